"""What trained arms say of each other: from each training's held-out samples and its log to one JSON.

A difference is one arm's held-out cross-entropy less another's, in nats per token: below zero the first is better. It
is taken sample by sample, mean over the seeds that both arms have.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..errors import StageError
from ..store.safe_json import LOG_BYTES, read_json_lines
from .arms import Arm, CompareSettings
from .heldout import Heldout
from .statistics import Array, bootstrap_interval, mean_over_seeds, sign_test, steps_to

HELDOUT: Final = "heldout.json"
"""In a training's folder: its student on the held-out samples."""


@dataclass(frozen=True)
class Trained:
    """One finished training of a comparison."""

    arm: str
    seed: int
    folder: Path
    heldout: Heldout
    curve: list[tuple[int, float]]
    """Step and held-out cross-entropy, while it was trained."""
    record: dict[str, Any]
    """What is known of how it was made."""

    @classmethod
    def load(cls, arm: str, seed: int, folder: Path, record: dict[str, Any]) -> Trained:
        """Reads a training's folder."""
        rows = read_log(folder)
        curve = {int(row["step"]): float(row["heldout_ce"]) for row in rows if "heldout_ce" in row}
        return cls(arm, seed, folder, Heldout.load(folder / HELDOUT), sorted(curve.items()), record)

    @property
    def ce(self) -> float:
        """Held-out cross-entropy at the end, in nats per token."""
        return self.heldout.metrics["ce"]


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a training's log."""
    path = folder / "metrics.jsonl"
    return read_json_lines(path, LOG_BYTES) if os.path.lexists(path) else []


def summarise(trained: Sequence[Trained], arms: Sequence[Arm], settings: CompareSettings) -> dict[str, Any]:
    """The comparison, for JSON.

    Args:
        trained: those that are finished; any of the arms and seeds may be missing yet.
        arms: all arms, in order.
        settings: of the comparison.

    Returns:
        `arms`: for each that has a training, its settings, `runs`, the metrics' means and 95 % intervals over seeds,
        that of `ce` over held-out samples, the mean held-out curve, KV errors per layer, and `steps_to_baseline` of
        each seed. `curve_steps`: the steps at which every training was measured, which mean curves and
        `steps_to_baseline` are of: an arm that was looked at more often would reach a level earlier by that alone.
        `differences`: of each arm from each other, see `difference`. `missing`: arms and seeds that are not trained
        yet.

    Raises:
        StageError: if two trainings were not measured on the same samples.
    """
    _check_equal(trained)
    by_arm = {arm.name: [t for t in trained if t.arm == arm.name] for arm in arms}
    # From the curve too: that was measured in the precision of training, as the curves that are to reach it.
    levels = {t.seed: t.curve[-1][1] for t in by_arm[settings.baseline] if t.curve}
    steps = common_steps(trained)
    found: dict[str, Any] = {}
    for arm in arms:
        if runs := sorted(by_arm[arm.name], key=lambda t: t.seed):
            found[arm.name] = {"targets": arm.targets, "overrides": arm.overrides, **_of_arm(runs, levels, steps)}
    done = {(t.arm, t.seed) for t in trained}
    missing = [[arm.name, seed] for arm in arms for seed in settings.seeds if (arm.name, seed) not in done]
    pairs = [difference(by_arm[a], by_arm[b]) for a, b in itertools.permutations(found, 2)]
    return {
        "baseline": settings.baseline,
        "seeds": settings.seeds,
        "heldout_samples": len(trained[0].heldout.sample_ids) if trained else 0,
        "curve_steps": steps,
        "arms": found,
        "differences": [pair for pair in pairs if pair is not None],
        "missing": missing,
    }


def difference(ours: Sequence[Trained], theirs: Sequence[Trained]) -> dict[str, Any] | None:
    """One arm's held-out cross-entropy less another's; None if they have no seed in common.

    Returns:
        `arm`, `against`, `seeds`; `ce`, the difference in nats per token; `interval_samples`, its 95 % by a paired
        bootstrap over held-out samples, and `interval_seeds`, by Student's t over paired seeds; on how many samples the
        arm is `lower` or `higher`, and the sign test's `p`; each seed's difference in `by_seed`.
    """
    first, second = {t.seed: t for t in ours}, {t.seed: t for t in theirs}
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    tokens = np.asarray(first[seeds[0]].heldout.tokens, dtype=np.float64)
    nats = _mean_nats([first[s] for s in seeds]) - _mean_nats([second[s] for s in seeds])
    by_seed = [first[s].ce - second[s].ce for s in seeds]
    signs = sign_test(nats)
    return {
        "arm": ours[0].arm,
        "against": theirs[0].arm,
        "seeds": seeds,
        "ce": float(nats.sum() / tokens.sum()),
        "interval_samples": bootstrap_interval(nats, tokens),
        "interval_seeds": mean_over_seeds(by_seed).interval,
        "by_seed": by_seed,
        "lower": signs.lower,
        "higher": signs.higher,
        "p": signs.p,
    }


def common_steps(trained: Sequence[Trained]) -> list[int]:
    """The steps at which all were measured that have a curve, ascending; the last one is, however often each was."""
    curves = [{step for step, _ in t.curve} for t in trained if t.curve]
    return sorted(set.intersection(*curves)) if curves else []


def _of_arm(runs: list[Trained], levels: dict[int, float], steps: list[int]) -> dict[str, Any]:
    names = runs[0].heldout.metrics
    over_seeds = {name: asdict(mean_over_seeds([t.heldout.metrics[name] for t in runs])) for name in names}
    tokens = np.asarray(runs[0].heldout.tokens, dtype=np.float64)
    return {
        "runs": [
            {"seed": t.seed, "folder": str(t.folder), **t.record, "metrics": t.heldout.metrics, "curve": t.curve}
            for t in runs
        ],
        "metrics": over_seeds,
        "ce_interval_samples": bootstrap_interval(_mean_nats(runs), tokens),
        "curve": _mean_curve(runs, steps),
        "kv_error": {
            name: np.mean([t.heldout.errors[name] for t in runs], axis=0).tolist() for name in runs[0].heldout.errors
        },
        "steps_to_baseline": {
            str(t.seed): steps_to([point for point in t.curve if point[0] in steps], levels[t.seed])
            for t in runs
            if t.seed in levels
        },
    }


def _mean_nats(runs: Sequence[Trained]) -> Array:
    mean: Array = np.mean([np.asarray(t.heldout.nats, dtype=np.float64) for t in runs], axis=0)
    return mean


def _mean_curve(runs: Sequence[Trained], steps: Sequence[int]) -> list[dict[str, Any]]:
    """At these steps: the mean, and 95 % over seeds."""
    curves = [dict(t.curve) for t in runs if t.curve]
    found = ((step, mean_over_seeds([curve[step] for curve in curves])) for step in steps if curves)
    return [{"step": step, "ce": mean.mean, "interval": mean.interval} for step, mean in found]


def _check_equal(trained: Sequence[Trained]) -> None:
    """Refuses what is not a comparison: other samples, or other steps."""
    for other in trained[1:]:
        first = trained[0]
        for what, one, two in (
            ("held-out samples", first.heldout.sample_ids, other.heldout.sample_ids),
            ("predicted tokens", first.heldout.tokens, other.heldout.tokens),
            ("training samples", first.record.get("train_samples"), other.record.get("train_samples")),
            ("steps", first.record.get("steps"), other.record.get("steps")),
        ):
            if one != two:
                raise StageError(
                    f"{first.folder} and {other.folder} do not compare: they have other {what}; train them again "
                    "with kava compare --force"
                )
