"""The stage in which a teacher writes the corpus: prompts of the recipe's corpus in, a JSON-lines corpus out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import CorpusError, StoreNotFoundError
from ..extract import Encoder
from ..extract.generate import GenerateSettings, Question, prompt_ids, question_of, row_of
from ..hub import load_tokenizer
from ..progress import progress
from ..store import Lock, claimed
from ..store.files import disk_errors, write_atomic
from ..store.safe_json import LOG_BYTES, read_json_lines
from .context import context_limit
from .places import RECORD, read_record
from .stage import Stage, Status
from .teachers import open_writer
from .tokenizer_checks import check_teacher_tokenizer


class GenerateStage(Stage):
    """The corpus that a teacher writes."""

    name = "generate"

    @property
    def costly(self) -> bool:
        """Yes."""
        return True

    @property
    def output(self) -> Path:
        """The folder of the corpus and of what is known of its origin."""
        return self.run.generated_dir

    def inspect(self) -> Status:
        """Compares the record in the folder with the recipe."""
        if not self.building.is_dir():
            return Status("missing")
        record = read_record(self.building)
        if "kept" not in record and not self.is_begun():  # Stopped before the first answer.
            return Status("missing")
        if record.get("key") != self.run.generate_key:
            return Status("stale", "the prompts, the teacher or extract.generate changed")
        if "kept" not in record:
            return Status("partial", f"{len(self._written())} of {len(self.run.prompts)} prompts answered")
        return Status("complete", _summary(record))

    @property
    def splits(self) -> bool:
        """By chunks of prompts: a teacher's batches never cross one, so its text depends on nothing but the chunk."""
        return True

    def make(self, scheduler: str | None) -> str:
        """Asks what was not asked yet; keeps what matches, when everything is answered."""
        run, settings = self.run, self.run.generate_settings
        name = run.generating_teacher
        record: dict[str, Any] = {
            "key": run.generate_key,
            "settings": settings.model_dump(mode="json"),
            "teacher": run.teacher_identity(name).model_dump(mode="json"),
            "prompts": run.prompts.digest,
        }
        self.begin()
        questions = [question_of(r) for r in run.prompts.records]
        chunks = [range(n, min(n + settings.chunk, len(questions))) for n in range(0, len(questions), settings.chunk)]
        rows = self._written()
        mine = [chunks[number] for number in self.share.of(range(len(chunks)))]
        if missing := [chunk for chunk in mine if any(questions[n].sample_id not in rows for n in chunk)]:
            try:
                self._ask(name, questions, missing, settings, record)
            except StoreNotFoundError:
                if self.beside is None or read_record(self.output).get("key") != run.generate_key:
                    raise
                self.beside = None  # Another process wrote the last answers and put all in the place of the old ones.
                return _summary(read_record(self.output))
            rows = self._written()
        if len(rows) < len(questions):
            return f"{len(rows)} of {len(questions)} prompts answered; the others are not among {self.share}"
        record["backend"] = next(iter(rows.values()))["written_by"]
        kept = [rows[q.sample_id] for q in questions if settings.keep == "all" or rows[q.sample_id]["matches"]]
        if not kept:
            raise CorpusError(f"none of {len(rows)} answers matches; look at {self._answers}, or set keep: all")
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        write_atomic(self.building / "corpus.jsonl", lines.encode())
        record |= {"kept": len(kept), "asked": len(rows), "matching": sum(row["matches"] for row in rows.values())}
        write_atomic(self.building / RECORD, json.dumps(record, indent=1).encode())
        return _summary(record)

    def begin(self) -> None:
        """Create the folder of the answers, so that another process that joins does not take it for complete."""
        with disk_errors(self.building):
            self._answers.mkdir(parents=True, exist_ok=True)

    def is_begun(self) -> bool:
        """Whether there are answers, or another process is writing some."""
        return any(self._answers.glob("*"))

    def _ask(
        self,
        name: str,
        questions: list[Question],
        chunks: list[range],
        settings: GenerateSettings,
        record: dict[str, Any],
    ) -> None:
        run, encoder = self.run, self.run.teacher_encoder(name)
        check_teacher_tokenizer(run, name, run.prompts)
        tokenizer, stop_ids = load_tokenizer(run.teacher_source(name)), run.stop_ids(name)
        self._refuse_long_prompts(name, (questions[number] for chunk in chunks for number in chunk), encoder)
        total = sum(len(chunk) for chunk in chunks)
        with open_writer(run, name) as writer, progress(self.label, total, "prompts") as advance:
            for chunk, lock in claimed(chunks, self._claim):
                try:
                    rows = self._written()
                    asked = [number for number in chunk if questions[number].sample_id not in rows]
                    prompts = [prompt_ids(encoder, questions[number], settings) for number in asked]
                    if asked:
                        if read_record(self.building).get("key") != run.generate_key:
                            write_atomic(self.building / RECORD, json.dumps(record, indent=1).encode())
                        written = writer.generate(prompts, settings, stop_ids=stop_ids, numbers=asked)
                        lines = ""
                        for number, ids in zip(asked, written, strict=True):
                            text = tokenizer.decode(ids, skip_special_tokens=True)
                            row = {**row_of(questions[number], text), "written_by": writer.backend}
                            lines += json.dumps(row, ensure_ascii=False) + "\n"
                        write_atomic(self._answers / f"{asked[0]:08d}-{asked[-1]:08d}.jsonl", lines.encode())
                    advance(len(chunk))
                finally:
                    lock.release()

    def _refuse_long_prompts(self, name: str, questions: Iterable[Question], encoder: Encoder) -> None:
        """Refuse prompts that leave no room for the answer, before the teacher is loaded."""
        settings, (max_tokens, limit) = self.run.generate_settings, context_limit(self.run, name)
        for question in questions:
            length = len(prompt_ids(encoder, question, settings))
            if length + settings.max_new_tokens > max_tokens:
                raise CorpusError(
                    f"sample {question.sample_id!r}: {length} tokens and {settings.max_new_tokens} new ones are more "
                    f"than the {max_tokens} that the teacher reads ({limit})"
                )

    def _claim(self, chunk: range, wait: bool) -> Lock | None:
        return Lock.take(self._answers / f".{chunk.start:08d}.lock", wait=wait, create=False)

    @property
    def _answers(self) -> Path:
        return self.building / "answers"

    def _written(self) -> dict[str, dict[str, Any]]:
        """Every answer so far by sample id, in the order of the prompts."""
        files = sorted(self._answers.glob("[0-9]*.jsonl"))
        rows = [row for path in files for row in read_json_lines(path, LOG_BYTES)]
        return {row["id"]: row for row in rows}


def _summary(record: dict[str, Any]) -> str:
    return f"{record['kept']} of {record['asked']} samples kept, {record['matching']} match the answer"
