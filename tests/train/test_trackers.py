"""Trackers, where they are installed: runs that lie on this machine, with every number of the log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fixtures.stores import write_store

from kava.errors import BackendNotInstalledError, RecipeError
from kava.hub import tokenizer_digest
from kava.store import KVGeometry
from kava.train import TrainSettings, load_student, train_student


def _train(student: Path, tmp_path: Path, **changes: Any) -> list[dict[str, Any]]:
    geometry = KVGeometry(num_layers=3, num_key_value_heads=4, head_dim=8)
    digest = tokenizer_digest(load_student(student)[1])
    if not (tmp_path / "t.zarr").exists():
        write_store(tmp_path / "t.zarr", [9, 14, 6, 11], kind="target", geometry=geometry, tokenizer_digest=digest)
    from kava.store import KVStore

    settings = TrainSettings.model_validate(
        {"max_steps": 3, "alpha": 1.0, "batch_size": 2, "logging_steps": 1, **changes}
    )
    train_student(student, KVStore.open(tmp_path / "t.zarr"), tmp_path / "out", settings)
    return [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]


def test_tensorboard_is_what_is_asked_for(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    _train(tiny_models["student"], tmp_path, report_to=[])
    assert not (tmp_path / "out/tensorboard").exists()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_one_that_is_not_installed(
    tiny_models: dict[str, Path], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kava.train.trackers.find_spec", lambda name: None)
    with pytest.raises(BackendNotInstalledError, match=rf"train.report_to: {name} .*pip install 'kava\[{name}\]'"):
        _train(tiny_models["student"], tmp_path, report_to=["tensorboard", name])
    assert not (tmp_path / "out").exists()


def test_the_trainers_own_key_is_refused(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.arguments\.report_to: say it in train\.report_to"):
        _train(tiny_models["student"], tmp_path, arguments={"report_to": "wandb"})


def test_trackio_has_every_number(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    lines = _train(tiny_models["student"], tmp_path, report_to=["trackio"])
    from trackio.sqlite_storage import SQLiteStorage

    assert any(path.is_file() for path in (tmp_path / "trackio").rglob("*"))
    _same_numbers(SQLiteStorage.get_logs("kava", "out"), lines)


def test_wandb_has_every_number(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    lines = _train(tiny_models["student"], tmp_path, report_to=["wandb"])
    (path,) = (tmp_path / "out/wandb").glob("offline-run-*/*.wandb")
    written = path.read_bytes()
    for line in lines:
        for name in {"kv", "ce", "heldout_ce", "heldout_kv"} & line.keys():
            assert f"train/{name}".encode() in written
            assert json.dumps(line[name]).encode() in written


def _same_numbers(found: list[dict[str, Any]], lines: list[dict[str, Any]]) -> None:
    """Of every step, and of the evaluation after the last one."""
    for line in lines:
        for name in {"kv", "ce", "heldout_ce", "heldout_kv"} & line.keys():
            assert line[name] in [row.get(f"train/{name}") for row in found if row["train/global_step"] == line["step"]]
    assert any("heldout_kv" in line for line in lines)
