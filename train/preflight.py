"""Checks of training settings before anything is captured or loaded: against a geometry, a config, and this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from ..errors import RecipeError
from ..hub import meta_model, one_line
from ..store import KVGeometry
from .arguments import argument_values, build_arguments, refuse_several_devices
from .checks import low_precision_shards
from .lora import lora_targets
from .losses import LossOptions, check_shape
from .ranks import num_processes
from .settings import TrainSettings

_OF_A_DEVICE: Final = ("fp16", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode")
"""Arguments that `TrainingArguments` refuses without a device, or applies to the whole process, captures included."""

_LAUNCHED: Final = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Environment variables by which accelerate joins processes that a launcher has started."""


def check_loss(geometry: KVGeometry, settings: TrainSettings) -> None:
    """Check the layers, weights and heads of the KV loss against the student's geometry.

    Raises:
        StageError: if they do not fit.
    """
    if settings.with_kv:
        options = LossOptions(settings.magnitude_weight, settings.relation_heads)
        check_shape(
            geometry,
            loss=settings.loss,
            layers=settings.layers,
            layer_weights=settings.layer_weights,
            options=options,
        )


def check_lora(settings: TrainSettings, config: Any) -> None:
    """Check that peft is installed and that the student has the modules that are to be adapted.

    Raises:
        BackendNotInstalledError: without peft.
        RecipeError: if the student has no module of one of the names.
    """
    if settings.lora is not None:
        lora_targets(meta_model(config), settings.lora)


def check_arguments(settings: TrainSettings, out: Path, *, has_heldout: bool) -> None:
    """Build the arguments, the optimizer's class and the schedule of a training, on the CPU and without a model.

    Raises:
        RecipeError: if transformers refuses one.
    """
    values = argument_values(settings, out, has_heldout=has_heldout)
    if "LOCAL_RANK" in os.environ or any(os.environ.get(name, "1") != "1" for name in _LAUNCHED):
        return  # Here `TrainingArguments` would wait for other processes, which may be capturing other parts.
    values = {name: value for name, value in values.items() if name not in _OF_A_DEVICE}
    built = build_arguments(values | {"use_cpu": True})
    if {"optim", "optim_args", "optim_target_modules"} & settings.arguments.keys():
        _check_optimizer(built)
    if settings.lr_scheduler != "cosine" or "lr_scheduler_kwargs" in settings.arguments:
        _check_schedule(settings, built)


def check_precision(settings: TrainSettings, dtype: str, *, runs_here: bool) -> None:
    """Check that this machine can train with the precision and the sharding that are asked for.

    Args:
        settings: see `TrainSettings`.
        dtype: of the student's weights.
        runs_here: whether the training runs in this process, so that it must not see several devices.

    Raises:
        RecipeError: if half precision needs a device, or one process sees several devices.
        StageError: if shards would be of low precision.
    """
    import torch

    on_device = torch.accelerator.is_available() and not settings.arguments.get("use_cpu")
    if settings.arguments.get("fp16") and not on_device:
        raise RecipeError("train.arguments.fp16: needs a GPU, and none can be used here. Set train.bf16: true instead")
    if settings.arguments.get("tf32") and not on_device:
        raise RecipeError("train.arguments.tf32: needs a GPU, and none can be used here. Leave it out")
    if settings.fsdp and settings.bf16 and dtype != "float32":
        raise low_precision_shards(dtype)
    if runs_here and on_device and num_processes() == 1:
        refuse_several_devices(torch.accelerator.device_count())


def _check_optimizer(built: Any) -> None:
    from transformers import Trainer

    try:
        Trainer.get_optimizer_cls_and_kwargs(built)
    except (ValueError, ImportError, RuntimeError, TypeError) as error:
        raise RecipeError(f"train.arguments.optim: {one_line(error)}") from None


def _check_schedule(settings: TrainSettings, built: Any) -> None:
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=settings.learning_rate)
    try:
        get_scheduler(
            built.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=settings.warmup_steps,
            num_training_steps=settings.max_steps,
            scheduler_specific_kwargs=built.lr_scheduler_kwargs,
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise RecipeError(f"train.lr_scheduler: {settings.lr_scheduler}: {one_line(error)}") from None
