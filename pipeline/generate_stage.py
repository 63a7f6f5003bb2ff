"""The stage in which a teacher writes the corpus: prompts of the recipe's corpus in, a JSON-lines corpus out.

Answers are written as they come, by any number of processes, each file under a name that holds the hash of its bytes;
when all are there, the corpus and the record that seals both are written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from ..errors import CorpusError, DamagedStoreError, StoreNotFoundError
from ..extract import Encoder
from ..extract.generate import GenerateSettings, Question, prompt_ids, question_of, row_of
from ..hub import load_tokenizer
from ..progress import progress
from ..store import Lock, claimed, locked
from ..store.files import disk_errors, make_folder, read_small, write_atomic
from ..store.hashing import hash_bytes
from ..store.safe_json import LOG_BYTES, parse_json
from ..store.sealed import check_record, sealed_text, write_record
from .context import context_limit
from .places import RECORD, read_record
from .stage import Stage, Status
from .teachers import open_writer
from .tokenizer_checks import check_teacher_tokenizer

ANSWERS: Final = "answers"
"""Folder of all that was written, below the generated corpus."""


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
        if not record and not _answer_files(self.building):  # Interrupted before the record; a claim may be left.
            return Status("missing")
        if "kept" not in record and not self.is_begun():  # Stopped before the first answer.
            return Status("missing")
        if record.get("key") != self.run.generate_key:
            return Status("stale", "the prompts, the teacher or extract.generate changed")
        if "kept" not in record:
            return Status("partial", f"{len(self._written())} of {len(self.run.prompts)} prompts answered")
        check_record(self.building, record, quick=self.run.quick)
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
        if self._was_exchanged():
            return _summary(read_record(self.output))
        self.begin()
        questions = [question_of(r) for r in run.prompts.records]
        chunks = [range(n, min(n + settings.chunk, len(questions))) for n in range(0, len(questions), settings.chunk)]
        rows = self._written()
        mine = [chunks[number] for number in self.share.of(range(len(chunks)))]
        if missing := [chunk for chunk in mine if any(questions[n].sample_id not in rows for n in chunk)]:
            try:
                self._ask(name, questions, missing, settings, record)
            except StoreNotFoundError:
                if not self._was_exchanged():
                    raise
                return _summary(read_record(self.output))
            rows = self._written()
        if len(rows) < len(questions):
            if self._was_exchanged():
                return _summary(read_record(self.output))
            return f"{len(rows)} of {len(questions)} prompts answered; the others are not among {self.share}"
        record["backend"] = next(iter(rows.values()))["written_by"]
        kept = [rows[q.sample_id] for q in questions if settings.keep == "all" or rows[q.sample_id]["matches"]]
        if not kept:
            raise CorpusError(f"none of {len(rows)} answers matches; look at {self._answers}, or set keep: all")
        record |= {"kept": len(kept), "asked": len(rows), "matching": sum(row["matches"] for row in rows.values())}
        # Processes that waited for the last answers come here all at once, and the first one may exchange the folder.
        with locked(self.output.with_name(f".{self.output.name}.finish.lock")):
            with suppress(DamagedStoreError):
                if self.inspect().state == "complete":
                    return _summary(record)
            if not self._was_exchanged():
                lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
                write_atomic(self.building / "corpus.jsonl", lines.encode())
                write_record(self.building, record)
        return _summary(record)

    def _was_exchanged(self) -> bool:
        """Whether another process completed the rebuild and put it in the place of the old output."""
        if self.beside is None or self.building.is_dir():
            return False
        if read_record(self.output).get("key") != self.run.generate_key:
            return False
        self.beside = None
        return True

    def begin(self) -> None:
        """Create the folder of the answers, so that another process that joins does not take it for complete."""
        with disk_errors(self.building):
            make_folder(self._answers)

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
                            write_atomic(self.building / RECORD, sealed_text({**record, "files": {}}))
                        written = writer.generate(prompts, settings, stop_ids=stop_ids, numbers=asked)
                        lines = ""
                        for number, ids in zip(asked, written, strict=True):
                            text = tokenizer.decode(ids, skip_special_tokens=True)
                            row = {**row_of(questions[number], text), "written_by": writer.backend}
                            lines += json.dumps(row, ensure_ascii=False) + "\n"
                        data = lines.encode()
                        file_name = f"{asked[0]:08d}-{asked[-1]:08d}.{hash_bytes(data)}.jsonl"
                        write_atomic(self._answers / file_name, data)
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
        return self.building / ANSWERS

    def _written(self) -> dict[str, dict[str, Any]]:
        """Every answer so far by sample id, in the order of the prompts.

        Raises:
            DamagedStoreError: if a file of answers is not as it was written.
        """
        files = _answer_files(self.building)
        rows = [parse_json(line, path) for path in files for line in read_answers(path).splitlines()]
        return {row["id"]: row for row in rows}


def damaged_answers(folder: Path) -> dict[str, Path]:
    """Return the files of answers in a folder that are not as they were written, by what is wrong with each."""
    found = {}
    for path in _answer_files(folder):
        try:
            read_answers(path)
        except DamagedStoreError as error:
            found[str(error)] = path
    return found


def read_answers(path: Path) -> bytes:
    """Return the bytes of a file of answers, after comparing them with the hash in its name.

    Raises:
        DamagedStoreError: if they are not what was written.
    """
    data = read_small(path, LOG_BYTES)
    if path.name.split(".")[1:-1] != [hash_bytes(data)]:
        raise DamagedStoreError(
            f"{path}: damaged: its bytes do not have the hash in its name. Restore it, or run kava repair, which asks "
            "the teacher again"
        )
    return data


def _answer_files(folder: Path) -> list[Path]:
    """The files of answers so far, in the order of the prompts."""
    return sorted((folder / ANSWERS).glob("[0-9]*.jsonl"))


def _summary(record: dict[str, Any]) -> str:
    return f"{record['kept']} of {record['asked']} samples kept, {record['matching']} match the answer"
