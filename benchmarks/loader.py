"""Does a training wait for its targets, and how fast a GPU could they feed? The real trainer, and the loader alone.

Part one trains small students on a store that the page cache is not allowed to keep: while the training runs, a thread
tells the kernel every tenth of a second to drop the store's files (`posix_fadvise(DONTNEED)`), and what came from the
disk is counted (`/proc/self/io`). The baseline of each student is itself without a KV loss on the same batches.
Part two takes batches as fast as they come, in a warm cache: MB of decoded bfloat16 targets per second of wall and of
CPU time, against one thread that reads the same samples into one buffer, and against copying as many bytes.

Usage: python benchmarks/loader.py [GIGABYTES] [STEPS, 0 for the second part alone]
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import forget

from kava.hub import find_model, load_tokenizer, tokenizer_digest
from kava.store import (
    KVGeometry,
    KVSample,
    KVStore,
    Manifest,
    ModelIdentity,
    Split,
    default_page_tokens,
)
from kava.train import (
    StudentSettings,
    TargetCollator,
    TargetDataset,
    TrainSettings,
    make_student,
    train_student,
)
from kava.train.feed import TrainingRows
from kava.train.loader import Batches, ProcessLoader, ThreadedLoader
from kava.train.order import Order

STUDENTS = {
    "6 layers, 4 x 32, hidden 256": (KVGeometry(num_layers=6, num_key_value_heads=4, head_dim=32), 256),
    "4 layers, 8 x 64, hidden 16": (KVGeometry(num_layers=4, num_key_value_heads=8, head_dim=64), 16),
}
"""That of the demo, and one with as much KV for as little work as can be: what a faster machine would ask for."""
PER_PART, WARM = 64, 4


def student(folder: Path, geometry: KVGeometry, hidden: int) -> None:
    """A random student and a tokenizer of bytes."""
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": geometry.num_layers,
        "num_attention_heads": geometry.num_key_value_heads,
        "num_key_value_heads": geometry.num_key_value_heads,
        "head_dim": geometry.head_dim,
    }
    settings = StudentSettings.model_validate({"config": config, "tokenizer": {"vocab_size": 260}})
    make_student(settings, folder, ["a text"])


def write(path: Path, geometry: KVGeometry, gigabytes: float, codec: str, digest: str) -> KVStore:
    """Random targets; samples of 100 to 600 tokens."""
    rng = np.random.default_rng(0)
    per_token = geometry.bytes_per_token(2)
    lengths = rng.integers(100, 600, int(gigabytes * 1e9 / per_token / 350)).tolist()
    manifest = Manifest(
        kind="target",
        geometry=geometry,
        dtype="bfloat16",
        codec=codec,
        page_tokens=default_page_tokens(geometry, 2),
        num_samples=len(lengths),
        samples_per_part=PER_PART,
        model=ModelIdentity(id="benchmark", compute_dtype="bfloat16"),
        tokenizer_digest=digest,
        corpus_digest="c",
    )
    store = KVStore.create(path, manifest)
    noise = torch.randn(2, 700, *geometry.shape).to(torch.bfloat16)
    for part in store.missing_parts():
        with store.write_part(part) as writer:
            for position, index in enumerate(manifest.part_samples(part)):
                tokens, shift = lengths[index], index % 100
                row = np.arange(tokens, dtype=np.int32)
                keys, values = (side[shift : shift + tokens] for side in noise)
                made = KVSample(
                    sample_id=f"s{index}",
                    split=Split.TRAIN,
                    keys=keys,
                    values=values,
                    input_ids=rng.integers(0, 256, tokens).astype(np.int32),
                    positions=row,
                    spans=np.stack([row, row + 1], axis=1),
                    segments=np.ones(tokens, np.uint8),
                    mask=np.ones(tokens, np.bool_),
                )
                writer.append(position, made)
            writer.commit()
    os.sync()
    return KVStore.open(path)


@contextmanager
def uncached(path: Path) -> Iterator[None]:
    """While it is open, the kernel keeps little of the files below `path`."""
    stop = threading.Event()

    def drop() -> None:
        while True:
            forget(path)
            if stop.wait(0.1):
                return

    forget(path)
    thread = threading.Thread(target=drop)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def from_disk() -> int:
    """Bytes that this process has had read from a device so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in usage)


def trained(root: Path, name: str, folder: Path, store: KVStore, steps: int, **changes: Any) -> dict[str, Any]:
    """The last line of a training's log, over all steps but the first fifth."""
    settings = {
        "max_steps": steps,
        "batch_size": 2,
        "logging_steps": steps // 5,
        "measure_steps": 10**6,
        "collapse_threshold": 0,
        **changes,
    }
    before, begun = from_disk(), time.perf_counter()
    train_student(folder, store, root / name, TrainSettings.model_validate(settings))
    lines = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "data_wait_share" in line][1:]
    return {
        "wait": float(np.mean([line["data_wait_share"] for line in found])),
        "worst": max(line["data_wait_share"] for line in found),
        "tokens": float(np.mean([line["tokens_per_second"] for line in found])),
        "disk": (from_disk() - before) / (time.perf_counter() - begun),
    }


def part_one(root: Path, gigabytes: float, steps: int) -> None:
    """A table of trainings."""
    print(f"{steps} steps of about 700 tokens, torch with one thread; the store's files are kept out of the cache")
    columns = f"{'tokens/s':>9} {'targets MB/s':>13} {'disk MB/s':>10} {'wait':>7} {'worst':>7}"
    print(f"{'student':<30} {'arm':<22} {columns}")
    for number, (label, (geometry, hidden)) in enumerate(STUDENTS.items()):
        folder = root / f"student{number}"
        student(folder, geometry, hidden)
        digest = tokenizer_digest(load_tokenizer(find_model(str(folder))))
        store = write(root / f"targets{number}.zarr", geometry, gigabytes, "blosc-zstd", digest)
        arms: dict[str, dict[str, Any]] = {
            "no KV loss": {"alpha": 0},
            "1 thread": {"reader_threads": 1},
            "2 threads (default)": {},
            "2 threads, packed": {"pack_tokens": 700, "batch_size": 1},
            "1 process": {"num_workers": 1},
        }
        for arm, changes in arms.items():
            with uncached(store.path):
                found = trained(root / f"out{number}", arm.replace(" ", "-"), folder, store, steps, **changes)
            rate = 0 if "alpha" in changes else found["tokens"] * geometry.bytes_per_token(2) / 1e6
            print(
                f"{label:<30} {arm:<22} {found['tokens']:>9.0f} {rate:>13.1f} {found['disk'] / 1e6:>10.1f} "
                f"{found['wait']:>7.2%} {found['worst']:>7.2%}",
                flush=True,
            )


def part_two(root: Path, gigabytes: float) -> None:
    """A table of the loader alone."""
    geometry = KVGeometry(num_layers=22, num_key_value_heads=4, head_dim=64)  # TinyLlama-1.1B's.
    print()
    print(f"the loader alone, {geometry}, 2 rows packed to 1024 tokens a batch, warm cache; best of 3")
    print(f"{'codec':<11} {'reader':<32} {'MB/s':>7} {'MB/CPU s':>9} {'of one, CPU':>14}")
    for codec in ("none", "blosc-zstd"):
        store = write(root / f"alone-{codec}.zarr", geometry, gigabytes, codec, "t")
        dataset = TargetDataset(store, Split.TRAIN)
        order = Order(dataset.lengths, dataset.parts, seed=0, pack_tokens=1024)
        count = WARM + int(gigabytes * 2e9 / (geometry.bytes_per_token(2) * 2 * 1024))
        batches = Batches(dataset, TargetCollator(0, ("prompt",)), TrainingRows(order, 2, rank=0, ranks=1), count)
        size = geometry.bytes_per_token(2) * sum(
            dataset.lengths[item] for number in range(WARM, count) for row in batches.rows(number) for item in row
        )

        def one_buffer(dataset: TargetDataset = dataset, batches: Batches = batches) -> Iterator[None]:
            tensors = {n: torch.ones(600, *dataset.shape, dtype=dataset.dtype) for n in dataset.names}
            yield
            for number in range(WARM, len(batches)):
                for row in batches.rows(number):
                    for item in row:
                        dataset.read(item, {n: t[: dataset.lengths[item]] for n, t in tensors.items()})

        def loaded(make: Any, batches: Batches = batches) -> Iterator[None]:
            loader = make(batches)
            for _ in range(WARM):  # Memory that is used again is not made again: that is the training's state.
                loader.take(1)
            yield
            while loader.take(1):
                pass
            loader.close()

        def copied(size: int = size) -> Iterator[None]:
            one, two = (torch.ones(32 << 20, dtype=torch.uint8) for _ in range(2))
            yield
            for _ in range(size >> 25):
                one.copy_(two)

        threads = {n: partial(ThreadedLoader, threads=n, ahead=2, pin=False) for n in (1, 2, 3, 4)}
        readers: dict[str, Any] = {
            "copying as many bytes": copied,
            "one thread into one buffer": one_buffer,
            **{f"loader, {n} thread{'s' * (n > 1)}": partial(loaded, make) for n, make in threads.items()},
            "DataLoader, 1 process": partial(loaded, partial(ProcessLoader, workers=1)),
            "DataLoader, 2 processes": partial(loaded, partial(ProcessLoader, workers=2)),
        }
        best: dict[str, tuple[float, float]] = {}
        for _ in range(3):  # In turn, so that a neighbour on the machine disturbs all alike.
            for name, work in readers.items():
                begun = work()
                next(begun)
                wall, cpu = time.perf_counter(), cpu_seconds()
                next(begun, None)
                wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
                known = best.get(name, (wall, cpu))
                best[name] = min(known[0], wall), min(known[1], cpu)
        base = best["one thread into one buffer"][1]
        for name, (wall, cpu) in best.items():
            print(f"{codec:<11} {name:<32} {size / wall / 1e6:>7.0f} {size / cpu / 1e6:>9.0f} {base / cpu:>14.2f}")
        rate = size / min(cpu for name, (_, cpu) in best.items() if name.startswith("loader")) / 1e6
        print(f"{codec:<11} a GPU that eats 1300 MB/s keeps {1300 / rate:.2f} cores busy with decoding", flush=True)


def main(gigabytes: float, steps: int) -> None:
    """Both parts."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if steps:
            part_one(Path(folder), gigabytes, steps)
        part_two(Path(folder), min(gigabytes, 1.0))


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 2.0, int(sys.argv[2]) if len(sys.argv) > 2 else 60)
