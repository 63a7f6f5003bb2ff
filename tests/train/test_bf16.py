"""bfloat16 autocast on a CPU: the student runs in bfloat16, and everything that is compared is compared in float32."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.models import tiny_model
from fixtures.stores import write_store

from kava.errors import RetryLaterError
from kava.hub import tokenizer_digest
from kava.store import KVGeometry
from kava.tap import KVTap
from kava.train import LOSSES, KVLoss, TrainSettings, load_student, train_student
from kava.train.objective import Objective
from kava.train.projector import StudentProjector

GEOMETRY = KVGeometry(num_layers=3, num_key_value_heads=2, head_dim=8)


@pytest.mark.parametrize("projector", [False, True], ids=["none", "learned"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_kv_loss_is_of_float32(name: str, projector: bool) -> None:
    """The same tapped bfloat16 numbers, compared under autocast and without any."""
    model = tiny_model("llama", layers=3, heads=4, kv_heads=2, head_dim=8)
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(14).view(2, 7)
    target = {side: torch.randn(2, 7, 3, 2, 8, generator=generator) for side in ("keys", "values")}
    mask = torch.rand(2, 7, generator=generator) < 0.8
    loss = KVLoss(name, 1, 1, (0, 1, 2), dict.fromkeys(target, (1.0, 1.0, 1.0)))
    learned = StudentProjector(loss.names, loss.layers, GEOMETRY) if projector else None
    if learned is not None:
        for change in learned.parameters():
            torch.nn.init.normal_(change, std=0.1)
    inputs = {
        "input_ids": ids,
        "labels": ids,
        "kv_mask": mask,
        "segments": torch.ones(2, 7, dtype=torch.uint8),
        **target,
    }
    with torch.autocast("cpu", torch.bfloat16):
        found = Objective(loss, None, learned)(model, inputs)
    assert {t.dtype for layers in found.student.values() for t in layers.values()} == {torch.bfloat16}
    own = {side: {n: t.float() for n, t in layers.items()} for side, layers in found.student.items()}
    wanted = loss(learned(own) if learned is not None else own, target, mask)
    assert found.kv["kv"].dtype == torch.float32
    for term, value in wanted.items():
        assert torch.equal(found.kv[term], value), term
    with torch.no_grad():
        exact = Objective(loss, None, learned)(model, inputs)
    torch.testing.assert_close(found.kv["kv"], exact.kv["kv"], rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(found.ce, exact.ce, rtol=2e-2, atol=1e-2)
    assert not torch.equal(found.ce, exact.ce), "autocast was on"


def test_gradients_are_finite_and_close_to_those_of_float32() -> None:
    model = tiny_model("llama", layers=3, heads=4, kv_heads=2, head_dim=8, scale=2.0)
    generator = torch.Generator().manual_seed(0)
    target = {side: torch.randn(2, 7, 3, 2, 8, generator=generator) for side in ("keys", "values")}
    loss = KVLoss("mse", 1, 1, (0, 1, 2), dict.fromkeys(target, (1.0, 1.0, 1.0)))
    gradients = []
    for enabled in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), KVTap(model) as tap:
            model(input_ids=torch.arange(14).view(2, 7), use_cache=False)
        loss({"keys": tap.keys, "values": tap.values}, target, torch.ones(2, 7, dtype=torch.bool))["kv"].backward()  # type: ignore[no-untyped-call]
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        gradients.append(torch.cat([g.flatten() for g in found.values()]))
        assert sum("k_proj" in n or "v_proj" in n for n in found) == 6
        assert gradients[-1].dtype == torch.float32
    assert gradients[0].isfinite().all()
    one, two = gradients
    assert torch.nn.functional.cosine_similarity(one, two, dim=0) > 0.999


def test_a_training_that_only_its_evaluation_was_left_of_is_evaluated_under_autocast_too(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    geometry = KVGeometry(num_layers=3, num_key_value_heads=4, head_dim=8)
    digest = tokenizer_digest(load_student(tiny_models["student"])[1])
    store, _ = write_store(
        tmp_path / "t.zarr", [9, 14, 6, 11], kind="target", geometry=geometry, tokenizer_digest=digest
    )

    def train(name: str, ask: int | None = None, *, bf16: bool = True) -> dict[str, float]:
        def on_step(step: int, total: int) -> None:
            if step == ask:
                os.kill(os.getpid(), signal.SIGTERM)

        settings = TrainSettings.model_validate({"max_steps": 2, "alpha": 1.0, "batch_size": 2, "bf16": bf16})
        return train_student(tiny_models["student"], store, tmp_path / name, settings, on_step=on_step).metrics

    whole = train("whole")
    with pytest.raises(RetryLaterError, match="after step 2"):
        train("cut", 2)
    assert train("cut") == whole
    assert train("exact", bf16=False)["ce"] not in (whole["ce"], pytest.approx(whole["ce"], rel=1e-7))


@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True, "lora": {"r": 4}}], ids=["plain", "lora"])
def test_a_training_is_close_to_that_in_float32(
    tiny_models: dict[str, Path], tmp_path: Path, more: dict[str, Any]
) -> None:
    geometry = KVGeometry(num_layers=3, num_key_value_heads=4, head_dim=8)
    digest = tokenizer_digest(load_student(tiny_models["student"])[1])
    store, _ = write_store(
        tmp_path / "t.zarr", [9, 14, 6, 11, 8, 17], kind="target", geometry=geometry, tokenizer_digest=digest
    )
    logs = []
    for bf16 in (True, False):
        settings = {
            "max_steps": 4,
            "alpha": 1.0,
            "batch_size": 2,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "bf16": bf16,
            **more,
        }
        train_student(tiny_models["student"], store, tmp_path / str(bf16), TrainSettings.model_validate(settings))
        lines = (tmp_path / str(bf16) / "metrics.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    for one, two in zip(*logs, strict=True):
        for name in {"ce", "kv", "keys_0", "values_2", "heldout_ce", "heldout_kv"} & one.keys():
            assert one[name] == pytest.approx(two[name], rel=2e-2)
            assert one[name] != two[name]
