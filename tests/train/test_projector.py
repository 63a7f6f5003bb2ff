"""The projector on the student's side: what it does, that it is learned, resumed and dropped, and what it can hide."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.stores import write_store
from safetensors.torch import load_file

from kava.hub import tokenizer_digest
from kava.store import KVGeometry, KVStore
from kava.train import TrainSettings, load_student, train_student
from kava.train.projector import StudentProjector

GEOMETRY = KVGeometry(num_layers=3, num_key_value_heads=4, head_dim=8)
Train = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> KVStore:
    digest = tokenizer_digest(load_student(tiny_models["student"])[1])
    path = tmp_path_factory.mktemp("targets") / "t.zarr"
    lengths = [9, 14, 6, 11, 8, 17, 5, 12, 10]
    store: KVStore = write_store(path, lengths, kind="target", geometry=GEOMETRY, tokenizer_digest=digest)[0]
    return store


@pytest.fixture
def train(targets: KVStore, tiny_models: dict[str, Path], tmp_path: Path) -> Train:
    """Trains with a learned projector, and gives the lines of the log."""

    def train(name: str, on_step: Any = None, **changes: Any) -> list[dict[str, Any]]:
        settings = {
            "max_steps": 4,
            "alpha": 1.0,
            "batch_size": 2,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "projector": "learned",
            **changes,
        }
        train_student(
            tiny_models["student"],
            targets,
            tmp_path / name,
            TrainSettings.model_validate(settings),
            on_step=on_step or (lambda step, total: None),
        )
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if "ce" in line or "warning" in line or "heldout_ce" in line]

    return train


def test_by_hand() -> None:
    """Every number of a token is mixed with all others of it in that layer, and with nothing else."""
    projector = StudentProjector(("values",), (2,), KVGeometry(num_layers=3, num_key_value_heads=2, head_dim=3))
    generator = torch.Generator().manual_seed(0)
    own = {"keys": {2: torch.zeros(1, 2, 2, 3)}, "values": {2: torch.randn(1, 2, 2, 3, generator=generator)}}
    assert torch.equal(projector(own)["values"][2], own["values"][2])
    assert projector.distances() == {"values_projector_2": 0}
    change = torch.randn(6, 6, generator=generator)
    with torch.no_grad():
        projector.changes["values_2"].copy_(change)
    found = projector({"values": {2: own["values"][2].bfloat16()}})["values"][2].detach()
    assert found.dtype == torch.float32
    for t in range(2):
        flat = own["values"][2][0, t].bfloat16().flatten().tolist()
        for n in range(6):
            wanted = flat[n] + sum(flat[m] * float(change[m, n]) for m in range(6))
            assert float(found[0, t].flatten()[n]) == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    (distance,) = projector.distances().values()
    assert float(distance) == pytest.approx((sum(x * x for x in change.flatten().tolist()) / 6) ** 0.5)


def test_it_begins_as_none_learns_and_is_dropped(train: Train, tmp_path: Path) -> None:
    with_it, without = train("learned", alpha=10), train("none", alpha=10, projector="none")
    assert with_it[0]["kv"] == without[0]["kv"]
    assert with_it[0]["keys_projector_0"] == 0
    distances = [line["values_projector_2"] for line in with_it if "ce" in line]
    assert sorted(set(distances)) == distances
    assert with_it[3]["kv"] < without[3]["kv"]
    assert [*load_file(tmp_path / "learned/model.safetensors")] == [*load_file(tmp_path / "none/model.safetensors")]
    assert not list((tmp_path / "learned").rglob("*projector*"))


def test_a_learning_rate_of_its_own(train: Train) -> None:
    slow, fast = (train(f"{rate}", projector_learning_rate=rate) for rate in (1e-6, 1e-2))
    assert fast[3]["keys_projector_1"] > 1000 * slow[3]["keys_projector_1"] > 0
    assert slow[0] == pytest.approx({**slow[0], "kv": fast[0]["kv"], "ce": fast[0]["ce"]})


@pytest.mark.parametrize("more", [{}, {"lora": {"r": 2}, "gradient_checkpointing": True}], ids=["full", "lora"])
def test_a_cut_training_ends_as_the_whole_one(train: Train, tmp_path: Path, more: dict[str, Any]) -> None:
    settings = {"save_steps": 2, "gradient_accumulation_steps": 2, "weight_decay": 0.1, "max_steps": 5, **more}

    def fall(step: int, total: int) -> None:
        if step == 4:
            raise RuntimeError("power")

    whole = train("whole", **settings)
    with pytest.raises(RuntimeError, match="power"):
        train("cut", on_step=fall, **settings)
    assert (tmp_path / "cut/checkpoints/checkpoint-2/projector.safetensors").is_file()
    again = train("cut", **settings)
    timed = {"tokens_per_second", "data_wait_share", "peak_memory_gib"}
    assert [{k: v for k, v in line.items() if k not in timed} for line in again] == [
        {k: v for k, v in line.items() if k not in timed} for line in whole
    ]
    models = [load_student(tmp_path / name)[0].state_dict() for name in ("whole", "cut")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_accumulated_gradients_are_those_of_one_batch(train: Train) -> None:
    """And of one step alone: what an earlier step left would move it further."""
    one = train("one", batch_size=6, projector_learning_rate=1e-2, arguments={"optim": "sgd"})
    two = train(
        "two", batch_size=2, gradient_accumulation_steps=3, projector_learning_rate=1e-2, arguments={"optim": "sgd"}
    )
    for line, other in zip(one[:4], two[:4], strict=True):
        for name in ("kv", "keys_projector_0", "values_projector_2"):
            assert line[name] == pytest.approx(other[name], rel=1e-4, abs=1e-9)


def test_the_spread_is_of_the_students_own_tensors(train: Train) -> None:
    """A student that stands still has the same spread, whatever its projector makes of it."""
    settings = {"learning_rate": 1e-30, "lr_scheduler": "constant"}
    with_it = train("learned", projector_learning_rate=1.0, **settings)
    without = train("none", projector="none", **settings)
    assert with_it[3]["kv"] != pytest.approx(without[3]["kv"], rel=0.1)
    for one, two in zip(with_it[:4], without[:4], strict=True):
        for name in (f"{side}_spread_{layer}" for side in ("keys", "values") for layer in range(3)):
            assert one[name] == pytest.approx(two[name], rel=1e-5)


def test_the_alarm_rings_in_a_collapse(train: Train) -> None:
    """Targets are noise: the student comes to say the same for every token, while its projector makes up for the size."""
    settings: dict[str, Any] = {"max_steps": 12, "learning_rate": 3e-2, "alpha": 100, "projector_learning_rate": 3e-2}
    spreads = [line["values_spread_1"] for line in train("quiet", collapse_threshold=0, **settings) if "ce" in line]
    assert min(spreads) < 0.7 * spreads[0]
    lines = train("loud", collapse_threshold=(spreads[0] * min(spreads)) ** 0.5, **settings)
    told = [line for line in lines if "values_spread_1 fell to" in line.get("warning", "")]
    assert told
    assert told[0]["step"] == next(n for n, s in enumerate(spreads, 1) if s < (spreads[0] * min(spreads)) ** 0.5)


def test_without_a_kv_loss_there_is_nothing_to_project() -> None:
    with pytest.raises(ValueError, match="projector: learned needs a KV loss"):
        TrainSettings.model_validate({"projector": "learned", "alpha": 0})
