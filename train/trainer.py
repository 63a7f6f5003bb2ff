"""Hugging Face's Trainer with `CE + alpha * KV` as its loss.

Packing of steps, devices, precision, checkpoints and resuming are the Trainer's. Ours are the loss, held-out metrics
that weigh every token the same, and the refusal of targets that are not this student's.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import get_last_checkpoint

from ..errors import RecipeError, StageError
from ..hub import tokenizer_digest
from ..store import KVStore, Split
from ..store.files import disk_errors
from ..tap import KVTap, probe_geometry
from .data import IGNORED, TargetCollator, TargetDataset
from .losses import KVLoss, LossOptions
from .settings import TrainSettings
from .student import load_student


@dataclass(frozen=True)
class TrainResult:
    """What training ended with."""

    steps: int
    metrics: dict[str, float]
    """Held-out: `ce` in nats per token, `ce_per_byte`, `perplexity`, and `kv`."""


def train_student(
    student: Path,
    store: KVStore,
    out: Path,
    settings: TrainSettings,
    *,
    corpus_digest: str | None = None,
    on_step: Callable[[int, int], None] = lambda step, total: None,
) -> TrainResult:
    """Trains the student in folder `student` on the targets of `store` and saves it to `out`.

    An interrupted run goes on at its last checkpoint.

    Args:
        student: a folder with model and tokenizer.
        store: a complete target store.
        out: the new folder; logs lie beside the weights.
        settings: see `TrainSettings`.
        corpus_digest: the corpus that the targets must be of; None to accept any.
        on_step: called with the step reached and the last one.

    Raises:
        StageError: if the store is not made for this student, before the first step.
    """
    torch.manual_seed(settings.seed)
    model, tokenizer = load_student(student)
    _check_targets(store, model, tokenizer, corpus_digest)
    loss = None
    if settings.alpha > 0:
        loss = KVLoss.for_store(
            store,
            loss=settings.loss,
            key_weight=settings.key_weight,
            value_weight=settings.value_weight,
            layers=settings.layers,
            layer_weights=settings.layer_weights,
            segment_weights={str(name): weight for name, weight in settings.segment_weights.items()},
            options=LossOptions(settings.magnitude_weight, settings.relation_heads),
        )
    datasets = {split: TargetDataset(store, split, with_kv=loss is not None) for split in Split}
    if not len(datasets[Split.TRAIN]):
        raise StageError(f"{store.path}: there is no training sample in it")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    from torch.utils.tensorboard import SummaryWriter

    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        writer = SummaryWriter(str(out / "tensorboard"))
        trainer = KVTrainer(
            model=model,
            args=_arguments(settings, out, has_heldout=len(datasets[Split.HELDOUT]) > 0),
            train_dataset=datasets[Split.TRAIN],
            eval_dataset=datasets[Split.HELDOUT],
            data_collator=TargetCollator(pad or 0, tuple(settings.ce_segments)),
            callbacks=[TensorBoardCallback(writer), _JsonLog(out / "metrics.jsonl"), _Steps(on_step)],
            kv_loss=loss,
            alpha=settings.alpha,
        )
        trainer.remove_callback(PrinterCallback)
        checkpoint = get_last_checkpoint(str(out / "checkpoints")) if (out / "checkpoints").is_dir() else None
        if checkpoint is None:
            (out / "metrics.jsonl").unlink(missing_ok=True)
        trainer.train(resume_from_checkpoint=checkpoint)
        metrics = trainer.evaluate() if len(datasets[Split.HELDOUT]) else {}
        if trainer.is_world_process_zero():
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
            shutil.rmtree(out / "checkpoints", ignore_errors=True)
        writer.close()
    metrics = {name.removeprefix("heldout_"): value for name, value in metrics.items() if name.startswith("heldout_")}
    return TrainResult(int(trainer.state.global_step), metrics)


class KVTrainer(Trainer):  # type: ignore[misc]
    """The Trainer, with a KV term beside the cross-entropy."""

    def __init__(self, *, kv_loss: KVLoss | None, alpha: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # The mean over a batch is our loss; without this the Trainer expects sums over accumulated batches.
        self.model_accepts_loss_kwargs = False
        self.kv_loss, self.alpha = kv_loss, alpha
        self._terms = _Mean()
        self._heldout: tuple[int, dict[str, float]] = (-1, {})

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """`CE + alpha * KV` of one batch, in nats per predicted token."""
        ce, tokens, kv = self._forward(model, inputs)
        loss = ce / tokens.clamp(min=1)
        terms = {"ce": loss.detach()}
        if kv is not None:
            loss = loss + self.alpha * kv["kv"]
            terms |= {name: value.detach() for name, value in kv.items()}
        self._terms.add(terms)
        return (loss, None) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out CE over all predicted tokens, per byte of text, and the KV loss; logs and returns them."""
        if self._heldout[0] == self.state.global_step:
            return self._heldout[1]
        model = self.model
        training = model.training
        model.eval()
        ce = torch.zeros((), dtype=torch.float64)
        tokens = text_bytes = 0
        kv_terms = _Mean()
        with torch.no_grad():
            for inputs in self.get_eval_dataloader():
                inputs = self._prepare_inputs(inputs)
                batch_ce, batch_tokens, kv = self._forward(model, inputs)
                ce += batch_ce.double().cpu()
                tokens += int(batch_tokens)
                if kv is not None:
                    assert self.kv_loss is not None
                    weights = self.kv_loss.token_weights(inputs["kv_mask"], inputs["segments"])
                    total = float((inputs["kv_mask"] if weights is None else weights).sum())
                    kv_terms.add({name: value.detach() for name, value in kv.items()}, total)
        for index in self.eval_dataset.indices:
            sample = self.eval_dataset.store.sample(index, keys=False, values=False)
            text_bytes += int((sample.spans[:, 1] - sample.spans[:, 0]).sum())
        model.train(training)
        mean = float(ce) / max(tokens, 1)
        metrics = {
            "heldout_ce": mean,
            "heldout_perplexity": float(torch.tensor(mean).exp()),
            "heldout_ce_per_byte": float(ce) / max(text_bytes, 1),
            **{f"heldout_{name}": value for name, value in kv_terms.take().items()},
        }
        self.log(metrics)
        self._heldout = (self.state.global_step, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the terms of the loss, averaged since the last log."""
        if "loss" in logs:
            logs |= self._terms.take()
        super().log(logs, start_time)

    def _forward(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Summed cross-entropy, number of predicted tokens, and the KV terms if there are targets."""
        tapped = self.kv_loss is not None
        with KVTap(self.accelerator.unwrap_model(model), layers=self.kv_loss.layers if self.kv_loss else ()) as tap:
            logits = model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            ).logits
        labels = inputs["labels"][:, 1:]
        ce = F.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        kv = None
        if tapped:
            assert self.kv_loss is not None
            student = {"keys": tap.keys, "values": tap.values}
            target = {name: inputs[name] for name in student}
            kv = self.kv_loss(student, target, inputs["kv_mask"], inputs["segments"])
        return ce, (labels != IGNORED).sum(), kv


@dataclass
class _Mean:
    """A running mean of named scalars; reading it starts a new one."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    weight: float = 0.0

    def add(self, terms: dict[str, torch.Tensor], weight: float = 1.0) -> None:
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value * weight
        self.weight += weight

    def take(self) -> dict[str, float]:
        means = {name: float(value) / (self.weight or 1) for name, value in self.sums.items()}
        self.sums, self.weight = {}, 0.0
        return means


class _JsonLog(TrainerCallback):  # type: ignore[misc]
    """One JSON object a line, for every log of the Trainer."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class _Steps(TrainerCallback):  # type: ignore[misc]
    def __init__(self, on_step: Callable[[int, int], None]) -> None:
        self.on_step = on_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step(state.global_step, state.max_steps)


def _arguments(settings: TrainSettings, out: Path, *, has_heldout: bool) -> Any:
    known = {f.name for f in dataclasses.fields(TrainingArguments)}
    if unknown := sorted(set(settings.arguments) - known):
        raise RecipeError(f"train.arguments: transformers.TrainingArguments has no {unknown[0]!r}")
    values: dict[str, Any] = {
        "output_dir": str(out / "checkpoints"),
        "max_steps": settings.max_steps,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "bf16": settings.bf16,
        "logging_steps": settings.logging_steps,
        "eval_strategy": "steps" if settings.eval_steps and has_heldout else "no",
        "eval_steps": settings.eval_steps,
        "save_strategy": "steps" if settings.save_steps else "no",
        "save_steps": settings.save_steps or settings.max_steps,
        "save_total_limit": 1,
        "dataloader_num_workers": settings.num_workers,
        "seed": settings.seed,
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
        "remove_unused_columns": False,
        **settings.arguments,
    }
    try:
        return TrainingArguments(**values)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"train: {str(error).splitlines()[0]}") from None


def _check_targets(store: KVStore, model: Any, tokenizer: Any, corpus_digest: str | None) -> None:
    manifest = store.manifest
    if manifest.kind == "selected":
        raise StageError(
            f"{store.path} is a selected store: its slots are no targets for the student's tokens; train on what "
            "kava project makes"
        )
    if manifest.kind != "target":
        raise StageError(f"{store.path} is a {manifest.kind} store, not targets; run kava project first")
    if missing := store.missing_parts():
        raise StageError(f"{store.path}: {len(missing)} of {manifest.num_parts} parts are missing; run kava project")
    problems = []
    if (own := probe_geometry(model)) != manifest.geometry:
        problems.append(f"geometry: {manifest.geometry} there, {own} in the student")
    if (digest := tokenizer_digest(tokenizer)) != manifest.tokenizer_digest:
        problems.append(f"tokenizer: {manifest.tokenizer_digest} there, {digest} in the student")
    if corpus_digest is not None and corpus_digest != manifest.corpus_digest:
        problems.append(f"corpus: {manifest.corpus_digest} there, {corpus_digest} in the recipe")
    if problems:
        raise StageError(f"{store.path} was made for another student ({'; '.join(problems)}); run kava project again")
