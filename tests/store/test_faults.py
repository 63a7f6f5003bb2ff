"""What disks, clocks, other processes and other people do to a store: it is told, named, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.stores import EXTRAS, flip, manifest, mounted, overwrite, sample, tree, write_store

from kava.errors import (
    DamagedStoreError,
    KavaError,
    RetryLaterError,
    StoreError,
)
from kava.store import KVStore
from kava.store.fingerprint import digest_file, digest_json, file_stamp
from kava.store.leftovers import remove_leftovers

LENGTHS = [3, 4, 9, 1, 6, 12, 5]


@pytest.fixture
def store(tmp_path: Path) -> KVStore:
    written: KVStore = write_store(tmp_path / "s.zarr", LENGTHS, extras=EXTRAS)[0]
    return written


# Disks.


@pytest.mark.parametrize("codec", ["blosc-zstd", "none"])
def test_a_disk_that_is_full_at_any_point(tmp_path: Path, codec: str) -> None:
    """A bigger and bigger disk, until all fits: each time the whole parts are there, and the same bits in the end."""
    whole, samples = write_store(tmp_path / "whole.zarr", LENGTHS, extras=EXTRAS, codec=codec)
    disk, failures = tmp_path / "disk", 0
    with mounted(disk, "-t", "tmpfs", "-o", "size=4k", "tmpfs"):
        for kilobytes in range(4, 1000, 24):
            subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(disk)], check=True)
            try:
                store = KVStore.create(disk / "s.zarr", whole.manifest)
                for part in store.missing_parts():
                    with store.write_part(part) as writer:
                        for position, index in enumerate(store.manifest.part_samples(part)):
                            writer.append(position, samples[index])
                        writer.commit()
                break
            except RetryLaterError as error:
                message = str(error)
            failures += 1
            assert f"{disk}/s.zarr" in message
            assert "no space left on device" in message
            assert not list(disk.rglob(".tmp-*"))
            if (disk / "s.zarr/zarr.json").exists():
                assert KVStore.open(disk / "s.zarr").verify() == []
        assert failures > 5
        assert tree(disk / "s.zarr") == tree(whole.path)


def test_read_only_media_are_read_and_verified_and_writing_says_why(store: KVStore) -> None:
    subprocess.run(["mount", "--bind", str(store.path), str(store.path)], capture_output=True)
    with mounted(store.path, "-o", "remount,ro,bind"):
        again = KVStore.open(store.path)
        assert again.verify() == []
        assert again[4].sample_id == "sample-4"
        assert KVStore.create(store.path, store.manifest).missing_parts() == []
        for change in (lambda: again.write_part(0), lambda: again.drop_part(0), lambda: again.set_aside(0)):
            with pytest.raises(StoreError, match="cannot write here: read-only file system"):
                change()


def test_parts_are_files_that_nobody_writes_to_by_mistake(store: KVStore) -> None:
    files = [p for p in (store.path / "parts/00000").rglob("*") if p.is_file()]
    assert files
    assert not [p for p in files if p.stat().st_mode & 0o222]
    store.drop_part(0)
    assert not (store.path / "parts/00000").exists()
    shutil.rmtree(store.path)


@pytest.mark.parametrize(
    ("code", "expected", "message"),
    [
        (errno.EIO, DamagedStoreError, "input/output error"),
        (errno.ESTALE, RetryLaterError, "stale file handle"),
        (errno.EACCES, StoreError, "Change its rights"),
    ],
)
def test_a_disk_that_does_not_give_back(
    store: KVStore, monkeypatch: pytest.MonkeyPatch, code: int, expected: type[KavaError], message: str
) -> None:
    store.sample(0, keys=False, values=False, extras=False)
    assert len(store.part(0).starts) == len(store.part(0).lengths) == 3

    def broken(*_: Any) -> bytes:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("os.preadv", broken)
    with pytest.raises(expected, match=message):
        store[0]


# Parts that are not what they were.


def _replace(part: Path, other: Path) -> None:
    shutil.rmtree(part)
    shutil.copytree(other, part)


@pytest.mark.parametrize(
    "how",
    ["gone", "empty", "file", "other store", "other index", "linked part", "linked folder", "linked file", "dangling"],
)
def test_a_part_that_is_another_one(store: KVStore, tmp_path: Path, how: str) -> None:
    part, outside = store.path / "parts/00001", tmp_path / "outside"
    if how == "gone":
        shutil.rmtree(part)
        assert KVStore.open(store.path).missing_parts() == [1]
        with pytest.raises(StoreError, match="part 1 is not written yet"):
            store[3]
        return
    if how in ("empty", "file"):
        shutil.rmtree(part)
        part.mkdir() if how == "empty" else part.write_bytes(b"x")
    elif how == "other store":
        _replace(
            part, write_store(tmp_path / "o.zarr", LENGTHS, extras=EXTRAS, corpus_digest="o")[0].path / "parts/00001"
        )
    elif how == "other index":
        _replace(part, part.with_name("00000"))
    else:
        inner = {
            "linked part": part,
            "dangling": part,
            "linked folder": part / "keys",
            "linked file": part / "tokens/c/0/0",
        }[how]
        inner.rename(outside)
        inner.symlink_to(outside if how != "dangling" else tmp_path / "nothing")
    again = KVStore.open(store.path)
    assert again.committed_parts() == [0, 1, 2]
    with pytest.raises(DamagedStoreError, match="00001"):
        again.check_files()
    if how != "linked folder":  # What it leads to has the right checksums.
        with pytest.raises(DamagedStoreError, match="00001"):
            again[3]
    assert {damage.part for damage in again.verify()} == {1}
    again.drop_part(1)
    assert outside.exists() == how.startswith(("linked", "dangling"))
    with again.write_part(1) as writer:
        for position in range(3):
            writer.append(position, sample(3 + position, LENGTHS[3 + position], extras=EXTRAS))
        writer.commit()
    assert KVStore.open(store.path).verify() == []


def _resealed(header: Path, **changes: Any) -> None:
    """A table that a forger changed: the digest is right again."""
    raw = json.loads(header.read_text())
    table = raw["attributes"]["kava_part"] | changes
    table["digest"] = digest_json({k: v for k, v in table.items() if k != "digest"})
    raw["attributes"]["kava_part"] = table
    overwrite(header, json.dumps(raw).encode())


@pytest.mark.parametrize(
    "name", ["../../zarr.json", "/etc/passwd", "keys/../../00001/zarr.json", "", "keys//zarr.json", "a\0b"]
)
def test_a_table_names_files_of_its_part_alone(store: KVStore, name: str) -> None:
    header = store.path / "parts/00000/zarr.json"
    files = store.part(0).table["files"]
    _resealed(header, files=files | {name: [1, "hash"]})
    with pytest.raises(DamagedStoreError, match="which is no file of a part"):
        KVStore.open(store.path)[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_rows": 10**15},
        {"num_rows": 3},
        {"failed": {"9": "x"}},
        {"failed": {"x": "x"}},
        {"failed": []},
        {"target_tokens": -1},
        {"coverage": [[1, 2, 3]]},
        {"files": {}},
        {"files": {"zarr.json": "big"}},
        {"index": True},
    ],
)
def test_a_forged_table_is_refused_not_followed(store: KVStore, changes: dict[str, Any]) -> None:
    _resealed(store.path / "parts/00000/zarr.json", **changes)
    with pytest.raises(DamagedStoreError, match="00000"):
        KVStore.open(store.path)[0]
    assert {damage.part for damage in KVStore.open(store.path).verify()} == {0}


def test_checksums_can_be_left_out(tmp_path: Path) -> None:
    store, samples = write_store(tmp_path / "s.zarr", LENGTHS, codec="none")
    flip(store.path / "parts/00000/keys/c/0/0/0/0", 0)
    with pytest.raises(DamagedStoreError, match="chunk 0: checksum mismatch"):
        KVStore.open(store.path).sample(0)
    unchecked, exact = KVStore.open(store.path, check=False)[0], samples[0]
    assert unchecked.keys is not None
    assert exact.keys is not None
    assert (unchecked.keys != exact.keys.bfloat16()).sum() == 1


def test_a_part_written_again_under_an_open_store_is_noticed(tmp_path: Path) -> None:
    """Without compression every chunk lies where it lay: old rows and new numbers would fit each other."""
    store, _ = write_store(tmp_path / "s.zarr", LENGTHS, codec="none")
    store.sample(0)
    other = KVStore.open(store.path)
    other.drop_part(0)
    with other.write_part(0) as writer:
        for position, length in enumerate(LENGTHS[:3]):
            writer.append(position, sample(position + 50, length))
        writer.commit()
    with pytest.raises(StoreError, match="was written again since it was opened"):
        store.sample(0)


# Other writers.


def test_two_writers_at_once_make_every_part_once(tmp_path: Path) -> None:
    """Each tries all parts; who comes second finds the same bits there, goes on, and leaves nothing."""
    whole, samples = write_store(tmp_path / "whole.zarr", LENGTHS)
    stores = [KVStore.create(tmp_path / "s.zarr", whole.manifest) for _ in range(2)]
    begun = threading.Barrier(2)
    made: list[int] = []

    def write(store: KVStore) -> None:
        for part in range(3):
            with store.write_part(part) as writer:
                for position, index in enumerate(store.manifest.part_samples(part)):
                    writer.append(position, samples[index])
                begun.wait(timeout=60)
                writer.commit()
                made.append(part)

    threads = [threading.Thread(target=write, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [0, 0, 1, 1, 2, 2]
    assert tree(tmp_path / "s.zarr") == tree(whole.path)


def test_a_dead_writer_holds_nothing_and_a_living_one_keeps_its_work(store: KVStore) -> None:
    store.drop_part(0)
    parts = store.path / "parts"
    dead = parts / f".tmp-00000-{os.uname().nodename}-{2**22 - 1}-77-abcd1234"
    elsewhere = parts / ".tmp-00000-other-host-4242-77-abcd1234"
    odd = parts / ".tmp-nonsense"
    for folder in (dead, elsewhere, odd, parts / ".drop-00001"):
        folder.mkdir()
    with store.write_part(0) as living:
        remove_leftovers(store.path)
        left = {p.name for p in parts.glob(".*")}
        assert left == {elsewhere.name, odd.name, living._folder.name, f"{living._folder.name}.lock"}
    assert KVStore.open(store.path).missing_parts() == [0]


def test_a_part_that_was_set_aside_may_be_removed_by_two(store: KVStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other is faster, with one file of it, and is played here."""
    copies = [shutil.copytree(store.path / f"parts/0000{n}", store.path / f"copy{n}") for n in (0, 1)]
    for number, copy in enumerate(copies):
        store.set_aside(number)
        copy.rename(store.path / f"parts/0000{number}")
    unlink = os.unlink
    faster: list[Any] = []

    def late(path: Any, **options: Any) -> None:
        unlink(path, **options)
        if not faster:
            faster.append(path)
            unlink(path, **options)

    monkeypatch.setattr(os, "unlink", late)
    KVStore.create(store.path, store.manifest)
    assert faster
    assert KVStore.open(store.path).parts_set_aside() == []


@pytest.mark.parametrize("codec", ["blosc-zstd", "none"])
def test_a_file_system_that_reads_less_than_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    store, samples = write_store(tmp_path / "s.zarr", LENGTHS, dtype="float32", codec=codec)
    preadv, sizes = os.preadv, []

    def short(file: int, buffers: Any, offset: int) -> int:
        wanted = sum(buffer.nbytes for buffer in buffers)
        first = next(buffer for buffer in buffers if buffer.nbytes).cast("B")
        got = preadv(file, [first[: max(1, wanted // 2)]], offset)
        sizes.append((wanted, got))
        return got

    pread = os.pread
    monkeypatch.setattr(os, "preadv", short)
    monkeypatch.setattr(os, "pread", lambda file, nbytes, offset: pread(file, max(1, nbytes // 2), offset))
    for index, wanted in enumerate(samples):
        found = KVStore.open(store.path)[index]
        assert found.keys is not None
        assert wanted.keys is not None
        assert torch.equal(found.keys, wanted.keys)
    assert any(got < wanted for wanted, got in sizes)
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(DamagedStoreError, match="the file ends within it"):
        KVStore.open(store.path)[0]


@pytest.mark.parametrize("code", [errno.EEXIST, errno.ENOTEMPTY, errno.ESTALE, errno.ENOENT])
@pytest.mark.parametrize("moved", ["by us", "by another", "not at all"])
def test_renaming_on_a_file_server(
    store: KVStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, moved: str
) -> None:
    """There is no server here: its rename is played by one that fails before, or after, the work is done."""
    other = shutil.copytree(store.path / "parts/00000", tmp_path / "other")
    store.drop_part(0)
    rename = Path.rename

    def played(self: Path, target: Path) -> Path:
        if ".tmp-" in self.name and moved == "by us":
            rename(self, target)
        elif ".tmp-" in self.name and moved == "by another":
            shutil.copytree(other, target)
        raise OSError(code, os.strerror(code))

    # What another has moved there are the same bits.
    expected: type[KavaError] | None = StoreError if moved == "not at all" else None
    if moved == "not at all" and code == errno.ESTALE:
        expected = RetryLaterError
    with store.write_part(0) as writer:
        for position in range(3):
            writer.append(position, sample(position, LENGTHS[position], extras=EXTRAS))
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", played)
            if expected is None:
                writer.commit()
            else:
                with pytest.raises(expected):
                    writer.commit()
    assert not list(store.path.rglob(".tmp-*"))
    assert KVStore.open(store.path).missing_parts() == ([0] if moved == "not at all" else [])
    assert KVStore.open(store.path).verify() == []


def test_odd_names_among_the_parts_are_not_parts(store: KVStore) -> None:
    for name in ("000001", "0", "00001.bak", "99999", "٠٠٠٠١"):
        (store.path / "parts" / name).mkdir()
    assert KVStore.open(store.path).committed_parts() == [0, 1, 2]


# Clocks.


def test_a_clock_that_jumps_hides_no_change(tmp_path: Path) -> None:
    """The same size and the same modification time, set back by a clock or by a copying tool."""
    path = tmp_path / "weights"
    path.write_bytes(b"a" * (1 << 20))
    stat, before, digest = path.stat(), file_stamp(path), digest_file(path)
    path.write_bytes(b"b" * (1 << 20))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file_stamp(path)[:3] == before[:3]
    assert file_stamp(path) != before
    assert digest_file(path) != digest


def test_parts_from_the_future_and_the_past_are_the_same(store: KVStore) -> None:
    wanted = manifest(len(LENGTHS), extras=EXTRAS).fingerprint
    for number, path in enumerate(p for p in store.path.rglob("*") if p.is_file()):
        os.utime(path, (0, 4e9 if number % 2 else 1))
    again = KVStore.open(store.path)
    assert again.manifest.fingerprint == wanted
    assert again.verify() == []
    again.drop_part(2)
    assert KVStore.open(store.path).missing_parts() == [2]
