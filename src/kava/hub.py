"""Finding and loading Hugging Face models and tokenizers: by hub id, folder, GGUF file, or inside a Python package.

Every failure to find or read one becomes a `ModelNotFoundError` of one line.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from contextlib import suppress
from copy import deepcopy
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, Final

from .checkpoint import KeyReport, find_key_mapping, meta_model, tensor_shapes, weight_files
from .errors import CheckpointError, RecipeError, UnsupportedModelError
from .gguf import converted, is_sound, put_in_place
from .notices import notice
from .sources import ModelSource, check_source, find_model, hub_reachable, loading, model_file, one_line
from .store import KVGeometry, ModelIdentity, digest_file, digest_json
from .tap import attention_layout, probe_geometry
from .tokenizer import chat_template_digest, load_tokenizer, tokenizer_digest, tokenizer_file

__all__ = [
    "ModelSource",
    "chat_template_digest",
    "check_weights",
    "config_geometry",
    "count_parameters",
    "dense_source",
    "find_model",
    "hub_reachable",
    "load_config",
    "load_model",
    "load_tokenizer",
    "meta_model",
    "model_geometry",
    "model_identity",
    "one_line",
    "refuse_unknown_rope",
    "stop_token_ids",
    "token_digests",
    "tokenizer_digest",
    "tokenizer_file",
    "torch_device",
    "weights_digest",
]

_SAMPLING: Final = (*("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),)
"""Parameters of a generation config that count only if it samples."""
_WEIGHTS: Final = ("*.safetensors", "*.gguf", "*.bin")


@cache
def load_config(source: ModelSource) -> Any:
    """Return the model's config.

    Raises:
        ModelNotFoundError: if it cannot be loaded.
        CheckpointError: if the folder holds an adapter, or a GGUF file states what cannot be read right.
        UnsupportedModelError: if its keys are rotated in a way that transformers does not know.
        DamagedStoreError: if kava wrote the folder, and a file of it is not as it was written.
    """
    from transformers import AutoConfig

    check_source(source, quick=True)
    if source.is_local and (Path(source.location) / "adapter_config.json").exists():
        raise CheckpointError(
            f"model {source.name!r}: the folder holds an adapter (adapter_config.json), not a whole model. Merge it "
            "into its base model (peft: merge_and_unload) and save that"
        )
    with loading(source):
        if source.gguf_file:
            return AutoConfig.from_pretrained(converted(source.gguf_path))
        config = AutoConfig.from_pretrained(source.location, **source.options)
    refuse_unknown_rope(f"model {source.name!r}", config)
    if getattr(config, "head_dim", 0) is None:  # Some models compute with it as it is.
        config.head_dim = config.hidden_size // config.num_attention_heads
    return config


def refuse_unknown_rope(where: str, config: Any) -> None:
    """Refuse a config whose `rope_type` transformers does not know: it would end in a traceback much later.

    Raises:
        UnsupportedModelError: if so.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = getattr(config, "rope_parameters", None) or {}
    for each in (parameters, *parameters.values()):
        kind = each.get("rope_type", "default") if isinstance(each, dict) else "default"
        if kind not in (known := {"default", *ROPE_INIT_FUNCTIONS}):
            raise UnsupportedModelError(
                f"{where}: rope_type {kind!r} is not known to this version of transformers, only "
                f"{', '.join(sorted(known))}"
            )


def stop_token_ids(source: ModelSource) -> list[int]:
    """The ids that end a generation: those of the model's generation config, and the tokenizer's end of sequence."""
    from transformers import GenerationConfig

    stops = [load_tokenizer(source).eos_token_id, getattr(load_config(source), "eos_token_id", None)]
    folder = str(converted(source.gguf_path)) if source.gguf_file else source.location
    options = {} if source.gguf_file else source.options
    with suppress(OSError, ValueError):  # Many models have none.
        stops.append(GenerationConfig.from_pretrained(folder, **options).eos_token_id)
    flat = [i for stop in stops for i in (stop if isinstance(stop, list) else [stop])]
    return sorted({int(i) for i in flat if i is not None})


def load_model(source: ModelSource, *, dtype: str, device: str = "auto") -> Any:
    """Return the causal language model, in evaluation mode.

    Args:
        source: where it is.
        dtype: torch dtype of the weights, or `auto` for that of the checkpoint.
        device: `auto` (CUDA if there is one), `cpu`, `cuda`, `cuda:1`, ...

    Raises:
        ModelNotFoundError: if it cannot be loaded.
        CheckpointError: if the checkpoint does not hold exactly the tensors of its config.
        UnsupportedModelError: if its architecture is not known.
        RecipeError: if the device does not exist.
        DamagedStoreError: if kava wrote the folder, and a file of it is not as it was written.
    """
    from transformers import AutoModelForCausalLM

    check_source(source)
    config = load_config(source)
    layout = attention_layout(config)
    place = torch_device(device)
    options = {**source.options, "config": deepcopy(config)}
    if not source.gguf_file:
        options["key_mapping"] = check_weights(source)
    if layout.attn_implementation:
        options["attn_implementation"] = layout.attn_implementation
        notice(f"model {source.name!r}: attention is computed by {layout.attn_implementation!r}, which is exact for it")
    with loading(source):
        model, info = AutoModelForCausalLM.from_pretrained(
            source.location, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    if source.gguf_file:  # For packed tensors transformers compares no shapes.
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        own = {name: tensor.shape for name, tensor in meta_model(config).state_dict().items()}
        info["mismatched_keys"] |= {(name, shapes[name], own[name]) for name in own if shapes[name] != own[name]}
    KeyReport.of(info).refuse(source.name)
    if options.get("key_mapping"):  # A saved copy has the model's own names.
        model._weight_conversions = [
            c for c in model._weight_conversions if not {*c.source_patterns} & {*options["key_mapping"]}
        ]
    _drop_unused_sampling(model)
    return _densified(model).to(place).eval()


def _drop_unused_sampling(model: Any) -> None:
    """Drop the sampling parameters of a model whose generation config says that it does not sample.

    Llama 2 and its descendants have such a file; transformers reads it and refuses to save it with the model.
    """
    settings = getattr(model, "generation_config", None)
    if settings is not None and settings.do_sample is not True:
        for name in _SAMPLING:
            if getattr(settings, name, None) is not None:
                setattr(settings, name, None)


@cache
def check_weights(source: ModelSource) -> dict[str, str] | None:
    """Check a model's checkpoint before any weight is read.

    Returns:
        The renaming, for `from_pretrained`, that removes the prefixes of wrappers around the saved model; None if
        there are none.

    Raises:
        CheckpointError: if a file is missing or damaged, or if the tensors are not exactly those of the config.
    """
    config = load_config(source)
    if source.trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return None  # The class is the checkpoint's own: it is checked when it is loaded.
    with loading(source):
        files = weight_files(source.name, lambda name: model_file(source, name))
    tensors = tensor_shapes(source.name, files)
    with loading(source):
        model_class = type(meta_model(config))
    mapping = find_key_mapping(source.name, model_class, config, tensors)
    if mapping:
        example = next(name for name in tensors if any(re.search(pattern, name) for pattern in mapping))
        notice(
            f"model {source.name!r}: prefixes of wrappers are removed from the checkpoint's names, as in {example!r}"
        )
    return mapping


def torch_device(name: str) -> Any:
    """Return a torch device that can be used here.

    Args:
        name: `auto` for CUDA where there is one, or a name that torch knows.

    Raises:
        RecipeError: if there is no such device.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        devices = ["auto", "cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        reason = one_line(error).rstrip(".")
        raise RecipeError(
            f"device {name!r} cannot be used here: {reason}. Set device to one of {', '.join(devices)}"
        ) from error
    return device


def dense_source(source: ModelSource) -> ModelSource:
    """Return the same model as a plain folder: one in a GGUF file is unpacked once, in float32, into kava's cache.

    Raises:
        ModelNotFoundError: if it cannot be loaded.
    """
    if not source.gguf_file:
        return source
    sidecar = converted(source.gguf_path)
    folder = sidecar.with_name(f"{sidecar.name}-dense")
    if not is_sound(folder):
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
        load_model(source, dtype="float32", device="cpu").save_pretrained(temporary)
        put_in_place(temporary, folder)
    return find_model(str(folder))


@cache
def model_geometry(source: ModelSource) -> KVGeometry:
    """The KV geometry of a model, from its config alone."""
    config = load_config(source)
    attention_layout(config)
    with loading(source):
        return config_geometry(config)


def config_geometry(config: Any) -> KVGeometry:
    """The KV geometry that a config leads to: counted on a forward pass without weights.

    Raises:
        UnsupportedModelError: if its architecture is not known.
    """
    attention_layout(config)
    config = deepcopy(config)
    for parameters in (config.rope_parameters, *config.rope_parameters.values()):
        if isinstance(parameters, dict) and parameters.get("rope_type") in ("dynamic", "longrope"):
            parameters["rope_type"] = "default"  # These look at positions, which have no numbers there.
    return probe_geometry(meta_model(config))


def count_parameters(config: Any) -> int:
    """Numbers in the weights of a config's model."""
    return sum(prod(p.shape) for p in meta_model(config).parameters())


def model_identity(source: ModelSource, *, compute_dtype: str, digest: str | None = None) -> ModelIdentity:
    """What determines a model's numbers: the commit of a hub model, or the digest of local weights.

    Args:
        source: where it is.
        compute_dtype: dtype of the forward pass.
        digest: that of the weights where a record states it, of files that were compared with the record.
    """
    config, revision = load_config(source), None
    if source.is_local:
        digest = digest or weights_digest(Path(source.location), source.gguf_file)
    else:
        revision = _commit(source)
    return ModelIdentity(
        id=Path(source.name).name if source.is_local else source.name,
        revision=revision,
        weights_digest=digest,
        compute_dtype=compute_dtype,
        rope=json.loads(json.dumps(getattr(config, "rope_parameters", None) or {})),
    )


def weights_digest(folder: Path, gguf_file: str | None = None) -> str:
    """Digest of the weights and the config in a folder, or of one GGUF file."""
    if gguf_file:
        return digest_file(folder / gguf_file)
    files = sorted({p for pattern in (*_WEIGHTS, "config.json") for p in folder.glob(pattern)})
    return digest_json([[p.name, digest_file(p)] for p in files])


def token_digests(
    source: ModelSource, *, chat_template: bool, date: datetime.date | None = None
) -> tuple[str, str | None]:
    """Digests that determine the tokens of a text: of the tokenizer and, where it is used, of its chat template.

    Args:
        source: the model or tokenizer.
        chat_template: whether the text is wrapped in the tokenizer's chat template.
        date: that the template prints as today's.
    """
    tokenizer = load_tokenizer(source)
    return tokenizer_digest(tokenizer), chat_template_digest(tokenizer, date) if chat_template else None


def _densified(model: Any) -> Any:
    """A GGUF model is dense after loading; its quantiser marks would only keep it from being saved."""
    for owner in (model, model.config):
        for mark in ("quantization_config", "quantization_method"):
            if hasattr(owner, mark):
                delattr(owner, mark)
    model.hf_quantizer = None
    return model


def _commit(source: ModelSource) -> str | None:
    from transformers.utils import cached_file

    offline = not hub_reachable()
    with loading(source):
        path = cached_file(source.location, "config.json", revision=source.revision, local_files_only=offline)
    parent = Path(path or "").parent
    return parent.name if parent.parent.name == "snapshots" else source.revision
