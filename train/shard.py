"""A student in shards: each process keeps a part of every weight, of its gradient and of the optimizer's state.

torch's `fully_shard` (FSDP2) does it layer by layer, called by accelerate as the Trainer tells it to; checkpoints are
written in shards by torch too. Ours are what they do not know of: gradients of single terms of the loss, the whole
student at the end, and that CPUs shard as GPUs do, which is what the tests run on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

from .ranks import Ranks

SHARDING: Final[dict[str, Any]] = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "reshard_after_forward": True, "state_dict_type": "SHARDED_STATE_DICT"},
    "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
}
"""What the Trainer is told. Whole gradients are not kept between accumulated batches: each batch's are summed."""


def shard_anywhere(accelerator: Any, plugin: dict[str, Any]) -> None:
    """Has `accelerator.prepare` shard the model on CPUs too, and in the precision in which kava trains.

    On CPUs accelerate drops the plugin that it was given. Under `bf16` it would gather weights and sum gradients in
    bfloat16; here autocast does what it does without shards.

    Args:
        accelerator: of the Trainer, before anything is prepared.
        plugin: what its `FullyShardedDataParallelPlugin` is made of.
    """
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = accelerator.state
    if state.distributed_type != DistributedType.FSDP:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin)
        state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin.mixed_precision_policy = None


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a sharded tensor; any other as it is."""
    found: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return found


class ShardedGradients:
    """Gradients of single terms with regard to sharded weights, which `torch.autograd.grad` does not reach.

    Each is a backward pass of its own into gradients that are empty before and after; the graph stays. All processes
    must ask for the same ones. A gradient is the mean of the processes' own.

    torch gathers a layer's weights where a gradient comes to the layer's output. The last tapped layer's gets none from
    a KV loss, so cross-entropy is added to each term, times zero, and a gradient that is zero everywhere is none.
    """

    def __init__(self, model: Any, ce: torch.Tensor, ranks: Ranks) -> None:
        """Of a model.

        Args:
            model: sharded.
            ce: of the same forward pass, a scalar that all its layers' outputs count in.
            ranks: the processes.
        """
        self._model, self._ce, self._ranks = model, ce, ranks

    def __call__(self, term: torch.Tensor) -> list[torch.Tensor | None]:
        """This process's shard of the gradient of each trainable weight; None where there is none."""
        self._model.zero_grad()
        torch.autograd.backward(term + 0 * self._ce, retain_graph=True)
        # Not before: between a forward pass and its backward the model has whole weights in the place of shards.
        found = [None if p.grad is None else local(p.grad) for p in self._model.parameters() if p.requires_grad]
        self._model.zero_grad()
        reached = self._ranks.max([0.0 if g is None else float(g.any()) for g in found])
        return [g if some else None for g, some in zip(found, reached, strict=True)]


def whole_state(model: Any) -> dict[str, torch.Tensor]:
    """All weights of a sharded model, on the CPU of the first process; nothing on the others, which must ask too."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)))  # type: ignore[arg-type]


@contextmanager
def shard_errors() -> Iterator[None]:
    """What torch has met while it wrote or read shards, in the place of its own error, which is no `Exception`."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        found = [cause for cause, _ in error.failures.values()]
        raise next((cause for cause in found if isinstance(cause, OSError)), found[0]) from None
