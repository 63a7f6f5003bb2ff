"""Arms of a comparison: the same training with something of it changed, and everything that is compared kept equal.

An arm is what it overrides in the recipe's `train` section, and what it is trained on. All arms of a comparison take
the same number of steps over the same batches, from the same untrained student: a seed is the order of batches, and two
arms of one seed read the same samples in the same order.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from .settings import OF_KV, TrainSettings

TargetKind = Literal["true", "shuffled", "shuffled-tokens", "random"]

EQUAL: Final = (
    "name",
    "seed",
    "max_steps",
    "batch_size",
    "gradient_accumulation_steps",
    "pack_tokens",
    "group_by_length",
    "shuffle_window",
    "ce_segments",
    "eval_steps",
    "save_steps",
)
"""Keys of `train` that are the same in all arms: otherwise they would not be equal, or not measured alike."""

EQUAL_ARGUMENTS: Final = (
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "data_seed",
    "eval_steps",
    "eval_strategy",
    "eval_delay",
    "save_steps",
    "save_strategy",
)
"""Of `train.arguments`, the same: they win over what the keys say."""


class NeedsError(ValueError):
    """An arm needs what the `train` section, as it is now, does not have."""


@dataclass(frozen=True)
class _Kind:
    """A built-in arm."""

    overrides: Mapping[str, Any]
    targets: TargetKind = "true"
    kv: bool = True
    """Whether it has a KV loss."""
    logits: bool = False
    """Whether it has a loss on cached logits."""


ARMS: Final[Mapping[str, _Kind]] = {
    "none": _Kind({"alpha": 0}, kv=False),
    "kv": _Kind({}),
    "shuffled": _Kind({}, targets="shuffled"),
    "shuffled-tokens": _Kind({}, targets="shuffled-tokens"),
    "random": _Kind({}, targets="random"),
    "keys": _Kind({"value_weight": 0}),
    "values": _Kind({"key_weight": 0}),
    "logits": _Kind({"alpha": 0}, kv=False, logits=True),
    "kv+logits": _Kind({}, logits=True),
}
"""Arms by name; `kv` is what the recipe's `train` section says, without logits."""


@dataclass(frozen=True)
class Arm:
    """One arm."""

    name: str
    targets: TargetKind
    overrides: dict[str, Any]
    """Of the recipe's `train` section."""

    def settings(self, base: TrainSettings, seed: int, eval_steps: int) -> TrainSettings:
        """How it is trained.

        Args:
            base: the recipe's.
            seed: of the order of batches.
            eval_steps: how often held-out cross-entropy is measured.
        """
        stated = _stated(base) | self.overrides
        if stated.get("alpha") == 0:
            stated = {key: value for key, value in stated.items() if key not in OF_KV}
        # A plus is well in an arm's name, not in a student's.
        fixed = {"name": run_name(self.name, seed), "seed": seed, "eval_steps": eval_steps}
        # As strict as the recipe, where `true` is no number.
        return TrainSettings.model_validate_json(json.dumps(stated | fixed), strict=True)


class CompareSettings(BaseModel):
    """Which arms are compared, and over which seeds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    arms: dict[str, dict[str, Any]] = Field(default={"none": {}, "kv": {}, "shuffled": {}}, min_length=2)
    """By name; what each overrides in the `train` section, and `targets`: what it is trained on."""
    seeds: list[NonNegativeInt] = Field(default=[0, 1, 2], min_length=1)
    """Of the order of batches."""
    baseline: str = "none"
    """The arm that others are compared with, and whose final cross-entropy they are to reach."""
    eval_steps: PositiveInt | None = None
    """How often held-out cross-entropy is measured; None for a twentieth of `train.max_steps`."""

    @field_validator("arms", mode="before")
    @classmethod
    def _names_alone(cls, arms: Any) -> Any:
        """A list of names, or of names with what they override, is a mapping too."""
        if not isinstance(arms, list):
            return {name: {} if over is None else over for name, over in arms.items()} if _is_mapping(arms) else arms
        found: dict[str, Any] = {}
        for entry in arms:
            if not isinstance(entry, str) and not (_is_mapping(entry) and len(entry) == 1):
                raise ValueError(f"an arm is a name, or a name with what it overrides, not {entry!r}")
            name, over = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
            if name in found:
                raise ValueError(f"arm {name!r} is there twice")
            found[name] = {} if over is None else over
        return found

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is there twice: that is the same training twice")
        return seeds

    @model_validator(mode="after")
    def _named_well(self) -> CompareSettings:
        for name, overrides in self.arms.items():
            if not name.replace("-", "").replace("_", "").replace("+", "").replace(".", "").isalnum():
                raise ValueError(f"arms: {name!r} must be letters, digits, '.', '-', '+' and '_': it names files")
            if name[0] in ".-+":
                raise ValueError(f"arms: {name!r} must begin with a letter or a digit")
            if name not in ARMS and not overrides:
                near = difflib.get_close_matches(name, ARMS, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"built in are {', '.join(ARMS)}"
                raise ValueError(f"arms: {name!r} overrides nothing and is not built in; {hint}")
        if self.baseline not in self.arms:
            raise ValueError(f"baseline: {self.baseline!r} is none of the arms ({', '.join(self.arms)})")
        return self

    def resolve(self, base: TrainSettings) -> list[Arm]:
        """The arms of a recipe with this `train` section.

        Raises:
            ValueError: if one overrides what must be equal or what there is not, or cannot be had of this section.
        """
        return [_resolve(name, overrides, base) for name, overrides in self.arms.items()]

    def possible(self, base: TrainSettings) -> list[Arm]:
        """Those of the arms that can be had of this `train` section, which an override may have changed for once.

        Raises:
            ValueError: if one overrides what must be equal or what there is not.
        """
        found = []
        for name, overrides in self.arms.items():
            with suppress(NeedsError):
                found.append(_resolve(name, overrides, base))
        return found

    def steps_between(self, base: TrainSettings) -> int:
        """How many steps lie between two held-out evaluations."""
        return self.eval_steps or base.eval_steps or max(1, base.max_steps // 20)


def run_name(arm: str, seed: int) -> str:
    """The folder of one training."""
    return f"{arm.replace('+', '-and-')}-{seed}"


def _resolve(name: str, stated: dict[str, Any], base: TrainSettings) -> Arm:
    overrides = dict(stated)
    kind = ARMS.get(name)
    targets = overrides.pop("targets", "true" if kind is None else kind.targets)
    known = [*(key for key in TrainSettings.model_fields if key not in EQUAL), "targets"]
    for key in overrides:
        if key in EQUAL:
            raise ValueError(f"compare.arms.{name}.{key}: is the same in all arms; set it in the train section")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"valid here: {', '.join(known)}"
            raise ValueError(f"unknown key 'compare.arms.{name}.{key}'; {hint}")
    _check_arguments(name, overrides.get("arguments", base.arguments), base.arguments)
    if targets not in get_args(TargetKind):
        raise ValueError(f"compare.arms.{name}.targets: {targets!r} is none of {', '.join(get_args(TargetKind))}")
    if kind is not None:
        overrides = {**kind.overrides, **overrides}
        if not kind.logits:
            overrides = {"logits": None, **overrides}
        elif overrides.get("logits", _stated(base).get("logits")) is None:
            raise NeedsError(f"compare.arms: {name} needs train.logits, the loss on the teacher's cached logits")
        if kind.kv and base.alpha == 0 and "alpha" not in overrides:
            raise NeedsError(f"compare.arms: {name} needs train.alpha above 0, or an alpha of its own")
    arm = Arm(name, targets, overrides)
    arm.settings(base, 0, 1)
    return arm


def _check_arguments(name: str, stated: Any, base: Mapping[str, Any]) -> None:
    """Refuses `arguments` of an arm, which stand in the place of the recipe's, if it would not be equal any more."""
    if not isinstance(stated, dict):  # What it must be is told when it is taken up.
        return
    absent = object()
    for key in EQUAL_ARGUMENTS:
        if stated.get(key, absent) != base.get(key, absent):
            missing = "" if key in stated else ", which an arm's own arguments must repeat"
            raise ValueError(
                f"compare.arms.{name}.arguments.{key}: is the same in all arms; set it in train.arguments{missing}"
            )


def _stated(base: TrainSettings) -> dict[str, Any]:
    return base.model_dump(mode="json", exclude_unset=True)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)
