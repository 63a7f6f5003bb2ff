"""Random damage to a small store: whatever changes a number is found and named, and nothing ends in a traceback."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.stores import overwrite, write_store
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kava.errors import KavaError
from kava.store import ExtraArray, KVGeometry, KVStore
from kava.store.fingerprint import digest_json

LENGTHS = [3, 5, 2, 4]
TINY = KVGeometry(num_layers=2, num_key_value_heads=1, head_dim=2)
EXTRAS = {
    "importance": ExtraArray(axis="row", dtype="float32", shape=(2, 1)),
    "nats": ExtraArray(axis="sample", dtype="float64"),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shape: dict[str, Any] = {"geometry": TINY, "samples_per_part": 2, "extras": EXTRAS}
    store: KVStore = write_store(tmp_path / "s.zarr", LENGTHS, **shape)[0]
    store.drop_part(1)
    with store.write_part(1) as writer:
        writer.append(0, write_store(tmp_path / "o.zarr", LENGTHS, **shape)[1][2])
        writer.fail(1, "sample-3", store.part(0).sample(0).split, "too long")
        writer.commit({"parent": "p"}, written_by="hf 1")
    return store.path


def everything(path: Path, part: int | None = None) -> dict[Any, bytes]:
    """Every number that a reader can get, as bytes, of the whole store or of one part; what is refused is left out."""
    found: dict[Any, bytes] = {}
    told = partial(contextlib.suppress, KavaError)
    with told():
        store = KVStore.open(path)
        for index in range(len(store)) if part is None else store.manifest.part_samples(part):
            with told():
                sample = store[index]
                for name in ("input_ids", "positions", "spans", "segments", "mask"):
                    found[index, name] = getattr(sample, name).tobytes()
                for name in ("keys", "values"):
                    found[index, name] = getattr(sample, name).view(store.dtype.torch_dtype).float().numpy().tobytes()
                found |= {(index, name): array.tobytes() for name, array in sample.extras.items()}
                found[index, "id"] = f"{sample.sample_id} {sample.split}".encode()
        for number in store.committed_parts() if part is None else [part]:
            with told():
                found["sources", number] = repr((store.part(number).sources, store.part(number).written_by)).encode()
        if part is not None:
            return found
        for name in ("statistics", "failed", "indices", "num_tokens", "lengths"):
            with told():
                value = getattr(store, name)
                found["store", name] = repr(value() if callable(value) else value).encode()
        with told():
            found["store", "nats"] = store.per_sample("nats").tobytes()
        with told():
            found["store", "manifest"] = repr(store.manifest.model_dump(exclude={"versions"})).encode()
    return found


def damages(path: Path) -> int:
    try:
        return len(KVStore.open(path).verify())
    except KavaError:
        return 1


def check_flips(root: Path, rng: np.random.Generator, count: int) -> dict[str, int]:
    """Flips `count` random bytes, one after the other, each to a random other value."""
    good = everything(root)
    by_part = {part: everything(root, part) for part in range(2)}
    files = sorted(p for p in root.rglob("*") if p.is_file())
    sizes = np.array([p.stat().st_size for p in files])
    tally = {"found": 0, "on reading": 0, "harmless": 0}
    for _ in range(count):
        # Half the flips anywhere, half spread over the files: the small ones are the interesting ones.
        share = sizes / sizes.sum() if rng.random() < 0.5 else np.full(len(files), 1 / len(files))
        path = files[int(rng.choice(len(files), p=share))]
        data = path.read_bytes()
        at = int(rng.integers(len(data)))
        byte = (data[at] + int(rng.integers(1, 256))) % 256
        overwrite(path, data[:at] + bytes([byte]) + data[at + 1 :])
        # The other part's files are as they were.
        part = int(path.relative_to(root).parts[1]) if "0000" in str(path.relative_to(root)) else None
        before, now = good if part is None else by_part[part], everything(root, part)
        # What can still be read is what was written. Never a wrong number, however little is left.
        assert all(before[key] == value for key, value in now.items()), (path, at, byte)
        named = damages(root)
        if len(now) < len(before):
            tally["on reading"] += 1
            assert named, (path, at, byte)
        if named:
            tally["found"] += 1
        else:
            tally["harmless"] += 1
            assert now == before, (path, at, byte)
            assert path.name == "zarr.json", (path, at, byte)
        overwrite(path, data)
    assert everything(root) == good
    return tally


def test_a_few_flips(root: Path) -> None:
    tally = check_flips(root, np.random.default_rng(0), 60)
    assert tally["found"] > 40


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_ten_thousand_flips(root: Path, seed: int) -> None:
    tally = check_flips(root, np.random.default_rng(100 + seed), 2500)
    assert tally["found"] > 2000


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([10**400, "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(inner, (*path, key))


def _edited(data: st.DataObject, value: Any) -> Any:
    """The same JSON, with one value replaced, removed, or added."""
    places = list(_places(value))
    place = places[data.draw(st.integers(0, len(places) - 1))]
    new = data.draw(JSON)
    if not place:
        return new
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    how = data.draw(st.sampled_from(["replace", "remove", "add"]))
    if how == "remove":
        del inner[place[-1]]
    elif how == "add" and isinstance(inner, dict):
        inner[data.draw(st.text(max_size=5))] = new
    else:
        inner[place[-1]] = new
    return value


@pytest.mark.parametrize(
    "name", ["zarr.json", "parts/00000/zarr.json", "parts/00001/zarr.json", "parts/00000/keys/zarr.json"]
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), resealed=st.booleans())
def test_edited_json_is_refused_or_reads_the_same(root: Path, name: str, data: st.DataObject, resealed: bool) -> None:
    """Also where the digest was made right again, as by a forger: then a failure may be claimed, never a wrong number."""
    header = root / name
    before = header.read_bytes()
    good = everything(root)
    try:
        raw = json.loads(before)
        for _ in range(data.draw(st.integers(1, 3))):
            raw = _edited(data, raw)
        table = raw.get("attributes", {}) if isinstance(raw, dict) else {}
        table = table.get("kava_part") if isinstance(table, dict) else None
        if resealed and isinstance(table, dict):
            table["digest"] = digest_json({k: v for k, v in table.items() if k != "digest"})
        overwrite(header, json.dumps(raw).encode())
        now = everything(root)
        found = damages(root)
        told = ("store", "sources") if resealed else ()  # What only the table says, a forger can say.
        wrong = {key for key, value in now.items() if key[0] not in told and good.get(key) != value}
        assert not wrong, (raw, wrong)
        if len(now) < len(good) and not resealed:
            assert found
    finally:
        overwrite(header, before)


@pytest.mark.parametrize("text", [b"", b"null", b"[" * 100_000, b"\xff\xfe{}", b'{"a": 1', b"1e999", b'"\\ud800"'])
@pytest.mark.parametrize("name", ["zarr.json", "parts/00000/zarr.json"])
def test_what_is_no_header_at_all(root: Path, name: str, text: bytes) -> None:
    overwrite(root / name, text)
    assert len(everything(root)) < 20
    assert damages(root)
