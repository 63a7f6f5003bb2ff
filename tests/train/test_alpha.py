from __future__ import annotations

import math

import pytest
import torch
from fixtures.models import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from kava.tap import KVTap
from kava.train.alpha import AutoAlpha, gradient_norms, gradients_of, schedule_factor
from kava.train.settings import AlphaSchedule, TrainSettings


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ({"kind": "constant"}, [1, 1, 1, 1, 1]),
        ({"kind": "warmup", "steps": 4}, [0.25, 0.5, 0.75, 1, 1]),
        ({"kind": "linear_decay", "steps": 4}, [1, 0.75, 0.5, 0.25, 0]),
        ({"kind": "linear_decay"}, [1, 0.8, 0.6, 0.4, 0.2]),
    ],
)
def test_schedules(schedule: dict[str, object], factors: list[float]) -> None:
    found = [schedule_factor(AlphaSchedule.model_validate(schedule), step, 5) for step in range(5)]
    assert found == pytest.approx(factors)


def test_norms_are_those_of_the_gradients_of_shared_weights() -> None:
    """Against two backward passes of their own; a gradient that is there already stays."""
    model = tiny_model("llama", layers=3)
    ids = torch.arange(12).view(2, 6)

    def terms() -> tuple[torch.Tensor, torch.Tensor]:
        with KVTap(model, layers=[0, 1]) as tap:
            logits = model(input_ids=ids, use_cache=False).logits
        return logits.square().mean(), (tap.keys[0] - 1).square().mean() + tap.values[1].abs().mean()

    gradients = []
    for which in (0, 1):
        model.zero_grad()
        terms()[which].backward()  # type: ignore[no-untyped-call]
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    shared = gradients[0].keys() & gradients[1].keys()
    assert "model.layers.0.self_attn.k_proj.weight" in shared
    assert not {"lm_head.weight", "model.layers.2.self_attn.k_proj.weight"} & shared
    wanted = [math.sqrt(sum(float(side[n].double().square().sum()) for n in shared)) for side in gradients]
    found = gradient_norms(*terms(), gradients_of(list(model.parameters())))
    assert [float(norm) for norm in found] == pytest.approx(wanted, rel=1e-5)
    assert all(torch.equal(p.grad, gradients[1][n]) for n, p in model.named_parameters() if p.grad is not None)


@settings(deadline=None)
@given(share=st.floats(0.01, 10), ratios=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8))
def test_alpha_makes_the_share(share: float, ratios: list[float]) -> None:
    """Exactly for one batch; for several the geometric mean, however the gradients are scaled."""
    auto = AutoAlpha(share, steps=8)
    assert auto.alpha == 0
    auto.update(1.0, 0.0)
    assert auto.alpha == 0
    for ratio in ratios:
        auto.update(3.0 * ratio, 3.0)
    mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
    assert auto.alpha == pytest.approx(share * mean)


def test_later_measurements_move_it_slowly() -> None:
    auto = AutoAlpha(0.5, steps=4)
    for _ in range(4):
        auto.update(1.0, 1.0)
    auto.update(16.0, 1.0)
    assert auto.alpha == pytest.approx(0.5 * 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"alpha": "sometimes"},
        {"alpha": float("nan")},
        {"alpha": [1]},
        {"kv_share": 0},
        {"alpha_schedule": {"kind": "step"}},
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        TrainSettings.model_validate(changes)
