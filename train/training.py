"""A training from beginning to end: what is loaded, checked, trained on and left behind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback

from ..errors import RetryLaterError, StageError
from ..store import Split
from ..store.files import disk_errors, remove
from ..store.sealed import settle
from .arguments import training_arguments
from .callbacks import Log, Steps, StopOnSignal
from .checkpoints import begin_at, last_checkpoint
from .checks import check_packing, check_sharding, check_targets
from .data import TargetCollator, TargetDataset, Targets
from .feed import Feed
from .lora import add_lora, save_merged
from .objective import Objective
from .ranks import Ranks, agreed
from .settings import CHECKPOINTS, TrainSettings
from .shard import shard_errors, whole_state
from .student import load_student, padding, saving
from .trackers import check_trackers
from .trainer import KVTrainer


@dataclass(frozen=True)
class TrainResult:
    """What training ended with."""

    steps: int
    metrics: dict[str, float]
    """Held-out: `ce` in nats per token, `ce_per_byte`, `perplexity`, `kv`, and `logits` in nats per token."""
    alpha: float
    """The weight of the KV loss, without its schedule: as it was set, or as it was found."""


def train_student(
    student: Path,
    store: Targets,
    out: Path,
    settings: TrainSettings,
    *,
    corpus_digest: str | None = None,
    on_begin: Callable[[], None] = lambda: None,
    on_step: Callable[[int, int], None] = lambda step, total: None,
    on_saved: Callable[[TrainResult], None] = lambda result: None,
    ranks: Ranks | None = None,
) -> TrainResult:
    """Trains the student in folder `student` on the targets of `store` and saves it to `out`.

    An interrupted run goes on at its last checkpoint, and ends as it would have without the interruption. SIGTERM,
    SIGUSR1 and Ctrl-C write one after the step in hand.

    Args:
        student: a folder with model and tokenizer.
        store: a complete target store.
        out: the new folder; logs lie beside the weights.
        settings: see `TrainSettings`.
        corpus_digest: the corpus that the targets must be of; None to accept any.
        on_begin: called on the first rank when nothing was refused, before the first step.
        on_step: called with the step reached and the last one.
        on_saved: called on the first rank when the student is on the disk, before its checkpoints are removed: whatever
            marks it as complete must exist by then.
        ranks: the processes that train together, of which only the first writes; None for this one alone.

    Raises:
        StageError: if the store is not made for this student, or the KV loss would have no gradient; before the first
            update.
        TrainingError: if a loss or a gradient is not finite; the last checkpoint stays.
        RetryLaterError: after a signal to stop, with a checkpoint, or if the disk is full.
        BackendNotInstalledError: if a tracker or peft is not installed.
    """
    ranks = ranks or Ranks()
    found = _prepare(student, store, out, settings, corpus_digest)
    model, tokenizer, datasets, args = found.model, found.tokenizer, found.datasets, found.args
    collator = TargetCollator(padding(tokenizer), tuple(settings.ce_segments))
    feed = Feed(datasets, collator, settings, args, ranks)
    checkpoints = out / CHECKPOINTS
    checkpoint, begun, damaged = ranks.first(lambda: begin_at(checkpoints))

    with (
        disk_errors(out),
        shard_errors(),
        StopOnSignal(ranks) as stop,
        closing(Log(out, begun, ranks, settings.report_to)) as log,
        closing(feed),
    ):
        trainer = KVTrainer(
            model=model,
            args=args,
            train_dataset=datasets[Split.TRAIN],
            eval_dataset=datasets[Split.HELDOUT],
            data_collator=collator,
            callbacks=[*log.callbacks, Steps(on_step), stop],
            objective=found.objective,
            settings=settings,
            feed=feed,
            ranks=ranks,
            warn=log.warn,
        )
        trainer.remove_callback(PrinterCallback)
        for line in damaged:
            log.warn(begun, f"{line}; it is not used, training resumes after step {begun}")
        if checkpoint is not None:
            trainer.load_state(checkpoint)
        if ranks.is_first:
            on_begin()
        if not trainer.finished:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        # A signal behind the last step may find no checkpoint: the training is finished then, and is saved.
        if stop.agree() and ranks.first(lambda: last_checkpoint(checkpoints)[1]) == trainer.state.global_step:
            raise agreed(
                RetryLaterError(
                    f"{out}: stopped by {stop.caught} after step {trainer.state.global_step} with a checkpoint; the "
                    "same command goes on from there"
                )
            )
        metrics = trainer.evaluate() if len(datasets[Split.HELDOUT]) else {}
        heldout = {n.removeprefix("heldout_"): value for n, value in metrics.items() if n.startswith("heldout_")}
        result = TrainResult(int(trainer.state.global_step), heldout, trainer.alpha)
        weights = {"state_dict": whole_state(model)} if trainer.sharded else {}
        if ranks.is_first:
            with saving(out):
                (model if settings.lora is None else save_merged(model, out)).save_pretrained(out, **weights)
                tokenizer.save_pretrained(out)
            settle(out)
            on_saved(result)
            remove(checkpoints)
        ranks.wait()
    return result


@dataclass(frozen=True)
class _Prepared:
    """All that a training needs, loaded and checked."""

    model: Any
    tokenizer: Any
    objective: Objective
    datasets: dict[Split, TargetDataset]
    args: Any


def _prepare(student: Path, store: Targets, out: Path, settings: TrainSettings, corpus_digest: str | None) -> _Prepared:
    check_trackers(settings.report_to)
    torch.manual_seed(settings.seed)
    model, tokenizer = load_student(student)
    check_targets(store, model, tokenizer, corpus_digest, logits=settings.logits is not None)
    objective = Objective.for_store(store, settings)
    loss = objective.kv_loss
    names, layers = ((), ()) if loss is None else (loss.names, loss.layers)
    logits = settings.logits is not None
    datasets = {s: TargetDataset(store, s, names=names, layers=layers, logits=logits) for s in Split}
    if not len(datasets[Split.TRAIN]):
        raise StageError(f"{store.path}: there is no training sample in it")
    if settings.lora is not None:
        model = add_lora(model, settings.lora)
    if settings.pack_tokens is not None:
        check_packing(model)
    if settings.fsdp:
        check_sharding(model, bf16=settings.bf16)
    args = training_arguments(settings, out, has_heldout=len(datasets[Split.HELDOUT]) > 0)
    return _Prepared(model, tokenizer, objective, datasets, args)
