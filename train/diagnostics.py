"""What the log says besides the loss: means between two logs, speed, memory, the spread of the student's tensors."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainerCallback

from ..errors import StageError
from .alpha import Gradients
from .ranks import Ranks


@dataclass
class Mean:
    """Running means of named scalars, each over the times it was added; reading them starts new ones."""

    sums: dict[str, torch.Tensor | float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def add(self, terms: Mapping[str, torch.Tensor | float], weight: float = 1.0) -> None:
        """Adds one value of each; tensors stay where they are until they are read."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * weight
            self.weights[name] = self.weights.get(name, 0.0) + weight

    def take(self, ranks: Ranks) -> dict[str, float]:
        """The means over all ranks, and a new beginning."""
        sums: dict[str, float] = {}
        weights: dict[str, float] = {}
        for found in ranks.gather(self.state()):
            for name, value in found["sums"].items():
                sums[name] = sums.get(name, 0.0) + value
                weights[name] = weights.get(name, 0.0) + found["weights"][name]
        self.sums, self.weights = {}, {}
        return {name: value / (weights[name] or 1.0) for name, value in sums.items()}

    def state(self) -> dict[str, dict[str, float]]:
        """For a checkpoint: numbers that JSON keeps exactly."""
        return {"sums": {name: float(value) for name, value in self.sums.items()}, "weights": dict(self.weights)}

    def load(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Goes on where `state` was taken."""
        self.sums, self.weights = dict(state["sums"]), dict(state["weights"])


class StepClock(TrainerCallback):  # type: ignore[misc]
    """How fast training goes, and how much of it is waiting for targets to be read.

    A step is from the moment its batches are asked for to the optimizer's update; evaluation, logs and checkpoints do
    not count.
    """

    def __init__(self) -> None:
        self.waited = self.worked = 0.0
        self.tokens = 0
        self._began = 0.0

    @staticmethod
    def now() -> float:
        """Seconds of a clock that only goes on."""
        return time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The batches are there."""
        self._began = self.now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The weights are updated."""
        self.worked += self.now() - self._began

    def take(self, ranks: Ranks) -> dict[str, float]:
        """`tokens_per_second` without padding, `data_wait_share` of the steps' time, `peak_memory_gib`.

        Tokens are of all ranks; waiting and memory of the one that has most. Memory is the device's, allocated by
        torch; on a CPU, the process's.
        """
        total = self.waited + self.worked
        waited, total, memory = ranks.max([self.waited, total, _peak_memory_bytes() / 2**30])
        (tokens,) = ranks.sum([self.tokens])
        found = {"peak_memory_gib": memory}
        if total > 0:
            found |= {"tokens_per_second": tokens / total, "data_wait_share": waited / total}
        self.waited, self.worked, self.tokens = 0.0, 0.0, 0
        return found


def _peak_memory_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check_gradient(student: Mapping[str, Mapping[int, torch.Tensor]]) -> None:
    """Refuses tapped tensors without a gradient: their loss would be finite, logged, and teach nothing.

    Args:
        student: `keys` and `values` by layer.

    Raises:
        StageError: naming the first.
    """
    for name, layers in student.items():
        for layer, tensor in layers.items():
            if not tensor.requires_grad:
                raise StageError(
                    f"train: the {name} of layer {layer} depend on no trainable weight, so that the KV loss cannot "
                    "teach them; leave the layer out of train.layers, or make more weights trainable"
                )


def not_finite(terms: Mapping[str, torch.Tensor], gradients: Gradients) -> list[str]:
    """The names of those terms whose gradient has an infinite norm, or none."""
    bad = []
    for name, term in terms.items():
        found = [g for g in gradients(term) if g is not None]
        if not torch.isfinite(torch.nn.utils.get_total_norm(found)):
            bad.append(name)
    return bad


def spread_ratio(student: torch.Tensor, target: torch.Tensor) -> float | None:
    """How much the student's tensor varies from token to token, over how much the target's does.

    The root of the ratio of variances over tokens, summed over heads and dimensions. What is the same for every token
    does not count: a student that has collapsed onto one vector has 0, however long that is.

    Args:
        student: `[n, h, d]`.
        target: `[n, h, d]`.

    Returns:
        None if the target does not vary, as in a batch with a single token.
    """
    if len(target) < 2:
        return None
    own, wanted = (t.detach().float().var(0, correction=0).sum() for t in (student, target))
    return float((own / wanted).sqrt()) if wanted > 0 else None


@dataclass
class CollapseAlarm:
    """Tells of keys or values whose spread ratio falls below a threshold that it was above before.

    A student with random weights begins below it; that is no collapse. Each is told once, and again only after it
    had recovered.
    """

    threshold: float
    above: set[str] = field(default_factory=set)

    def check(self, ratios: Mapping[str, float]) -> list[str]:
        """The names that have fallen since the last call."""
        fallen = sorted(name for name in self.above & ratios.keys() if ratios[name] < self.threshold)
        self.above -= set(fallen)
        self.above |= {name for name, ratio in ratios.items() if ratio >= self.threshold}
        return fallen
