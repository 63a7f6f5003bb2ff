"""All stages of a run, in order.

    [generate] ─┬─> student ─┬─> reference ─┐
                └─> extract ─┴──────────────┴─> [resample] ─> project ─> [select] ─> [fuse] ─> train

A stage is done when its output says of itself what the recipe asks for. One whose recipe or inputs changed is stale;
cheap stages are then made again, costly ones (a capture, a training) only with `--force`. See `make`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DamagedStoreError
from ..hub import load_tokenizer
from ..progress import progress
from ..store import Split
from ..store.files import disk_errors, remove, write_atomic
from ..store.sealed import NOT_SEALED, check_record, sealed_text, visible_files, write_record
from ..train.ranks import Ranks
from ..train.settings import ADAPTER, CHECKPOINTS, TrainSettings
from .capture_stages import ExtractStage, ReferenceStage
from .fuse.stage import fuse_stage
from .generate_stage import GenerateStage
from .places import RECORD, read_record
from .run import Run
from .select.stage import SelectStage
from .stage import Stage, Status
from .store_stages import ProjectStage, ResampleStage

if TYPE_CHECKING:
    from ..train.data import Targets
    from ..train.training import TrainResult


class StudentStage(Stage):
    """The student before training."""

    name = "student"

    @property
    def output(self) -> Path:
        """The student's folder."""
        return self.run.student_dir

    def inspect(self) -> Status:
        """Compares the record in the folder with the recipe."""
        if not self.output.is_dir():
            return Status("missing")
        return Status("complete", str(self.run.student_geometry))

    def make(self, scheduler: str | None) -> str:
        """Makes model and tokenizer."""
        from ..train.student import make_student

        texts = [self.run.corpus.records[i].text for i in self.run.corpus.split(Split.TRAIN)]
        make_student(self.run.recipe.student, self.output, texts, self.run.student_record)
        self.run.forget_student()
        return f"{self.run.student_geometry}, {len(load_tokenizer(self.run.student_source))} tokens in the vocabulary"


class TrainStage(Stage):
    """A trained student."""

    name = "train"
    ranks = Ranks()
    """The processes that train together."""

    @property
    def costly(self) -> bool:
        """Yes."""
        return True

    @property
    def output(self) -> Path:
        """The trained student's folder."""
        return self.run.trained_dir()

    @property
    def settings(self) -> TrainSettings:
        """How it is trained."""
        return self.run.recipe.train

    def key(self) -> str:
        """What determines it."""
        return self.run.trained_key(self.settings)

    def targets(self) -> Targets:
        """What it is trained on."""
        return self.run.open_target(self.run.teacher_of(self.settings))

    def check(self) -> None:
        """Loads the student and what it is trained on, before a trained one is thrown away."""
        if not self.output.is_dir():
            return
        from ..train.training import check_training

        self.key()
        check_training(
            self.run.student_dir,
            self.targets(),
            self.output,
            self.settings,
            corpus_digest=self.run.corpus.digest,
        )

    def inspect(self) -> Status:
        """Compares the record in the folder with the recipe."""
        key = self.key()
        if not self.output.is_dir():
            return Status("missing")
        record = read_record(self.output)
        if not record:
            if not visible_files(self.output):  # Stopped before the record of its beginning was on the disk.
                return Status("missing")
            raise DamagedStoreError(
                f"{self.output / RECORD}: damaged: it is missing. Restore it, or train again with --force"
            )
        if record.get("key") != key:
            return Status("stale", "train settings, the student or its targets changed")
        if "metrics" not in record:
            return Status("partial", "interrupted; goes on at its last checkpoint")
        check_record(self.output, self.must_exist(record), quick=self.run.quick)
        if (self.output / CHECKPOINTS).exists():
            return Status("partial", f"{result_line(record)}; its checkpoints are not removed yet")
        return Status("complete", result_line(record))

    def make(self, scheduler: str | None) -> str:
        """Trains."""
        from ..train.training import train_student

        run = self.run
        if finished := self.ranks.first(self._finish):
            return finished
        store, settings = self.targets(), self.settings
        record: dict[str, Any] = {"key": self.key(), "targets": store.manifest.fingerprint}
        advance: Callable[[int], None] | None = None

        def on_saved(result: TrainResult) -> None:
            record.update(name=settings.name, alpha=result.alpha, steps=result.steps, metrics=result.metrics)
            write_record(self.output, record, sealed_of(self.output))

        with ExitStack() as stack:
            if self.ranks.is_first:
                advance = stack.enter_context(progress(f"{self.label} {settings.name}", settings.max_steps, "steps"))
                # The record without metrics marks a training that was begun; the next call goes on with it.
                write_atomic(self.output / RECORD, sealed_text({**record, "files": {}}))
                run.recipe.model_copy(update={"train": settings}).save(self.output / "recipe.yaml")
            result = train_student(
                run.student_dir,
                store,
                self.output,
                settings,
                corpus_digest=run.corpus.digest,
                on_step=lambda step, total: advance(1) if advance else None,
                on_saved=on_saved,
                ranks=self.ranks,
            )
        return result_line({"steps": result.steps, "metrics": result.metrics})

    def must_exist(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record without files that may be removed, because they are made again without training."""
        return record

    def _finish(self) -> str:
        """Removes the checkpoints of a training that ended before it could; empty if it has not ended yet."""
        record = read_record(self.output)
        if "metrics" not in record or record.get("key") != self.key():
            return ""
        with disk_errors(self.output):
            remove(self.output / CHECKPOINTS)
        return result_line(record)


def stages_of(run: Run) -> list[Stage]:
    """All stages of a run, in order."""
    teachers = list(run.recipe.teachers)
    stages: list[Stage] = [StudentStage(run)]
    if run.recipe.extract.generate is not None:
        stages.insert(0, GenerateStage(run))
    stages += [ExtractStage(run, teacher) for teacher in teachers]
    if run.needs_reference:
        stages.append(ReferenceStage(run))
    if run.recipe.resample.materialize:
        stages += [ResampleStage(run, teacher) for teacher in teachers]
    stages += [ProjectStage(run, teacher) for teacher in teachers]
    if run.recipe.select is not None:
        stages += [SelectStage(run, teacher) for teacher in teachers]
    if run.recipe.fuse is not None:
        stages.append(fuse_stage(run))
    return [*stages, TrainStage(run)]


def sealed_of(folder: Path) -> list[Path]:
    """What the record of a trained student stands for: all but what trackers write, checkpoints and evaluations."""
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    files += visible_files(folder / ADAPTER) if (folder / ADAPTER).is_dir() else []
    return [path for path in files if path.name not in (RECORD, *NOT_SEALED)]


def result_line(record: dict[str, Any]) -> str:
    """The outcome of a training, for people."""
    metrics = record.get("metrics", {})
    if "ce" not in metrics:
        return f"{record.get('steps', 0)} steps, nothing held out"
    kv = f", held-out KV loss {metrics['kv']:.3f}" if "kv" in metrics else ""
    return f"{record['steps']} steps, held-out CE {metrics['ce']:.3f} ({metrics['ce_per_byte']:.3f} per byte){kv}"


def trained_students(run: Run) -> list[dict[str, Any]]:
    """The records of all finished students of a run, with their folders."""
    found = []
    for path in sorted((run.root / "students").glob(f"*/{RECORD}")):
        with suppress(DamagedStoreError):  # `kava verify RECIPE` names it; the others are listed.
            record = read_record(path.parent)
            if "metrics" in record:
                found.append({**record, "path": str(path.parent)})
    return found
