"""All stages of a run, in order.

    [generate] ─┬─> student ─┬─> reference ─┐
                └─> extract ─┴──────────────┴─> [resample] ─> project ─> [select] ─> [fuse] ─> train

A stage is done when its output says of itself what the recipe asks for. One whose recipe or inputs changed is stale;
cheap stages are then made again, costly ones (a capture, a training) only with `--force`. See `make`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DamagedStoreError, StoreError
from ..hub import find_model, load_tokenizer, model_geometry
from ..progress import progress
from ..store import Split
from ..store.files import disk_errors, fsync, remove, write_atomic
from ..store.safe_json import read_json_object
from ..store.sealed import NOT_SEALED, check_record, sealed_text, visible_files, write_record
from ..train.ranks import Ranks
from ..train.settings import ADAPTER, CHECKPOINTS, TrainSettings
from .capture_stages import ExtractStage, ReferenceStage
from .fuse.stage import fuse_stage
from .generate_stage import GenerateStage
from .places import RECORD, read_record
from .project_stage import ProjectStage
from .run import Run
from .select.stage import SelectStage
from .stage import Stage, Status
from .store_stages import ResampleStage
from .template_checks import check_student_template
from .tokenizer_checks import check_student_tokenizer
from .transform import student_encoder

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
        if not self.building.is_dir():
            return Status("missing")
        record = read_record(self.building)
        if not record:
            raise DamagedStoreError(f"{self.building / RECORD}: damaged: it is missing. Run kava repair")
        if record.get("key") != self.run.student_key:
            return Status("stale", f"{self.output}: student settings or corpus changed")
        check_record(self.building, record, quick=self.run.quick)
        return Status("complete", str(model_geometry(find_model(str(self.building.resolve())))))

    def make(self, scheduler: str | None) -> str:
        """Makes model and tokenizer."""
        from ..train.student import make_student

        run = self.run
        check_student_template(run)
        check_student_tokenizer(run, run.corpus, origin=True)
        texts = (run.corpus.records[i].text for i in run.corpus.split(Split.TRAIN))
        make_student(run.recipe.student, self.building, texts, run.student_record, self._stop_at_the_end_of_a_turn)
        run.forget_student()
        source = find_model(str(self.building.resolve()))
        return f"{model_geometry(source)}, {len(load_tokenizer(source))} tokens in the vocabulary"

    def exchange(self) -> None:
        """Put the rebuilt student in the place of the old one."""
        super().exchange()
        self.run.forget_student()

    def _stop_at_the_end_of_a_turn(self, folder: Path) -> None:
        """Add the chat template's end of a turn to the tokens that end what the student writes, trained or not."""
        student, path = self.run.recipe.student, folder / "generation_config.json"
        encoder = student_encoder(str(folder.resolve()), student.chat_template, student.chat_template_date)
        if not encoder.stop_ids:
            return
        config = read_json_object(path) if path.exists() else {}
        known = config.get("eos_token_id")
        ids = sorted({*(known if isinstance(known, list) else [known]), *encoder.stop_ids} - {None})
        write_atomic(path, json.dumps(config | {"eos_token_id": ids}, indent=2).encode())


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

    def inspect(self) -> Status:
        """Compares the record in the folder with the recipe."""
        key = self.key()
        if not self.is_begun():
            return Status("missing")
        record = read_record(self.building)
        if not record:
            raise DamagedStoreError(
                f"{self.building / RECORD}: damaged: it is missing. Restore it, or train again with --force"
            )
        if record.get("key") != key:
            return Status("stale", "train settings, the student or its targets changed")
        if "metrics" not in record:
            return Status("partial", "interrupted; goes on at its last checkpoint")
        check_record(self.building, self.must_exist(record), quick=self.run.quick)
        if (self.building / CHECKPOINTS).exists():
            return Status("partial", f"{result_line(record)}; its checkpoints are not removed yet")
        return Status("complete", result_line(record))

    def is_begun(self) -> bool:
        """Whether there is a checkpoint to resume from, or weights."""
        checkpoints = (self.building / CHECKPOINTS).glob("checkpoint-*/trainer_state.json")
        return any(checkpoints) or any(self.building.glob("*.safetensors"))

    def forget(self) -> None:
        """Remove a training without a checkpoint; what it logged stays, to be looked at."""
        logged = self.building / "metrics.jsonl"
        if self.beside is None and logged.exists() and logged.stat().st_size:
            with disk_errors(self.building):
                for name in (RECORD, "recipe.yaml"):
                    (self.building / name).unlink(missing_ok=True)
        else:
            super().forget()

    def make(self, scheduler: str | None) -> str:
        """Trains."""
        from ..train.training import train_student

        run = self.run
        if finished := self.ranks.first(self._finish):
            return finished
        store, settings = self.targets(), self.settings
        record: dict[str, Any] = {"key": self.key(), "targets": store.manifest.fingerprint}
        advance: Callable[[int], None] | None = None

        def begin() -> None:
            # The record without metrics marks a training that was begun; the next call resumes it.
            fsync(self.building)  # The names of folders that the Trainer has created by now.
            write_atomic(self.building / RECORD, sealed_text({**record, "files": {}}))
            run.recipe.model_copy(update={"train": settings}).save(self.building / "recipe.yaml")

        def on_saved(result: TrainResult) -> None:
            record.update(name=settings.name, alpha=result.alpha, steps=result.steps, metrics=result.metrics)
            write_record(self.building, record, sealed_of(self.building))

        with ExitStack() as stack:
            if self.ranks.is_first:
                advance = stack.enter_context(progress(f"{self.label} {settings.name}", settings.max_steps, "steps"))
            result = train_student(
                run.student_dir,
                store,
                self.building,
                settings,
                corpus_digest=run.corpus.digest,
                on_begin=begin,
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
        record = read_record(self.building)
        if "metrics" not in record or record.get("key") != self.key():
            return ""
        with disk_errors(self.building):
            remove(self.building / CHECKPOINTS)
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
    for path in sorted((run.root / "students").glob(f"[!.]*/{RECORD}")):
        record: dict[str, Any] = {}
        with suppress(StoreError):  # Another user's, or damaged; the row of its stage and `kava verify` say so.
            record = read_record(path.parent)
        if "metrics" in record:
            found.append({**record, "path": str(path.parent)})
    return found
