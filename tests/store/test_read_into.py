"""Reading into arrays that are there already, and some layers only; zarr-python is the oracle."""

from __future__ import annotations

import multiprocessing
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from fixtures.stores import GEOMETRY, flip, read_open, sample, write_store
from hypothesis import given, settings
from hypothesis import strategies as st

from kava.errors import DamagedStoreError, SampleFailedError, StoreError, StoreNotFoundError
from kava.store import CODECS, DTYPES, LOSSY, KVStore

LENGTHS = [3, 4, 9, 1, 6, 12, 5]
ROOM = 20


def by_zarr(store: KVStore, index: int, name: str) -> np.ndarray[Any, Any]:
    """`keys` or `values` of a sample, from what zarr-python reads; a lossy codec's formula in NumPy, row by row."""
    number, position = divmod(index, store.manifest.samples_per_part)
    group = zarr.open_group(store.path / f"parts/{number:05d}", mode="r", zarr_format=3)
    start, length = (int(np.asarray(group[array])[position]) for array in ("start", "length"))
    dtype, page = store.dtype, store.manifest.page_tokens
    if store.manifest.codec not in LOSSY:
        return np.asarray(group[name])[start : start + length]
    codes, scale, low, exact = (np.asarray(group[f"{name}_{what}"]) for what in ("q", "scale", "min", "exact"))
    if store.manifest.codec == "int4":
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1)
    first = min(4, page)
    out = np.empty((length, *GEOMETRY.shape), np.float32)
    for token in range(length):
        row = start + token
        at = row // page if name == "keys" else row
        steps, lows = (dtype.to_float32(a[at].copy()).reshape(*GEOMETRY.shape[:2], -1) for a in (scale, low))
        out[token] = codes[row] * steps + lows
        if token < first:
            out[token] = dtype.to_float32(exact[row // page * first + token].copy())
    return dtype.to_numpy(torch.from_numpy(out))


@given(
    codec=st.sampled_from([*CODECS, *LOSSY]),
    dtype=st.sampled_from(list(DTYPES)),
    page=st.sampled_from([1, 4, 8]),
    lengths=st.lists(st.integers(1, 19), min_size=1, max_size=4),
    layers=st.none() | st.lists(st.integers(0, 2), min_size=1, max_size=4),
    strided=st.booleans(),
    check=st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_the_same_bits_as_zarr_reads(
    codec: str, dtype: str, page: int, lengths: list[int], layers: list[int] | None, strided: bool, check: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        written, _ = write_store(Path(folder) / "s.zarr", lengths, codec=codec, dtype=dtype, page_tokens=page)
        store = KVStore.open(written.path, check=check)
        count = GEOMETRY.num_layers if layers is None else len(layers)
        room = np.full((ROOM, 2 if strided else 1, count, *GEOMETRY.shape[1:]), 7, store.dtype.numpy)
        for index, length in enumerate(lengths):
            room[:] = 7
            for name in ("keys", "values"):
                wanted = by_zarr(store, index, name)
                wanted = wanted if layers is None else wanted[:, layers]
                assert store.read_into(index, **{name: room[:, 0]}, layers=layers) == length
                assert room[:length, 0].tobytes() == wanted.tobytes()
                assert (room[length:] == 7).all()
                if strided:
                    assert (room[:, 1] == 7).all()
                read = getattr(store.sample(index, layers=layers), name)
                assert store.dtype.to_numpy(read).tobytes() == wanted.tobytes()
        batch = store.batch(range(len(lengths)), layers=layers)
        assert batch.keys is not None
        assert batch.keys.shape == (len(lengths), max(lengths), count, *GEOMETRY.shape[1:])


def test_a_tensor_shares_its_memory(tmp_path: Path) -> None:
    store, samples = write_store(tmp_path / "s.zarr", LENGTHS)
    pinned = torch.zeros((12, *GEOMETRY.shape), dtype=torch.bfloat16)
    assert store.read_into(2, values=store.dtype.to_numpy(pinned)) == 9
    assert samples[2].values is not None
    assert torch.equal(pinned[:9], samples[2].values.bfloat16())
    assert store.read_into(-5) == 9


@pytest.mark.parametrize(
    ("shape", "dtype", "layers", "message"),
    [
        ((8, 3, 2, 8), "<u2", None, r"keys of sample 'sample-2' are <u2 \(9, 3, 2, 8\), .* uint16 \(8, 3, 2, 8\)"),
        ((9, 3, 2, 8), "<u2", [0], r"\(9, 1, 2, 8\)"),
        ((9, 3, 2, 8), "<f4", None, "room for float32"),
        ((9, 1, 2, 8), "<u2", [3], r"has the layers 0 to 2, asked for \[3\]"),
        ((9, 1, 2, 8), "<u2", [-1], r"asked for \[-1\]"),
        ((9, 0, 2, 8), "<u2", [], r"asked for \[\]"),
    ],
)
def test_room_and_layers_must_fit(
    tmp_path: Path, shape: tuple[int, ...], dtype: str, layers: list[int] | None, message: str
) -> None:
    store, _ = write_store(tmp_path / "s.zarr", LENGTHS)
    room = np.zeros(shape, dtype)
    with pytest.raises(StoreError, match=message):
        store.read_into(2, keys=room, layers=layers)
    assert not room.any()


def test_what_is_not_there_is_not_read(tmp_path: Path) -> None:
    store, samples = write_store(tmp_path / "s.zarr", LENGTHS, samples_per_part=2)
    room = np.zeros((ROOM, *GEOMETRY.shape), "<u2")
    store.drop_part(0)
    with store.write_part(0) as writer:
        writer.fail(0, "sample-0", samples[0].split, "too long")
        writer.append(1, samples[1])
        writer.commit()
    for arrays in ({}, {"keys": room}):
        with pytest.raises(SampleFailedError, match="too long"):
            store.read_into(0, **arrays)
        with pytest.raises(IndexError, match="sample 7 of 7"):
            store.read_into(7, **arrays)
    part = store.part(0)
    assert part.read_into("keys", 1, room.copy()) == 4
    store.drop_part(0)
    with pytest.raises(StoreError, match="written again since"):
        part.read_into("keys", 1, room)
    with pytest.raises(StoreNotFoundError, match="part 0 is not written yet"):
        store.read_into(1, keys=room)
    assert not room.any()


@pytest.mark.parametrize("codec", [*CODECS, *LOSSY])
def test_damage_is_named_as_by_reading_a_sample(tmp_path: Path, codec: str) -> None:
    store, _ = write_store(tmp_path / "s.zarr", LENGTHS, codec=codec)
    name = "keys" if codec in CODECS else "keys_q"
    pages = store.part(0).pages[name]
    offset, nbytes = pages.offset(3), int(pages.table.nbytes[3])  # The middle page of sample 2.
    flip(store.path / f"parts/00000/{name}/c/0/0/0/0", offset + nbytes // 2)
    said = []
    reads: list[Callable[[KVStore], object]] = [
        lambda s: s.sample(2),
        lambda s: s.sample(2, layers=[1]),
        lambda s: s.read_into(2, keys=np.empty((9, *GEOMETRY.shape), "<u2")),
        lambda s: s.read_into(2, keys=np.empty((9, 1, 2, 8), "<u2"), layers=[1]),
        lambda s: s.read_into(2, keys=np.empty((9, 2, *GEOMETRY.shape), "<u2")[:, 0]),
    ]
    for read in reads:
        with pytest.raises(DamagedStoreError, match=f"{name}/c/0/0/0/0: chunk 3: checksum mismatch") as found:
            read(KVStore.open(store.path))
        said.append(str(found.value))
    assert len(set(said)) == 1
    opened = KVStore.open(store.path)
    assert opened.read_into(2, values=np.empty((9, *GEOMETRY.shape), "<u2")) == 9


def test_threads_share_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With so few parts kept open, threads open and forget the same ones all the time."""
    monkeypatch.setattr("kava.store.open_parts.OPEN_BYTES", 40_000)  # Two
    store, samples = write_store(tmp_path / "s.zarr", LENGTHS * 3, samples_per_part=2)
    wanted = [store.dtype.to_numpy(s.keys).tobytes() for s in samples if s.keys is not None]
    begun = threading.Barrier(4)

    def work(seed: int) -> int:
        room = np.empty((ROOM, *GEOMETRY.shape), "<u2")
        begun.wait()
        for index in np.random.default_rng(seed).integers(0, len(store), 150).tolist():
            assert room[: store.read_into(index, keys=room)].tobytes() == wanted[index]
        return seed

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [0, 1, 2, 3]
    assert len(store._parts) == 2


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_process_forked_off_while_threads_read(tmp_path: Path) -> None:
    store, _ = write_store(tmp_path / "s.zarr", LENGTHS)
    context, done = multiprocessing.get_context("fork"), threading.Event()

    def work() -> None:
        while not done.is_set():
            store.part(0)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            queue = context.SimpleQueue()
            child = context.Process(target=read_open, args=(store, queue), daemon=True)
            child.start()
            child.join(60)
            assert child.exitcode == 0
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_a_spawned_process_opens_parts_itself(tmp_path: Path) -> None:
    store, samples = write_store(tmp_path / "s.zarr", LENGTHS)
    wanted = sample(2, 9).keys
    assert wanted is not None
    store[2]
    assert len(store.__getstate__()["_parts"]) == 0
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    child = context.Process(target=read_open, args=(store, queue))
    child.start()
    child.join(120)
    assert queue.get() == float(wanted.bfloat16().float().sum())
    assert samples[2].sample_id == "sample-2"
