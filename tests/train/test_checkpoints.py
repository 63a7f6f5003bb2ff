"""Checkpoints are sealed: damaged ones are named and not used, the one before is; older ones go when a new one is safe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.stores import flip, tree, write_store

from kava.errors import DamagedStoreError
from kava.hub import tokenizer_digest
from kava.store import KVGeometry, KVStore
from kava.store.sealed import read_sealed
from kava.train import TrainSettings, load_student, train_student
from kava.train.checkpoints import begin_at, damaged_checkpoints, last_checkpoint, remove_older

Train = Callable[..., Path]


class _CutError(Exception):
    pass


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Train:
    """Trains for six steps with a checkpoint every two, or until it is cut off; returns the folder."""
    root = tmp_path_factory.mktemp("checkpoints")
    store: KVStore = write_store(
        root / "t.zarr",
        [9, 14, 6, 11, 8, 17],
        kind="target",
        geometry=KVGeometry(num_layers=3, num_key_value_heads=4, head_dim=8),
        tokenizer_digest=tokenizer_digest(load_student(tiny_models["student"])[1]),
    )[0]
    settings = TrainSettings.model_validate(
        {
            "max_steps": 6,
            "save_steps": 2,
            "alpha": "auto",
            "alpha_steps": 3,
            "batch_size": 2,
            "logging_steps": 1,
            "report_to": [],
            "projector": "learned",
            "arguments": {"save_total_limit": 2},
        }
    )

    def train(name: str, cut: int | None = None) -> Path:
        def on_step(step: int, total: int) -> None:
            if step == cut:
                raise _CutError

        try:
            train_student(tiny_models["student"], store, root / name, settings, on_step=on_step)
        except _CutError:
            assert cut is not None
        return root / name

    return train


@pytest.fixture(scope="module")
def cut(train: Train) -> Path:
    return train("cut", 5) / "checkpoints"


@pytest.fixture
def copy(cut: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cut, tmp_path / "checkpoints"))


FILES = (
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "training_args.bin",
    "projector.safetensors",
    "kava.json",
)


def test_a_checkpoint_names_all_its_files(cut: Path) -> None:
    assert sorted(path.name for path in cut.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    for checkpoint in cut.iterdir():
        record = read_sealed(checkpoint / "kava.json")
        assert {*record["files"], "kava.json"} == {path.name for path in checkpoint.iterdir()} >= {*FILES}
        assert {path.stat().st_mode & 0o777 for path in checkpoint.iterdir()} == {0o644}


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_byte_and_the_checkpoint_before_is_used(copy: Path, name: str) -> None:
    rng, path = np.random.default_rng(1), copy / "checkpoint-4" / name
    whole = path.read_bytes()
    for at in [0, len(whole) - 1, *rng.integers(0, len(whole), 10)]:
        flip(path, int(at), int(rng.integers(8)))
        assert str(path) in "".join(damaged_checkpoints(copy)), at
        checkpoint, step, damaged = begin_at(copy)
        assert (checkpoint, step) == (copy / "checkpoint-2", 2)
        assert [line.split(":")[0] for line in damaged] == [str(path)]
        (copy / "damaged-checkpoint-4").rename(copy / "checkpoint-4")
        path.write_bytes(whole)
    assert begin_at(copy) == (copy / "checkpoint-4", 4, [])


def test_one_without_a_record_is_incomplete_and_removed(copy: Path) -> None:
    (copy / "checkpoint-4/kava.json").unlink()
    (copy / "checkpoint-9").mkdir()
    assert begin_at(copy) == (copy / "checkpoint-2", 2, [])
    assert [path.name for path in copy.iterdir()] == ["checkpoint-2"]
    flip(copy / "checkpoint-2/optimizer.pt", 99)
    checkpoint, step, damaged = begin_at(copy)
    assert (checkpoint, step, len(damaged)) == (None, 0, 1)


def test_training_resumes_to_the_same_bits(
    train: Train, cut: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train("whole")
    other = shutil.copytree(cut.parent, cut.parent.with_name("other"))
    flip(other / "checkpoints/checkpoint-4/optimizer.pt", 2000)
    train("other")
    assert "checkpoint-4/optimizer.pt: damaged" in (printed := capsys.readouterr().err)
    assert "training resumes after step 2" in printed
    names = ("model.safetensors", "config.json", "tokenizer.json")
    assert all((other / name).read_bytes() == (whole / name).read_bytes() for name in names)
    assert not (other / "checkpoints").exists()
    warned = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines() if "warning" in line]
    assert len(warned) == 1


def test_older_ones_go_and_their_record_first(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("kava.train.checkpoints.remove", lambda path: seen.append(sorted(tree(path))))
    remove_older(copy, 1)
    assert len(seen) == 1
    assert "kava.json" not in seen[0]
    assert last_checkpoint(copy) == (copy / "checkpoint-4", 4)
    remove_older(copy, None)
    assert last_checkpoint(copy)[1] == 4


def test_a_record_that_is_no_record(copy: Path) -> None:
    state: dict[str, Any] = json.loads((copy / "checkpoint-4/kava.json").read_text())
    del state["digest"]
    (copy / "checkpoint-4/kava.json").write_text(json.dumps(state))
    with pytest.raises(DamagedStoreError, match="has no digest"):
        read_sealed(copy / "checkpoint-4/kava.json")
    assert begin_at(copy)[1] == 2
