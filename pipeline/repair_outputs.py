"""Repair of the sealed outputs that are no stores: each is made again, and put in place if it has the recorded bits.

Other bits would make everything derived from them stale, so an output that cannot be made again as it was is named and
left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from ..errors import DamagedStoreError, KavaError, StoreError
from ..store import KVStore
from ..store.files import remove, write_atomic
from ..store.hashing import hash_bytes, hash_file
from ..store.sealed import RECORD, seal, sealed_text, visible_files
from .compare_stage import ArmStage
from .fuse.stage import FuseStage, FuseViewStage, measured, open_targets
from .generate_stage import GenerateStage, damaged_answers
from .make import stage_lock
from .maps.projector import read_card
from .places import read_record
from .project_stage import ProjectStage
from .sealed_outputs import folder_damages, fusion_damages, generated_damages, projector_damages, trained_damages
from .stage import Stage
from .stages import StudentStage, TrainStage

Say = Callable[[str, str], None]


def repair_output(stage: Stage, say: Say) -> None:
    """Check the sealed output of a stage that is no store, or what its store needs beside its parts, and repair it.

    Raises:
        DamagedStoreError: if it is damaged and cannot be made again as it was; then it is left alone.
    """
    for kind, (what, path_of, check, repair) in _REPAIRS.items():
        if not isinstance(stage, kind):
            continue
        path = path_of(stage)
        damages = check(path)
        for line in damages:
            say(stage.label, line)
        if not damages and path.exists():
            say(stage.label, f"{what} is as it was written")
        if damages:
            with stage_lock(stage, say):
                say(stage.label, repair(stage, path))


def _repair_student(stage: StudentStage, folder: Path) -> str:
    recorded, rebuild = _recorded(folder), stage.rebuild()
    expected = recorded.get("files") or _sealed(folder)
    try:
        if recorded and recorded.get("key") != stage.run.student_key:
            raise DamagedStoreError("it was made with other settings than the recipe's")
        rebuild.forget()
        rebuild.make(None)
        if other := _differing(expected, read_record(rebuild.building)["files"]):
            raise DamagedStoreError(f"made again, {other} has other bits")
        rebuild.exchange()
    except KavaError as error:
        rebuild.forget()
        raise DamagedStoreError(
            f"{folder}: damaged, and cannot be made again as it was: {error}. Restore it from a copy, or replace it "
            "with kava run --force student: if the new one has other bits, what was made from the old one is stale"
        ) from None
    return "made again, with the same bits"


def _repair_generated(stage: GenerateStage, folder: Path) -> str:
    try:
        before = read_record(folder)
        if before.get("key") != stage.run.generate_key:
            raise DamagedStoreError("it was written with other settings than the recipe's, or has no record")
        for path in damaged_answers(folder).values():
            remove(path)
        line = stage.make(None)
        after = read_record(folder)
    except KavaError as error:
        raise DamagedStoreError(
            f"{folder}: damaged, and cannot be written again: {error}. Restore it from a copy, or replace it with "
            "kava run --force generate"
        ) from None
    if before.get("files") and (other := _differing(before["files"], after["files"])):
        raise DamagedStoreError(
            f"{folder}: written again, but {other} has other bits: the teacher wrote another text here. Restore the "
            "folder from a copy, or what was made from the corpus is stale"
        )
    return f"written again, with the same bits; {line}"


def _repair_projector(stage: ProjectStage, path: Path) -> str:
    try:
        try:
            card = read_card(path)
        except (FileNotFoundError, StoreError):
            card = {}
        if card and card.get("made_for") != stage.manifest().fingerprint:
            raise DamagedStoreError("it was fitted for another recipe")
        projector = stage.fit(stage.complete_parent())
        known = card["file"][1] if card else hash_file(path) if path.exists() else None
        same = hash_bytes(projector.to_bytes()) == known
        if not same and (card or _has_parts(stage.output)):
            raise DamagedStoreError("fitted again it has other bits than those that the targets were made with")
        projector.save(path)
    except KavaError as error:
        raise DamagedStoreError(
            f"{path}: damaged, and cannot be fitted again as it was: {error}. Restore it from a copy, or remove it "
            "and run kava run --force project"
        ) from None
    return f"the projector was fitted again{', with the same bits' if same else ''}"


def _repair_fusion(stage: FuseStage | FuseViewStage, path: Path) -> str:
    try:
        stores = open_targets(stage.run)
        if isinstance(stage, FuseStage):
            manifest = stage.manifest()
            remove(path)
            measured(stage.run, stores, manifest, path)
        else:
            remove(path)
            stage.make(None)
    except KavaError as error:
        raise DamagedStoreError(
            f"{path}: damaged, and cannot be measured again: {error}. Run kava fuse when the targets are complete"
        ) from None
    return "what the targets are fused by was measured again"


def _repair_trained(stage: TrainStage, folder: Path) -> str:
    """Only a measurement of a comparison can be made again without training; a damaged checkpoint is not used."""
    from ..train.compare import HELDOUT

    recorded, damages = _recorded(folder), folder_damages(folder)
    if recorded and not damages:
        return "training resumes at the last checkpoint that is as it was written"
    if recorded and all(line.startswith(f"{folder / HELDOUT}:") for line in damages):
        del recorded["files"][HELDOUT]
        write_atomic(folder / RECORD, sealed_text(recorded))
        remove(folder / HELDOUT)
        return f"{HELDOUT} was removed; kava compare measures it again"
    chosen = f" --arm {stage.arm.name} --seed {stage.seed}" if isinstance(stage, ArmStage) and stage.arm else ""
    raise DamagedStoreError(
        f"{folder}: damaged, and only training makes it again. Restore it from a copy, or run kava "
        f"{stage.name}{chosen} --force"
    )


_REPAIRS: Final[
    dict[type[Stage], tuple[str, Callable[[Any], Path], Callable[[Path], list[str]], Callable[[Any, Path], str]]]
] = {
    GenerateStage: ("the corpus", lambda stage: stage.output, generated_damages, _repair_generated),
    StudentStage: ("the student", lambda stage: stage.output, folder_damages, _repair_student),
    ProjectStage: ("the projector", lambda stage: stage.projector_path, projector_damages, _repair_projector),
    FuseStage: ("the fusion", lambda stage: stage.fusion_path, fusion_damages, _repair_fusion),
    FuseViewStage: ("the fusion", lambda stage: stage.output, fusion_damages, _repair_fusion),
    TrainStage: ("the trained student", lambda stage: stage.output, trained_damages, _repair_trained),
}
"""For each kind of stage: the name of its sealed output, where that is, what is damaged of it, and its repair."""


def _recorded(folder: Path) -> dict[str, Any]:
    """The record of a folder; empty if it is missing or damaged."""
    try:
        return read_record(folder)
    except StoreError:
        return {}


def _sealed(folder: Path) -> dict[str, Any]:
    return {path.relative_to(folder).as_posix(): seal(path) for path in visible_files(folder) if path.is_file()}


def _differing(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The names of the files in which two records differ."""
    return ", ".join(sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)))


def _has_parts(store: Path) -> bool:
    try:
        return bool(KVStore.open(store).committed_parts())
    except StoreError:
        return any((store / "parts").glob("[0-9]*"))
