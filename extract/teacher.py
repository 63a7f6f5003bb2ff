"""What a teacher is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from ..store import KVGeometry
from .tokens import Tokens

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Captured:
    """Keys and values of one sample, on the CPU."""

    index: int
    """Of the sample in the sequence that was given to `capture`."""
    keys: torch.Tensor
    """`[t, l, h, d]`, before rotary embedding, without padding."""
    values: torch.Tensor
    """`[t, l, h, d]`."""
    extras: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    """Signals of the forward pass, as the store's manifest declares them."""


class Teacher(Protocol):
    """Anything that computes keys and values of token sequences by teacher-forced prefill.

    A context manager: leaving it frees the model, or stops the engine.
    """

    backend: str
    """What computes, as `provenance` states it. Under Hugging Face, parts with the same one are equal bit for bit."""

    @property
    def geometry(self) -> KVGeometry:
        """Layers, KV heads and head width of what `capture` returns."""
        ...

    @property
    def max_tokens(self) -> int:
        """The longest sequence the model can read."""
        ...

    def capture(self, samples: Sequence[Tokens]) -> Iterator[Captured]:
        """Computes every sample once, in an order of its own; the next is under way while one is looked at."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def provenance(engine: str, version: str, device: str, batch_tokens: int) -> str:
    """Return what rounding depends on besides the manifest.

    For example `hf 5.19.0, torch 2.9.0, cpu AVX512 x 8, batch_tokens 4096`.

    Args:
        engine: name of the backend, without spaces.
        version: that of its library.
        device: kind and model of the device.
        batch_tokens: tokens of one forward pass.
    """
    return f"{engine} {version}, torch {metadata.version('torch')}, {device}, batch_tokens {batch_tokens}"


def device_name(device: torch.device) -> str:
    """Return kind and model of a device on which this process computes.

    On a CPU a matrix product is summed in an order that depends on the instructions and on the number of threads.
    """
    import torch

    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()} x {torch.get_num_threads()}"
    return device.type
