"""Checkpoints of a run folder that came from elsewhere: they run no code and nothing waits for them."""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.command import seal_again
from fixtures.stores import write_store
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from kava.errors import DamagedStoreError, RetryLaterError, StageError
from kava.hub import tokenizer_digest
from kava.store import KVGeometry
from kava.train import TrainSettings, load_student, train_student
from kava.train.checkpoint_files import check_checkpoint


class _Code:
    """Unpickled, it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint as torch writes it in shards."""
    folder = tmp_path / "checkpoint-1"
    state = {
        "state": {"weight": {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 3, dtype=torch.bfloat16)}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": ["weight"], "foreach": None, "fused": True}],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_shards({"optimizer": state}, checkpoint_id=folder / "optimizer_0", no_dist=True)
    return folder


def test_what_torch_writes_in_shards_is_accepted(sharded: Path) -> None:
    check_checkpoint(sharded)


def test_metadata_that_runs_code_is_refused(sharded: Path, tmp_path: Path) -> None:
    metadata = sharded / "optimizer_0/.metadata"
    metadata.write_bytes(pickle.dumps(_Code(tmp_path / "ran")))
    with pytest.raises(StageError, match=r"\.metadata: refused: it names posix\.mkdir, which would run code"):
        check_checkpoint(sharded)
    assert not (tmp_path / "ran").exists()
    pickle.loads(metadata.read_bytes())
    assert (tmp_path / "ran").exists()  # The attack is real.


def test_a_value_that_runs_code_is_refused(sharded: Path, tmp_path: Path) -> None:
    folder = sharded / "optimizer_0"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index = next(index for index in metadata.storage_data if index.fqn == "optimizer.param_groups.0.lr")
    stream = io.BytesIO()
    torch.save(_Code(tmp_path / "ran"), stream)
    (folder / "other.distcp").write_bytes(stream.getvalue())
    place = metadata.storage_data[index]
    metadata.storage_data[index] = type(place)("other.distcp", 0, len(stream.getvalue()))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(StageError, match=r"refused: .*GLOBAL posix\.mkdir"):
        check_checkpoint(sharded)
    metadata.storage_data[index] = type(place)("../other.distcp", 0, 1)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(StageError, match="is no plain file of the checkpoint"):
        check_checkpoint(sharded)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("data", [b"", b"\x80\x05", b"cos\n", pickle.dumps({"a": 1}), b"junk"], ids=range(5))
def test_metadata_that_is_none_is_refused(sharded: Path, data: bytes) -> None:
    (sharded / "optimizer_0/.metadata").write_bytes(data)
    with pytest.raises(StageError, match="refused: "):
        check_checkpoint(sharded)


def test_a_pipe_or_a_link_in_a_checkpoint_is_refused(sharded: Path) -> None:
    pipe = sharded / "optimizer_0/x.distcp"
    os.mkfifo(pipe)
    with pytest.raises(DamagedStoreError, match="a named pipe where a regular file was written"):
        check_checkpoint(sharded)
    pipe.unlink()
    pipe.symlink_to("/etc")
    with pytest.raises(DamagedStoreError, match="a link where a regular file was written"):
        check_checkpoint(sharded)


@pytest.fixture
def train(tmp_path: Path, tiny_models: dict[str, Path]) -> Callable[[], None]:
    """Training of four steps that stops after the second one, with a checkpoint, the first time."""
    digest = tokenizer_digest(load_student(tiny_models["student"])[1])
    shape = {"kind": "target", "geometry": KVGeometry(num_layers=3, num_key_value_heads=4, head_dim=8)}
    store, _ = write_store(tmp_path / "t.zarr", [9, 14, 6, 11], tokenizer_digest=digest, **shape)
    settings = TrainSettings.model_validate({"max_steps": 4, "alpha": 1.0, "batch_size": 2, "save_steps": 1})

    def stop(step: int, total: int) -> None:
        if step == 2:
            raise RetryLaterError("stopped")

    def train() -> None:
        begun = (tmp_path / "out").exists()
        train_student(
            tiny_models["student"], store, tmp_path / "out", settings, on_step=(lambda *_: None) if begun else stop
        )

    with pytest.raises(RetryLaterError):
        train()
    return train


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_state_of_the_trainer_that_runs_code_is_refused(train: Callable[[], None], tmp_path: Path, name: str) -> None:
    (checkpoint,) = (tmp_path / "out/checkpoints").iterdir()
    torch.save(_Code(tmp_path / "ran"), checkpoint / name)
    seal_again(checkpoint)  # As an attacker would: the record fits what is there.
    with pytest.raises(StageError, match=rf"{name}: refused: .*GLOBAL posix\.mkdir"):
        train()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["trainer_state.json", "kava.json", "optimizer.pt", "model.safetensors"])
def test_a_pipe_in_a_checkpoint_does_not_stop_the_training_for_good(
    train: Callable[[], None], tmp_path: Path, name: str
) -> None:
    (checkpoint,) = (tmp_path / "out/checkpoints").iterdir()
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    train()
    assert (tmp_path / "out/model.safetensors").is_file()


def test_a_checkpoint_of_its_own_is_resumed(train: Callable[[], None], tmp_path: Path) -> None:
    train()
    assert (tmp_path / "out/model.safetensors").is_file()
