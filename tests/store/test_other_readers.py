"""The format without kava: zarr-python, tensorstore and zarrs each read a part to the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from fixtures.stores import EXTRAS, flip, write_store

from kava.store import CODECS, DTYPES, KVStore
from kava.store.part import TOKEN_FIELDS

LENGTHS = [3, 4, 9, 1, 6, 12, 5]
ARRAYS = (
    *("keys", "values", "start", "length", "split", "tokens"),
    *EXTRAS,
)


def _zarr(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(zarr.open_array(path, mode="r", zarr_format=3)[:])


def _tensorstore(path: Path) -> np.ndarray[Any, Any]:
    import tensorstore

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return np.asarray(tensorstore.open(spec, open=True, read=True).result().read().result())


def _zarrs(path: Path, *, strict: bool = True) -> np.ndarray[Any, Any]:
    """`strict`: everything by zarrs, nothing handed to zarr-python."""
    import zarrs  # noqa: F401  (registers its pipeline)

    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": strict}):
        return np.asarray(zarr.open_array(path, mode="r", zarr_format=3)[:])


READERS: dict[str, Callable[[Path], np.ndarray[Any, Any]]] = {
    "zarr-python": _zarr,
    "tensorstore": _tensorstore,
    "zarrs": _zarrs,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_array_is_the_same_bits(tmp_path: Path, reader: str, codec: str, dtype: str) -> None:
    store, samples = write_store(tmp_path / "s.zarr", LENGTHS, dtype=dtype, codec=codec, extras=EXTRAS)
    read = READERS[reader]
    for number in store.committed_parts():
        folder = store.path / "parts" / f"{number:05d}"
        part = {name: read(folder / name) for name in ARRAYS}
        for position, index in enumerate(store.manifest.part_samples(number)):
            wanted = samples[index]
            rows = slice(int(part["start"][position]), int(part["start"][position]) + int(part["length"][position]))
            assert part["split"][position] == wanted.split
            for name in ("keys", "values"):
                expected = DTYPES[dtype].to_numpy(getattr(wanted, name))
                assert part[name].dtype == expected.dtype
                np.testing.assert_array_equal(part[name][rows], expected)
            fields = dict(zip(TOKEN_FIELDS, part["tokens"][rows].T, strict=True))
            assert part["tokens"].dtype == np.int32
            for field, expected in (
                ("input_id", wanted.input_ids),
                ("position", wanted.positions),
                ("span_start", wanted.spans[:, 0]),
                ("span_stop", wanted.spans[:, 1]),
                ("segment", wanted.segments),
                ("mask", wanted.mask),
            ):
                np.testing.assert_array_equal(fields[field], expected)
            for name, kind in EXTRAS.items():
                place: Any = rows if kind.axis == "row" else position
                np.testing.assert_array_equal(part[name][place], wanted.extras[name])


@pytest.mark.parametrize("read", [_zarr, partial(_zarrs, strict=False)], ids=["zarr-python", "zarrs"])
def test_ids_are_strings_for_zarr(tmp_path: Path, read: Callable[[Path], np.ndarray[Any, Any]]) -> None:
    """zarrs hands strings to zarr-python, tensorstore 0.1 has none."""
    store, _ = write_store(tmp_path / "s.zarr", LENGTHS)
    assert read(store.path / "parts/00001/sample_id").tolist() == ["sample-3", "sample-4", "sample-5"]


@pytest.mark.parametrize(
    "reader",
    [
        "zarr-python",
        "tensorstore",
        pytest.param(
            "zarrs",
            marks=pytest.mark.xfail(
                strict=True, reason="zarrs 0.2.3 compares no checksum when it reads part of a shard"
            ),
        ),
    ],
)
@pytest.mark.parametrize("codec", CODECS)
def test_a_flipped_bit_is_an_error(tmp_path: Path, reader: str, codec: str) -> None:
    store, _ = write_store(tmp_path / "s.zarr", LENGTHS, codec=codec)
    pages = store.part(0).pages["keys"]
    flip(store.path / "parts/00000/keys/c/0/0/0/0", pages.offset(1) + int(pages.table.nbytes[1]) // 2)
    with pytest.raises(Exception, match=r"(?i)checksum|crc32c|digest mismatch"):
        READERS[reader](store.path / "parts/00000/keys")


def test_the_documents_example_runs_without_kava(tmp_path: Path) -> None:
    """As printed in docs/store-format.md, in an interpreter that cannot import kava."""
    page = (Path(__file__).parents[2] / "docs/store-format.md").read_text()
    blocks = [block.split("```")[0] for block in page.split("```python\n")[1:]]
    (code,) = [block for block in blocks if "import tensorstore" in block]
    store, samples = write_store(tmp_path / "s.zarr", [3, 4, 9, 1], samples_per_part=4)
    code = "import sys; sys.modules['kava'] = None\n" + code.replace("runs/demo/teachers/smollm2.zarr", str(store.path))
    code += "\nprint(keys.float().sum().item(), same.float().sum().item())"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd="/")
    assert run.returncode == 0, run.stderr
    wanted = KVStore.open(store.path)[3].keys
    assert wanted is not None
    assert run.stdout.split() == [str(wanted.float().sum().item())] * 2
    assert samples[3].sample_id == "sample-3"
