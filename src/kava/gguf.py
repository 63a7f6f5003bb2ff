"""A model in a GGUF file as a config that transformers reads right.

transformers' reader drops metadata that it does not know, and some that changes every number: scaled rotary
frequencies, sliding windows, rotary widths. Here the file's metadata is laid over the config that transformers makes
of it, key by key; a key that is neither applied nor known to be harmless is refused by name.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .checkpoint import meta_model, without_quantization
from .errors import BackendNotInstalledError, CheckpointError, DamagedStoreError
from .gguf_tokenizer import convert_tokenizer
from .lfs import lfs_pointer
from .store import cache_folder, digest_file, digest_json
from .store.files import make_folder
from .store.sealed import RECORD, check_record, read_sealed, write_record

_FORM: Final = 2
"""Raised when the same file is converted to another config or tokenizer: older conversions are not used then."""

_ATTRIBUTES: Final[dict[str, tuple[str, ...]]] = {
    "context_length": ("max_position_embeddings",),
    "block_count": ("num_hidden_layers",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size",),
    "vocab_size": ("vocab_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "norm_epsilon"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_count": ("num_experts",),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "use_parallel_residual": ("use_parallel_residual",),
}
"""Metadata below the architecture's name, and the setting of the config that it is: the first that the config has."""
_HARMLESS: Final[dict[str, Any]] = {
    "rope.scaling.finetuned": None,
    "tensor_data_layout": None,
    "attention.causal": True,
    "rope.scale_linear": 1.0,
    "nextn_predict_layers": 0,
    "leading_dense_block_count": 0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
}
"""Metadata that changes no number, if it has this value; None: whatever its value."""
_ROPE: Final = re.compile(
    r"rope\.(dimension_count|freq_base|freq_base_swa|scaling\.(type|factor|original_context_length|attn_factor"
    r"|yarn_beta_fast|yarn_beta_slow))"
)
"""Metadata that `_rope_parameters` reads."""
_REQUIRED: Final = (
    *("context_length", "block_count", "embedding_length", "feed_forward_length", "attention.head_count"),
)
_DEFAULT_THETA: Final = 10000.0
"""The rotary base of a file that states none, as in llama.cpp."""
_PARTLY_ROTATED: Final = ("phi3", "stablelm")
_ROPE_TENSORS: Final = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
_FEW: Final = 3


@dataclass(frozen=True)
class _File:
    """Metadata of a GGUF file and its tables of rotary factors."""

    name: str
    metadata: dict[str, Any]
    tensor_names: tuple[str, ...]
    rope_factors: dict[str, tuple[float, ...]]

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    @property
    def own(self) -> dict[str, Any]:
        """Metadata below the architecture's name, by the rest of the key."""
        prefix = f"{self.architecture}."
        return {key.removeprefix(prefix): v for key, v in self.metadata.items() if key.startswith(prefix)}

    def refuse(self, key: str, reason: str) -> CheckpointError:
        """Return the error for a key that kava cannot read right."""
        return CheckpointError(
            f"GGUF file {self.name}: {key}: {reason}. Use the model's original folder, or another conversion of it"
        )


def converted(path: Path) -> Path:
    """Return the folder with config and tokenizer of a GGUF file as ordinary files, in the user's cache.

    It is made once: reading a vocabulary from GGUF takes ten seconds.

    Raises:
        CheckpointError: if the file states something that changes numbers and cannot be read right.
        BackendNotInstalledError: without the package gguf.
    """
    import transformers

    key = digest_json([_FORM, transformers.__version__, digest_file(path)])
    folder = cache_folder() / "gguf" / key
    if not is_sound(folder):
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
        make_folder(temporary)
        try:
            file = _read(path)
            config = _config(path, file)
            _refuse_dropped_tensors(file, config)
            config.save_pretrained(temporary)
            convert_tokenizer(path, file.architecture, file.metadata, file.refuse).save_pretrained(temporary)
            put_in_place(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def is_sound(folder: Path) -> bool:
    """Return whether a conversion in the cache exists and is as it was written; any other is made again."""
    try:
        check_record(folder, read_sealed(folder / RECORD))
    except (DamagedStoreError, FileNotFoundError):
        return False
    return True


def put_in_place(temporary: Path, folder: Path) -> None:
    """Seal a finished folder and rename it, unless another process was faster with the same one."""
    write_record(temporary, {})
    if folder.is_dir() and not is_sound(folder):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(temporary)


def _read(path: Path) -> _File:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise BackendNotInstalledError(f"{path.name}: GGUF files need gguf: pip install 'kava[gguf]'") from error
    if pointer := lfs_pointer(path):
        raise CheckpointError(f"GGUF file {path.name}: {pointer}")
    if path.suffix in (".safetensors", ".bin", ".json"):
        raise CheckpointError(f"model {path}: this is one file of a model. Name its folder, {path.parent}")
    try:
        reader = GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:  # What numpy makes of a cut file.
        raise CheckpointError(
            f"GGUF file {path.name} is damaged or not a GGUF file ({error}). Copy it again"
        ) from error
    if "general.architecture" not in metadata:
        raise CheckpointError(f"GGUF file {path.name}: it states no general.architecture. Use another conversion")
    factors = {t.name: tuple(float(x) for x in t.data) for t in reader.tensors if t.name in _ROPE_TENSORS}
    return _File(path.name, metadata, tuple(tensor.name for tensor in reader.tensors), factors)


def _config(path: Path, file: _File) -> Any:
    """The config that transformers makes of the file, with what it dropped."""
    from transformers import AutoConfig

    if file.architecture == "clip":
        raise CheckpointError(
            f"GGUF file {file.name}: it holds the image encoder of a model (an mmproj file), not its language model. "
            "Name the model's other file"
        )
    for key in file.metadata:
        if key.startswith(("split.", "adapter.")) and not (key == "split.count" and file.metadata[key] < 2):
            raise file.refuse(key, "this is one part of a model; kava reads a model from one file")
    if lacking := [f"{file.architecture}.{suffix}" for suffix in _REQUIRED if suffix not in file.own]:
        raise file.refuse(lacking[0], "the file does not state it")
    for suffix in _ATTRIBUTES:
        if isinstance(value := file.own.get(suffix), list) and len(set(value)) != 1:
            raise file.refuse(f"{file.architecture}.{suffix}", "layers with unequal values are not supported")
    config = without_quantization(AutoConfig.from_pretrained(path.parent, gguf_file=path.name))
    changes = _defaults(file, config)
    for suffix, value in file.own.items():
        key = f"{file.architecture}.{suffix}"
        if suffix in _HARMLESS:
            if _HARMLESS[suffix] not in (None, value):
                raise file.refuse(key, f"the value {value!r} is not supported")
        elif suffix in _ATTRIBUTES:
            changes |= _attribute(file, config, suffix, value)
        elif suffix == "attention.sliding_window_pattern" and hasattr(config, "layer_types"):
            changes["layer_types"] = _layer_types(value, config.num_hidden_layers)
        elif not _ROPE.fullmatch(suffix):
            raise file.refuse(key, f"kava does not know this setting (its value is {str(value)[:40]})")
    config = type(config).from_dict(config.to_dict() | changes)
    if hasattr(config, "query_pre_attn_scalar"):
        config.query_pre_attn_scalar = _query_scale(config)
    return type(config).from_dict(config.to_dict() | _rope_parameters(file, config))


def _defaults(file: _File, config: Any) -> dict[str, Any]:
    """What llama.cpp assumes of keys that a file leaves out; a config class assumes one checkpoint's values instead."""
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    changes = {name: file.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    heads, own = file.own["attention.head_count"], file.own
    if "attention.head_count_kv" not in own:
        changes["num_key_value_heads"] = heads
    if "attention.key_length" not in own and hasattr(config, "head_dim") and not isinstance(heads, list):
        changes["head_dim"] = config.hidden_size // heads
    if config.model_type == "gemma3_text" and "attention.sliding_window" not in own:
        raise file.refuse(f"{file.architecture}.attention.sliding_window", "the file does not state it")
    return changes


def _attribute(file: _File, config: Any, suffix: str, value: Any) -> dict[str, Any]:
    """The change to the config that a key asks for."""
    key = f"{file.architecture}.{suffix}"
    if isinstance(value, list):
        value = value[0]
    if suffix == "attention.sliding_window" and not value:
        value = None
    if suffix == "vocab_size":  # Of the vocabulary; rows of the embedding may be padded.
        return {}
    if suffix == "expert_count" and not value:
        return {}
    for attribute in _ATTRIBUTES[suffix]:
        if hasattr(config, attribute):
            return {config.attribute_map.get(attribute, attribute): value}
    if suffix in ("attention.key_length", "attention.value_length"):
        derived = value == config.hidden_size // config.num_attention_heads
        return {} if derived else {"head_dim": value}  # Whether the model heeds it, the shapes of its weights tell.
    raise file.refuse(key, f"{config.model_type} has no such setting in transformers (its value is {value})")


def _layer_types(pattern: Any, num_layers: int) -> list[str]:
    """Types of attention layers: a flag for each, or one full layer in so many."""
    sliding = pattern if isinstance(pattern, list) else [(layer + 1) % pattern != 0 for layer in range(num_layers)]
    return ["sliding_attention" if flag else "full_attention" for flag in sliding]


def _query_scale(config: Any) -> int:
    """Gemma's scale of queries, which no key states: llama.cpp takes it from the size of the model."""
    largest = {"gemma2": 46, "gemma3_text": 62}
    if config.num_hidden_layers == largest.get(config.model_type):
        return int(config.hidden_size // config.num_attention_heads)
    return int(config.head_dim)


def _rope_parameters(file: _File, config: Any) -> dict[str, Any]:
    """`rope_parameters`, and what else says how keys are rotated."""
    own, prefix = file.own, file.architecture
    per_type = isinstance(next(iter(config.rope_parameters.values()), None), dict)
    kinds = config.rope_parameters if per_type else {"": config.rope_parameters}
    main = dict(kinds["full_attention" if per_type else ""])
    main["rope_theta"] = own.get("rope.freq_base", _DEFAULT_THETA)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = own.get("rope.dimension_count", head_dim)
    if config.model_type in _PARTLY_ROTATED:
        main["partial_rotary_factor"] = rotated / head_dim
    elif rotated != head_dim:
        raise file.refuse(f"{prefix}.rope.dimension_count", f"{rotated} of {head_dim} is not supported here")
    main |= _scaling(file, config, main["rope_theta"], rotated)
    if not per_type:
        if "rope.freq_base_swa" in own:
            raise file.refuse(f"{prefix}.rope.freq_base_swa", f"{config.model_type} has one rotary base")
        original = main.get("original_max_position_embeddings")
        if original is not None and hasattr(config, "original_max_position_embeddings"):
            return {"rope_parameters": main, "original_max_position_embeddings": original}
        return {"rope_parameters": main}
    local = dict(kinds["sliding_attention"])
    local["rope_theta"] = own.get("rope.freq_base_swa", local["rope_theta"])
    return {"rope_parameters": kinds | {"full_attention": main, "sliding_attention": local}}


def _scaling(file: _File, config: Any, theta: float, rotated: int) -> dict[str, Any]:
    """The scaling of rotary frequencies that keys or tensors of the file ask for."""
    scaling = {k.removeprefix("rope.scaling."): v for k, v in file.own.items() if k.startswith("rope.scaling.")}
    prefix, kind = f"{file.architecture}.rope.scaling", scaling.get("type", "none")
    original = scaling.get("original_context_length")
    if table := file.rope_factors.get("rope_freqs.weight"):
        if kind != "none":
            raise file.refuse(f"{prefix}.type", f"{kind!r} together with rope_freqs.weight is not supported")
        if len(table) != rotated // 2:
            raise file.refuse("rope_freqs.weight", f"it has {len(table)} factors for {rotated // 2} frequencies")
        return _per_frequency(table, theta, rotated, original or config.max_position_embeddings)
    if any(name in file.rope_factors for name in _ROPE_TENSORS[1:]):
        short, long = (file.rope_factors.get(name) for name in _ROPE_TENSORS[1:])
        if not short or not long or original is None:
            raise file.refuse("rope_factors_long.weight", "both tables and the original context length are needed")
        factor = config.max_position_embeddings / original
        attention = scaling.get("attn_factor", math.sqrt(1 + math.log(factor) / math.log(original)))
        return {
            "rope_type": "longrope",
            "short_factor": list(short),
            "long_factor": list(long),
            "attention_factor": attention,
            "original_max_position_embeddings": original,
        }
    if scaling.get("attn_factor", 1.0) != 1.0:
        raise file.refuse(f"{prefix}.attn_factor", f"the value {scaling['attn_factor']} is not supported")
    if kind == "none":
        if scaling.get("factor", 1.0) not in (0.0, 1.0) and "type" not in scaling:
            raise file.refuse(f"{prefix}.factor", "there is a factor, but no type")
        return {"rope_type": "default"}
    factor = scaling.get("factor")
    if kind not in ("linear", "yarn") or not factor:
        raise file.refuse(f"{prefix}.type", f"{kind!r} with factor {factor} is not supported")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    parameters = {"rope_type": "yarn", "factor": factor}
    parameters["original_max_position_embeddings"] = original or round(config.max_position_embeddings / factor)
    betas = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
    return parameters | {name: scaling[key] for name, key in betas.items() if key in scaling}


def _per_frequency(table: tuple[float, ...], theta: float, rotated: int, original: int) -> dict[str, Any]:
    """Rotary parameters that divide every frequency by its own factor.

    A table that Llama 3.1's formula gives with Meta's numbers is named so; any other is `longrope` with one table.
    """
    factor = max(table)
    llama3 = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for length in (8192, original):
        if all(
            math.isclose(given, formula, rel_tol=1e-4)
            for given, formula in zip(table, _llama3_factors(factor, theta, rotated, length), strict=True)
        ):
            return {"rope_type": "llama3", "original_max_position_embeddings": length} | llama3
    tables = {"short_factor": list(table), "long_factor": list(table)}
    return {
        "rope_type": "longrope",
        "attention_factor": 1.0,
        "original_max_position_embeddings": original,
        **tables,
    }


def _llama3_factors(factor: float, theta: float, rotated: int, original: int) -> list[float]:
    factors = []
    for pair in range(rotated // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / rotated)
        if wavelength < original / 4:
            factors.append(1.0)
        elif wavelength > original:
            factors.append(factor)
        else:
            smooth = (original / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def _refuse_dropped_tensors(file: _File, config: Any) -> None:
    """Refuse tensors that transformers' reader would pass over in silence."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    processor: Callable[..., Any] = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)
    known = get_gguf_hf_weights_map(meta_model(config), processor(config=config.to_dict()))
    read = {*known, *_ROPE_TENSORS}
    dropped = [name for name in file.tensor_names if name not in read and name.removesuffix(".weight") not in read]
    if dropped:
        names = ", ".join(dropped[:_FEW]) + (", ..." if len(dropped) > _FEW else "")
        raise file.refuse(names, f"{len(dropped)} tensors have no place in {config.model_type}")
