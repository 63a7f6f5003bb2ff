"""Low-rank adapters in the place of full fine-tuning, by peft (the extra `lora`).

The tap reads the outputs of the adapted projections, so the KV loss reaches the adapters as it reaches weights.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from ..errors import BackendNotInstalledError, RecipeError
from ..tap import decoder
from .settings import ADAPTER, LoraSettings

PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "dense")
"""What attention modules call their projections; each has some of these."""


def add_lora(model: Any, settings: LoraSettings) -> Any:
    """The model with trainable adapters, all else frozen; a `PeftModel` around it.

    LoRA, Hu et al. 2021, arXiv 2106.09685: `W x + (alpha / r) B A x`, `B` zero at first.

    Raises:
        BackendNotInstalledError: without peft.
        RecipeError: if the model has no module of one of the names.
    """
    target_modules = lora_targets(model, settings)
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model,
        LoraConfig(
            r=settings.r,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=target_modules,
            task_type="CAUSAL_LM",
        ),
    )


def lora_targets(model: Any, settings: LoraSettings) -> list[str]:
    """Return the names of the modules that get an adapter; of the model, only the names of its modules are read.

    Raises:
        BackendNotInstalledError: without peft.
        RecipeError: if the model has no module of one of the names.
    """
    if find_spec("peft") is None:
        raise BackendNotInstalledError("train.lora needs peft: pip install 'kava[lora]'")
    modules = [name for name, _ in model.named_modules()]
    target_modules = settings.target_modules or [
        name for name in PROJECTIONS if hasattr(decoder(model).layers[0].self_attn, name)
    ]
    for name in target_modules:
        if not any(module == name or module.endswith(f".{name}") for module in modules):
            raise RecipeError(f"train.lora.target_modules: {type(model).__name__} has no module {name!r}")
    return target_modules


def save_merged(model: Any, out: Path) -> Any:
    """Saves the adapter below `out` and adds it to the weights.

    Args:
        model: of `add_lora`; not to be used afterwards.
        out: the student's folder.

    Returns:
        The model without adapters, of the class that it had at first.
    """
    # Embeddings are never adapted here; peft would ask the hub whether their size has changed.
    model.save_pretrained(out / ADAPTER, save_embedding_layers=False)
    return model.merge_and_unload()
