"""What killed processes leave: named with its size, and removed once nobody holds its lock."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fixtures.command import kava, write_recipe
from fixtures.stores import tree, write_store

from kava.store import KVStore
from kava.store.leftovers import leftovers_of, remove_leftovers
from kava.store.maker import hold, is_abandoned, lock_of, mark
from kava.train.student import make_student

WRITER = """
import sys
from pathlib import Path
from kava.store.maker import hold, mark
folder = Path(sys.argv[1]) / f".tmp-00001-{mark()}"
lock = hold(folder)
folder.mkdir()
(folder / "keys").write_bytes(bytes(1000))
print(folder, flush=True)
sys.stdin.readline()
"""


@contextmanager
def _writer(parts: Path, *before: str) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A living process that writes a part, in another namespace by the words before it."""
    words = [*before, sys.executable, "-c", WRITER, str(parts)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        process.wait()
        pytest.skip(f"{before[0]} is refused here")
    try:
        yield Path(line), process
    finally:
        process.communicate("\n")


NAMESPACES = {
    "here": (),
    "another PID namespace": ("unshare", "--pid", "--fork", "--kill-child"),
    "another host name": ("unshare", "--uts", "sh", "-c", 'hostname container-7 && exec "$@"', "sh"),
    "both": (
        "unshare",
        "--uts",
        "--pid",
        "--fork",
        "--kill-child",
        "sh",
        "-c",
        'hostname container-7 && exec "$@"',
        "sh",
    ),
}


@pytest.mark.parametrize("where", NAMESPACES)
def test_the_lock_decides_whether_a_writer_is_alive(tmp_path: Path, where: str) -> None:
    store, _ = write_store(tmp_path / "store", [3, 4])
    parts = store.path / "parts"
    with _writer(parts, *NAMESPACES[where]) as (folder, _):
        name = folder.name.split("-", 2)[2]
        assert not is_abandoned(folder, name, any_host=True)
        assert not is_abandoned(folder, name)
        remove_leftovers(store.path, any_host=True)
        assert folder.is_dir()
        assert [left.use for left in leftovers_of(store.path)] == ["in use"]
    # It ended without removing anything, as a killed one does.
    assert is_abandoned(folder, name, any_host=True)
    (left,) = leftovers_of(store.path)
    assert (left.path, left.use, left.size) == (folder, "abandoned", 1000)
    # What a host with another name left is removed where a user asks for it.
    KVStore.create(store.path, store.manifest)
    assert folder.exists() == ("host" in where or where == "both")
    remove_leftovers(store.path, any_host=True)
    assert list(parts.glob(".*")) == []


def test_without_locks_the_process_id_decides(tmp_path: Path) -> None:
    store, _ = write_store(tmp_path / "store", [3, 4])
    host, pid, birth, word = mark().rsplit("-", 3)
    kinds = {"dead": f"{host}-{pid}-{int(birth) - 1}-{word}", "alive": mark(), "away": f"elsewhere-{pid}-1-{word}"}
    for name in kinds.values():
        (store.path / f"parts/.tmp-00001-{name}").mkdir()
    remove_leftovers(store.path, any_host=True)
    assert {p.name for p in (store.path / "parts").glob(".*")} == {f".tmp-00001-{kinds[k]}" for k in ("alive", "away")}
    assert {left.use for left in leftovers_of(store.path)} == {"unknown"}


@pytest.fixture
def done(tmp_path: Path, tiny_models: dict[str, Path]) -> Path:
    recipe: Path = write_recipe(tmp_path, tiny_models)
    kava("run", recipe, "--until", "extract")
    return recipe


def _left(recipe: Path) -> dict[str, Any]:
    found = json.loads(kava("status", recipe, "--json"))["leftovers"]
    return {Path(row["path"]).name: row for row in found}


def test_status_names_and_repair_removes(done: Path) -> None:
    run = done.parent / "run"
    store = run / "teachers/big.zarr"
    before = tree(run)
    assert _left(done) == {}
    assert "left behind" not in kava("status", done)
    shutil.copytree(store, store.with_name(".big.zarr.discarded"))
    shutil.copytree(store, store.with_name(".big.zarr.next"))
    shutil.copytree(store / "parts/00000", store / "parts/.drop-00000")
    shutil.copytree(store / "parts/00000", store / f"parts/.tmp-00000-container-7-41-99-{'a' * 8}")
    lock_of(store / f"parts/.tmp-00000-container-7-41-99-{'a' * 8}").touch()
    shutil.copytree(store / "parts/00000", store / f"parts/.again-container-7-41-99-{'b' * 8}")
    lock_of(store / f"parts/.again-container-7-41-99-{'b' * 8}").touch()
    shutil.copytree(run / "student", run / f".tmp-student-{socket.gethostname()}-1-1-{'c' * 8}")
    (run / "students").mkdir()
    shutil.copytree(run / "student", run / "students/.other.discarded")
    rows = _left(done)
    assert len(rows) == 7
    assert {row["use"] for row in rows.values()} == {"abandoned"}
    assert rows[".big.zarr.next"]["bytes"] > 10_000
    printed = kava("status", done)
    assert all(name in printed for name in rows)
    assert json.loads(kava("status", done, "--json"))["stages"][1]["state"] == "complete"
    printed = kava("repair", done)
    assert printed.count("removed ") == 6
    # Of a training under another name, with the recipe of that name.
    assert set(_left(done)) == {".other.discarded"}
    assert "removed" in kava("repair", done, "-s", "train.name=other")
    assert _left(done) == {}
    (run / "students").rmdir()
    assert tree(run) == before


def test_the_next_run_of_a_stage_removes_what_it_replaces(done: Path) -> None:
    store = done.parent / "run/teachers/big.zarr"
    before = tree(store)
    shutil.copytree(store, store.with_name(".big.zarr.discarded"))
    shutil.copytree(store / "parts/00000", store / "parts/.drop-00000")
    shutil.rmtree(store / "parts/00002")
    kava("extract", done)
    assert list(store.parent.glob(".*")) == []
    assert tree(store) == before


def test_a_rebuild_that_is_being_written_is_left_alone(done: Path) -> None:
    store = done.parent / "run/teachers/big.zarr"
    KVStore.create(store.with_name(".big.zarr.next"), KVStore.open(store).manifest)
    builder = store.with_name(f".big.zarr.next-{mark()}")
    lock = hold(builder)
    assert _left(done)[".big.zarr.next"]["use"] == "in use"
    assert "left alone" in kava("repair", done)
    lock.release()
    assert "removed" in kava("repair", done)
    assert _left(done) == {}


def test_a_student_that_another_process_writes_is_left_alone(done: Path) -> None:
    from kava.pipeline import load_recipe

    folder = done.parent / "student"
    theirs = folder.with_name(f".tmp-student-{mark()}")
    dead = folder.with_name(f".tmp-student-{socket.gethostname()}-{os.getpid()}-1-{'d' * 8}")
    for path in (theirs, dead):
        path.mkdir()
    lock = hold(theirs)
    make_student(load_recipe(done).student, folder, [])
    assert theirs.is_dir()
    assert not dead.exists()
    lock.release()
    assert [path.name for path in folder.parent.glob(".tmp-*.lock")] == []
