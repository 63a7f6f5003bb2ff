"""Checks that a checkpoint holds exactly the tensors of its model.

transformers fills a tensor that a checkpoint lacks with random numbers and continues. Names and shapes are therefore
compared before any weight is read: they are taken from the files' headers and loaded into a model on the `meta`
device, so that transformers itself applies its rules on tied heads, renamed layers and keys to ignore.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .errors import CheckpointError
from .lfs import lfs_pointer
from .notices import no_progress_bar, transformers_log

SINGLE: Final = ("model.safetensors", "pytorch_model.bin")
"""Weight files, in the order in which transformers looks for them; each may be an index of shards instead."""
_WRAPPERS: Final = r"(?:(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
UNWRAP: Final[dict[str, str]] = {rf"^{_WRAPPERS}": "", rf"\.{_WRAPPERS}": "."}
"""A key mapping for `from_pretrained` that removes the prefixes of torch.compile, DDP, FSDP and checkpointing."""
_HARMLESS: Final = re.compile(r"rotary_emb\.inv_freq$")
"""Buffers of old checkpoints that are computed from the config."""
_CONVERSION: Final = re.compile(r"^(\S+)\s*\|\s*\S*CONVERSION", re.MULTILINE)
_ANSI: Final = re.compile(r"\x1b\[[0-9;]*m")
_SHOWN: Final = 3


@dataclass(frozen=True)
class KeyReport:
    """Differences between a checkpoint's tensors and its model's parameters, each sorted by name."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    """Names with both shapes."""

    @classmethod
    def of(cls, info: dict[str, Any]) -> KeyReport:
        """Return the report in what `from_pretrained(output_loading_info=True)` returns."""
        shapes = [f"{name} {list(stored)} instead of {list(own)}" for name, stored, own in info["mismatched_keys"]]
        unexpected = [name for name in info["unexpected_keys"] if not _HARMLESS.search(name)]
        return cls(*(tuple(sorted(keys)) for keys in (info["missing_keys"], unexpected, shapes)))

    def __len__(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.mismatched)

    def refuse(self, name: str) -> None:
        """Raise an error that names the first few keys of each kind, if there are any.

        Raises:
            CheckpointError: if the checkpoint does not hold exactly the model's tensors.
        """
        kinds = (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("of another shape", self.mismatched),
        )
        problems = [f"{len(keys)} tensors {kind} ({_few(keys)})" for kind, keys in kinds if keys]
        if problems:
            raise CheckpointError(
                f"model {name!r}: the checkpoint does not hold the tensors of its config: {'; '.join(problems)}. "
                "Save the whole model again with save_pretrained, or correct its config.json"
            )


def meta_model(config: Any) -> Any:
    """Return the causal language model of a config on the `meta` device: every module, no weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        # Of the ways to compute experts, the one whose shapes do not depend on numbers.
        return AutoModelForCausalLM.from_config(
            without_quantization(deepcopy(config)), experts_implementation="batched_mm"
        )


def without_quantization(config: Any) -> Any:
    """Remove the marks of a quantised checkpoint from a config, and return it."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def weight_files(name: str, resolve: Callable[[str], Path | None]) -> list[Path]:
    """Return a model's weight files, as transformers chooses them.

    Args:
        name: the model, for messages.
        resolve: returns the path of a file of the model, or None if it does not exist.

    Raises:
        CheckpointError: if there are none, or if an index names files that do not exist.
    """
    for single in SINGLE:
        if path := resolve(single):
            return [path]
        if index := resolve(f"{single}.index.json"):
            try:
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"model {name!r}: {index.name} is not an index of shards: {error}") from error
            paths = {shard: resolve(shard) for shard in shards}
            if absent := [shard for shard, path in paths.items() if path is None]:
                raise CheckpointError(
                    f"model {name!r}: {index.name} names {len(absent)} of {len(shards)} files that do not exist "
                    f"({_few(absent)}). Copy them into the folder"
                )
            return [path for path in paths.values() if path is not None]
    raise CheckpointError(
        f"model {name!r}: there are no weights; expected {' or '.join(SINGLE)}, or an index of either's shards"
    )


def tensor_shapes(name: str, files: Iterable[Path]) -> dict[str, Any]:
    """Return every tensor of some weight files on the `meta` device, by name: shapes, no numbers.

    Raises:
        CheckpointError: if a file is truncated or unreadable.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Any] = {}
    for path in files:
        if pointer := lfs_pointer(path):
            raise CheckpointError(f"model {name!r}: {path.name}: {pointer}")
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as reader:
                    for key in reader.keys():  # noqa: SIM118 - not a mapping
                        tensors[key] = torch.empty(reader.get_slice(key).get_shape(), device="meta")
            else:
                tensors |= _torch_file(path)
        except (SafetensorError, RuntimeError, ValueError, EOFError, OSError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise CheckpointError(
                f"model {name!r}: {path.name} is damaged or not a weight file ({reason}). Copy it again"
            ) from error
    return tensors


def key_report(
    model_class: Any, config: Any, tensors: dict[str, Any], key_mapping: dict[str, str] | None = None
) -> KeyReport:
    """Return the differences between these tensors and the model of this config, as transformers would load them.

    Args:
        model_class: the class of the causal language model.
        config: its config; a quantised one is compared by modules only, because each method renames tensors.
        tensors: by name, on the `meta` device.
        key_mapping: renamings, as for `from_pretrained`.
    """
    if getattr(config, "quantization_config", None) is not None:
        return _quantized_report(model_class, config, tensors)
    with transformers_log() as lines, no_progress_bar():
        try:
            _, info = model_class.from_pretrained(
                None,
                config=deepcopy(config),
                state_dict=dict(tensors),
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                key_mapping=key_mapping,
            )
        except RuntimeError:  # Tensors that are stacked into one on loading: one of them is missing.
            names = _CONVERSION.findall(_ANSI.sub("", "\n".join(lines)))
            if not names:
                raise
            return KeyReport(missing=tuple(f"parts of {name}" for name in sorted(names)))
    return KeyReport.of(info)


def find_key_mapping(name: str, model_class: Any, config: Any, tensors: dict[str, Any]) -> dict[str, str] | None:
    """Return the renaming under which a checkpoint holds exactly the model's tensors; None if it needs none.

    Raises:
        CheckpointError: if it does not hold them under its own names, nor without the prefixes of wrappers.
    """
    report = key_report(model_class, config, tensors)
    if not len(report):
        return None
    unwrapped = [_unwrap(key) for key in tensors]
    if unwrapped != list(tensors) and len(set(unwrapped)) == len(unwrapped):
        second = key_report(model_class, config, tensors, UNWRAP)
        if not len(second):
            return dict(UNWRAP)
        report = min(report, second, key=len)
    report.refuse(name)
    return None


def _unwrap(key: str) -> str:
    for pattern, replacement in UNWRAP.items():
        key = re.sub(pattern, replacement, key)
    return key


def _torch_file(path: Path) -> dict[str, Any]:
    import pickle

    import torch

    try:
        loaded = torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(str(error)) from error
    if not isinstance(loaded, dict):
        raise ValueError(f"it holds a {type(loaded).__name__}, not named tensors")
    return {key: tensor for key, tensor in loaded.items() if isinstance(tensor, torch.Tensor)}


def _quantized_report(model_class: Any, config: Any, tensors: dict[str, Any]) -> KeyReport:
    """Parameters of whose module the checkpoint holds no tensor at all, experts aside."""
    import torch

    with torch.device("meta"):
        model = model_class(without_quantization(deepcopy(config)))
    modules = {key.rsplit(".", 1)[0] for key in tensors}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    names = [name for name, _ in model.named_parameters() if ".experts" not in name and name not in tied]
    return KeyReport(missing=tuple(sorted(name for name in names if name.rsplit(".", 1)[0] not in modules)))


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
