"""The stage that makes targets: a fitted projector, and a teacher's capture in the student's geometry."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ..errors import DamagedStoreError, StageError, StoreNotFoundError
from ..store import KVStore, Manifest, digest_json, locked
from ..store.sealed import check_entry
from .capturing import capture
from .context import refuse_too_long
from .describe import describe
from .maps.project import fit_projector
from .maps.projector import Projector, move_projector, read_card, remove_projector
from .store_stages import TransformStage, time_transform
from .teachers import open_teacher
from .transform import Transform, calibration_pairs


class ProjectStage(TransformStage):
    """Targets: a teacher's capture on the student's tokens and in the student's geometry."""

    name = "project"

    @property
    def output(self) -> Path:
        """The target store."""
        return self.run.target_path(self._teacher)

    def manifest(self) -> Manifest:
        """From the recipe, the teacher store, the student and its reference."""
        return self.run.target_manifest(self._teacher)

    def parent(self) -> KVStore:
        """The resampled store where the recipe wants one, else the teacher's: then both are done in one pass."""
        materialized = self.run.recipe.resample.materialize
        path = self.run.resampled_path if materialized else self.run.teacher_path
        return KVStore.open(path(self._teacher))

    @property
    def costly(self) -> bool:
        """With `extract.keep: target`: then most targets come straight from a teacher."""
        return self.run.recipe.extract.keep == "target"

    def needed(self, parent: Manifest) -> list[int]:
        """This process's and those of the calibration, or with `extract.keep: target` these alone."""
        if self.run.recipe.extract.keep == "target":
            return self.run.calibration_parts
        return super().needed(parent)

    def fitted_on(self) -> list[int]:
        """The parts of the calibration, if the map is fitted on any."""
        return self.run.calibration_parts if "calibration" in self.manifest().parameters["project"] else []

    def make(self, scheduler: str | None) -> str:
        """Projects the parts that are captured, then runs the teacher over those whose capture is not kept."""
        line = super().make(scheduler)
        run, store, parent = self.run, self.store(), self.parent()
        if not self.missing(store):
            return line
        if run.teacher_manifest(self._teacher).fingerprint != parent.manifest.fingerprint:
            raise StageError(f"{parent.path} was captured from another teacher or corpus than the recipe's now")
        transform, manifest = self.prepare(parent), store.manifest
        indices = [index for part in self.missing(store) for index in manifest.part_samples(part)]
        refuse_too_long(run, self._teacher, run.corpus, indices)
        with open_teacher(run, self._teacher) as teacher:
            capture(self, store, run.corpus, run.teacher_encoder(self._teacher), teacher, transform=transform)
        return describe(self, store)

    def prepare(self, parent: KVStore) -> Transform:
        """With the projector, which is saved if it is a new one."""
        path = self.projector_path
        if not self.is_fitted():
            with locked(path.with_name(f".{path.name}.lock")):
                if not self.is_fitted():  # Another process may have fitted it meanwhile.
                    self.fitted(parent).save(path)
        return replace(self.transform(parent), projector=str(path.resolve()), calibration=self.calibration())

    @property
    def projector_path(self) -> Path:
        """The projector that the targets at `building` are made with.

        Where the targets are rebuilt beside others, so is it: until the exchange, each store has its own.
        """
        path = self.run.projector_path(self._teacher)
        if self.beside != self.next_place():
            return path
        with suppress(DamagedStoreError):  # The one of the targets that are being replaced.
            if self._fits(path):
                return path
        return _next_projector(path)

    def exchange(self) -> None:
        """The projector first: if a kill comes between the two, the rebuild goes on and uses it."""
        final, path = self.run.projector_path(self._teacher), self.projector_path
        if path != final:
            move_projector(path, final)
        super().exchange()

    def forget(self) -> None:
        """Remove the rebuild and its projector."""
        super().forget()
        remove_projector(_next_projector(self.run.projector_path(self._teacher)))

    def transform(self, parent: KVStore) -> Transform:
        """Time only: what the projector is applied to, and fitted on."""
        recipe = self.run.recipe
        resampler = None if recipe.resample.materialize else recipe.resample.method
        return time_transform(self.run, parent, self.building, self.manifest().fingerprint, resampler)

    def fitted(self, parent: KVStore) -> Projector:
        """The projector on disk if it was fitted for this very store, else one that is fitted now."""
        if self.is_fitted():
            return Projector.load(self.projector_path)
        return self.fit(parent)

    def fit(self, parent: KVStore) -> Projector:
        """Fit the projector, whatever is on disk."""
        run, settings = self.run, self.run.recipe.project
        reference = KVStore.open(run.reference_path) if run.needs_reference else None
        ids = [record.sample_id for record in run.calibration.records]
        projector = fit_projector(
            parent.geometry,
            run.student_geometry,
            run.layers(self._teacher) or str(settings.layers),
            heads=settings.heads,
            per=settings.per,
            scale=settings.scale,
            ridge=settings.ridge,
            top_k=settings.top_k,
            pairs=calibration_pairs(self.transform(parent), parent, ids, reference),
            seed=settings.seed,
        )
        projector.card.update(made_for=self.manifest().fingerprint, calibration_parts=self.calibration())
        return projector

    def is_fitted(self) -> bool:
        """Whether the projector on disk was fitted for this very store, on the calibration as it is now.

        Raises:
            DamagedStoreError: if it, or its card, is not as it was written.
        """
        return self._fits(self.projector_path)

    def _fits(self, projector: Path) -> bool:
        try:
            card = read_card(projector)
        except FileNotFoundError:
            return False
        if card.get("made_for") != self.manifest().fingerprint or card.get("calibration_parts") != self.calibration():
            return False
        if projector != self.run.projector_path(self._teacher) and not projector.exists():
            return False  # A kill came between the moves of a rebuilt projector and of its card.
        check_entry(projector, card["file"])
        return True

    def calibration(self) -> str:
        """A digest of the parts that the projector is fitted on; empty if it is fitted on nothing."""
        if "calibration" not in self.manifest().parameters["project"]:
            return ""
        parent = self.parent()
        there = set(parent.committed_parts())
        digests = [parent.part(n).content if n in there else None for n in self.run.calibration_parts]
        if self.run.needs_reference:
            reference = KVStore.open(self.run.reference_path)
            digests += [reference.part(number).content for number in reference.committed_parts()]
        return digest_json(digests)

    def keep(self, projector: Projector) -> bool:
        """Saves a projector unless there are targets that another one made; returns whether it did."""
        try:
            made = KVStore.open(self.output).manifest.fingerprint
        except StoreNotFoundError:
            made = projector.card["made_for"]
        if made != projector.card["made_for"]:
            return False
        projector.save(self.run.projector_path(self._teacher))
        return True


def _next_projector(path: Path) -> Path:
    return path.with_name(f".next-{path.name}")
