"""The stages whose output is a store: captures, and what is made from them part by part."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import DamagedStoreError, KavaError, StageError, StoreError, StoreFormatError, StoreNotFoundError
from ..progress import progress
from ..store import KVStore, Manifest, digest_json, locked
from ..store.files import remove
from ..store.part_exchange import has_parts, manifest_at, replacing_outdated, scratch_store
from ..store.sealed import check_entry
from .capturing import capture
from .cluster.share import Share, format_parts
from .context import refuse_too_long
from .describe import describe, short
from .maps.project import fit_projector
from .maps.projector import Projector, move_projector, read_card, remove_projector
from .parallel import run_parts
from .run import Run
from .stage import Stage, State, Status
from .teachers import open_teacher
from .tokenizer_checks import check_student_tokenizer
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
        try:
            wanted = self.manifest()
        except DamagedStoreError as error:  # Of what it is made from: nothing is known of the output itself.
            raise StoreError(str(error)) from error
        try:
            store = KVStore.open(self.building)
        except StoreNotFoundError:
            return Status("missing")
        except StoreFormatError as error:
            return Status("stale", str(error))
        found = store.manifest.differences(wanted)
        if found and self._is_empty():
            return Status("missing")  # A process was killed before its first part, under another recipe.
        if found:
            return Status("stale", ", ".join(f"{n}: {short(old)} -> {short(new)}" for n, (old, new) in found.items()))
        store.check_files()
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
        if (ways := len(store.written_by)) > 1:
            detail += f", written in {ways} ways that round differently (kava inspect)"
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

    def store(self) -> KVStore:
        """Return the store that this process writes; creates it if it does not exist.

        A rebuild that another process completed and exchanged meanwhile is the output by now.
        """
        manifest = self.manifest()
        if self.beside is not None and not self.again and manifest_at(self.beside) is None:
            there = manifest_at(self.output)
            if there is not None and not there.differences(manifest):
                self.beside = None
        there = manifest_at(self.building)
        if there is not None and there.differences(manifest) and self._is_empty():
            remove(self.building)
        return KVStore.create(self.building, manifest)

    def _is_empty(self) -> bool:
        return not self.building.is_symlink() and not has_parts(self.building)

    def current(self, store: KVStore) -> KVStore:
        """Return the store where it lies now: another process may have put it in the place of the old one."""
        return store if store.path.is_dir() else KVStore.open(self.output)

    def rewriting(self, store: KVStore) -> AbstractContextManager[None]:
        """Hide this process's outdated parts while they are written again; see `replacing_outdated`."""
        return replacing_outdated(store, lambda: self.outdated(store), self.mine(store.manifest))

    def begin(self) -> None:
        """Create the store, so that another process that joins does not take the rebuild for complete."""
        KVStore.create(self.building, self.manifest())

    def is_begun(self) -> bool:
        """Whether the store has parts, or another process is at one."""
        return has_parts(self.building)

    def summary(self, line: str) -> str:
        """Describe the output, in which the rebuild lies now."""
        return describe(self, KVStore.open(self.output))

    def make_share_again(self, scheduler: str | None) -> str:
        """Rebuild this process's parts, and exchange each with the existing one when it is complete."""
        store = KVStore.open(self.output)
        return self.make_parts_again(self.mine(store.manifest), scheduler)

    def make_parts_again(self, parts: Collection[int], scheduler: str | None) -> str:
        """Rebuild these parts inside the store's folder, and exchange each with the existing one.

        Returns:
            A line for people.
        """
        store = KVStore.open(self.output)
        with scratch_store(store, parts) as folder:
            replace(self, beside=folder, again=True, share=Share(parts=frozenset(parts))).make(scheduler)
        return describe(self, store)

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

    def unclaimed(self, work: Callable[[int], int], store: KVStore) -> Unclaimed:
        """Return the work on those parts of `store` that no other process makes."""
        return Unclaimed(work, str(store.path.resolve()), store.manifest.fingerprint, str(self.output.resolve()))


class TransformStage(StoreStage):
    """A store made from a teacher's, part by part."""

    def make(self, scheduler: str | None) -> str:
        """Runs the transform over the parts that are missing or outdated."""
        parent = self.complete_parent()
        transform = self.prepare(parent)  # First: the fit may fail.
        store = self.store()
        with self.rewriting(store):
            missing, there = self.missing(store), set(parent.committed_parts())
            if missing:
                check_student_tokenizer(self.run, self.run.corpus)
            ready = [part for part in missing if part in there]
            with progress(self.label, len(ready), "parts") as advance:
                work = self.unclaimed(transform, store)
                run_parts(work, ready, scheduler=scheduler, on_part=lambda part: advance(1))
        return describe(self, store)

    def inputs(self) -> dict[Path, list[int]]:
        """The parent's parts."""
        parent = self.parent()
        assert parent is not None
        return {parent.path: self.needed(parent.manifest)}

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
        parent.check_files()
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
        return _transform(self.run, parent, self.building, self.manifest().fingerprint, method)


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
        return _transform(self.run, parent, self.building, self.manifest().fingerprint, resampler)

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


def _transform(run: Run, parent: KVStore, out: Path, fingerprint: str, resampler: str | None) -> Transform:
    return Transform(
        parent=str(parent.path.resolve()),
        out=str(out.resolve()),
        corpus=run.corpus_settings,
        student=str(run.student_dir.resolve()),
        chat_template=run.recipe.student.chat_template,
        chat_template_date=run.recipe.student.chat_template_date,
        resampler=resampler,
        across_segments=run.recipe.resample.across_segments,
        fingerprint=fingerprint,
        projector=None,
    )


def _next_projector(path: Path) -> Path:
    return path.with_name(f".next-{path.name}")
