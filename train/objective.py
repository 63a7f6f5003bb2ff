"""What a batch is trained on: one forward pass, and every term of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..store import LOGITS
from ..tap import KVTap
from .data import IGNORED, Targets
from .logits import logit_loss, taught
from .losses import KVLoss, LossOptions
from .projector import StudentProjector
from .settings import LogitSettings, TrainSettings


class Pass(NamedTuple):
    """What one forward pass gives."""

    ce: torch.Tensor
    """Summed over predicted tokens."""
    tokens: torch.Tensor
    """Their number."""
    kv: dict[str, torch.Tensor]
    """See `KVLoss`; empty without one."""
    student: Mapping[str, Mapping[int, torch.Tensor]]
    """The tapped `keys` and `values`, as the student has them."""
    logits: torch.Tensor | None
    """Divergences `[n]` of the predicted tokens that the teacher has a distribution for; None if not asked for."""

    @property
    def divergence(self) -> torch.Tensor | None:
        """Their mean; 0 where there are none."""
        return None if self.logits is None else self.logits.sum() / max(len(self.logits), 1)


@dataclass(frozen=True)
class Objective:
    """The terms of the loss."""

    kv_loss: KVLoss | None
    logits: LogitSettings | None
    projector: StudentProjector | None
    """What the student's keys and values go through before they are compared; None to compare them as they are."""

    @classmethod
    def for_store(cls, store: Targets, settings: TrainSettings) -> Objective:
        """What the settings ask for, for the targets of a store.

        Raises:
            StageError: if they do not fit the store; see `KVLoss.for_store`.
        """
        if not settings.with_kv:
            return cls(None, settings.logits, None)
        loss = KVLoss.for_store(
            store,
            loss=settings.loss,
            key_weight=settings.key_weight,
            value_weight=settings.value_weight,
            layers=settings.layers,
            layer_weights=settings.layer_weights,
            segment_weights={str(name): weight for name, weight in settings.segment_weights.items()},
            options=LossOptions(settings.magnitude_weight, settings.relation_heads),
        )
        learned = settings.projector == "learned"
        return cls(
            loss, settings.logits, StudentProjector(loss.names, loss.layers, store.geometry) if learned else None
        )

    def __call__(self, model: Any, inputs: Mapping[str, Any], *, tapped: Any = None) -> Pass:
        """One forward pass, tapped if there is a KV loss.

        The model may run under autocast; what is compared is compared in float32.

        Args:
            model: what is called.
            inputs: a batch.
            tapped: the student's own model inside of `model`; None if that is it.
        """
        layers = self.kv_loss.layers if self.kv_loss else ()
        with KVTap(model if tapped is None else tapped, layers=layers) as tap:
            logits = model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs.get("attention_mask"),
                position_ids=inputs.get("position_ids"),
                use_cache=False,
            ).logits
        with torch.autocast(logits.device.type, enabled=False):
            return self._compare(logits, {"keys": tap.keys, "values": tap.values}, inputs)

    def _compare(
        self, logits: torch.Tensor, student: Mapping[str, Mapping[int, torch.Tensor]], inputs: Mapping[str, Any]
    ) -> Pass:
        labels = inputs["labels"][:, 1:]
        ce = F.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        divergences = None
        if self.logits is not None:
            known = taught(inputs["labels"], inputs["logit_ids"])
            cached = [inputs[name][:, :-1][known] for name in LOGITS]
            divergences = logit_loss(logits[:, :-1][known], *cached, temperature=self.logits.temperature)
        kv = {}
        if self.kv_loss is not None:
            target = {name: inputs[name] for name in self.kv_loss.names}
            own = student if self.projector is None else self.projector(student)
            kv = self.kv_loss(own, target, inputs["kv_mask"], inputs["segments"], inputs.get("sample_numbers"))
        return Pass(ce, (labels != IGNORED).sum(), kv, student, divergences)
