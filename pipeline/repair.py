"""Making what is damaged again, and nothing else.

A part that is not as it was written is set aside, not removed: the next call knows by it what is still to be made,
should this one be cut off. It is removed when the new part is there. A derived part whose parent part has other bits
now is made again too; after the same machine has made the same bits, none is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from ..errors import DamagedStoreError, KavaError, RecipeError, StageError, StoreError, StoreNotFoundError
from ..progress import progress
from ..store import KVStore, verify_store
from ..store.files import is_writable, write_atomic
from ..store.table import header_bytes
from .capture_stages import ExtractStage
from .cluster import ALL, Share
from .cluster.share import format_parts
from .compare_stage import arm_stages
from .leftovers import remove_all
from .make import stage_lock
from .project_stage import ProjectStage
from .repair_outputs import repair_output
from .run import Run
from .stage import Stage
from .stages import stages_of
from .store_stages import StoreStage

Say = Callable[[str, str], None]


@dataclass(frozen=True)
class Repaired:
    """What became of one store."""

    label: str
    """Of its stage."""
    damages: tuple[str, ...]
    """What was found, for people."""
    parts: tuple[int, ...]
    """The parts that were made again."""
    line: str
    """For people."""


def repair(
    run: Run,
    *,
    only: str | None = None,
    teacher: str | None = None,
    failed: bool = False,
    share: Share = ALL,
    scheduler: str | None = None,
    say: Say = lambda label, line: None,
) -> list[Repaired]:
    """Check every output of a run that exists, and make again what is damaged.

    Parts come from the teacher or their parents; the student, a projector, a fusion and a generated corpus are put in
    place if they have the recorded bits.

    What killed processes left beside the outputs is removed, once nobody holds its lock.

    Args:
        run: the run.
        only: the name or label of a stage, or the path of its store: only that one.
        teacher: only the stores of this teacher.
        failed: also make parts with failed samples again.
        share: which parts of each store to check and to make again.
        scheduler: see `run_parts`.
        say: called with a stage's label and what was found or done, as it comes.

    Returns:
        One entry for each store that is there.

    Raises:
        RecipeError: if `only` names no store of the recipe.
        StageError: if a damaged store is not what the recipe describes, or what it is made from is not there.
        DamagedStoreError: if something cannot be made again as it was, after all that can be was.
    """
    outputs: list[Stage] = [*stages_of(run), *(arm_stages(run) if run.recipe.compare is not None else [])]
    if only is not None or teacher is not None:
        outputs = [stage for stage in outputs if isinstance(stage, StoreStage)]
    stages = [stage for stage in outputs if isinstance(stage, StoreStage)]
    if only is not None:
        named = {s.label: s for s in stages if only in (s.name, s.label) or Path(only).resolve() == s.output.resolve()}
        if not named:
            known = ", ".join(f"{stage.label!r} ({stage.output})" for stage in stages)
            raise RecipeError(f"--store {only}: this recipe has no such store, only {known}")
        outputs = list(named.values())
    if teacher is not None:
        run.teacher(teacher)
        outputs = [stage for stage in outputs if stage.teacher == teacher]
    found, lost = [], []
    for stage in outputs:
        try:
            if share.rank == 0 and share.parts is None:
                repair_output(stage, say)
            if isinstance(stage, StoreStage):
                found.append(repair_stage(stage, failed=failed, share=share, scheduler=scheduler, say=say))
        except DamagedStoreError as error:
            say(stage.label, str(error))
            lost.append(stage.label)
        except KavaError as error:
            if not lost:
                raise
            say(stage.label, f"cannot be checked before the damage above is repaired: {error}")
    remove_all(stages_of(run) if only is None and teacher is None else outputs, say)
    if lost:
        raise DamagedStoreError(f"{', '.join(lost)}: damaged, and not repaired; the lines above say why and what to do")
    return [repaired for repaired in found if repaired is not None]


def retry_failed(run: Run, teachers: list[str], share: Share = ALL, say: Say = lambda label, line: None) -> None:
    """Make this process's parts with failed samples again; each old part stays until the new one is complete.

    Raises:
        StageError: if a store is not what the recipe describes; then nothing is made.
        StoreNotFoundError: if there is no capture.
    """
    failed_parts: list[tuple[StoreStage, list[int]]] = []
    for name in teachers:
        extract = ExtractStage(run, name, share)
        extract.link_shared()
        stages: list[StoreStage] = [extract]
        if run.recipe.extract.keep == "target" and run.target_path(name).exists():
            # Of most parts there is no capture; kava project asks the teacher.
            stages.append(ProjectStage(run, name, share))
        for stage in stages:
            store = KVStore.open(stage.output)
            if store.manifest.differences(stage.manifest()):
                raise StageError(
                    f"{stage.label}: {stage.output} is not what this recipe describes; capture failed samples again "
                    f"with the recipe that made it, or replace it (kava run --force {stage.name})"
                )
            there = set(stage.mine(store.manifest)) & set(store.committed_parts())
            if parts := [part for part in sorted(there) if store.part(part).failed]:
                failed_parts.append((stage, parts))
    for stage, parts in failed_parts:
        say(stage.label, f"parts {format_parts(parts)} again; {stage.make_parts_again(parts, None)}")


def repair_stage(
    stage: StoreStage,
    *,
    failed: bool,
    share: Share = ALL,
    scheduler: str | None,
    say: Say,
) -> Repaired | None:
    """The same for one store; None if it is not there.

    What cannot be split is checked and made again by one process at a time: the next finds nothing to do.
    """
    # On read-only media no process writes, and it cannot be said that this one does.
    alone = not stage.splits and stage.output.exists() and is_writable(stage.run.root)
    with stage_lock(stage, say) if alone else nullcontext():
        return _repair_stage(stage, failed, share, scheduler, say)


def _repair_stage(stage: StoreStage, failed: bool, share: Share, scheduler: str | None, say: Say) -> Repaired | None:
    damages: list[str] = []
    try:
        store = KVStore.open(stage.output)
    except StoreNotFoundError:
        if not any((stage.output / "parts").glob("[0-9]*")):
            say(stage.label, "not made yet")
            return None
        store, problem = _restored(stage, "the store's zarr.json is missing")
        damages.append(problem)
    except StoreError as error:
        store, problem = _restored(stage, str(error))
        damages.append(problem)
    if stage.splits:
        stage.share = share
    mine = set(stage.mine(store.manifest)) & set(store.committed_parts())
    with progress(f"verify {stage.label}", len(mine), "parts") as advance:
        found = verify_store(store, on_part=lambda part: advance(1), parts=mine)
    damages += map(str, found)
    bad = {damage.part for damage in found if damage.part is not None}
    if any(damage.part is None for damage in found):
        write_atomic(store.path / "parts" / "zarr.json", header_bytes({}))
    again: set[int] = set()
    if failed:
        retried = {p for p in mine if p not in bad and _may_retry(store, p)}
        if retried and not stage.splits and share.world_size > 1:
            # The next rank would find the same samples failed, and take out what the first one reads by then.
            say(stage.label, f"failed samples are left; kava repair --store {stage.name} --failed, without --rank")
        else:
            again = retried
    # An older recipe's store may be whole; only to change it, the recipe must be the one that made it.
    waiting = set(store.parts_set_aside()) & set(stage.mine(store.manifest)) - set(store.committed_parts())
    fits = not store.manifest.differences(stage.manifest()) if bad or waiting or again else True
    for line in damages:
        say(stage.label, line)
    if not fits:
        raise StageError(
            f"{stage.label}: {stage.output} has {len(bad | again)} parts to be made again, but this recipe describes "
            "another store; repair it with the recipe that made it, or replace it (kava run --force)"
        )
    if bad | waiting | again:
        _check_inputs(stage, bad | waiting | again)
    for part in sorted(bad):
        store.set_aside(part)
    parts = bad | waiting | again | set(_outdated(stage, store)) & set(stage.mine(store.manifest))
    if not parts:
        line = "repaired its headers" if damages else f"{len(mine)} parts are as they were written"
        say(stage.label, line)
        return Repaired(stage.label, tuple(damages), (), line)
    stage.share = Share(parts=frozenset(parts))
    if parts - again:
        made = stage.make(scheduler)
        KVStore.open(stage.output).remove_set_aside()
    if again:  # They are whole: each stays until the new one is.
        made = stage.make_parts_again(again, scheduler)
    line = f"made part{'s' * (len(parts) > 1)} {', '.join(map(str, sorted(parts)))} again; {made}"
    say(stage.label, line)
    return Repaired(stage.label, tuple(damages), tuple(sorted(parts)), line)


def _restored(stage: StoreStage, reason: str) -> tuple[KVStore, str]:
    """Writes the manifest that the recipe asks for, if parts that are there were written under it.

    Raises:
        StageError: if none was: then it is the recipe that differs, or everything is lost.
    """
    wanted = stage.manifest()
    store = KVStore(stage.output, wanted)
    if not any(_belongs(store, part) for part in store.committed_parts()):
        raise StageError(
            f"{stage.label}: {reason}; no part there was written for this recipe, so its manifest cannot be written "
            f"again. Repair with the recipe that made it, or kava run --force {stage.name}"
        )
    write_atomic(stage.output / "zarr.json", header_bytes(wanted.to_attributes()))
    return KVStore.open(stage.output), f"{reason}; written again from the recipe"


def _belongs(store: KVStore, part: int) -> bool:
    """Whether a part was written under this manifest, its codec included, which the fingerprint leaves out."""
    try:
        reader = store.part(part)
        for position in range(len(reader)):
            if position not in reader.failed:
                reader.sample(position)
                return True
    except StoreError:
        return False
    return True


def _may_retry(store: KVStore, part: int) -> bool:
    """Whether a part has failed samples that a model has computed: those of a derived part are its parent's.

    Targets straight from a teacher name what their map was fitted on as a source, but no part that they were made from.
    """
    if not store.part(part).failed:
        return False
    return not any(name == "parent" or name.startswith("target ") for name in store.part(part).sources)


def _check_inputs(stage: StoreStage, parts: set[int]) -> None:
    """Before anything is set aside.

    Raises:
        StageError: if what these parts are made from is not there.
        DamagedStoreError: if it is damaged itself.
    """
    try:
        parent = stage.parent()
    except StoreNotFoundError as error:
        raise StageError(f"{stage.label}: damaged parts cannot be made again: {error}") from None
    if parent is not None:
        for part in parts & set(parent.committed_parts()):
            parent.part(part)


def _outdated(stage: StoreStage, store: KVStore) -> list[int]:
    found = stage.outdated(store)
    return found if found and not store.manifest.differences(stage.manifest()) else []
