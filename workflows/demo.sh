#!/usr/bin/env bash
# The whole story on two CPU cores: corpus, capture of a real teacher, targets, and the same student trained with and
# without them. Everything lies below runs/demo; a second call does only what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
recipe=workflows/demo.yaml

if [ ! -s runs/demo/corpus.jsonl ]; then
  python workflows/demo_corpus.py runs/demo/corpus.jsonl
fi
kava run "$recipe"
kava train "$recipe" -s train.name=plain -s train.alpha=0
echo
kava status "$recipe"
