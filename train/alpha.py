"""The weight of the KV loss: a schedule, and a weight found from the gradients of both terms.

A KV loss says little by its size: with a weight of 1 it can have a thousandth of the cross-entropy's gradient, or drown
it. `gradient_norms` measures what counts, and `AutoAlpha` turns the measure into a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .settings import AlphaSchedule


def schedule_factor(schedule: AlphaSchedule, step: int, max_steps: int) -> float:
    """What alpha is multiplied with in the step after `step` finished ones: in `[0, 1]`.

    `warmup` rises from `1 / steps` to 1, reached in step number `steps`; `linear_decay` falls from 1 to 0 and stays.
    """
    steps = schedule.steps or max_steps
    if schedule.kind == "warmup":
        return min(1.0, (step + 1) / steps)
    if schedule.kind == "linear_decay":
        return max(0.0, 1 - step / steps)
    return 1.0


Gradients = Callable[[torch.Tensor], Sequence[torch.Tensor | None]]
"""The gradient of a scalar with regard to each of some parameters, None where there is none; the graph stays."""


def gradients_of(parameters: Sequence[torch.nn.Parameter]) -> Gradients:
    """With regard to these parameters, of which frozen ones are skipped; gradients that are there already stay."""
    trainable = [p for p in parameters if p.requires_grad]
    return lambda term: torch.autograd.grad(term, trainable, retain_graph=True, allow_unused=True)


def gradient_norms(ce: torch.Tensor, kv: torch.Tensor, gradients: Gradients) -> tuple[torch.Tensor, torch.Tensor]:
    """Euclidean norms of the gradients of both terms, over the trainable parameters that both of them reach.

    The language-model head and layers behind the last tapped one have a gradient from the cross-entropy alone and are
    left out. Two backward passes.

    Args:
        ce: the mean cross-entropy of a batch, a scalar.
        kv: the unweighted KV loss of the same batch, a scalar.
        gradients: of the student's parameters.

    Returns:
        The norms for `ce` and `kv`, float64 scalars.
    """
    of_ce, of_kv = torch.zeros(2, dtype=torch.float64, device=ce.device)
    for one, two in zip(_squares(gradients(ce)), _squares(gradients(kv)), strict=True):
        if one is not None and two is not None:
            of_ce, of_kv = of_ce + one, of_kv + two
    return of_ce.sqrt(), of_kv.sqrt()


def _squares(gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The squared norm of each gradient; None where there is none."""
    return [
        None if g is None else torch.linalg.vector_norm(g.detach(), dtype=torch.float32).double().square()
        for g in gradients
    ]


@dataclass
class AutoAlpha:
    """Alpha such that the KV gradient's norm is a given share of the cross-entropy's.

    `alpha = kv_share * exp(mean log(|g_ce| / |g_kv|))`. The mean is over all measurements while there are at most
    `steps` of them, and from then on a moving one in which each new measurement has weight `1 / steps`: one odd batch
    moves it little, and logarithms keep it from being led by the largest.
    """

    kv_share: float
    steps: int
    log_ratio: float = 0.0
    measured: int = 0

    def update(self, ce_norm: float, kv_norm: float) -> None:
        """Takes in one measurement; one without a gradient on either side says nothing, and changes nothing."""
        if ce_norm > 0 and kv_norm > 0:
            self.measured += 1
            self.log_ratio += (math.log(ce_norm / kv_norm) - self.log_ratio) / min(self.measured, self.steps)

    @property
    def alpha(self) -> float:
        """The weight; 0 before the first batch that has a KV gradient."""
        return self.kv_share * math.exp(self.log_ratio) if self.measured else 0.0
