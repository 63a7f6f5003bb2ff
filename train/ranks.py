"""The processes that train one student together, as torchrun starts them, and what they agree on."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import KavaError

T = TypeVar("T")
E = TypeVar("E", bound=KavaError)


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; of a single one, all is its own."""

    rank: int = 0
    size: int = 1
    device: Any = None
    """Where tensors must be for the others to see them."""

    @classmethod
    def join(cls, *, use_cpu: bool = False) -> Ranks:
        """Waits for the others, where torchrun (or srun, with the same variables) has started several.

        Args:
            use_cpu: not to use devices, even if there are some.
        """
        if num_processes() == 1:
            return cls()
        import torch
        from accelerate import PartialState

        state = PartialState(cpu=use_cpu or not torch.accelerator.is_available())
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def is_first(self) -> bool:
        """Whether this one writes, and speaks."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks."""
        return self._reduce(values, "SUM")

    def max(self, values: Sequence[float]) -> list[float]:
        """The largest of all ranks."""
        return self._reduce(values, "MAX")

    def _reduce(self, values: Sequence[float], how: str) -> list[float]:
        if self.size == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, getattr(dist.ReduceOp, how))
        return list(tensor.tolist())

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in their order; anything that pickles."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def first(self, function: Callable[[], T]) -> T:
        """What the function gives on the first rank, the only one that calls it.

        Raises:
            KavaError: that it raises there, on all of them.
        """
        if self.size == 1:
            return function()
        import torch.distributed as dist

        told: list[Any] = [None, None]
        if self.is_first:
            try:
                told[0] = function()
            except KavaError as error:
                told[1] = error
        dist.broadcast_object_list(told, src=0, device=self.device)
        if told[1] is not None:
            raise agreed(told[1])
        found: T = told[0]
        return found

    def wait(self) -> None:
        """Until all are here."""
        self.sum([0.0])

    def leave(self) -> None:
        """Ends what `join` began."""
        if self.size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()


def agreed(error: E) -> E:
    """The error, marked as one that every rank raises."""
    error.agreed = True
    return error


def num_processes() -> int:
    """How many processes torchrun has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))
