"""What a teacher needs of its device's memory, worked out from its config, and what the device has."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any, Final

from ...errors import RecipeError
from ...hub import count_parameters, load_config
from ...store.dtypes import dtype_of
from ..run import Run

_CONTEXT: Final = 600_000_000
"""Of CUDA itself: kernels, workspaces."""
_SPARE: Final = 1.1
"""Fragmentation of the allocator."""


@dataclass(frozen=True)
class Memory:
    """Bytes, of one device."""

    teacher: str
    weights: int
    kv: int
    """Keys and values of two batches: one is handed over while the next is computed."""
    activations: int
    """The largest layer of one forward pass, and logits where they are asked for."""
    needed: int
    """All of it, with what the allocator and the device add."""
    device: str
    available: int | None
    """What the device of this machine has free; None if it is not here."""

    @property
    def fits(self) -> bool:
        """Whether it is not known to be too much."""
        return self.available is None or self.needed <= self.available

    def describe(self) -> dict[str, Any]:
        """For programs."""
        return {**asdict(self), "fits": self.fits}


def teacher_memory(run: Run, name: str, longest: int) -> Memory:
    """What capturing from a teacher needs; `longest` is the longest sample in tokens.

    Raises:
        ModelNotFoundError: if its config cannot be reached.
        RecipeError: if its device is none, or none of this machine's.
    """
    settings, extract = run.teacher(name), run.recipe.extract
    config = load_config(run.teacher_source(name))
    itemsize = dtype_of(settings.dtype).itemsize
    ways = 1
    if extract.backend == "vllm":
        ways = settings.engine.tensor_parallel_size * settings.engine.pipeline_parallel_size
    parameters = count_parameters(config)
    tokens = max(extract.batch_tokens, longest)
    heads = config.num_attention_heads
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    query = heads * (getattr(config, "head_dim", None) or width // heads)
    activations = tokens * itemsize * (6 * width + 3 * inner + 4 * query)
    if extract.importance:
        activations += tokens * longest * heads * 4
    if extract.confidence or extract.logits is not None:
        activations += 2 * tokens * config.vocab_size * 4
    weights = parameters * itemsize // ways
    kv = 2 * tokens * run.teacher_geometry(name).bytes_per_token(itemsize) // ways
    device, available = _device(settings.device, f"teachers.{name}.device")
    context = _CONTEXT if device != "cpu" else 0
    needed = round((weights + kv + activations) * _SPARE) + context
    return Memory(name, weights, kv, activations, needed, device, available)


def _device(asked: str, key: str) -> tuple[str, int | None]:
    """The device that would be used, and its free memory; `key` is the recipe's that asks for it."""
    import torch

    try:
        found = torch.device("cuda" if asked == "auto" else asked)
    except RuntimeError:
        raise RecipeError(f"{key}: {asked!r} is no device; write auto, cpu, cuda or cuda:1") from None
    if found.type == "cuda" and torch.cuda.is_available():
        index, count = found.index or 0, torch.cuda.device_count()
        if index >= count:
            raise RecipeError(f"{key}: {asked} is not here, this machine's last one is cuda:{count - 1}")
        return f"cuda:{index}", int(torch.cuda.mem_get_info(index)[0])
    if asked not in ("auto", "cpu"):
        return asked, None
    # Without a device here the plan may be made for another machine: only what is asked of the CPU is compared.
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return ("cpu", max(free, _available())) if asked == "cpu" else ("not here", None)


def _available() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123  # No path of a user's.
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
