"""The stage in which a teacher writes the corpus: prompts of the recipe's corpus in, a JSON-lines corpus out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import CorpusError
from ..extract.generate import GenerateSettings, Question, prompt_ids, question_of, row_of
from ..hub import load_tokenizer, stop_token_ids
from ..progress import progress
from ..store.files import disk_errors, write_atomic
from .places import RECORD, read_record
from .stage import Stage, Status
from .teachers import open_writer


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
        if not self.output.is_dir():
            return Status("missing")
        record = read_record(self.output)
        if record.get("key") != self.run.generate_key:
            return Status("stale", "the prompts, the teacher or extract.generate changed")
        if "kept" not in record:
            return Status("partial", f"{len(self._written())} of {len(self.run.prompts)} prompts answered")
        return Status("complete", _summary(record))

    def make(self, scheduler: str | None) -> str:
        """Asks what was not asked yet; keeps what matches."""
        run, settings = self.run, self.run.generate_settings
        name = run.generating_teacher
        record: dict[str, Any] = {
            "key": run.generate_key,
            "settings": settings.model_dump(mode="json"),
            "teacher": run.teacher_identity(name).model_dump(mode="json"),
            "prompts": run.prompts.digest,
        }
        with disk_errors(self.output):
            self.output.mkdir(parents=True, exist_ok=True)
        write_atomic(self.output / RECORD, json.dumps(record, indent=1).encode())
        questions = [question_of(r) for r in run.prompts.records]
        rows = self._written()
        missing = [number for number, q in enumerate(questions) if q.sample_id not in rows]
        if missing:
            record["backend"] = self._ask(name, questions, missing, settings)
        else:
            record["backend"] = next(iter(rows.values()))["written_by"]
        rows = self._written()
        kept = [rows[q.sample_id] for q in questions if settings.keep == "all" or rows[q.sample_id]["matches"]]
        if not kept:
            raise CorpusError(f"none of {len(rows)} answers matches; look at {self._log}, or set keep: all")
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        write_atomic(self.run.generated_dir / "corpus.jsonl", lines.encode())
        record |= {"kept": len(kept), "asked": len(rows), "matching": sum(row["matches"] for row in rows.values())}
        write_atomic(self.output / RECORD, json.dumps(record, indent=1).encode())
        return _summary(record)

    def _ask(self, name: str, questions: list[Question], missing: list[int], settings: GenerateSettings) -> str:
        run, encoder = self.run, self.run.teacher_encoder(name)
        tokenizer, stop_ids = load_tokenizer(run.teacher_source(name)), stop_token_ids(run.teacher_source(name))
        with (
            open_writer(run, name) as writer,
            progress(self.label, len(missing), "prompts") as advance,
            disk_errors(self._log),
            self._log.open("a", encoding="utf-8") as log,
        ):
            for start in range(0, len(missing), settings.chunk):
                chosen = missing[start : start + settings.chunk]
                prompts = [prompt_ids(encoder, questions[number], settings) for number in chosen]
                for number, ids in zip(chosen, prompts, strict=True):
                    if len(ids) + settings.max_new_tokens > writer.max_tokens:
                        raise CorpusError(
                            f"sample {questions[number].sample_id!r}: {len(ids)} tokens and {settings.max_new_tokens} "
                            f"new ones are more than the {writer.max_tokens} that the teacher reads"
                        )
                written = writer.generate(prompts, settings, stop_ids=stop_ids, numbers=chosen)
                for number, ids in zip(chosen, written, strict=True):
                    text = tokenizer.decode(ids, skip_special_tokens=True)
                    row = {**row_of(questions[number], text), "written_by": writer.backend}
                    log.write(json.dumps(row, ensure_ascii=False) + "\n")
                log.flush()
                os.fsync(log.fileno())
                advance(len(chosen))
            return writer.backend

    @property
    def _log(self) -> Path:
        return self.output / "answers.jsonl"

    def _written(self) -> dict[str, dict[str, Any]]:
        """Every answer so far by sample id; a line that was cut off is asked again."""
        if not self._log.exists():
            return {}
        rows, whole = {}, b""
        for line in self._log.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            row = json.loads(line)
            rows[row["id"]] = row
            whole += line
        if len(whole) != self._log.stat().st_size:
            write_atomic(self._log, whole)
        return rows


def _summary(record: dict[str, Any]) -> str:
    return f"{record['kept']} of {record['asked']} samples kept, {record['matching']} match the answer"
