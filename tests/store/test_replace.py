"""Exchange of an output with its replacement: old or new at any moment, and after a kill at any file operation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kava.store import replace
from kava.store.replace import discarded_path, exchange, next_path, note_path, replace_with, settle


class Killed(BaseException):
    """What nobody catches."""


def _make(path: Path, kind: str, word: str) -> None:
    if kind == "file":
        path.write_text(word)
    elif kind == "link":
        target = path.parent / f"target-{word}"
        target.mkdir(exist_ok=True)
        (target / "file").write_text(word)
        path.symlink_to(target)
    else:
        path.mkdir()
        (path / "file").write_text(word)


def _read(path: Path) -> str:
    return (path / "file" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("kinds", [("file", "file"), ("folder", "folder"), ("folder", "link"), ("link", "link")])
def test_the_new_one_takes_the_place_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, str], can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(replace, "_renameat2", lambda: None)
    path = tmp_path / "out.zarr"
    _make(path, kinds[0], "old")
    _make(next_path(path), kinds[1], "new")
    replace_with(path, next_path(path))
    assert _read(path) == "new"
    assert [p.name for p in tmp_path.glob(".*")] == []
    assert all(_read(target) == target.name[7:] for target in tmp_path.glob("target-*"))


def test_names_are_exchanged_at_once_here(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    assert exchange(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "one").read_text() == "two"
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "one", tmp_path / "three")


@pytest.mark.parametrize("can_exchange", [True, False])
def test_killed_before_any_file_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool) -> None:
    outcomes = []
    for moment in range(100):
        folder = tmp_path / str(moment)
        folder.mkdir()
        path = folder / "out"
        _make(path, "folder", "old")
        _make(next_path(path), "folder", "new")
        with monkeypatch.context() as patch:
            left = [moment]

            def killing(function: Any, left: list[int] = left) -> Any:
                def called(*words: Any, **named: Any) -> Any:
                    if left[0] == 0:
                        raise Killed
                    left[0] -= 1
                    return function(*words, **named)

                return called

            for name in ("exchange", "remove", "fsync", "write_atomic"):
                patch.setattr(replace, name, killing(getattr(replace, name)))
            patch.setattr(Path, "rename", killing(Path.rename))
            patch.setattr(Path, "unlink", killing(Path.unlink))
            if not can_exchange:
                patch.setattr(replace, "_renameat2", lambda: None)
            try:
                replace_with(path, next_path(path))
                killed = False
            except Killed:
                killed = True
        if can_exchange:
            assert _read(path) in ("old", "new")
        settle(path)
        outcomes.append(_read(path))
        assert not note_path(path).exists()
        if outcomes[-1] == "old":
            assert _read(next_path(path)) == "new", "the rebuild goes on"
        else:
            assert not next_path(path).exists()
        if not killed:
            break
        replace_with(path, next_path(path)) if next_path(path).exists() else None
        assert _read(path) == "new"
        assert not note_path(path).exists()
    assert outcomes == sorted(outcomes, reverse=True)
    assert {"old", "new"} == set(outcomes)
    assert len(outcomes) > 5
    assert not discarded_path(path).exists()
