"""The stages that run a model over the corpus: a teacher's capture, and the untrained student's own."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ..errors import StageError
from ..extract import Encoder
from ..store import KVStore, Manifest
from ..store.files import link, remove
from ..store.replace import next_path
from .capturing import capture
from .context import refuse_too_long
from .describe import describe
from .preflight.models import refuse_teacher
from .run import Run
from .segments import segment_warnings
from .stage import Status
from .store_stages import StoreStage
from .teachers import open_teacher
from .transform import student_encoder

_COUNTED: Final = 200
"""Samples whose tokens are counted before a capture."""


class ExtractStage(StoreStage):
    """The capture of one teacher."""

    name = "extract"

    @property
    def costly(self) -> bool:
        """Yes."""
        return True

    @property
    def output(self) -> Path:
        """The teacher store."""
        return self.run.teacher_path(self._teacher)

    def manifest(self) -> Manifest:
        """From the recipe."""
        return self.run.teacher_manifest(self._teacher)

    def wanted(self, manifest: Manifest) -> list[int]:
        """All parts, or with `extract.keep: target` those of the calibration."""
        if self.run.recipe.extract.keep == "target":
            return self.run.calibration_parts
        return super().wanted(manifest)

    def inspect(self) -> Status:
        """A capture that other runs share is in its place when there is a link to it."""
        found, shared = super().inspect(), self.run.shared_path(self._teacher)
        if self.beside is not None:
            return found
        if found.state == "missing" and shared is not None and (shared / "zarr.json").exists():
            return Status("partial", f"another run has begun {shared}, there is no link to it yet")
        return found

    def next_place(self) -> Path:
        """Beside the output; a capture that runs share has a place of its own for every content.

        Raises:
            StageError: if the output is the shared one that the recipe asks for.
        """
        shared = self.run.shared_path(self._teacher)
        if shared is None:
            return super().next_place()
        self.link_shared()
        if self.output.is_symlink() and self.output.resolve() == shared:
            raise StageError(
                f"{self.label}: {shared} is shared with other runs and is what this recipe asks for; "
                "name the parts to capture again (--force --parts 0-7), or remove it"
            )
        return shared

    def exchange(self) -> None:
        """Put the rebuild, or a link to it if runs share it, in the place of the output."""
        if self.beside is not None and self.beside == self.run.shared_path(self._teacher):
            link(next_path(self.output), self.beside)
            self.beside = next_path(self.output)
        super().exchange()

    def forget(self) -> None:
        """Remove what is at `building`, and an empty store that runs share; one with parts is not this run's alone."""
        place, shared = self.building.resolve(), self.run.shared_path(self._teacher)
        if place != shared:
            super().forget()
        elif not self.is_begun():
            if self.output.is_symlink() and self.output.resolve() == shared:
                remove(self.output)
            remove(place)

    def make_share_again(self, scheduler: str | None) -> str:
        """Rebuild this process's parts, also of a capture that other runs share."""
        self.link_shared()
        return super().make_share_again(scheduler)

    def link_shared(self) -> None:
        """Puts the capture that other runs share in its place, if there is one and nothing is there."""
        shared = self.run.shared_path(self._teacher)
        if shared is not None and (shared / "zarr.json").exists() and not self.output.is_dir():
            link(self.output, shared)

    def notices(self) -> list[str]:
        """How the corpus is read, once for all teachers, and the tokens of each segment."""
        from .plan.tokens import count_tokens

        lines = [] if self.run.corpus_was_described else [f"corpus: {note}" for note in self.run.prompts.notes]
        self.run.corpus_was_described = True
        count = count_tokens(self.run.teacher_encoder(self._teacher), self.run.corpus, _COUNTED)
        about = "" if count.is_exact else f"about, from {len(count.indices)} samples: "
        numbers = ", ".join(f"{name} {number:,}" for name, number in count.segments.items())
        return [*lines, f"tokens: {about}{numbers}", *segment_warnings(self.run)]

    def make(self, scheduler: str | None) -> str:
        """Runs the teacher over the parts that are missing."""
        refuse_teacher(self.run, self._teacher)
        refuse_too_long(self.run, self._teacher, self.run.corpus, self._uncaptured())
        shared = self.run.shared_path(self._teacher)
        if shared is not None and not self.building.is_dir():
            KVStore.create(shared, self.manifest())  # Before the link: one that leads nowhere is no store.
            self.link_shared()
        store = self.store()
        if self.missing(store):
            with open_teacher(self.run, self._teacher) as teacher:
                capture(self, store, self.run.corpus, self.run.teacher_encoder(self._teacher), teacher)
        return describe(self, store)

    def _uncaptured(self) -> list[int]:
        """Return the samples that this process still captures; with `extract.keep: target` also for its targets."""
        manifest = self.manifest()
        if self.run.recipe.extract.keep == "target":
            self.share.check(manifest.num_parts, self.label)
            parts, place = self.share.of(list(range(manifest.num_parts))), self.run.target_path(self._teacher)
        else:
            parts, place = self.mine(manifest), self.building
        committed = set(KVStore.open(place).committed_parts()) if (place / "zarr.json").exists() else set()
        return [index for part in parts if part not in committed for index in manifest.part_samples(part)]


class ReferenceStage(StoreStage):
    """The student's own keys and values before training, captured like a teacher's."""

    name = "reference"

    @property
    def splits(self) -> bool:
        """No: it is small, and what maps are fitted to must be whole."""
        return False

    @property
    def output(self) -> Path:
        """The reference store."""
        return self.run.reference_path

    def manifest(self) -> Manifest:
        """From the recipe and the student."""
        return self.run.reference_manifest

    def make(self, scheduler: str | None) -> str:
        """Runs the untrained student over the calibration samples."""
        from ..extract.hf import HFTeacher

        store = self.store()
        student = HFTeacher.load(
            self.run.student_source, dtype="float32", batch_tokens=self.run.recipe.extract.batch_tokens
        )
        capture(self, store, self.run.calibration, _student_encoder(self.run), student)
        return describe(self, store)


def _student_encoder(run: Run) -> Encoder:
    student = run.recipe.student
    return student_encoder(str(run.student_dir.resolve()), student.chat_template, student.chat_template_date)
