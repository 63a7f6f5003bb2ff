"""The stages whose output is a store: captures, and what is made from them part by part."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import DamagedStoreError, KavaError, StageError, StoreError, StoreFormatError, StoreNotFoundError
from ..progress import progress
from ..store import KVStore, Manifest
from ..store.files import remove
from ..store.part_exchange import has_parts, manifest_at, replacing_outdated, scratch_store
from .cluster.share import Share, format_parts
from .describe import describe, short
from .parallel import run_parts
from .run import Run
from .stage import Stage, State, Status
from .tokenizer_checks import check_student_tokenizer
from .transform import Transform, Unclaimed


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
        return time_transform(self.run, parent, self.building, self.manifest().fingerprint, method)


def time_transform(run: Run, parent: KVStore, out: Path, fingerprint: str, resampler: str | None) -> Transform:
    """Return what is done to every part of a teacher's store, without a projector: time alone.

    Args:
        run: the run.
        parent: the store to read.
        out: the store to write.
        fingerprint: fingerprint of that store.
        resampler: name of the method; None where the parent is on the student's tokens already.
    """
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
