"""A store under another codec or dtype."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.stores import EXTRAS, manifest, sample, tree, write_store

from kava.errors import DamagedStoreError, ManifestMismatchError, RecipeError
from kava.pipeline.transcode import Transcoding, transcode_store, transcoded_manifest
from kava.store import DTYPES, LOSSY, KVGeometry, KVSample, KVStore, default_page_tokens

LENGTHS = [3, 4, 9, 1, 6, 12, 5]


@pytest.fixture
def source(tmp_path: Path) -> KVStore:
    """With extra arrays, a failed sample, sources and coverage."""
    store = KVStore.create(tmp_path / "source.zarr", manifest(extras=EXTRAS, kind="resampled"))
    for part in store.missing_parts():
        with store.write_part(part) as writer:
            for position, index in reversed(list(enumerate(store.manifest.part_samples(part)))):
                made = sample(index, LENGTHS[index], extras=EXTRAS)
                if index == 4:
                    writer.fail(position, made.sample_id, made.split, "too long")
                else:
                    writer.append(position, made, coverage=np.full((4, 3), index))
            writer.commit({"parent": f"part-{part}"}, written_by="test 1")
    return KVStore.open(store.path)


def same(one: KVSample, other: KVSample) -> bool:
    """Equal in every bit."""
    return (
        one.sample_id == other.sample_id
        and one.split == other.split
        and torch.equal(one.keys, other.keys)  # type: ignore[arg-type]
        and torch.equal(one.values, other.values)  # type: ignore[arg-type]
        and all(np.array_equal(one.extras[n], other.extras[n], equal_nan=True) for n in one.extras)
        and all(
            np.array_equal(getattr(one, n), getattr(other, n))
            for n in ("input_ids", "positions", "spans", "segments", "mask")
        )
    )


def test_lossless_is_the_store_that_would_have_been_written(source: KVStore, tmp_path: Path) -> None:
    """Every byte, but that a part remembers which part it took the place of."""
    made = transcode_store(source, tmp_path / "none.zarr", "none", scheduler="synchronous")
    assert made.manifest.fingerprint == source.manifest.fingerprint
    assert made.verify() == []
    assert made.failed == source.failed == {"sample-4": "too long"}
    assert all(same(made[i], source[i]) for i in source.indices())
    for number in source.committed_parts():
        mine, theirs = made.part(number), source.part(number)
        assert mine.content == theirs.content
        assert mine.digest != theirs.digest
        kept = ("sources", "written_by", "target_tokens", "coverage", "failed", "num_rows", "store")
        assert [mine.table[n] for n in kept] == [theirs.table[n] for n in kept]
    back = transcode_store(made, tmp_path / "back.zarr", "blosc-zstd", scheduler="synchronous")
    files = [
        {name: data for name, data in tree(store.path).items() if not re.fullmatch(r"parts/\d+/zarr.json", name)}
        for store in (back, source)
    ]
    assert files[0] == files[1]
    assert [back.part(n).content for n in back.committed_parts()] == [source.part(n).content for n in (0, 1, 2)]


@pytest.mark.parametrize(("codec", "dtype"), [("int8", None), ("int4", "float16"), ("none", "float32")])
def test_what_changes_numbers_has_a_parent_and_a_fingerprint(
    source: KVStore, tmp_path: Path, codec: str, dtype: str | None
) -> None:
    made = transcode_store(source, tmp_path / "out.zarr", codec, dtype)
    assert made.manifest.fingerprint != source.manifest.fingerprint
    assert made.manifest.parents == {"transcoded": source.manifest.fingerprint}
    assert [made.part(n).sources for n in (0, 1, 2)] == [{"transcoded": source.part(n).content} for n in (0, 1, 2)]
    assert made.verify() == []
    assert made.failed == source.failed
    for index in source.indices():
        page, name = made.manifest.page_tokens, dtype or "bfloat16"
        for kind in ("keys", "values"):
            wanted = getattr(source[index], kind).to(getattr(torch, name))
            if codec in LOSSY:
                wanted = LOSSY[codec].round_trip(kind, wanted, page, DTYPES[name])
            assert torch.equal(getattr(made[index], kind), wanted)


def test_a_second_run_does_nothing_and_a_new_source_part_is_written_again(source: KVStore, tmp_path: Path) -> None:
    for codec in ("none", "int8"):
        out = tmp_path / f"{codec}.zarr"
        transcode_store(source, out, codec)
        told: list[int] = []
        before = tree(out)
        transcode_store(source, out, codec, on_part=told.append)
        assert tree(out) == before
        assert told == [0, 1, 2]
    source.drop_part(1)
    with source.write_part(1) as writer:
        for position, index in enumerate(source.manifest.part_samples(1)):
            writer.append(position, sample(index + 70, 5, extras=EXTRAS))
        writer.commit()
    for codec in ("none", "int8"):
        out = tmp_path / f"{codec}.zarr"
        old = {n: KVStore.open(out).part(n).digest for n in (0, 1, 2)}
        made = transcode_store(KVStore.open(source.path), out, codec)
        assert [n for n in (0, 1, 2) if made.part(n).digest != old[n]] == [1]
        assert made[3].sample_id == "sample-73"


def test_a_store_that_is_not_complete_is_gone_on_with(source: KVStore, tmp_path: Path) -> None:
    source.drop_part(1)
    made = transcode_store(source, tmp_path / "out.zarr", "none")
    assert made.committed_parts() == [0, 2]
    assert made.missing_parts() == [1]


def test_what_cannot_be_is_refused(source: KVStore, tmp_path: Path) -> None:
    for codec, dtype, message in [
        ("zip", None, "--codec zip: there is no such codec; use one of blosc-zstd, none, int8, int4"),
        ("none", "int8", "--dtype int8: there is no such dtype"),
        ("blosc-zstd", None, "blosc-zstd, bfloat16 already"),
    ]:
        with pytest.raises(RecipeError, match=message):
            transcode_store(source, tmp_path / "out.zarr", codec, dtype)
    for place in (source.path, source.path / "inner"):
        with pytest.raises(RecipeError, match="is the store to read or lies in it"):
            transcode_store(source, place, "none")
    assert not (tmp_path / "out.zarr").exists()
    other, _ = write_store(tmp_path / "other.zarr", LENGTHS, corpus_digest="other", codec="none")
    with pytest.raises(ManifestMismatchError, match=r"corpus_digest: .*write to a new folder"):
        transcode_store(source, other.path, "none")


@pytest.mark.parametrize("name", ["keys", "importance", "tokens"])
def test_damage_of_the_source_is_found_as_it_is_read(source: KVStore, tmp_path: Path, name: str) -> None:
    (path,) = (p for p in (source.path / f"parts/00001/{name}/c").rglob("*") if p.is_file())
    good = path.read_bytes()
    path.write_bytes(good[:9] + bytes([good[9] ^ 1]) + good[10:])
    with pytest.raises(DamagedStoreError, match=name):
        transcode_store(KVStore.open(source.path), tmp_path / "out.zarr", "none", scheduler="synchronous")
    made = KVStore.open(tmp_path / "out.zarr")
    assert 1 not in made.committed_parts()
    assert made.verify() == []


def test_pages_follow_the_codec_unless_they_were_chosen() -> None:
    large = KVGeometry(num_layers=80, num_key_value_heads=8, head_dim=128)
    usual = manifest(geometry=large, page_tokens=default_page_tokens(large, 2))
    assert transcoded_manifest(usual, "int8", "bfloat16").page_tokens == 64
    assert transcoded_manifest(usual, "blosc-zstd", "float32").page_tokens == 2
    assert transcoded_manifest(manifest(page_tokens=24), "int8", "bfloat16").page_tokens == 24


def test_killed_it_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL in the middle of a part; what is half-written is never seen, and is removed by the next run."""
    source, _ = write_store(tmp_path / "source.zarr", [40] * 40, samples_per_part=2)
    whole = transcode_store(source, tmp_path / "whole.zarr", "int8")
    code = (
        "import sys, time; from kava.pipeline.transcode import transcode_store; from kava.store import KVStore; "
        "from kava.store import PartWriter; from pathlib import Path; write = PartWriter.append\n"
        "def slow(self, position, sample, **more):\n"
        "    write(self, position, sample, **more)\n"
        "    if self.index == 7: print('now', flush=True); time.sleep(60)\n"
        "PartWriter.append = slow\n"
        "transcode_store(KVStore.open(sys.argv[1]), Path(sys.argv[2]), 'int8', scheduler='synchronous')"
    )
    out = tmp_path / "out.zarr"
    process = subprocess.Popen([sys.executable, "-c", code, source.path, out], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert list((out / "parts").glob(".tmp-00007-*"))
    cut = KVStore.open(out)
    assert 7 in cut.missing_parts()
    assert cut.verify() == []
    transcode_store(source, out, "int8")
    assert tree(out) == tree(whole.path)


def test_the_work_on_a_part_can_be_sent(source: KVStore, tmp_path: Path) -> None:
    import pickle

    out = KVStore.create(tmp_path / "out.zarr", transcoded_manifest(source.manifest, "none", "bfloat16"))
    work = pickle.loads(pickle.dumps(Transcoding(str(source.path), str(out.path))))
    assert [work(part) for part in (2, 0)] == [2, 0]
    assert work(0) == 0  # Given out twice: the first is kept.
    assert out.committed_parts() == [0, 2]
    table = json.loads((out.path / "parts/00000/zarr.json").read_text())["attributes"]["kava_part"]
    assert table["content"] == source.part(0).content
