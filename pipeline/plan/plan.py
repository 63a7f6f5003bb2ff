"""Before any time on a device: tokens, bytes, files, memory, hours, and what would make them fewer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from ...errors import CorpusError, HubUnreachableError, KavaError, StageError
from ...extract import Corpus
from ...store import CODECS, LOSSY, KVGeometry, KVStore
from ...store.files import size_of
from ..context import context_limit
from ..places import read_record
from ..recipe import Recipe, SelectSettings
from ..run import Run
from .memory import Memory, teacher_memory
from .probe import Probe, run_probe
from .stores import Counts, PlannedStore, planned_stores
from .students import PlannedWeights, planned_students

T = TypeVar("T")
_SLOTS: Final = 24
"""Slots of each sample in KaVa's runs, where the recipe states no number."""


@dataclass(frozen=True)
class Disk:
    """One file system."""

    path: str
    needed: int
    """Bytes still to be written."""
    free: int

    @property
    def fits(self) -> bool:
        """Whether it has room."""
        return self.needed <= self.free


@dataclass(frozen=True)
class Saving:
    """A change of the recipe that makes its stores smaller."""

    change: str
    bytes: int
    """Of all stores then."""
    saves: int


@dataclass
class Plan:
    """What a run will take."""

    run: Run
    corpus: Corpus | None = None
    geometries: dict[str, KVGeometry] = field(default_factory=dict)
    student: KVGeometry | None = None
    counts: Counts | None = None
    stores: list[PlannedStore] = field(default_factory=list)
    students: list[PlannedWeights] = field(default_factory=list)
    """Weights that are written beside the stores."""
    disks: list[Disk] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    savings: list[Saving] = field(default_factory=list)
    probe: Probe | None = None
    times: dict[str, float] = field(default_factory=dict)
    """Seconds by stage, from the probe."""
    break_even_epochs: float | None = None
    unreached: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What could not be found out, and what is planned with instead."""
    broken: list[str] = field(default_factory=list)
    """Why the recipe cannot be run as it is, apart from the room that it needs."""

    @property
    def bytes(self) -> int:
        """Of all stores."""
        return sum(store.size.bytes for store in self.stores)

    @property
    def refusals(self) -> list[str]:
        """Why it cannot be run as it is; empty if it can."""
        found = [
            f"{disk.path} has {human(disk.free)} free, {human(disk.needed)} are to be written: "
            f"{human(disk.needed - disk.free)} too little"
            for disk in self.disks
            if not disk.fits
        ]
        found += [
            f"teacher {m.teacher} needs about {human(m.needed)} of {m.device}, which has {human(m.available or 0)} "
            f"free: {human(m.needed - (m.available or 0))} too little"
            for m in self.memory
            if not m.fits
        ]
        return found


def make_plan(run: Run, *, sample: int | None = None, probe: bool = False, teachers: list[str] | None = None) -> Plan:
    """Works out what a run takes; nothing of it is made.

    Args:
        run: the run.
        sample: count the tokens of so many samples; None for all.
        probe: run every stage on a few samples, in a temporary folder, and measure.
        teachers: only the stores of these.

    Raises:
        KavaError: if `probe` is asked for and a stage fails.
    """
    plan, recipe = Plan(run), run.recipe

    def reach(what: str, find: Callable[[], T], instead: T | None = None) -> T | None:
        try:
            return find()
        except KavaError as error:
            if isinstance(error, HubUnreachableError):
                plan.unreached.append(error.name)
            else:
                plan.problems.append(f"{what}: {error}")
            return instead

    everyone = []
    for name, settings in recipe.teachers.items():
        wanted = teachers is None or name in teachers
        if not wanted and recipe.samples_per_part is not None:
            continue
        found = reach(name, lambda name=name: run.teacher_geometry(name), settings.geometry)  # type: ignore[misc]
        if found is not None:
            everyone.append(found)  # Parts are alike in all stores: the largest teacher sizes them.
            if wanted:
                plan.geometries[name] = found
    plan.student = reach("student", run.planned_student_geometry, recipe.student.geometry)
    plan.corpus = reach("corpus", lambda: _corpus(run, plan.problems))
    if plan.corpus is None or not plan.geometries:
        if probe:
            raise StageError("; ".join(plan.problems) or "a probe needs the corpus and the teachers")
        return plan
    counts = plan.counts = Counts(run, plan.corpus, sample, plan.problems)
    if probe:
        if recipe.extract.generate is not None and plan.corpus is run.prompts:
            raise StageError("a probe reads what the teacher wrote, which is not there yet; kava run --only generate")
        plan.probe = run_probe(run, plan.corpus, counts, list(plan.geometries))
        plan.problems += plan.probe.problems
    measured = plan.probe.bytes_per_token if plan.probe else None

    def stores(changed: Run) -> list[PlannedStore]:
        assert plan.corpus is not None
        return planned_stores(
            changed, plan.corpus, counts, plan.geometries, plan.student, everyone=everyone, measured=measured
        )

    planned = reach("stores", lambda: stores(run))
    if planned is None:
        return plan
    plan.stores = planned
    if plan.student is not None and recipe.student.model not in plan.unreached:
        plan.students = reach("weights of the student", lambda: planned_students(run)) or []
    plan.disks = _disks(plan)
    for name in plan.geometries:
        longest = counts.teacher(name).longest
        reach(f"context of {name}", lambda name=name: _tell_of_long_samples(plan, name))  # type: ignore[misc]
        if (memory := reach(f"memory of {name}", lambda n=name, t=longest: teacher_memory(run, n, t))) is not None:  # type: ignore[misc]
            plan.memory.append(memory)
    plan.savings = _savings(plan, stores)
    if plan.probe is not None:
        _times(plan)
    return plan


def _corpus(run: Run, problems: list[str]) -> Corpus:
    """The corpus, or before a teacher has written it its prompts alone."""
    try:
        return run.corpus
    except StageError as error:
        if run.recipe.extract.generate is None:
            raise
        problems.append(
            f"{error}; planned with the prompts alone: add up to "
            f"{run.recipe.extract.generate.max_new_tokens} tokens for each of them"
        )
        if not len(run.prompts):
            raise CorpusError(f"corpus {run.recipe.corpus.label}: no prompts") from None
        return run.prompts


def _tell_of_long_samples(plan: Plan, name: str) -> None:
    assert plan.counts is not None
    (most, limit), lengths = context_limit(plan.run, name), plan.counts.teacher(name).lengths
    if count := sum(length > most for length in lengths):
        line = f"{count} of {len(lengths)} samples are longer than the {most} tokens that {name} reads ({limit})"
        if plan.run.recipe.extract.too_long == "skip":
            plan.problems.append(f"{line}: they will be recorded as failed")
        elif f"teacher {name}" not in plan.counts.bounds and not _is_captured(plan.run, name):
            plan.broken.append(f"{line}: shorten them, or set extract.too_long: skip")


def _is_captured(run: Run, name: str) -> bool:
    path = run.target_path(name) if run.recipe.extract.keep == "target" else run.teacher_path(name)
    try:
        return not KVStore.open(path).missing_parts()
    except KavaError:
        return False


def _disks(plan: Plan) -> list[Disk]:
    """Each file system that is written to, with what is not there yet."""
    needed: dict[int, tuple[Path, int]] = {}

    def add(path: Path, size: int, there: int) -> None:
        place = path
        while not place.exists():
            place = place.parent
        device = place.stat().st_dev
        first, total = needed.get(device, (place, 0))
        needed[device] = first, total + max(0, size - there)

    for store in plan.stores:
        path = store.path
        if plan.run.recipe.store_dir is not None and store.label.startswith("extract ") and not path.exists():
            path = _shared(plan.run, store.label.removeprefix("extract "))
        add(path, store.size.bytes, size_of(path) if _is_there(path) else 0)
    trained = plan.run.recipe.compare is None and "metrics" in read_record(plan.run.trained_dir())
    for weights in plan.students:
        if not (trained and weights.label == "checkpoints"):
            add(weights.path, weights.bytes, size_of(weights.path) - size_of(weights.path / "checkpoints"))
    return [Disk(str(place), total, shutil.disk_usage(place).free) for place, total in needed.values()]


def _shared(run: Run, name: str) -> Path:
    """Where a capture is kept for other runs too; somewhere beside them if its name cannot be had yet."""
    try:
        path = run.shared_path(name)
    except KavaError:
        path = None
    return path or Path(str(run.recipe.store_dir)).expanduser() / run.teacher_path(name).name


def _is_there(path: Path) -> bool:
    try:
        KVStore.open(path)
    except KavaError:
        return False
    return True


def _savings(plan: Plan, stores: Callable[[Run], list[PlannedStore]]) -> list[Saving]:
    """Changes of one key each, those that save anything, the largest first."""
    recipe = plan.run.recipe
    changes: dict[str, dict[str, Any]] = {}
    for section in ("extract", "project"):
        settings = getattr(recipe, section)
        if settings.dtype == "float32":
            changes[f"{section}.dtype: bfloat16"] = {section: {"dtype": "bfloat16"}}
        for codec in (*CODECS, *LOSSY):
            if codec != settings.codec:
                changes[f"{section}.codec: {codec}"] = {section: {"codec": codec}}
    if recipe.extract.keep == "capture" and recipe.select is None and not recipe.extract.importance:
        changes["extract.keep: target"] = {"extract": {"keep": "target"}, "resample": {"materialize": False}}
    if recipe.resample.materialize:
        changes["resample.materialize: false"] = {"resample": {"materialize": False}}
    if recipe.extract.importance and recipe.select is None:
        changes["extract.importance: false"] = {"extract": {"importance": False}}
    if recipe.fuse is not None and recipe.fuse.materialize:
        changes["fuse.materialize: false"] = {"fuse": {"materialize": False}}
    found = []
    for change, sections in changes.items():
        total = sum(store.size.bytes for store in stores(Run(_changed(recipe, sections))))
        if total < plan.bytes:
            found.append(Saving(change, total, plan.bytes - total))
    found += _fewer_layers(plan) + _slots_alone(plan, stores)
    return sorted(found, key=lambda saving: -saving.saves)


def _fewer_layers(plan: Plan) -> list[Saving]:
    """A student of half the layers: targets have as many as it."""
    targets = sum(s.size.bytes for s in plan.stores if s.label.startswith("project ") or s.label == "fuse")
    if plan.student is None or plan.student.num_layers < 2 or not targets:
        return []
    half = plan.student.num_layers // 2
    saves = round(targets * (1 - half / plan.student.num_layers))
    return [Saving(f"a student of {half} layers instead of {plan.student.num_layers}", plan.bytes - saves, saves)]


def _slots_alone(plan: Plan, stores: Callable[[Run], list[PlannedStore]]) -> list[Saving]:
    """Captures removed once slots are filled from them."""
    recipe = plan.run.recipe
    if plan.student is None or recipe.extract.keep == "target":
        return []
    settings, total = recipe.select, plan.bytes
    if settings is None:
        settings = SelectSettings(tokens=_SLOTS)
        planned = stores(Run(recipe.model_copy(update={"select": settings})))
        total += sum(s.size.bytes for s in planned if s.label.startswith("select "))
    captures = sum(s.size.bytes for s in plan.stores if s.label.startswith("extract "))
    change = f"captures removed after kava select, which keeps {settings.tokens} slots of each sample"
    return [Saving(change, total - captures, plan.bytes - total + captures)] if total - captures < plan.bytes else []


def _changed(recipe: Recipe, sections: dict[str, dict[str, Any]]) -> Recipe:
    update = {name: getattr(recipe, name).model_copy(update=changes) for name, changes in sections.items()}
    return recipe.model_copy(update=update)


def _times(plan: Plan) -> None:
    """Seconds of each stage as a command of its own on this machine; and epochs until offline is the shorter way."""
    probe, counts, run = plan.probe, plan.counts, plan.run
    assert probe is not None
    assert counts is not None
    student = counts.student.rows()
    calibration = next((s.size.tokens for s in plan.stores if s.label == "reference"), 0)
    forward = once = read = 0.0
    for name, found in probe.teachers.items():
        seconds = counts.teacher(name).rows() * found.per_token
        plan.times[f"extract {name}"] = probe.start + found.load + seconds
        fit = found.fit_per_token * (calibration or student)
        plan.times[f"project {name}"] = probe.start + fit + student * found.derive_per_token
        forward += seconds
        once += plan.times[f"extract {name}"] + plan.times[f"project {name}"]
        read += student * found.read_per_token
    if calibration:
        plan.times["reference"] = calibration * probe.reference_per_token
        once += plan.times["reference"]
    if probe.step is not None:
        plan.times["train"] = probe.start + probe.step * run.recipe.train.max_steps
    # Live, every epoch pays the teachers' forward passes; offline they are paid once, and every epoch reads targets.
    plan.break_even_epochs = once / (forward - read) if forward > read else None


def human(count: float) -> str:
    """Bytes for people, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.1f} {unit}"
