"""Stores of many parts and many samples: opening, finding samples, and reading them in order and at random.

Keys and values are tiny, so that what is measured is the cost of parts and samples, not of numbers. Printed are CPU
seconds of this process and its peak memory; each question is asked of a store that was just opened.

Usage: OMP_NUM_THREADS=1 python benchmarks/many_parts.py [PARTS] [SAMPLES_PER_PART] [FOLDER]
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from kava.store import KVGeometry, KVSample, KVStore, Manifest, ModelIdentity, Split

GEOMETRY = KVGeometry(num_layers=2, num_key_value_heads=2, head_dim=16)
TOKENS = 15
READS = 2000
"""Samples that are read in order and at random."""


def manifest(parts: int, per_part: int) -> Manifest:
    """The manifest of a store of tiny samples."""
    return Manifest(
        kind="capture",
        geometry=GEOMETRY,
        dtype="bfloat16",
        codec="blosc-zstd",
        page_tokens=64,
        num_samples=parts * per_part,
        samples_per_part=per_part,
        model=ModelIdentity(id="random", compute_dtype="float32"),
        tokenizer_digest="t",
        corpus_digest="c",
    )


def write(store: KVStore) -> None:
    """Write all parts; only the ids of the samples differ."""
    kv = torch.randn((2, TOKENS, *GEOMETRY.shape), generator=torch.Generator().manual_seed(0)).bfloat16()
    stops = np.arange(1, TOKENS + 1, dtype=np.int32)
    tokens = (
        stops,
        stops - 1,
        np.stack([stops - 1, stops], 1),
        np.full(TOKENS, 1, np.uint8),
        np.ones(TOKENS, np.bool_),
    )
    for part in store.missing_parts():
        with store.write_part(part) as writer:
            for position, index in enumerate(store.manifest.part_samples(part)):
                writer.append(position, KVSample(f"sample-{index:08d}", Split.TRAIN, kv[0], kv[1], *tokens))
            writer.commit()


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of some work."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def read_all(store: KVStore, reader: Callable[[KVStore, int], object], order: list[int]) -> None:
    """Read these samples."""
    for index in order:
        reader(store, index)


def ask(question: Callable[[KVStore], object], path: Path) -> None:
    """Ask a store that is opened for it."""
    question(KVStore.open(path))


def megabytes() -> float:
    """Peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Write the store if it does not exist, then ask."""
    parts = int(sys.argv[1]) if len(sys.argv) > 1 else 1154
    per_part = int(sys.argv[2]) if len(sys.argv) > 2 else 130
    folder = Path(sys.argv[3]) if len(sys.argv) > 3 else Path(tempfile.mkdtemp(prefix="kava-many-"))
    path, before = folder / "many.zarr", megabytes()
    store = KVStore.create(path, manifest(parts, per_part))
    print(f"{parts} parts of {per_part} samples of {TOKENS} tokens")
    print(f"{'write, ms a part':<34} {1000 * seconds(lambda: write(store)) / parts:>10.2f}")
    generator = np.random.default_rng(0)
    orders = {"in order": list(range(READS)), "at random": generator.integers(0, len(store), READS).tolist()}
    room = np.zeros((64, *GEOMETRY.shape), "<u2")
    readers: dict[str, Callable[[KVStore, int], object]] = {
        "sample": lambda opened, index: opened[index],
        "read_into": lambda opened, index: opened.read_into(index, keys=room, values=room),
    }
    found = {}
    for name, order in orders.items():
        for what, reader in readers.items():
            found[name] = seconds(partial(read_all, KVStore.open(path), reader, order))
            print(f"{f'{what}, {name}, ms':<34} {1000 * found[name] / READS:>10.3f}")
    print(f"{'read_into, at random / in order':<34} {found['at random'] / found['in order']:>10.2f}")
    questions: dict[str, Callable[[KVStore], object]] = {
        "open and lengths, s": lambda opened: opened.lengths,
        "indices, s": lambda opened: opened.indices(),
        "indices_of, s": lambda opened: opened.indices_of(["sample-00000077", "no such"]),
        "statistics, s": lambda opened: opened.statistics(),
        "check_files, s": lambda opened: opened.check_files(),
    }
    for name, question in questions.items():
        print(f"{name:<34} {seconds(partial(ask, question, path)):>10.3f}")
    print(f"{'memory over that at the start, MB':<34} {megabytes() - before:>10.0f}")


if __name__ == "__main__":
    main()
