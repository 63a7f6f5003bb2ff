"""What the Trainer is told: the recipe's settings as `transformers.TrainingArguments`."""

from __future__ import annotations

import dataclasses
import os
from copy import deepcopy
from pathlib import Path
from typing import Any, Final

import torch
from transformers import TrainingArguments

from ..errors import RecipeError
from ..hub import one_line
from .ranks import num_processes
from .settings import CHECKPOINTS, TrainSettings
from .shard import SHARDING
from .trackers import PROJECT

_FSDP: Final = "set train.fsdp, which shards the student among the processes of torchrun"
REFUSED: Final = {
    "fsdp": _FSDP,
    "fsdp_config": _FSDP,
    "deepspeed": f"DeepSpeed is not supported; {_FSDP}",
    "train_sampling_strategy": "the order of samples is kava's own: train.group_by_length, train.pack_tokens",
    "dataloader_drop_last": "no sample is dropped: the tail of an epoch is the head of the next batch",
    "ignore_data_skip": "a training that goes on reads what would have followed",
    "report_to": "say it in train.report_to",
    "auto_find_batch_size": "the order of samples depends on train.batch_size; set that",
    "num_train_epochs": "a training is counted in steps; set train.max_steps",
    "output_dir": "the student and its checkpoints lie in run_dir",
    "resume_from_checkpoint": "a training that was cut off goes on at its last checkpoint by itself",
    "label_smoothing_factor": "the cross-entropy is kava's own, of the tokens as they are",
    "save_only_model": "a training that is cut off could not go on as the whole one would",
    "load_best_model_at_end": "the student is that of the last step; set train.max_steps",
    "bf16_full_eval": "held-out metrics are those of the weights as they are trained; train.bf16 is for both",
    "fp16_full_eval": "held-out metrics are those of the weights as they are trained",
    "dataloader_persistent_workers": "batches are read by kava's own threads or train.num_workers, which live on",
}
"""What training here does otherwise, and why."""
OWN_KEYS: Final = {
    "max_steps": "max_steps",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "lr_scheduler",
    "warmup_steps": "warmup_steps",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "bf16": "bf16",
    "logging_steps": "logging_steps",
    "eval_steps": "eval_steps",
    "save_steps": "save_steps",
    "dataloader_num_workers": "num_workers",
    "seed": "seed",
    "gradient_checkpointing": "gradient_checkpointing",
}
"""Arguments that a key of `train` sets; half of what reads that key would not see the argument."""


def training_arguments(settings: TrainSettings, out: Path, *, has_heldout: bool) -> Any:
    """Return the arguments of one training; see `argument_values`.

    Raises:
        RecipeError: if they are refused, or this process sees several devices.
    """
    built = build_arguments(argument_values(settings, out, has_heldout=has_heldout))
    refuse_several_devices(built.n_gpu)
    return built


def argument_values(settings: TrainSettings, out: Path, *, has_heldout: bool) -> dict[str, Any]:
    """Return the arguments of one training, by name.

    Args:
        settings: see `TrainSettings`; its `arguments` win over what is kava's own choice, and set no key of its own.
        out: the student's folder; checkpoints lie below it.
        has_heldout: whether there is anything to evaluate on.

    Raises:
        RecipeError: if transformers has no such argument, if it is one of `REFUSED` or `OWN_KEYS`, or if gradient
            checkpointing would lose the KV loss's gradient.
    """
    known = {f.name for f in dataclasses.fields(TrainingArguments)}
    if unknown := sorted(set(settings.arguments) - known):
        raise RecipeError(f"train.arguments: transformers.TrainingArguments has no {unknown[0]!r}")
    for name in settings.arguments:
        if name in REFUSED:
            raise RecipeError(f"train.arguments.{name}: {REFUSED[name]}")
        if name in OWN_KEYS:
            raise RecipeError(f"train.arguments.{name}: set train.{OWN_KEYS[name]}")
    values: dict[str, Any] = {
        **{name: getattr(settings, key) for name, key in OWN_KEYS.items()},
        "output_dir": str(out / CHECKPOINTS),
        "eval_strategy": "steps" if settings.eval_steps and has_heldout else "no",
        "save_strategy": "steps" if settings.save_steps else "no",
        "save_steps": settings.save_steps or settings.max_steps,
        "save_total_limit": 1,
        "report_to": "none",
        "project": PROJECT,
        "run_name": out.name,
        # A loss that is not finite ends the training; nothing is left to filter from the log.
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Without a device, bfloat16 is refused otherwise, and several processes do not find each other.
        **({} if torch.accelerator.is_available() else {"use_cpu": True}),
        "disable_tqdm": True,
        "remove_unused_columns": False,
        # A single process has nothing to share.
        **(deepcopy(SHARDING) if settings.fsdp and num_processes() > 1 else {}),
        **settings.arguments,
    }
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if values.get(name) == "epoch":
            raise RecipeError(f"train.arguments.{name}: epoch: a training is counted in steps; set {name[:-8]}steps")
    if values["save_strategy"] == "best":
        raise RecipeError(
            "train.arguments.save_strategy: best: a training goes on at its last checkpoint; set save_steps"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not settings.fsdp:
        raise RecipeError(f"train: accelerate was told to shard the model (ACCELERATE_USE_FSDP): {_FSDP}")
    if settings.fsdp:
        for name in ("fp16", "torch_compile", "accelerator_config"):
            if settings.arguments.get(name):
                raise RecipeError(f"train.arguments.{name}: not together with train.fsdp; leave out one of both")
    checkpointing = dict(values.get("gradient_checkpointing_kwargs") or {})
    if checkpointing.setdefault("use_reentrant", False):
        raise RecipeError(
            "train.arguments.gradient_checkpointing_kwargs: use_reentrant: true runs layers without a gradient first, "
            "and the KV loss, which is read there, would have none; leave it out"
        )
    return values | {"gradient_checkpointing_kwargs": checkpointing}


def build_arguments(values: dict[str, Any]) -> Any:
    """Return `TrainingArguments` with these values.

    Raises:
        RecipeError: if transformers refuses one.
    """
    try:
        return TrainingArguments(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"train: {one_line(error)}") from None


def refuse_several_devices(count: int) -> None:
    """Refuse a training in one process that sees several devices.

    Raises:
        RecipeError: if it does.
    """
    if count > 1:
        raise RecipeError(
            f"train: one process sees {count} devices; start one for each, torchrun --nproc-per-node {count} "
            "-m kava train ..., or show it a single one (CUDA_VISIBLE_DEVICES=0)"
        )
