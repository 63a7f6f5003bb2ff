"""Files that someone else put into a store: special files, hostile JSON, headers that name code."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numcodecs.pickles
import numpy as np
import pytest
import zarr
from fixtures.stores import EXTRAS, manifest, write_store
from hypothesis import given
from hypothesis import strategies as st

from kava.errors import DamagedStoreError, KavaError, StoreError
from kava.store import KVGeometry, KVStore
from kava.store.files import read_small
from kava.store.manifest import MAX_PARTS, MAX_SAMPLES, Manifest, sealed
from kava.store.safe_json import MAX_DEPTH, parse_json, read_json
from kava.store.table import header_bytes
from kava.store.zarr_headers import check_zarr_array

SPECIAL = ["pipe", "socket", "device", "endless device", "folder", "link", "dangling link", "huge"]


def put(kind: str, path: Path) -> None:
    """Put a file of this kind in the place of another."""
    data = path.read_bytes() if path.is_file() else b"{}"
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        here = Path.cwd()
        os.chdir(path.parent)  # An address has 107 characters at most.
        try:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(path.name)
        finally:
            os.chdir(here)
    elif kind.endswith("device"):
        major, minor = (1, 5) if kind.startswith("endless") else (5, 0)
        try:
            os.mknod(path, 0o600 | 0o020000, os.makedev(major, minor))
        except PermissionError:
            pytest.skip("devices need root")
    elif kind == "folder":
        path.mkdir()
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    else:
        outside = path.parent.parent / f"outside-{path.name}"
        if kind == "link":
            outside.write_bytes(data)
        path.symlink_to(outside)


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_special_file_is_refused_before_it_is_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "inner/record.json"
    path.parent.mkdir()
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
    put(kind, path)
    with pytest.raises(DamagedStoreError, match=r"record\.json: (a|has) ") as raised:
        read_small(path, 1 << 20)
    assert "\n" not in str(raised.value)


def test_what_is_read_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_small(tmp_path / "nothing", 10)
    (tmp_path / "long").write_bytes(b"x" * 11)
    with pytest.raises(DamagedStoreError, match="expected 10 at most"):
        read_small(tmp_path / "long", 10)
    (tmp_path / "folder").symlink_to(tmp_path / "real")
    (tmp_path / "real").mkdir()
    (tmp_path / "real/file").write_bytes(b"x" * 10)
    assert read_small(tmp_path / "folder/file", 10) == b"x" * 10  # A run may lie behind a link.


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["zarr.json", "parts/00001/zarr.json"])
def test_a_special_file_in_the_place_of_a_header(tmp_path: Path, name: str, kind: str) -> None:
    store, _ = write_store(tmp_path / "s.zarr", [3, 4, 9, 1], samples_per_part=2)
    put(kind, store.path / name)
    with pytest.raises(KavaError) as raised:
        KVStore.open(store.path)[2]
    assert "\n" not in str(raised.value)
    if name != "zarr.json":
        assert [damage.part for damage in KVStore.open(store.path).verify()] == [1]


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (b"[" * 600 + b"]" * 600, "nested deeper than 64 levels"),
        (b'{"a":' * 600 + b"1" + b"}" * 600, "nested deeper than 64 levels"),
        (b"[" * 5_000_000, "nested deeper"),
        (b"[" * 65 + b'"' + b'\\"' * 2_000_000, "nested deeper"),
        (b'["' + b"[" * 100 + b'", ' + b'"' + b'\\"' * 2_000_000, "Unterminated"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' is repeated"),
        (b'{"' + b"k" * 200 + b'": 1, "' + b"k" * 200 + b'": 3}', r"the key 'kkk.*\.\.\. is repeated"),
        (b"[" + b"[]," * 1_000_000 + b"[]]", "more than 65,536 arrays and objects"),
        (b"1" * 1000, "1000 digits"),
        (b"-" + b"1" * 1_000_000, "digits"),
        (b"0." + b"1" * 1_000_000, "characters"),
        (b"\xff", "codec"),
        (b"", "Expecting value"),
        (b'{"a": 1} x', "Extra data"),
    ],
    ids=range(14),
)
def test_json_outside_its_limits_is_refused_at_once(document: bytes, reason: str) -> None:
    with pytest.raises(DamagedStoreError, match=f"^where is not readable: .*{reason}") as raised:
        parse_json(document, "where")
    assert len(str(raised.value)) < 250


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**64) + 1, 2**64 - 1) | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=30,
    )
)
def test_json_within_its_limits_is_read_as_by_python(value: Any) -> None:
    assert parse_json(json.dumps(value).encode(), "where") == value
    deep = json.dumps(value)
    for _ in range(MAX_DEPTH - 12):
        deep = f"[{deep}]"
    assert parse_json(deep.encode(), "where") == json.loads(deep)


def _set(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        *path, last = name.split(".")
        for key in path:
            raw = raw[key]
        raw[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("num_samples", 10**12), "num_samples"),
        (_set("num_samples", 10**19), "num_samples"),
        (_set("num_samples", -1), "num_samples"),
        (_set("num_samples", 1e400), "num_samples"),
        (_set("num_samples", float("nan")), "num_samples"),
        (_set("num_samples", MAX_SAMPLES), f"num_parts: .* at most {MAX_PARTS:,}"),
        (_set("samples_per_part", 10**9), "samples_per_part"),
        (_set("page_tokens", 10**9), "page_tokens"),
        (_set("geometry.head_dim", 10**9), "geometry.head_dim"),
        (_set("geometry.num_layers", 10**9), "geometry.num_layers"),
        (_set("geometry", {"num_layers": 4096, "num_key_value_heads": 4096, "head_dim": 4096}), "page of keys"),
        (_set("extras", {"a": {"axis": "row", "dtype": "int32", "shape": [10**9]}}), "extras.a.shape"),
        (_set("extras", {"a": {"axis": "row", "dtype": "int32", "shape": [4096, 4096]}}), "extras.a"),
        (_set("extras", {"a": {"axis": "row", "dtype": "int32", "shape": [1] * 60}}), "extras.a.shape"),
        (_set("extras", {f"a{n}": {"axis": "row", "dtype": "int32"} for n in range(300)}), "extras"),
        (_set("codec", "x" * 10_000_000), "codec"),
        (_set("format_version", "x" * 10_000_000), "store format 'xxx"),
        (_set("x" * 10_000_000, 1), "manifest field 'xxx"),
        (_set("model.id", ["x"]), "model.id"),
    ],
    ids=range(19),
)
def test_an_implausible_manifest_is_refused_in_a_short_line(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    raw = manifest().model_dump(mode="json")
    change(raw)
    (tmp_path / "zarr.json").write_bytes(header_bytes(sealed(raw)))
    with pytest.raises(StoreError, match=message) as raised:
        KVStore.open(tmp_path)
    assert len(str(raised.value)) < 400
    assert "\n" not in str(raised.value)


def test_the_largest_plausible_store_opens(tmp_path: Path) -> None:
    made = manifest(MAX_SAMPLES, MAX_SAMPLES // MAX_PARTS, geometry=KVGeometry(**_LARGE))
    store = KVStore.create(tmp_path / "s.zarr", made)
    assert len(KVStore.open(store.path)) == MAX_SAMPLES
    assert store.missing_parts()[-1] == MAX_PARTS - 1
    assert Manifest.from_attributes(made.to_attributes(), "x") == made


_LARGE = {"num_layers": 1024, "num_key_value_heads": 128, "head_dim": 1024}


def test_text_that_is_not_unicode_is_refused(tmp_path: Path) -> None:
    store = KVStore.create(tmp_path / "s.zarr", manifest())
    header = store.path / "zarr.json"
    header.write_text(header.read_text().replace('"tiny"', '"\\ud800"'))
    with pytest.raises(StoreError, match="surrogate"):
        KVStore.open(store.path)


def test_a_group_with_consolidated_metadata_is_refused(tmp_path: Path) -> None:
    store, _ = write_store(tmp_path / "s.zarr", [3, 4])
    header = store.path / "parts/00000/zarr.json"
    fields = json.loads(header.read_bytes()) | {"consolidated_metadata": {"kind": "inline", "metadata": {}}}
    header.chmod(0o644)
    header.write_text(json.dumps(fields))
    with pytest.raises(DamagedStoreError, match="'consolidated_metadata' is unknown"):
        KVStore.open(store.path)[0]


# Headers of arrays.


class _Code:
    """Unpickled, it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("codec", ["blosc-zstd", "none", "int8", "int4"])
def test_every_header_that_kava_writes_is_read(tmp_path: Path, codec: str) -> None:
    store, _ = write_store(tmp_path / "s.zarr", [3, 4], codec=codec, extras=EXTRAS)
    headers = list(store.path.glob("parts/*/*/zarr.json"))
    assert len(headers) >= 10
    for header in headers:
        assert check_zarr_array(header) == json.loads(header.read_bytes())


def test_a_zarr_v2_array_with_a_pickle_codec_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numcodecs.pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True)  # As before numcodecs 0.16.6.
    marker, array = tmp_path / "ran", tmp_path / "sample_id"
    array.mkdir()
    fields = {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "fill_value": "", "order": "C"}
    (array / ".zarray").write_text(
        json.dumps(fields | {"compressor": None, "filters": [{"id": "vlen-utf8"}, {"id": "pickle"}]})
    )
    (array / "0").write_bytes(numcodecs.pickles.Pickle().encode(_Code(marker)))
    with pytest.raises(DamagedStoreError, match="missing"):
        check_zarr_array(array / "zarr.json")
    with pytest.raises(FileNotFoundError):
        zarr.open_array(array, mode="r", zarr_format=3)
    assert not marker.exists()
    unguarded = zarr.open_array(array, mode="r")
    with suppress(Exception):  # The attack is real: with any format allowed, the code runs.
        np.asarray(unguarded[:])
    assert marker.exists()


def _codec(codec: Any) -> Callable[[dict[str, Any]], None]:
    return lambda fields: fields["codecs"].insert(0, codec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_codec({"name": "numcodecs.pickle", "configuration": {}}), r"codec 'numcodecs\.pickle' is not read"),
        (_codec("numcodecs.pickle"), r"codec 'numcodecs\.pickle' is not read"),
        (_codec({"name": "gzip", "configuration": {"level": 1}}), "codec 'gzip' is not read"),
        (_codec({"name": ["x"]}), "is not read"),
        (_codec({"name": "zstd", "configuration": {"level": 1, "module": "os"}}), "has the configuration"),
        (_codec({"name": "zstd", "configuration": {"level": [1]}}), "level is"),
        (_codec({"name": "crc32c", "must_understand": False}), "and its configuration"),
        (_set("codecs", [{"name": "crc32c"}] * 1000), "one to 6 codecs"),
        (_set("codecs", []), "one to 6 codecs"),
        (_set("codecs", {"name": "bytes"}), "one to 6 codecs"),
        (_set("zarr_format", 2), "zarr_format 2"),
        (_set("node_type", "group"), "node_type"),
        (_set("data_type", {"name": "numpy.object"}), "data_type"),
        (_set("data_type", "r8"), "data_type"),
        (_set("shape", [10**19]), "shape"),
        (_set("shape", [-1]), "shape"),
        (_set("shape", [True]), "shape"),
        (_set("shape", []), "shape"),
        (_set("chunk_grid.configuration.chunk_shape", [10**10]), "is larger than"),
        (_set("chunk_grid.name", "rectangular"), "chunk_grid"),
        (_set("chunk_grid", []), "chunk_grid"),
        (_set("chunk_key_encoding", {"name": "v2", "configuration": {"separator": "."}}), "chunk_key_encoding"),
        (_set("storage_transformers", [{"name": "x"}]), "storage_transformers"),
        (_set("fill_value", ["x"]), "fill_value"),
        (_set("extension", {"must_understand": False}), "'extension' is unknown"),
        (lambda fields: fields.pop("codecs"), "'codecs' is missing"),
    ],
    ids=range(26),
)
def test_a_header_that_kava_does_not_write_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    store, _ = write_store(tmp_path / "s.zarr", [3, 4])
    header = store.path / "parts/00000/length/zarr.json"
    fields = json.loads(header.read_bytes())
    change(fields)
    header.chmod(0o644)
    header.write_text(json.dumps(fields))
    with pytest.raises(DamagedStoreError, match=message) as raised:
        check_zarr_array(header)
    assert len(str(raised.value)) < 400


def test_a_codec_inside_a_shard_is_checked_too(tmp_path: Path) -> None:
    store, _ = write_store(tmp_path / "s.zarr", [3, 4])
    header = store.path / "parts/00000/keys/zarr.json"
    header.chmod(0o644)
    for key in ("codecs", "index_codecs"):
        for name in ("numcodecs.pickle", "sharding_indexed"):
            fields = json.loads(header.read_bytes())
            fields["codecs"][0]["configuration"][key].append({"name": name})
            other = tmp_path / "other.json"
            other.write_text(json.dumps(fields))
            with pytest.raises(DamagedStoreError, match="is not read"):
                check_zarr_array(other)
