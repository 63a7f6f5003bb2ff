"""Making what is missing of stages, alone or as one of several processes.

Several processes may be given the same stages at any time, each with a share of the parts. What cannot be split (the
student, its reference, a projector) is made by the first that gets there, and the others wait for it. A stage that
needs parts of other processes' shares waits for those that are being made, and makes those that nobody is at: so one
process after the other is as good as all at once, and none waits for one that was never started.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..errors import BusyError, DamagedStoreError, KavaError, NothingCapturedError, StageError, StoreNotFoundError
from ..store import KVStore, Lock, locked
from ..store.files import is_writable
from ..store.leftovers import builders_path, remove_beside
from ..store.maker import hold, mark
from ..store.replace import next_path
from ..train.ranks import Ranks
from .cluster.share import ALL, Share, format_parts
from .generate_stage import GenerateStage
from .stage import Stage
from .stages import TrainStage
from .store_stages import StoreStage

Say = Callable[[str, str], None]
OnMake = Callable[[Stage], None]


def run_stages(
    stages: list[Stage],
    *,
    force: frozenset[str] = frozenset(),
    scheduler: str | None = None,
    share: Share = ALL,
    say: Say = lambda label, line: None,
    ranks: Ranks | None = None,
    on_make: Callable[[Stage], None] = lambda stage: None,
) -> None:
    """Makes what is missing of each stage, in order.

    Args:
        stages: of one run, in the order of `stages_of`.
        force: names of stages whose output is thrown away first, or, of one that is split, this process's share.
        scheduler: see `run_parts`.
        share: what this process makes of the stages that are split.
        say: called with a stage's label and what became of it.
        ranks: the processes that train together, of which the first decides and speaks; None for this one alone.
        on_make: called with each stage that is going to write.

    Raises:
        StageError: if a stage's inputs are missing, or a costly output is stale and not forced; or if one of several
            processes is to throw away what the others read.
        RecipeError: if the share names parts that a store does not have.
        DamagedStoreError: if a stage's output, or what it reads, is not as it was written.
        BusyError: if another process trains the student that is to be trained.
        NothingCapturedError: if a store is complete and every sample of it failed.
    """
    if not share.is_all:
        for stage in stages:
            if stage.name in force and not stage.splits:
                raise stage.inseparable()
    try:
        _run_in_order(stages, force, scheduler, share, say, ranks or Ranks(), on_make)
    finally:
        for stage in stages[:1]:
            _remove_empty_folders(stage.run.root)


def _run_in_order(
    stages: list[Stage],
    force: frozenset[str],
    scheduler: str | None,
    share: Share,
    say: Say,
    ranks: Ranks,
    on_make: OnMake,
) -> None:
    for number, stage in enumerate(stages):
        if isinstance(stage, StoreStage) and stage.splits:
            stage.share = share
        elif stage.splits:  # Its parts are other ones.
            stage.share = replace(share, parts=None)
        if isinstance(stage, TrainStage):
            _train(stage, stage.name in force, ranks, say, on_make)
            continue
        if not share.is_all:
            _supply(stage, stages[:number], scheduler, say, on_make)
        _run_stage(stage, stage.name in force, scheduler, say, on_make)
        refuse_if_all_failed(stage)
        unfinished = isinstance(stage, GenerateStage) or stage.beside is not None
        if unfinished and not stage.share.is_all and number + 1 < len(stages):
            # What follows reads all of it, and would read the old output.
            _run_stage(replace(stage, share=Share(), beside=None), False, scheduler, say, on_make)


def _run_stage(stage: Stage, force: bool, scheduler: str | None, say: Say, on_make: OnMake) -> None:
    status = stage.status()
    if isinstance(stage, StoreStage) and stage.share.parts and status.state not in ("blocked", "damaged"):
        stage.share.check(stage.manifest().num_parts, stage.label)
    if not force and status.state == "complete":
        say(stage.label, f"up to date ({status.detail})")
        return
    with ExitStack() as held:
        with stage_lock(stage, say):
            done = _prepare(stage, force, say, held)
            if not done:
                for line in stage.notices():
                    say(stage.label, line)
            if not done and not stage.splits:
                done = _make(stage, scheduler, on_make)
        if not done:
            done = _make(stage, scheduler, on_make)
            with stage_lock(stage, say):
                done = _exchange_if_complete(stage, done)
    say(stage.label, done)


def _train(stage: TrainStage, force: bool, ranks: Ranks, say: Say, on_make: OnMake) -> None:
    """Trains, with the other ranks: the first looks at what is there, and all do the same."""
    stage.ranks = ranks
    with ExitStack() as held:
        line, stage.beside = ranks.first(partial(_begin, stage, force, say, held))
        if not line:
            on_make(stage)
        try:
            line = line or stage.make(None)
        except BaseException:
            if ranks.is_first:
                _forget_if_empty(stage)
            raise
        line = ranks.first(partial(_exchange_if_complete, stage, line))
    if ranks.is_first:
        say(stage.label, line)


def _begin(stage: TrainStage, force: bool, say: Say, held: ExitStack) -> tuple[str, Path | None]:
    """Takes the training for this process and its ranks, until `held` is closed; then as `_prepare`.

    Nobody waits for it: that may take days, and two in one folder would write into each other's checkpoints.
    """
    status = stage.status()
    if status.state == "blocked":
        raise StageError(status.detail)
    if status.state == "complete" and not force:
        return f"up to date ({status.detail})", None
    lock = Lock.take(stage.output.with_name(f".{stage.output.name}.lock"))
    if lock is None:
        raise BusyError(
            f"{stage.label}: another process is training {stage.output}; run the same command again when it has ended"
        )
    held.callback(lock.release)
    return _prepare(stage, force, say, held), stage.beside


def _prepare(stage: Stage, force: bool, say: Say, held: ExitStack) -> str:
    """Decide where the stage is written; return a line if nothing is to be made.

    What exists and is to be replaced stays until its replacement is complete: a whole output is rebuilt beside it, as
    one rebuild for all processes, and this process's share of one is rebuilt part by part.

    Args:
        stage: its `beside` is set.
        force: whether the output, or this process's share of it, is to be made again.
        say: called with what is stale.
        held: closed when this process has written its share.

    Raises:
        StageError: if inputs are missing, or the output is stale and costly and `force` is not set.
        DamagedStoreError: if the output is damaged and `force` is not set.
    """
    remove_beside(stage.output)
    status = stage.status()
    if status.state == "blocked":
        raise StageError(status.detail)
    stale = status.state == "stale"
    whole = stale or (force and stage.share.is_all)
    if status.state == "missing" or (not whole and not force):
        if status.state == "complete":
            return f"up to date ({status.detail})"
        if status.state == "damaged":
            raise DamagedStoreError(f"{stage.label}: {status.detail}; kava repair makes what is damaged again")
        if not os.path.lexists(next_path(stage.output)) or stage.rebuild().status().state != "partial":
            return ""
        whole = True  # It was begun by --force, which is not asked for twice.
    if not whole:
        stage.again = True
        return ""
    rebuild = stage.rebuild()
    found = rebuild.status().state if rebuild.is_begun() else "missing"
    if stale and not force and found not in ("partial", "complete"):
        if stage.costly:
            raise StageError(
                f"{stage.label}: {stage.output} is stale ({status.detail}); add --force {stage.name} to make it "
                "again, or write elsewhere (run_dir, train.name)"
            )
        say(stage.label, f"stale ({status.detail}), made again")
    if found not in ("missing", "partial", "complete"):
        rebuild.forget()
    stage.beside = rebuild.beside
    held.callback(hold(builders_path(stage.output, mark())).release)
    if found == "complete":
        return _exchange_if_complete(stage, "complete")
    stage.begin()
    return ""


def _make(stage: Stage, scheduler: str | None, on_make: OnMake) -> str:
    """Make a stage where `_prepare` decided; what fails before anything was written leaves nothing."""
    on_make(stage)
    try:
        if stage.again:
            return stage.make_share_again(scheduler)
        line = stage.make(scheduler)
    except BaseException:
        _forget_if_empty(stage)
        raise
    return line if stage.splits else _exchange_if_complete(stage, line)


def refuse_if_all_failed(stage: Stage) -> None:
    """Refuse to continue with a store in which no sample is left.

    Raises:
        NothingCapturedError: with the most frequent reason, if the store is complete and every sample failed.
    """
    if not isinstance(stage, StoreStage):
        return
    try:
        store = KVStore.open(stage.output)
    except StoreNotFoundError:
        return
    parts = stage.wanted(store.manifest)
    count = sum(len(store.manifest.part_samples(part)) for part in parts)
    if not parts or set(parts) & set(store.missing_parts()) or len(store.failed) < count:
        return
    reasons = list(store.failed.values())
    kinds = [re.sub(r"\d+", "0", reason) for reason in reasons]  # Reasons differ by lengths and layers.
    kind, most = Counter(kinds).most_common(1)[0]
    remedy = "Correct the cause"
    if "non-finite" in kind:
        remedy = "Check the teacher's weights, or set its dtype to bfloat16 or float32"
    raise NothingCapturedError(
        f"{stage.label}: all {count:,} samples of {stage.output} failed, {most:,} of them like this: "
        f"{reasons[kinds.index(kind)]}. {remedy}, and capture again with --force"
    )


def _forget_if_empty(stage: Stage) -> None:
    with suppress(KavaError, OSError):  # What went wrong first is told.
        if os.path.lexists(stage.building) and not stage.is_begun():
            stage.forget()


def _remove_empty_folders(root: Path) -> None:
    """Remove the folders of a run in which a refused command wrote nothing, and the run's own if it is empty then."""
    if not is_writable(root):
        return
    with suppress(OSError):
        for folder in [*(path for path in root.iterdir() if path.is_dir() and not path.is_symlink()), root]:
            with suppress(OSError):  # One that is not empty stays.
                folder.rmdir()


def _exchange_if_complete(stage: Stage, line: str) -> str:
    """Put a rebuild in the place of the old output if it is complete; return the line for people."""
    if stage.beside is None:
        return line
    status = stage.status()
    if not os.path.lexists(stage.building) and replace(stage, beside=None).status().state == "complete":
        stage.beside = None  # Another process made the last part, and exchanged the two.
        return stage.summary(line)
    if status.state != "complete":
        return f"{line}; the old output stays in its place until all is made again"
    stage.exchange()
    return stage.summary(line)


def _supply(stage: Stage, before: list[Stage], scheduler: str | None, say: Say, on_make: OnMake) -> None:
    """Makes parts of earlier stages that this one cannot begin without, and that other processes have not made yet.

    An outdated part is one of them: what is made from it would be outdated too.
    """
    try:
        inputs = stage.inputs()
    except KavaError:  # Told by its status, or when it is made.
        return
    for number, earlier in enumerate(before):
        if not isinstance(earlier, StoreStage) or earlier.output not in inputs:
            continue
        store = KVStore.open(earlier.output)
        if absent := set(inputs[earlier.output]) & {*store.missing_parts(), *earlier.outdated(store)}:
            rest = replace(earlier, share=Share(parts=frozenset(absent)))
            say(rest.label, f"parts {format_parts(absent)} of other shares are needed first")
            _supply(rest, before[:number], scheduler, say, on_make)
            on_make(rest)
            say(rest.label, rest.make(scheduler))


def stage_lock(stage: Stage, say: Say) -> AbstractContextManager[None]:
    """Held while a stage is prepared, and while one that cannot be split is made."""
    path = stage.run.root / f".{stage.label.replace(' ', '-')}.lock"
    return locked(path, lambda: say(stage.label, "another process is at it; waiting"))
