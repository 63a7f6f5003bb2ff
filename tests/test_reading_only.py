"""Read-only media and other users: what only looks, reads; what cannot be read is one row."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from fixtures.command import kava, write_recipe
from fixtures.forking import ended
from fixtures.stores import mounted

from kava.pipeline.cli import main

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")


@pytest.fixture(scope="module")
def made(tiny_models: dict[str, Path]) -> Iterator[Path]:
    """A recipe whose stages are complete, in a folder that every user may read."""
    folder = Path(tempfile.mkdtemp(prefix="kava-readable-"))
    folder.chmod(0o755)
    models = {name: shutil.copytree(path, folder / name) for name, path in tiny_models.items()}
    changes = {"train": {"max_steps": 2, "eval_steps": None}, "resample": {"materialize": True}}
    recipe: Path = write_recipe(folder, models, **changes)
    kava("run", recipe)
    for path in folder.rglob("*"):  # Whatever the mode of weights is: here it is the test's.
        path.chmod(0o755 if path.is_dir() else 0o644)
    yield recipe
    shutil.rmtree(folder)


def _names(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.lstat().st_mtime_ns for p in folder.rglob("*")}


def _checks(recipe: Path) -> list[list[Any]]:
    run = recipe.parent / "run"
    return [
        ["run", recipe],
        ["repair", recipe],
        ["verify", run / "teachers/big.zarr", run / "targets/big.zarr", run / "reference.zarr"],
        ["status", recipe],
        ["inspect", run / "teachers/big.zarr"],
    ]


def test_on_read_only_media_everything_is_checked(made: Path) -> None:
    run = made.parent / "run"
    before = _names(run)
    with mounted(run, "--bind", str(run)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(run)], check=True)
        for words in _checks(made):
            printed = kava(*words)
            assert "cannot" not in printed
        # A recipe that differs in nothing that is made, but in the file that is kept of it.
        kava("run", made, "-s", "extract.batch_tokens=77")
        assert "cannot write here: read-only file system" in kava("project", made, "-s", "project.heads=mean", code=2)
        assert "cannot write here" in kava("extract", made, "--force", code=2)
    assert _names(run) == before
    kava("run", made)
    assert _names(run).keys() == before.keys()


def _as_nobody(words: list[Any]) -> tuple[int, str]:
    """The command in a fork of this process that becomes another user."""
    with tempfile.TemporaryFile("w+") as file:
        child = os.fork()
        if not child:
            code = 3
            try:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
                sys.argv = ["kava", *map(str, words)]
                with redirect_stdout(file), redirect_stderr(file):
                    main()
                code = 0
            except SystemExit as error:
                code = int(error.code or 0)
            except BaseException:
                traceback.print_exc(file=file)
            finally:
                file.flush()
                os._exit(code)
        code = ended(child)
        file.seek(0)
        return code, file.read()


@as_root
def test_as_another_user(made: Path) -> None:
    before = _names(made.parent / "run")
    for words in _checks(made):
        kava(*words)  # So that everything is imported: another user need not be able to read the interpreter.
    for words in _checks(made):
        code, printed = _as_nobody(words)
        assert code == 0, printed
    assert _names(made.parent / "run") == before


@as_root
@pytest.mark.parametrize(
    ("hidden", "label"),
    [
        ("students/kv/kava.json", "train"),
        ("students", "train"),
        ("student/kava.json", "student"),
        ("student/model.safetensors", "reference"),
        ("teachers/big.zarr/zarr.json", "extract big"),
        ("teachers/big.zarr/parts", "extract big"),
        ("teachers/big.zarr/parts/00001/zarr.json", "extract big"),
        ("teachers", "extract big"),
        ("targets/big.zarr/parts/00000", "project big"),
        ("reference.zarr", "reference"),
    ],
)
def test_what_cannot_be_read_is_one_row(made: Path, hidden: str, label: str) -> None:
    kava("status", made, "--json")
    path = made.parent / "run" / hidden
    mode = path.stat().st_mode
    path.chmod(0o700 if path.is_dir() else 0o600)
    try:
        code, printed = _as_nobody(["status", made, "--json"])
    finally:
        path.chmod(mode)
    assert code == 0, printed
    rows = {row["stage"]: row for row in json.loads(printed)["stages"]}
    assert set(rows) == {"student", "extract big", "reference", "resample big", "project big", "train"}
    assert rows[label]["state"] == "blocked"
    assert "cannot be read: permission denied" in rows[label]["detail"]
    assert str(path) in rows[label]["detail"]
    untouched = {"student", "train"} - {label} if label not in ("student", "reference") else {"extract big"}
    if not hidden.startswith("targets"):
        assert any(rows[name]["state"] == "complete" for name in untouched)


@as_root
def test_reading_and_writing_are_told_apart(made: Path) -> None:
    kava("status", made)
    code, printed = _as_nobody(["extract", made, "--force"])
    assert code == 2
    assert "cannot write here: permission denied" in printed
    made.parent.joinpath("corpus.jsonl").chmod(0o600)
    try:
        code, printed = _as_nobody(["extract", made, "--force"])
    finally:
        made.parent.joinpath("corpus.jsonl").chmod(0o644)
    assert code == 2
    assert "corpus.jsonl: Permission denied" in printed
    assert "write" not in printed
