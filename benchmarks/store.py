"""The store on real keys and values: size, reading, writing, threads, a cold disk and memory, each beside its aim.

SmolLM2-135M reads items of GSM8K (its `train.jsonl`; without one, the demo corpus) in bfloat16. Baselines, measured in
the same run on the same bytes, interleaved:

- memmap: samples in random order, copied out of one `np.memmap` into a buffer that is used again;
- plain: the same arrays written to one file in sequence, and flushed as a part is;
- bare: Blosc alone on pages in memory, decoding into one page and encoding from it;
- zarr: the same samples read by zarr-python out of the same part;
- disk: one file read in sequence with O_DIRECT.

Throughput is in MB of raw bfloat16. Ratios are of CPU time, which other work on the machine disturbs least, but for
those that are about waiting: threads, a cold disk, and writing against plain writing are by the clock as well.

Usage: OMP_NUM_THREADS=1 python benchmarks/store.py [train.jsonl] [SAMPLES] [ROUNDS] [QUESTION,...]
"""

from __future__ import annotations

import math
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from measure import MODEL, captured, fastest, forget, peak, under_codec
from numcodecs import blosc

from kava.pipeline.parts import BYTES_PER_TOKEN, PART_BYTES
from kava.store import CODECS, LOSSY, BackgroundWriter, KVSample, KVStore
from kava.store.shard import shard_index

ZARR_SAMPLES = 24
THREADS = (1, 2, 4)
PASSES = 5
"""How often threads read all samples: once takes milliseconds, in which a thread's start would count."""
PART_TIMES = 4
"""How often a written part holds all samples, so that it is nearer to one of the default size."""


@dataclass
class Aims:
    """What was measured beside what it should be."""

    rows: list[tuple[str, float, str, float]] = field(default_factory=list)

    def at_least(self, what: str, found: float, aim: float) -> None:
        """A number that should be this or more."""
        self.rows.append((what, found, ">=", aim))

    def at_most(self, what: str, found: float, aim: float) -> None:
        """A number that should be this or less."""
        self.rows.append((what, found, "<=", aim))

    def show(self) -> None:
        """Prints them all."""
        print(f"\n{'':<66} {'found':>8} {'aim':>11}")
        for what, found, sign, aim in self.rows:
            met = found >= aim if sign == ">=" else found <= aim
            print(f"{what:<66} {found:>8.3f} {sign} {aim:>8.3f} {'' if met else '  not met'}")


class Room:
    """A buffer for the longest sample, used again for every one."""

    def __init__(self, store: KVStore) -> None:
        shape = (int(store.part(0).lengths.max()), *store.geometry.shape)
        self.keys, self.values = (np.zeros(shape, store.dtype.numpy) for _ in range(2))

    def read(self, store: KVStore, order: list[int]) -> None:
        """Reads these samples."""
        for index in order:
            store.read_into(index, keys=self.keys, values=self.values)

    def copy(self, flat: np.ndarray[Any, Any], starts: list[int], order: list[int]) -> None:
        """Copies them out of one flat array, in which the keys of each lie before its values."""
        for index in order:
            half = (starts[index + 1] - starts[index]) // 2
            for offset, room in ((0, self.keys), (half, self.values)):
                first = starts[index] + offset
                np.copyto(room.reshape(-1)[:half], flat[first : first + half])


def interleaved(
    arms: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Seconds of the fastest round of each."""
    found = dict.fromkeys(arms, float("inf"))
    for _ in range(rounds):
        for name, work in arms.items():
            found[name] = min(found[name], fastest(work, 1, clock))
    return found


def chunks(store: KVStore) -> list[bytes]:
    """The compressed pages of keys and values, without their checksums."""
    found = []
    for name in ("keys", "values"):
        reader = store.part(0).pages[name]
        for shard in range(-(-reader.num_pages // reader.array.pages_per_shard)):
            data = Path(reader.path(shard)).read_bytes()
            entries = shard_index(reader.array, reader.table, shard).tolist()
            found += [data[offset : offset + nbytes - 4] for offset, nbytes in entries if offset < len(data)]
    return found


def by_zarr(store: KVStore, order: list[int]) -> None:
    """Reads samples without kava."""
    part = store.part(0)
    group = zarr.open_group(part.path, mode="r", zarr_format=3)
    arrays: list[Any] = [group[name] for name in ("keys", "values")]
    for index in order:
        start, length = int(part.starts[index]), int(part.lengths[index])
        for array in arrays:
            array[start : start + length]


def flat_copy(exact: KVStore, root: Path) -> tuple[np.ndarray[Any, Any], list[int]]:
    """All samples in one memory map, and where each begins."""
    row = 2 * int(np.prod(exact.geometry.shape))
    starts = [0, *(np.cumsum(exact.part(0).lengths, dtype=np.int64) * row).tolist()]
    return np.memmap(root / "raw.bin", exact.dtype.numpy, mode="r"), starts


def plain_write(path: Path, arrays: list[np.ndarray[Any, Any]]) -> None:
    """One file, in sequence, flushed."""
    with path.open("wb") as file:
        for array in arrays:
            file.write(array.data)
        file.flush()
        os.fsync(file.fileno())


def write(root: Path, like: KVStore, samples: list[KVSample], encoders: int = 0) -> None:
    """One part, as the capture writes it; in a folder of its own, as removing one takes time too."""
    changes = {"num_samples": len(samples), "samples_per_part": len(samples)}
    manifest = like.manifest.model_copy(update=changes)
    store = KVStore.create(Path(tempfile.mkdtemp(dir=root)) / "s.zarr", manifest)
    with BackgroundWriter(store, encoders=encoders) as writer:
        writer.begin(0)
        for position, sample in enumerate(samples):
            writer.append(position, sample)
        writer.commit()


def reading(stores: dict[str, KVStore], raw: int, root: Path, rounds: int, aims: Aims) -> None:
    """Warm reads at random."""
    exact = stores["none"]
    order = np.random.default_rng(0).permutation(len(exact)).tolist()
    some = order[:ZARR_SAMPLES]
    share = float(exact.part(0).lengths[some].sum() / exact.num_tokens)
    (flat, starts), room = flat_copy(exact, root), Room(exact)
    pages, page = chunks(stores["blosc-zstd"]), np.empty(exact.part(0).pages["keys"].array.page_shape, np.uint16)
    arms: dict[str, Callable[[], object]] = {"memmap": partial(room.copy, flat, starts, order)}
    arms["bare"] = lambda: [blosc.decompress(chunk, page) for chunk in pages]
    for codec, store in stores.items():
        arms[codec] = partial(room.read, store, order)
        arms[f"{codec} unchecked"] = partial(room.read, KVStore.open(store.path, check=False), order)
        if codec in CODECS:
            arms[f"{codec} zarr"] = partial(by_zarr, store, some)
    took = interleaved(arms, rounds)
    print(
        f"\nwarm, at random, into a buffer that is used again: memmap {raw / took['memmap'] / 1e6:.0f} MB/s, ", end=""
    )
    print(f"bare decode {raw / took['bare'] / 1e6:.0f} MB/s; CPU time")
    print(f"{'codec':<12} {'MB/s':>7} {'samples/s':>10} {'/memmap':>8} {'unchecked':>10} {'/zarr':>7} {'/bare':>7}")
    for codec in stores:
        seconds = took[codec]
        zarrs = f"{took[f'{codec} zarr'] / share / seconds:7.2f}" if codec in CODECS else f"{'':>7}"
        bare = f"{took['bare'] / seconds:7.2f}" if codec == "blosc-zstd" else ""
        print(
            f"{codec:<12} {raw / seconds / 1e6:>7.0f} {len(order) / seconds:>10.0f} {took['memmap'] / seconds:>8.3f} "
            f"{took['memmap'] / took[f'{codec} unchecked']:>10.3f} {zarrs} {bare}"
        )
    aims.at_least("read, none, checksums compared / memmap copy", took["memmap"] / took["none"], 0.5)
    lossless = took["blosc-zstd"]
    aims.at_least("read, blosc-zstd / zarr-python", took["blosc-zstd zarr"] / share / lossless, 2.5)
    aims.at_least("read, blosc-zstd / bare decode", took["bare"] / lossless, 0.8)


def threads(stores: dict[str, KVStore], raw: int, root: Path, rounds: int, aims: Aims) -> None:
    """The same by several threads of one process, by the clock; beside it, what the machine gives to two threads.

    For work, that is Blosc encoding a page; for the memory that all share, a copy out of the memory map.
    """
    flat, starts = flat_copy(stores["none"], root)
    page = np.zeros((64, 30, 3, 64), np.uint16)
    spin = partial(blosc.compress, page, b"zstd", 1, blosc.SHUFFLE, 1 << 20)

    def together(count: int, work: Callable[[int], object]) -> None:
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(work, range(count)))

    arms: dict[str, Callable[[], object]] = {}
    for count in THREADS:
        arms[f"bare {count}"] = partial(together, count, lambda n, c=count: [spin() for _ in range(200 // c)])  # type: ignore[misc]
        order = np.tile(np.random.default_rng(1).permutation(len(stores["none"])), PASSES)
        rooms, mine = [Room(stores["none"]) for _ in range(count)], [order[n::count].tolist() for n in range(count)]
        arms[f"memmap {count}"] = partial(together, count, lambda n, r=rooms, m=mine: r[n].copy(flat, starts, m[n]))  # type: ignore[misc]
        for codec, store in stores.items():
            arms[f"{codec} {count}"] = partial(together, count, lambda n, s=store, r=rooms, m=mine: r[n].read(s, m[n]))  # type: ignore[misc]
    took = interleaved(arms, rounds, time.perf_counter)
    print(f"\nthreads, by the clock: MB/s of {', '.join(map(str, THREADS))}, and times as fast as one")
    for name in ("bare", "memmap", *stores):
        speeds = [PASSES * raw / took[f"{name} {n}"] / 1e6 for n in THREADS]
        shown = "" if name == "bare" else " ".join(f"{speed:>7.0f}" for speed in speeds)
        print(f"{name:<12} {shown:<24} {' '.join(f'{speed / speeds[0]:>6.2f}' for speed in speeds)}")
    gains = {name: took[f"{name} 1"] / took[f"{name} 2"] for name in ("bare", "memmap", "none", "blosc-zstd")}
    if gains["bare"] < 1.5:
        print(f"no second core was free: two threads of Blosc alone are {gains['bare']:.2f} times as fast as one")
        return
    aims.at_least("two threads read none: their gain / that of memmap", gains["none"] / gains["memmap"], 0.9)
    aims.at_least("two threads read blosc-zstd: gain / that of Blosc alone", gains["blosc-zstd"] / gains["bare"], 0.9)


def cold(stores: dict[str, KVStore], raw: int, root: Path, rounds: int, aims: Aims) -> None:
    """Reads at random of files that no memory holds, against the disk."""

    def direct() -> None:
        file = os.open(root / "raw.bin", os.O_RDONLY | os.O_DIRECT)
        with mmap.mmap(-1, 8 << 20) as block:
            offset = 0
            while got := os.preadv(file, [block], offset):
                offset += got
        os.close(file)

    def read(store: KVStore, count: int) -> None:
        order, rooms = np.random.default_rng(2).permutation(len(store)), [Room(store) for _ in range(count)]
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(lambda n: rooms[n].read(store, order[n::count].tolist()), range(count)))

    found: dict[tuple[str, int], float] = {}
    for _ in range(rounds):
        forget(root / "raw.bin")
        found["disk", 1] = min(found.get(("disk", 1), 9e9), fastest(direct, 1, time.perf_counter))
        for codec, store in stores.items():
            for count in (1, 2):
                opened = KVStore.open(store.path)
                opened.part(0).sample(0)
                forget(store.path)
                taken = fastest(partial(read, opened, count), 1, time.perf_counter)
                found[codec, count] = min(found.get((codec, count), 9e9), taken)
    print(f"\ncold, at random, by the clock: the disk in sequence {raw / found['disk', 1] / 1e6:.0f} MB/s")
    print(f"{'codec':<12} {'1 thread':>9} {'/disk':>6} {'2 threads':>10} {'/disk':>6}")
    for codec in stores:
        cells = [(raw / found[codec, n] / 1e6, found["disk", 1] / found[codec, n]) for n in (1, 2)]
        print(f"{codec:<12} {cells[0][0]:>9.0f} {cells[0][1]:>6.2f} {cells[1][0]:>10.0f} {cells[1][1]:>6.2f}")
        if codec in CODECS:
            aims.at_least(f"cold read, {codec} / disk, best of 1 and 2 threads", max(c[1] for c in cells), 0.9)


def writing(stores: dict[str, KVStore], raw: int, root: Path, rounds: int, aims: Aims) -> None:
    """Parts against a plain file and against encoding alone."""
    exact, raw = stores["none"], PART_TIMES * raw
    samples = PART_TIMES * [exact[index] for index in range(len(exact))]
    arrays = [exact.dtype.to_numpy(t) for s in samples for t in (s.keys, s.values) if t is not None]
    shape = exact.part(0).pages["keys"].array.page_shape
    pages = [np.zeros(shape, np.uint16) for _ in range(sum(-(-len(a) // shape[0]) for a in arrays))]
    pieces = (a[first : first + shape[0]] for a in arrays for first in range(0, len(a), shape[0]))
    for page, piece in zip(pages, pieces, strict=True):
        page[: len(piece)] = piece
    (root / "written").mkdir()
    arms: dict[str, Callable[[], object]] = {
        "plain": partial(plain_write, root / "written/plain.bin", arrays),
        "bare": lambda: [blosc.compress(page, b"zstd", 1, blosc.SHUFFLE, 1 << 20) for page in pages],
        **{codec: partial(write, root / "written", store, samples) for codec, store in stores.items()},
        **{f"{codec} threads": partial(write, root / "written", s, samples, 2) for codec, s in stores.items()},
    }
    cpu, clock = dict.fromkeys(arms, float("inf")), dict.fromkeys(arms, float("inf"))
    for _ in range(rounds):
        for name, work in arms.items():
            begun = time.process_time()
            clock[name] = min(clock[name], fastest(work, 1, time.perf_counter))
            cpu[name] = min(cpu[name], time.process_time() - begun)
            shutil.rmtree(root / "written")
            (root / "written").mkdir()
    print(f"\nwriting a part: plain {raw / clock['plain'] / 1e6:.0f} MB/s by the clock, ", end="")
    print(f"{raw / cpu['plain'] / 1e6:.0f} by CPU; bare encode {raw / cpu['bare'] / 1e6:.0f} by CPU")
    print(
        f"{'codec':<12} {'CPU MB/s':>9} {'/bare':>6} {'clock MB/s':>11} {'/plain':>7} {'2 encoders':>11} {'/plain':>7}"
    )
    for codec in stores:
        alone, helped = clock[codec], clock[f"{codec} threads"]
        print(
            f"{codec:<12} {raw / cpu[codec] / 1e6:>9.0f} {cpu['bare'] / cpu[codec]:>6.2f} {raw / alone / 1e6:>11.0f} "
            f"{clock['plain'] / alone:>7.2f} {raw / helped / 1e6:>11.0f} {clock['plain'] / helped:>7.2f}"
        )
    aims.at_least("write, blosc-zstd / bare encode", cpu["bare"] / cpu["blosc-zstd"], 0.7)
    best = min(clock["none"], clock["none threads"])
    aims.at_least("write, none / plain file, by the clock", clock["plain"] / best, 1.0)


def memory(stores: dict[str, KVStore], aims: Aims) -> None:
    """Peak resident memory above the start, each in a process of its own: of a reader, of writers of two sizes."""
    for codec in ("none", "blosc-zstd"):
        words = [sys.executable, __file__, "--memory", str(stores["none"].path), str(stores[codec].path)]
        read, small, large = (
            float(subprocess.run([*words, factor], check=True, capture_output=True).stdout)
            for factor in ("0", "4", "64")
        )
        print(f"{codec:<12} reader +{read:.1f} MB, writer +{small:.1f}, of a part sixteen times as large +{large:.1f}")
        aims.at_most(f"memory, writer of 16 times the part, {codec}: MB more", large - small, 16)


def grown(exact: str, path: str, factor: str) -> None:
    """Prints how far memory grew: reading a store, or writing a quarter of its samples so many times to one part."""
    torch.set_num_threads(1)
    store = KVStore.open(path)
    if factor == "0":
        room, order = Room(store), list(range(len(store)))
        store.read_into(0, keys=room.keys)
        with peak() as found:
            room.read(store, order)
    else:
        source = KVStore.open(exact)
        many = [source[index] for index in range(len(source) // 4)] * int(factor)
        with tempfile.TemporaryDirectory(dir=store.path.parent) as folder, peak() as found:
            write(Path(folder), store, many, 2)
    print(found[0])


def sizes(stores: dict[str, KVStore], raw: int, aims: Aims) -> None:
    """Bytes and files."""
    exact = stores["none"].part(0)
    text = sum(int(exact.sample(position, keys=False, values=False).spans.max()) for position in range(len(exact)))
    tokens = int(exact.lengths.sum())
    part_bytes = PART_BYTES * BYTES_PER_TOKEN / (text / tokens)  # Corpora are cut by the length of their texts.
    print(f"\nfiles of a part of the default size: of these texts, {part_bytes / 1e9:.2f} GB raw")
    print(f"{'codec':<12} {'B/token':>8} {'of bf16':>8} {'files/GB':>9}")
    for codec, store in stores.items():
        part, size = store.part(0), store.size_on_disk()
        small = [name for name in part.table["files"] if "/c/" not in name or name.split("/")[0] not in part.pages]
        pages = {name: reader.num_pages * part_bytes / raw for name, reader in part.pages.items()}
        shards = sum(math.ceil(n / part.pages[name].array.pages_per_shard) for name, n in pages.items())
        per_gb = (len(small) + 1 + shards) / (part_bytes / 1e9)
        print(f"{codec:<12} {size / tokens:>8.0f} {size / raw:>8.3f} {per_gb:>9.1f}")
        aims.at_most(f"files per raw GB of a part of the default size, {codec}", per_gb, 25)
        if codec == "blosc-zstd":
            aims.at_most("size, blosc-zstd / bf16", size / raw, 0.71)


def main(corpus: str = "", samples: str = "100", rounds: str = "5", questions: str = "") -> None:
    """Prints a table for each question, all or some of them (`reading,cold`), and then the aims."""
    torch.set_num_threads(1)
    path = Path(corpus) if corpus else None
    with tempfile.TemporaryDirectory() as folder:
        root, aims = Path(folder), Aims()
        exact = captured(root, int(samples), path)
        stores = {codec: under_codec(exact, codec) for codec in [*CODECS, *LOSSY]}
        raw = exact.num_tokens * exact.geometry.bytes_per_token(2)
        with (root / "raw.bin").open("wb") as file:
            for sample in exact:
                for tensor in (sample.keys, sample.values):
                    assert tensor is not None
                    file.write(exact.dtype.to_numpy(tensor).data)
            os.fsync(file.fileno())
        print(
            f"{MODEL}, {len(exact)} items of {path.name if path else 'the demo corpus'}, {exact.num_tokens} tokens, ",
            end="",
        )
        print(
            f"{exact.geometry}, {raw / 1e6:.0f} MB raw, pages of {exact.manifest.page_tokens} tokens; {rounds} rounds"
        )
        asked = {
            "sizes": lambda: sizes(stores, raw, aims),
            "reading": lambda: reading(stores, raw, root, int(rounds), aims),
            "threads": lambda: threads(stores, raw, root, int(rounds), aims),
            "cold": lambda: cold(stores, raw, root, int(rounds), aims),
            "writing": lambda: writing(stores, raw, root, int(rounds), aims),
            "memory": lambda: memory(stores, aims),
        }
        for name in questions.split(",") if questions else asked:
            asked[name]()
        aims.show()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        grown(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
