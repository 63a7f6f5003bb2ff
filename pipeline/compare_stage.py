"""The trainings of a comparison: one stage for each arm and seed, in a folder of its own below `compare/`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..errors import KavaError, RecipeError, StageError
from ..store import Split, digest_json
from ..store.files import write_atomic
from ..store.sealed import write_record
from ..train.arms import Arm, run_name
from ..train.settings import TrainSettings
from .comparison import arms_of, compare_settings
from .places import read_record
from .run import Run
from .stage import Status
from .stages import TrainStage, sealed_of

if TYPE_CHECKING:
    from ..train.data import Targets

SUMMARY: Final = "compare.json"
"""Below `compare/`: what the trainings say of each other."""


@dataclass
class ArmStage(TrainStage):
    """One arm trained with one seed, and its student on the held-out samples."""

    arm: Arm | None = None
    seed: int = 0

    name = "compare"

    @property
    def label(self) -> str:
        """For people."""
        return f"compare {self._arm.name} seed {self.seed}"

    @property
    def output(self) -> Path:
        """The trained student's folder."""
        return self.run.compare_dir / run_name(self._arm.name, self.seed)

    @property
    def settings(self) -> TrainSettings:
        """The recipe's, with what the arm overrides."""
        base = self.run.recipe.train
        return self._arm.settings(base, self.seed, compare_settings(self.run).steps_between(base))

    def key(self) -> str:
        """What determines it: as for any student, and what became of the targets."""
        found = super().key()
        return found if self._arm.targets == "true" else digest_json([found, self._arm.targets])

    def targets(self) -> Targets:
        """The true targets, or the control made of them."""
        from ..train.controls import TARGETS

        return TARGETS[self._arm.targets](super().targets())

    def inspect(self) -> Status:
        """Compares the record in the folder with the recipe."""
        from ..train.compare import HELDOUT

        status = super().inspect()
        if status.state == "complete" and HELDOUT not in self.must_exist(read_record(self.building))["files"]:
            return Status("partial", "trained, not measured yet")
        return status

    def must_exist(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record without the measurement of the held-out samples, if that is missing."""
        from ..train.compare import HELDOUT

        if (self.building / HELDOUT).exists():
            return record
        return record | {"files": {name: entry for name, entry in record["files"].items() if name != HELDOUT}}

    def make(self, scheduler: str | None) -> str:
        """Trains, or goes on, and measures."""
        from ..train.compare import HELDOUT

        line = super().make(scheduler) if super().inspect().state != "complete" else "trained before"
        store = super().targets()
        record = read_record(self.building) | {"arm": self._arm.name, "seed": self.seed}
        record["train_samples"] = digest_json(store.indices(Split.TRAIN))
        _measure(self.building, store, self.settings).save(self.building / HELDOUT)
        write_record(self.building, record, sealed_of(self.building))
        return line

    @property
    def _arm(self) -> Arm:
        assert self.arm is not None
        return self.arm


def arm_stages(run: Run, arms: list[str] | None = None, seeds: list[int] | None = None) -> list[ArmStage]:
    """One stage for each arm and seed; all seeds of an early one come late, so that what is finished can be compared.

    Args:
        run: with a `compare` section.
        arms: only these, by name.
        seeds: only these.

    Raises:
        RecipeError: if an arm or a seed is not in the section.
    """
    settings, known = compare_settings(run), arms_of(run)
    for name in arms or []:
        if name not in settings.arms:
            raise RecipeError(f"--arm {name}: there is no such arm, only {', '.join(settings.arms)}")
    for seed in seeds or []:
        if seed not in settings.seeds:
            raise RecipeError(f"--seed {seed}: it is none of compare.seeds ({', '.join(map(str, settings.seeds))})")
    return [
        ArmStage(run, arm=arm, seed=seed)
        for seed in settings.seeds
        for arm in known
        if (not arms or arm.name in arms) and (not seeds or seed in seeds)
    ]


def check_arms(run: Run, stages: list[ArmStage]) -> None:
    """Finds out before the first training what would be found out after it, or when its arm's turn has come.

    Raises:
        StageError: if nothing is held out, so that nothing could be compared, or an arm names a teacher that there is
            not.
        StoreNotFoundError: if an arm's targets are not made yet.
    """
    names = [run.teacher_of(stage.settings) for stage in stages]
    _ = run.student_source  # What is to be made first is told first.
    for name in dict.fromkeys(names):
        store = run.open_target(name)
        if not store.missing_parts() and not store.indices(Split.HELDOUT):
            raise StageError(
                f"{store.path}: no sample of it is held out, so there is nothing to compare on; set corpus.heldout, "
                "and kava run makes again what depends on it"
            )


def save_summary(run: Run) -> dict[str, Any]:
    """Compares what is finished, and writes `compare/compare.json`.

    A training that is stale or not finished is not among what is compared, but among what is missing.

    Raises:
        StageError: if nothing is finished, or trainings do not compare.
    """
    from ..train.compare import summarise

    trained = list(_finished(run))
    if not trained:
        raise StageError(f"{run.compare_dir}: no training of the comparison is finished; kava compare")
    found = summarise(trained, arms_of(run), compare_settings(run))
    provenance: dict[str, Any] = {name: read(run) for name, read in _MADE_OF.items()}
    provenance["versions"] = run.open_target(run.train_teacher).manifest.versions
    summary = {"train": run.recipe.train.model_dump(mode="json"), **found, "provenance": provenance}
    write_atomic(run.compare_dir / SUMMARY, json.dumps(summary, indent=1).encode())
    return summary


_MADE_OF: Final[dict[str, Callable[[Run], str]]] = {
    "student": lambda run: run.student_key,
    "corpus": lambda run: run.corpus.digest,
    "targets": lambda run: run.open_target(run.train_teacher).manifest.fingerprint,
}


def outdated(run: Run, summary: dict[str, Any]) -> list[str]:
    """What of a run is not what a summary was made of: keys of its recipe, and `student`, `corpus` and `targets`.

    What cannot be told, because it is not on this machine, is not among them.
    """
    try:
        then = TrainSettings.model_validate(summary["train"]).determining()
    except ValueError:  # Of another version, with other keys.
        then = dict(summary["train"])
    now = run.recipe.train.determining()
    keys = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key) and key != "seed")
    found = [f"train.{key}" for key in keys]
    if (settings := run.recipe.compare) is not None:
        arms = {a.name: [a.targets, json.loads(json.dumps(a.overrides))] for a in settings.possible(run.recipe.train)}
        known = {name: [arm["targets"], arm["overrides"]] for name, arm in summary["arms"].items()}
        absent = {name for name, _ in summary["missing"]}
        if any(arms.get(name) != how for name, how in known.items()) or arms.keys() - known.keys() - absent:
            found.append("compare.arms")
        found += [f"compare.{key}" for key in ("seeds", "baseline") if getattr(settings, key) != summary[key]]
    for name, read in _MADE_OF.items():
        with suppress(KavaError):
            if read(run) != summary["provenance"][name]:
                found.append(name)
    return found


def _finished(run: Run) -> Iterator[Any]:
    from ..train.compare import Trained

    for stage in arm_stages(run):
        if stage.status().state == "complete":
            assert stage.arm is not None
            record = read_record(stage.output)
            kept = {name: record.get(name) for name in ("key", "targets", "alpha", "steps", "train_samples")}
            yield Trained.load(stage.arm.name, stage.seed, stage.output, kept)


def _measure(folder: Path, store: Targets, settings: TrainSettings) -> Any:
    """The student in a folder on the held-out samples, in float32 and on the accelerator if there is one."""
    from ..train.heldout import evaluate_heldout
    from ..train.student import load_student, padding

    model, tokenizer = load_student(folder, dtype="float32", device="auto")
    return evaluate_heldout(
        model,
        store,
        pad_token_id=padding(tokenizer),
        ce_segments=settings.ce_segments,
        batch_size=settings.batch_size,
    )
