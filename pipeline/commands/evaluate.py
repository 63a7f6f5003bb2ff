"""`kava evaluate`: a trained student on held-out samples, on questions, and on tasks of lm-eval.

Held-out samples are read from the target store, with what it says of their keys and values. A student with another
tokenizer reads the corpus itself: its cross-entropy per byte compares, and there is nothing to compare its keys and
values with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.markup import escape
from rich.table import Table

from ...errors import RecipeError, StageError
from ...extract import Encoder
from ...hub import find_model, load_model, load_tokenizer, stop_token_ids, tokenizer_digest
from ...progress import progress
from ...store import KVSample, Split
from ...store.files import write_atomic
from ..found_recipe import find_recipe, load_found_recipe
from ..recipe import load_recipe
from ..run import Run
from ..stages import TrainStage
from .harness import Tasks, metric_texts

RESULT: Final = "evaluate.json"
ANSWERS: Final = "answers.jsonl"


@dataclass(frozen=True)
class Student:
    """A folder of weights, and the run whose held-out samples it is tried on."""

    folder: Path
    run: Run

    @classmethod
    def find(cls, path: Path, recipe: Path | None, overrides: Sequence[str]) -> Student:
        """The trained student of a recipe, or the one in a folder.

        Args:
            path: a recipe, or a folder that `save_pretrained` wrote.
            recipe: of the run; None for `path`, or for the recipe that training left in the folder.
            overrides: of the recipe's keys.

        Raises:
            RecipeError: if it is a folder without a recipe, and none is given; or a recipe, and another is given too.
            StageError: if the recipe's student is not trained, or is stale.
        """
        if not path.is_dir():
            if recipe is not None:
                raise RecipeError(
                    f"--recipe {recipe} goes with a folder of weights, which {path} is not; give one of the two"
                )
            run = Run(load_recipe(path, overrides))
            stage = TrainStage(run)
            if (status := stage.status()).state != "complete":
                raise StageError(f"{stage.output} is {status.state} ({status.detail or 'not trained'}); kava train")
            return cls(stage.output, run)
        if recipe is not None:
            return cls(path, Run(load_recipe(recipe, overrides)))
        beside = find_recipe(path)
        if beside is None:
            raise RecipeError(f"{path} has no recipe.yaml, which training leaves there; say --recipe RECIPE")
        return cls(path, Run(load_found_recipe(beside, overrides)))


class CorpusSamples:
    """The corpus in a tokenizer of its own, read as targets are, without keys and values."""

    def __init__(self, run: Run, encoder: Encoder) -> None:
        """The samples.

        Args:
            run: has the corpus.
            encoder: makes tokens of it.
        """
        self.run, self.encoder = run, encoder

    @cached_property
    def path(self) -> Path:
        """For messages."""
        return Path(self.run.recipe.corpus.label)

    def indices(self, split: Split | None = None) -> list[int]:
        """Samples of one split or of all."""
        return list(range(len(self.run.corpus)) if split is None else self.run.corpus.split(split))

    def sample(self, index: int, *, keys: bool = True, values: bool = True, extras: bool = True) -> KVSample:
        """Sample `index`, of which nothing has a target."""
        record = self.run.corpus.records[index]
        tokens = self.encoder.encode(record)
        return KVSample(
            sample_id=record.sample_id,
            split=record.split,
            keys=None,
            values=None,
            input_ids=tokens.input_ids,
            positions=tokens.positions,
            spans=tokens.spans,
            segments=tokens.segments,
            mask=np.zeros(len(tokens), np.bool_),
        )


def evaluate_student(
    student: Student,
    *,
    dtype: str = "float32",
    batch_size: int = 16,
    generate: bool = True,
    limit: int | None = None,
    max_new_tokens: int = 256,
    tasks: Sequence[str] = (),
    include_path: Path | None = None,
) -> dict[str, Any]:
    """Everything that is measured of a student; also written to its folder, as `evaluate.json` and `answers.jsonl`.

    Args:
        student: to be evaluated.
        dtype: of its weights.
        batch_size: samples, or prompts, at a time.
        generate: whether to let it answer.
        limit: questions, and samples of a task, at most; None for all.
        max_new_tokens: of an answer.
        tasks: of lm-eval, by name or YAML file.
        include_path: a folder of further tasks.

    Raises:
        StageError: if nothing is held out, or there is no question to answer.
        RecipeError: if a task or its data is not there, or it cannot be run.
        BackendNotInstalledError: if tasks are asked for and lm-eval is not installed.
    """
    from ...train.heldout import evaluate_heldout
    from ...train.student import padding

    harness = Tasks.load(tasks, include_path) if tasks else None
    source = find_model(str(student.folder.resolve()))
    model, tokenizer = load_model(source, dtype=dtype), load_tokenizer(source)
    samples, kv = _samples(student.run, tokenizer)
    heldout = evaluate_heldout(
        model,
        samples,
        pad_token_id=padding(tokenizer),
        ce_segments=student.run.recipe.train.ce_segments,
        batch_size=batch_size,
        with_kv=kv,
    )
    found: dict[str, Any] = {
        "student": str(student.folder),
        "dtype": dtype,
        "heldout_samples": len(heldout.sample_ids),
        "tokens": sum(heldout.tokens),
        "text_bytes": sum(heldout.text_bytes),
        **heldout.metrics,
        **{f"{name}_error": errors for name, errors in heldout.errors.items()},
    }
    if generate:
        from ...train.answering import answer, questions_of

        questions = questions_of(samples, tokenizer, limit)
        with progress("answers", len(questions), "questions") as advance:
            match = answer(
                model,
                tokenizer,
                questions,
                stop_ids=sorted({*stop_token_ids(source), *_encoder(student.run, tokenizer).stop_ids}),
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                on_answer=advance,
            )
        found["exact_match"] = {
            "right": match.right,
            "questions": len(match.answers),
            "share": match.share,
            "interval": match.interval,
        }
        lines = [json.dumps(asdict(a), ensure_ascii=False) for a in match.answers]
        write_atomic(student.folder / ANSWERS, ("\n".join(lines) + "\n").encode())
    if harness is not None:
        found["tasks"] = harness.run(model, tokenizer, batch_size=batch_size, limit=limit)
    write_atomic(student.folder / RESULT, json.dumps(found, indent=1).encode())
    return found


def result_table(found: dict[str, Any]) -> Table:
    """What was measured, for people."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("held-out samples", str(found["heldout_samples"]))
    table.add_row("CE", f"{found['ce']:.4f} nats per token, perplexity {found['perplexity']:.2f}")
    table.add_row("per byte", f"{found['ce_per_byte']:.4f} nats, perplexity {found['perplexity_per_byte']:.3f}")
    if "kv_error" in found:
        layers = zip(found["keys_error"], found["values_error"], strict=True)
        each = "  ".join(f"{keys:.3f}/{values:.3f}" for keys, values in layers)
        table.add_row("KV error", f"{found['kv_error']:.3f} of the targets' variance; K/V by layer: {each}")
    else:
        table.add_row("KV error", "not measured: the student has a tokenizer that the targets are not for")
    if match := found.get("exact_match"):
        low, high = match["interval"]
        share = f"{match['share']:.3f}, 95 % {low:.3f} .. {high:.3f}"
        table.add_row("exact match", f"{match['right']} of {match['questions']} ({share})")
    for task, metrics in found.get("tasks", {}).items():
        table.add_row(escape(task), escape("  ".join(metric_texts(metrics))))
    return table


def _samples(run: Run, tokenizer: Any) -> tuple[Any, bool]:
    """The held-out samples in the student's tokens, and whether they come with keys and values."""
    targets = run.open_target(run.train_teacher)
    if tokenizer_digest(tokenizer) == targets.manifest.tokenizer_digest:
        return targets, True
    return CorpusSamples(run, _encoder(run, tokenizer)), False


def _encoder(run: Run, tokenizer: Any) -> Encoder:
    student = run.recipe.student
    return Encoder(
        tokenizer,
        chat_template=student.chat_template,
        add_eos=True,
        chat_template_date=student.chat_template_date,
    )
