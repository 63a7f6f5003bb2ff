"""The stage that fuses several teachers' targets: into a store, part by part, or into what a view reads them by."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ...errors import SampleFailedError, StageError, StoreError, StoreNotFoundError
from ...progress import progress
from ...store import KVStore, Manifest, Split, locked
from ..parallel import run_parts
from ..recipe import FuseSettings
from ..run import Run
from ..stage import Stage, Status
from ..store_stages import StoreStage
from ..transform import open_unchanged
from .fusion import Fusion, fused_manifest, fusion_key, measure_fusion
from .view import FusedTargets, take_survey

FUSION: Final = "fusion"
"""What a part names as the source of everything that is the same for all samples."""


@dataclass(frozen=True)
class FusePart:
    """What to do to every part; small, and safe to send to another machine that sees the same files."""

    fusion: str
    """The `Fusion`."""
    targets: tuple[tuple[str, str], ...]
    """Name of each teacher, and the store of its targets."""
    out: str
    """The store to write; it exists."""

    def __call__(self, part: int) -> int:
        """Writes one part and returns its number."""
        view = FusedTargets.open(Path(self.fusion), {name: Path(path) for name, path in self.targets})
        readers = {name: store.part(part) for name, store in view.stores.items()}
        first = next(iter(readers.values()))
        with open_unchanged(self.out, view.manifest.fingerprint).write_part(part) as writer:
            for position in first.order:
                try:
                    writer.append(position, view.sample(view.manifest.part_samples(part)[position]))
                except SampleFailedError as error:
                    writer.fail(position, first.sample_id(position), Split(int(first.splits[position])), str(error))
            writer.commit(sources(view.stores, part, view.fusion.key))
        return part


class FuseStage(StoreStage):
    """Targets of several teachers as one store."""

    name = "fuse"

    @property
    def output(self) -> Path:
        """The fused store."""
        return self.run.target_path(_settings(self.run).name)

    @property
    def fusion_path(self) -> Path:
        """The file that says how they are fused."""
        return self.run.fusion_path(_settings(self.run).name)

    def manifest(self) -> Manifest:
        """From the recipe and the manifests of the targets."""
        return wanted_manifest(self.run)

    def outdated(self, store: KVStore) -> list[int]:
        """Parts that were fused from other parts than those which are there now, or by other moments."""
        try:
            stores = open_targets(self.run)
        except StoreNotFoundError:  # Removed to save space: what was made from them stays good.
            return []
        try:
            key = fusion_key(stores, store.manifest)
        except StoreError:  # A damaged part is told of when it is read.
            return []
        return [
            number for number in store.committed_parts() if store.part(number).sources != sources(stores, number, key)
        ]

    def make(self, scheduler: str | None) -> str:
        """Measures what is the same for all samples, then fuses the parts that are missing or outdated."""
        stores, manifest = open_targets(self.run), self.manifest()
        path = self.run.fusion_path(_settings(self.run).name)
        fusion = measured(self.run, stores, manifest, path)
        store = self.store()
        targets = tuple((name, str(target.path.resolve())) for name, target in stores.items())
        work = FusePart(str(path.resolve()), targets, str(store.path.resolve()))
        with self.rewriting(store):
            missing = self.missing(store)
            with progress(self.label, len(missing), "parts") as advance:
                unclaimed = self.unclaimed(work, store)
                run_parts(unclaimed, missing, scheduler=scheduler, on_part=lambda part: advance(1))
        return self._described(store, fusion)

    def summary(self, line: str) -> str:
        """Describe the output, in which the rebuild lies now."""
        return self._described(KVStore.open(self.output), Fusion.load(self.run.fusion_path(_settings(self.run).name)))

    def _described(self, store: KVStore, fusion: Fusion) -> str:
        store = self.current(store)
        failed = len(store.failed)
        note = f", {failed} failed samples" if failed else ""
        if absent := store.missing_parts():
            note += f"; {len(absent)} parts are not there yet, which are not among {self.share}"
        return f"{store.num_tokens} tokens of {store.geometry}, {_told(fusion)} at {self.output}{note}"

    def inputs(self) -> dict[Path, list[int]]:
        """Every part of every teacher's targets: what is measured is measured on all of them."""
        return all_targets(self.run)


class FuseViewStage(Stage):
    """What is needed to fuse targets while they are read."""

    name = "fuse"

    @property
    def output(self) -> Path:
        """The file that describes the view."""
        return self.run.fusion_path(_settings(self.run).name)

    def inspect(self) -> Status:
        """Compares the file with the recipe and the targets."""
        manifest = wanted_manifest(self.run)
        try:
            fusion = Fusion.load(self.building)
        except StoreNotFoundError:
            return Status("missing")
        if found := fusion.manifest.differences(manifest):
            return Status("stale", ", ".join(f"{name}: {old} -> {new}" for name, (old, new) in found.items()))
        if fusion.key != fusion_key(open_targets(self.run), manifest):
            return Status("stale", "targets were made again")
        if fusion.survey is None:
            return Status("partial", "measured for a store, not read through yet")
        return Status("complete", f"fused while it is read: {_told(fusion)}")

    def make(self, scheduler: str | None) -> str:
        """Measures what is the same for all samples, and reads all targets once for their statistics."""
        stores = open_targets(self.run)
        fusion = measured(self.run, stores, wanted_manifest(self.run), self.building)
        view = FusedTargets(self.output, stores, fusion)
        with progress(self.label, fusion.manifest.num_parts, "parts") as advance:
            survey = take_survey(view, on_part=lambda part: advance(1))
        replace(fusion, survey=survey).save(self.building)
        return f"{survey.tokens} tokens with a target of {view.geometry}, {_told(fusion)}, by {self.output}"

    def inputs(self) -> dict[Path, list[int]]:
        """Every part of every teacher's targets."""
        return all_targets(self.run)


def fuse_stage(run: Run) -> Stage:
    """The stage that the recipe asks for."""
    return FuseStage(run) if _settings(run).materialize else FuseViewStage(run)


def wanted_manifest(run: Run) -> Manifest:
    """What the fused targets must say of themselves."""
    names = run.recipe.fused_teachers
    calibration = run.calibration.digest if len(names) > 1 else None
    manifests = {name: run.target_manifest(name) for name in names}
    return fused_manifest(manifests, _settings(run).weighting(names), calibration)


def open_targets(run: Run) -> dict[str, KVStore]:
    """The targets of every teacher that is fused, by name.

    Raises:
        StoreNotFoundError: if some are not made yet.
    """
    return {name: KVStore.open(run.target_path(name)) for name in run.recipe.fused_teachers}


def all_targets(run: Run) -> dict[Path, list[int]]:
    """The stores of `open_targets`, with all their parts."""
    return {store.path: list(range(store.manifest.num_parts)) for store in open_targets(run).values()}


def measured(run: Run, stores: dict[str, KVStore], manifest: Manifest, path: Path) -> Fusion:
    """The fusion on disk if it was measured on these very targets, else one that is measured now, and saved.

    Args:
        run: the run.
        stores: the targets that are fused.
        manifest: that of the fused targets.
        path: where the fusion is saved.

    Raises:
        StageError: if targets are missing or are not those of the recipe.
        DamagedStoreError: if the fusion on disk is not as it was written.
    """
    settings = _settings(run)
    if found := [n for n, store in stores.items() if store.manifest.fingerprint != manifest.parents[n]]:
        raise StageError(f"{stores[found[0]].path} was made for another recipe than it says now; kava project")
    key = fusion_key(stores, manifest)
    with locked(path.with_name(f".{path.name}.lock")):
        with suppress(StoreNotFoundError):
            fusion = Fusion.load(path)
            if fusion.key == key:
                return fusion
        ids = [record.sample_id for record in run.calibration.records]
        indices = next(iter(stores.values())).indices_of(ids)
        calibration = [indices[sample_id] for sample_id in ids]
        fusion = measure_fusion(stores, manifest, settings.weighting(run.recipe.fused_teachers), calibration)
        fusion.save(path)
        return fusion


def sources(stores: dict[str, KVStore], number: int, key: str) -> dict[str, str]:
    """What a part is fused from: the same part of each teacher's targets, and what was measured on all of them."""
    return {f"target {name}": store.part(number).content for name, store in stores.items()} | {FUSION: key}


def _settings(run: Run) -> FuseSettings:
    assert run.recipe.fuse is not None
    return run.recipe.fuse


def _told(fusion: Fusion) -> str:
    pairs = zip(fusion.blend.teachers, fusion.blend.share.tolist(), strict=True)
    return f"weights by {fusion.weighting.rule}, on average " + ", ".join(f"{n} {share:.3f}" for n, share in pairs)
