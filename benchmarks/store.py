"""The store's writer and reader against plain files, in one run: ratios, not absolute speeds.

Baselines: the same raw bytes written to one file in sequence, and random samples copied out of one `np.memmap`.
Data: real keys and values if a store is given, else random normal numbers in bfloat16 (which compress less).

Usage: python benchmarks/store.py [STORE]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from kava.store import (
    CODECS,
    KVGeometry,
    KVSample,
    KVStore,
    Manifest,
    ModelIdentity,
    Split,
    default_page_tokens,
)

SAMPLES, ROUNDS = 120, 3


def samples_of(path: str | None) -> tuple[KVGeometry, list[KVSample]]:
    """Real samples of a store, or random ones of SmolLM2's shape."""
    if path is not None:
        store = KVStore.open(path)
        return store.geometry, [store[i] for i in store.indices()[:SAMPLES]]
    geometry = KVGeometry(num_layers=30, num_key_value_heads=3, head_dim=64)
    rng = np.random.default_rng(0)
    made = []
    for number, tokens in enumerate(rng.integers(60, 400, SAMPLES).tolist()):
        keys, values = (torch.randn(tokens, *geometry.shape).to(torch.bfloat16) for _ in range(2))
        row = np.arange(tokens, dtype=np.int32)
        none = np.zeros((tokens, 2), np.int32)
        mask, segments = np.ones(tokens, np.bool_), np.zeros(tokens, np.uint8)
        made.append(KVSample(f"s{number}", Split.TRAIN, keys, values, row, row, none, segments, mask))
    return geometry, made


def best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few rounds."""
    times = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


def main(path: str | None) -> None:
    """Prints two rows per codec: as it is read by default, and without comparing checksums."""
    torch.set_num_threads(1)
    geometry, samples = samples_of(path)
    tensors = [(s.keys, s.values) for s in samples]
    raw = [t.view(torch.int16).numpy() for pair in tensors for t in pair if t is not None]
    size = sum(a.nbytes for a in raw)
    order = np.random.default_rng(1).permutation(len(samples)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)

        def plain_write() -> None:
            with (root / "raw.bin").open("wb") as file:
                for array in raw:
                    file.write(array.tobytes())

        write_base = best(plain_write)
        flat = np.memmap(root / "raw.bin", np.int16, mode="r")
        starts = np.concatenate([[0], np.cumsum([a.size for a in raw])])

        def plain_read() -> None:
            for i in order:
                np.array(flat[starts[2 * i] : starts[2 * i + 2]])

        read_base = best(plain_read)
        print(
            f"{len(samples)} samples, {size / 1e6:.0f} MB raw bfloat16, {geometry}; {'real' if path else 'random'} data"
        )
        print(
            f"{'codec':<12} {'disk/raw':>8} {'write/plain':>12} {'read/memmap':>12} {'samples/s':>10} {'files/GB':>9}"
        )
        for codec in CODECS:
            manifest = Manifest(
                kind="capture",
                geometry=geometry,
                dtype="bfloat16",
                codec=codec,
                page_tokens=default_page_tokens(geometry, 2),
                num_samples=len(samples),
                samples_per_part=len(samples),
                model=ModelIdentity(id="benchmark", compute_dtype="bfloat16"),
                tokenizer_digest="t",
                corpus_digest="c",
            )
            store = KVStore.create(root / codec, manifest)

            def write(store: KVStore = store) -> None:
                if store.committed_parts():
                    store.drop_part(0)
                with store.write_part(0) as writer:
                    for position, sample in enumerate(samples):
                        writer.append(position, sample)
                    writer.commit()

            def read(check: bool, path: Path = store.path) -> None:
                opened = KVStore.open(path, check=check)
                for i in order:
                    opened[i]

            def verify(path: Path = store.path) -> None:
                assert KVStore.open(path).verify() == []

            write_time, read_time = best(write), best(partial(read, True))
            files = sum(1 for p in (root / codec).rglob("*") if p.is_file())
            print(
                f"{codec:<12} {store.size_on_disk() / size:>8.3f} {write_base / write_time:>12.2f} "
                f"{read_base / read_time:>12.3f} {len(samples) / read_time:>10.0f} {files / (size / 1e9):>9.0f}"
            )
            unchecked, verified = best(partial(read, False)), best(verify)
            print(
                f"{'  unchecked':<33} {read_base / unchecked:>13.3f} {len(samples) / unchecked:>10.0f}   "
                f"checksums take {1 - unchecked / read_time:.0%} of reading; verify {size / 1e6 / verified:.0f} MB/s"
            )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
