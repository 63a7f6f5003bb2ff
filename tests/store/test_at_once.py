"""What other processes do to the same store meanwhile: hide parts, remove leftovers, write temporary files."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fixtures.stores import write_store

from kava.errors import RetryLaterError
from kava.store import KVStore
from kava.store.files import remove, write_atomic
from kava.store.part_exchange import replacing_outdated
from kava.store.sealed import settle
from kava.store.table import read_table


def _at_once(*works: Callable[[], None]) -> list[BaseException]:
    errors: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_parts_that_another_process_hid_are_left_to_it(tmp_path: Path) -> None:
    store, _ = write_store(tmp_path / "s", [3] * 9)
    with replacing_outdated(store, lambda: [0, 1, 2], [0, 1]):
        with replacing_outdated(KVStore.open(store.path), lambda: [2], [2]):
            assert store.committed_parts() == []
        assert store.committed_parts() == [2]
    assert store.committed_parts() == [0, 1, 2]


def test_parts_are_put_back_if_one_cannot_be_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = write_store(tmp_path / "s", [3] * 9)
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.name == "00001":
            raise OSError(28, "no space left")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(RetryLaterError), replacing_outdated(store, lambda: [0, 1], [0, 1]):
        pass
    assert store.committed_parts() == [0, 1, 2]


def test_two_processes_remove_the_same_folder(tmp_path: Path) -> None:
    for _ in range(10):
        for number in range(40):
            (tmp_path / f"gone/{number}").mkdir(parents=True)
            (tmp_path / f"gone/{number}/file").touch()
        assert _at_once(lambda: remove(tmp_path / "gone"), lambda: remove(tmp_path / "gone")) == []
        assert not (tmp_path / "gone").exists()


def test_a_folder_is_flushed_while_another_process_writes_into_it(tmp_path: Path) -> None:
    def write() -> None:
        for _ in range(50):
            write_atomic(tmp_path / "corpus.jsonl", b"text")

    def flush() -> None:
        for _ in range(50):
            settle(tmp_path)

    assert _at_once(write, write, flush) == []


def test_a_part_that_cannot_begin_holds_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = write_store(tmp_path / "s", [3] * 3)
    mkdir, opened = Path.mkdir, len(list(Path("/proc/self/fd").iterdir()))

    def failing(path: Path, *words: object, **options: object) -> None:
        if path.name.startswith(".tmp-"):
            raise OSError(28, "no space left")
        mkdir(path, *words, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", failing)
    with pytest.raises(RetryLaterError):
        store.write_part(0)
    assert len(list(Path("/proc/self/fd").iterdir())) == opened
    assert list((store.path / "parts").glob(".*")) == []


def test_a_part_replaced_between_its_table_and_its_index_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, lengths in (("a", [5, 6, 7]), ("b", [5, 7, 9])):
        write_store(tmp_path / name, lengths, samples_per_part=3)
    place, part = "kava.store.part_reader.read_table", tmp_path / "a/parts/00000"

    def replacing(*arguments: Any) -> Any:
        table = read_table(*arguments)
        monkeypatch.setattr(place, read_table)
        part.rename(tmp_path / "old")
        (tmp_path / "b/parts/00000").rename(part)
        return table

    monkeypatch.setattr(place, replacing)
    store = KVStore.open(tmp_path / "a")
    assert [len(store[index].input_ids) for index in range(3)] == [5, 7, 9]
