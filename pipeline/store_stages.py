"""The stages whose output is a store: captures, and what is made from them part by part."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import KavaError, StageError, StoreError, StoreNotFoundError
from ..extract import Corpus, Encoder, Teacher, capture_store
from ..progress import progress
from ..store import KVStore, Manifest, digest_json, locked
from ..store.sealed import check_entry
from .cluster.share import format_parts
from .direct import capture_targets
from .maps.project import fit_projector
from .maps.projector import Projector, read_card
from .parallel import run_parts
from .run import Run
from .stage import Stage, State, Status
from .teachers import open_teacher
from .transform import Transform, Unclaimed, calibration_pairs


@dataclass
class StoreStage(Stage):
    """A stage whose output is a store."""

    @property
    def splits(self) -> bool:
        """By its parts."""
        return True

    @abstractmethod
    def manifest(self) -> Manifest:
        """What the store must say of itself."""

    def parent(self) -> KVStore | None:
        """The store it is made from, part by part."""
        return None

    def inspect(self) -> Status:
        """Compares the store on disk with the manifest that the recipe asks for."""
        wanted = self.manifest()
        try:
            store = KVStore.open(self.output)
        except StoreNotFoundError:
            return Status("missing")
        if found := store.manifest.differences(wanted):
            return Status("stale", ", ".join(f"{n}: {_short(old)} -> {_short(new)}" for n, (old, new) in found.items()))
        parts = self.wanted(wanted)
        missing, total = set(parts) & set(store.missing_parts()), len(parts)
        outdated = self.outdated(store)
        state: State
        if missing or outdated:
            rewritten = f", {len(outdated)} to be made again" if outdated else ""
            state, detail = "partial", f"{total - len(missing)} of {total} parts{rewritten}"
        else:
            kept = f" kept of {wanted.num_parts}" if total < wanted.num_parts else ""
            state, detail = "complete", f"{total} parts{kept}"
        failed = len(store.failed)
        detail += f", {failed} failed samples" if failed else ""
        return Status(state, detail, total - len(missing), total, len(outdated), failed)

    def uncompared(self, error: KavaError) -> Status:
        """How many parts there are, of a recipe that cannot say which it wants; or that the store is damaged itself."""
        try:
            store = KVStore.open(self.output)
            total = store.manifest.num_parts
            done, failed = total - len(store.missing_parts()), len(store.failed)
        except StoreNotFoundError:
            return super().uncompared(error)
        except StoreError as damage:
            return Status("damaged", str(damage))
        detail = f"{done} of {total} parts are there, and cannot be compared with the recipe: {error}"
        return Status("blocked", detail, done, total, None, failed)

    def wanted(self, manifest: Manifest) -> list[int]:
        """The parts that this stage makes."""
        return list(range(manifest.num_parts))

    def mine(self, manifest: Manifest) -> list[int]:
        """Those of them that this process makes.

        Raises:
            RecipeError: if it was told to make parts that the store does not have.
        """
        self.share.check(manifest.num_parts, self.label)
        return self.share.of(self.wanted(manifest))

    def missing(self, store: KVStore) -> list[int]:
        """Those of these that are not there yet."""
        return sorted(set(self.mine(store.manifest)) & set(store.missing_parts()))

    def drop_outdated(self, store: KVStore) -> None:
        """Removes what this process is to make again."""
        for number in set(self.outdated(store)) & set(self.mine(store.manifest)):
            store.drop_part(number)

    def drop_share(self) -> None:
        """Removes this process's parts."""
        store = KVStore.open(self.output)
        for number in set(self.mine(store.manifest)) & set(store.committed_parts()):
            store.drop_part(number)

    def outdated(self, store: KVStore) -> list[int]:
        """Parts that were made from a parent part which is another one now, or with a map fitted on other parts.

        Raises:
            DamagedStoreError: if a part of either store cannot be opened; good targets outlive a damaged parent.
        """
        try:
            parent = self.parent()
        except StoreNotFoundError:  # Removed to save space: what was made from it stays good.
            return []
        if parent is None:
            return []
        there, calibration = set(parent.committed_parts()), None
        with suppress(StoreNotFoundError):  # The reference may be gone too.
            calibration = self.calibration()
        found = []
        for number in store.committed_parts():
            with suppress(StoreNotFoundError):  # Another process took it out meanwhile.
                sources = store.part(number).sources
                refitted = calibration not in (None, sources.get("calibration", ""))
                if refitted or (number in there and sources.get("parent") != parent.part(number).content):
                    found.append(number)
        return found

    def calibration(self) -> str:
        """A digest of what was fitted for this store; empty if nothing was."""
        return ""


class TransformStage(StoreStage):
    """A store made from a teacher's, part by part."""

    def make(self, scheduler: str | None) -> str:
        """Runs the transform over the parts that are missing or outdated."""
        parent = self.complete_parent()
        transform = self.prepare(parent)  # Before anything is dropped: the fit may fail.
        store = KVStore.create(self.output, self.manifest())
        self.drop_outdated(store)
        missing, there = self.missing(store), set(parent.committed_parts())
        ready = [part for part in missing if part in there]
        with progress(self.label, len(ready), "parts") as advance:
            work = Unclaimed(transform, str(store.path.resolve()), store.manifest.fingerprint)
            run_parts(work, ready, scheduler=scheduler, on_part=lambda part: advance(1))
        return describe(self, store)

    def inputs(self) -> dict[Path, list[int]]:
        """The parent's parts."""
        parent = self.parent()
        assert parent is not None
        return {parent.path: self.needed(parent.manifest)}

    def check(self) -> None:
        """The parent is complete, and what is to be fitted can be."""
        self.prepare(self.complete_parent())

    def complete_parent(self) -> KVStore:
        """The parent store, with all parts that are needed.

        Raises:
            StageError: if some of them are missing.
        """
        parent = self.parent()
        assert parent is not None
        if absent := set(self.needed(parent.manifest)) & set(parent.missing_parts()):
            named = f" ({format_parts(absent)})" if not self.share.is_all else ""
            raise StageError(
                f"{parent.path}: {len(absent)} of {parent.manifest.num_parts} parts{named} are missing; make them first"
            )
        return parent

    def needed(self, parent: Manifest) -> list[int]:
        """The parts of the parent without which nothing is begun: this process's, and those that a map is fitted on."""
        return sorted({*self.mine(self.manifest()), *self.fitted_on()})

    def fitted_on(self) -> list[int]:
        """The parts of the parent that something is fitted on."""
        return []

    @abstractmethod
    def prepare(self, parent: KVStore) -> Callable[[int], int]:
        """What to do to each part, with everything fitted; see `run_parts`."""


class ResampleStage(TransformStage):
    """A teacher's capture on the student's tokens, in the teacher's geometry."""

    name = "resample"

    @property
    def output(self) -> Path:
        """The resampled store."""
        return self.run.resampled_path(self._teacher)

    def manifest(self) -> Manifest:
        """From the recipe, the teacher store and the student."""
        return self.run.resampled_manifest(self._teacher)

    def parent(self) -> KVStore:
        """The teacher store."""
        return KVStore.open(self.run.teacher_path(self._teacher))

    def prepare(self, parent: KVStore) -> Transform:
        """Time only."""
        method = self.run.recipe.resample.method
        return _transform(self.run, parent, self.output, self.manifest().fingerprint, method)


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
        run, store, parent = self.run, KVStore.open(self.output), self.parent()
        if not self.missing(store):
            return line
        if run.teacher_manifest(self._teacher).fingerprint != parent.manifest.fingerprint:
            raise StageError(f"{parent.path} was captured from another teacher or corpus than the recipe's now")
        transform = self.prepare(parent)
        with open_teacher(run, self._teacher) as teacher:
            capture(self, store, run.corpus, run.teacher_encoder(self._teacher), teacher, transform=transform)
        return describe(self, store)

    def prepare(self, parent: KVStore) -> Transform:
        """With the projector, which is saved if it is a new one."""
        path = self.run.projector_path(self._teacher)
        if not self.is_fitted():
            with locked(path.with_name(f".{path.name}.lock")):
                if not self.is_fitted():  # Another process may have fitted it meanwhile.
                    self.fitted(parent).save(path)
        return replace(self.transform(parent), projector=str(path.resolve()), calibration=self.calibration())

    def transform(self, parent: KVStore) -> Transform:
        """Time only: what the projector is applied to, and fitted on."""
        recipe = self.run.recipe
        resampler = None if recipe.resample.materialize else recipe.resample.method
        return _transform(self.run, parent, self.output, self.manifest().fingerprint, resampler)

    def fitted(self, parent: KVStore) -> Projector:
        """The projector on disk if it was fitted for this very store, else one that is fitted now."""
        if self.is_fitted():
            return Projector.load(self.run.projector_path(self._teacher))
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
        path = self.run.projector_path(self._teacher)
        try:
            card = read_card(path)
        except FileNotFoundError:
            return False
        if card.get("made_for") != self.manifest().fingerprint or card.get("calibration_parts") != self.calibration():
            return False
        check_entry(path, card["file"])
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

    @property
    def projector_path(self) -> Path:
        """Where the projector is saved."""
        return self.run.projector_path(self._teacher)

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


def capture(
    stage: StoreStage,
    store: KVStore,
    corpus: Corpus,
    encoder: Encoder,
    teacher: Teacher,
    *,
    transform: Transform | None = None,
) -> None:
    """Runs a teacher over this process's missing parts, and writes what it gives, or targets made of that.

    Raises:
        KavaError: if the loaded model is not what its config promised.
    """
    if transform is None and teacher.geometry != store.geometry:
        raise KavaError(f"{stage.label}: the loaded model has {teacher.geometry}, its config promised {store.geometry}")
    parts, settings = stage.missing(store), stage.run.recipe.extract
    samples = [index for part in parts for index in store.manifest.part_samples(part)]
    total = sum(len(corpus.records[index].text.encode()) for index in samples)
    # Text length is known at once, tokens only part by part: the bar counts bytes of text.
    with progress(stage.label, total, "bytes of text") as advance:
        if transform is None:
            capture_store(store, corpus, encoder, teacher, settings, parts=parts, on_text=advance)
        else:
            capture_targets(transform, store, corpus, encoder, teacher, settings, parts=parts, on_text=advance)


def _transform(run: Run, parent: KVStore, out: Path, fingerprint: str, resampler: str | None) -> Transform:
    return Transform(
        parent=str(parent.path.resolve()),
        out=str(out.resolve()),
        corpus=run.corpus_settings,
        student=str(run.student_dir.resolve()),
        chat_template=run.recipe.student.chat_template,
        resampler=resampler,
        across_segments=run.recipe.resample.across_segments,
        fingerprint=fingerprint,
        projector=None,
    )


def describe(stage: StoreStage, store: KVStore) -> str:
    """What there is of a stage's store by now, for people."""
    failed, missing = len(store.failed), set(stage.wanted(store.manifest)) & set(store.missing_parts())
    size = store.size_on_disk() / 1e6
    note = f", {failed} failed samples" if failed else ""
    if met := store.coverage():
        text, with_target = (sum(counts[i] for counts in met.values()) for i in range(2))
        note += f", {with_target / max(text, 1):.1%} of text tokens have a target"
    if missing:
        note += f"; {len(missing)} parts are not there yet, which are not among {stage.share}"
    return f"{store.num_tokens} tokens of {store.geometry}, {size:.1f} MB at {store.path}{note}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
