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

from ..errors import StoreError
from ..hub import find_model, load_tokenizer, model_geometry
from ..progress import progress
from ..store import Split
from ..store.files import disk_errors, write_atomic
from ..train.ranks import Ranks
from ..train.settings import TrainSettings
from .capture_stages import ExtractStage, ReferenceStage
from .fuse.stage import fuse_stage
from .generate_stage import GenerateStage
from .places import RECORD, read_record
from .run import Run
from .select.stage import SelectStage
from .stage import Stage, Status
from .store_stages import ProjectStage, ResampleStage
from .template_checks import check_student_template
from .tokenizer_checks import check_student_tokenizer
from .transform import student_encoder

if TYPE_CHECKING:
    from ..train.data import Targets


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
        if read_record(self.building).get("key") != self.run.student_key:
            return Status("stale", f"{self.output}: student settings or corpus changed")
        return Status("complete", str(model_geometry(find_model(str(self.building.resolve())))))

    def make(self, scheduler: str | None) -> str:
        """Makes model and tokenizer."""
        from ..train.student import make_student

        check_student_template(self.run)
        check_student_tokenizer(self.run, self.run.corpus)
        texts = (self.run.corpus.records[i].text for i in self.run.corpus.split(Split.TRAIN))
        make_student(self.run.recipe.student, self.output, texts)
        self._stop_at_the_end_of_a_turn()
        write_atomic(self.output / RECORD, json.dumps({"key": self.run.student_key}).encode())
        return f"{self.run.student_geometry}, {len(load_tokenizer(self.run.student_source))} tokens in the vocabulary"

    def _stop_at_the_end_of_a_turn(self) -> None:
        """Add the chat template's end of a turn to the tokens that end what the student writes, trained or not."""
        student, path = self.run.recipe.student, self.output / "generation_config.json"
        encoder = student_encoder(str(self.output.resolve()), student.chat_template, student.chat_template_date)
        if not encoder.stop_ids:
            return
        config = json.loads(path.read_bytes()) if path.exists() else {}
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
        if record.get("key") != key:
            return Status("stale", "train settings, the student or its targets changed")
        if "metrics" not in record:
            return Status("partial", "interrupted; goes on at its last checkpoint")
        return Status("complete", result_line(record))

    def is_begun(self) -> bool:
        """Whether there is a checkpoint to resume from, or weights."""
        checkpoints = (self.building / "checkpoints").glob("checkpoint-*/trainer_state.json")
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
        store, settings = self.targets(), self.settings
        record: dict[str, Any] = {"key": self.key(), "targets": store.manifest.fingerprint}
        advance: Callable[[int], None] | None = None

        def begin() -> None:
            # The record without metrics marks a training that was begun; the next call goes on with it.
            write_atomic(self.building / RECORD, json.dumps(record, indent=1).encode())
            run.recipe.model_copy(update={"train": settings}).save(self.building / "recipe.yaml")

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
                ranks=self.ranks,
            )
        record |= {"name": settings.name, "alpha": result.alpha, "steps": result.steps, "metrics": result.metrics}
        if self.ranks.is_first:
            write_atomic(self.building / RECORD, json.dumps(record, indent=1).encode())
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
        with suppress(StoreError):  # Another user's; the row of its stage says so.
            record = read_record(path.parent)
        if "metrics" in record:
            found.append({**record, "path": str(path.parent)})
    return found
