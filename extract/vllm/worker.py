"""What kava adds to vLLM's workers, through its public `worker_extension_cls`: the connector meets the model.

Methods return what is wrong as text instead of raising, because an exception of a worker process reaches ours without
its type.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.parallel_state import get_tp_group, get_world_group
from vllm.model_executor.models.utils import extract_layer_index

from ...errors import UnsupportedModelError
from ..rope import RotaryTable, rotary_tables
from .compat import cache_specs, refuse_unsupported
from .copier import CachedLayer, Copier
from .handover import Address, Outbox
from .layout import CacheLayout, learn_layout, prove_layout

if TYPE_CHECKING:
    from .connector import KavaConnector


class CaptureWorker:
    """Mixed into every worker of the engine."""

    if TYPE_CHECKING:

        def get_model(self) -> torch.nn.Module:
            """The worker's model."""

    def kava_attach(
        self, address: tuple[str, bytes], dtype: str, ring_bytes: int, shape: tuple[int, int, int], config: str
    ) -> str | None:
        """Proves layouts and rotary tables, and opens the way out.

        Args:
            address: where our process listens.
            dtype: of what is sent.
            ring_bytes: of shared memory for this worker.
            shape: layers, KV heads and head_dim of the whole model, as its config promises them.
            config: the model's Hugging Face config, in JSON.

        Returns:
            What cannot be captured, or None.
        """
        connector: KavaConnector = get_kv_transfer_group()
        try:
            refuse_unsupported(connector.vllm_config, connector.kv_cache_config)
            layers = _layers(connector, self.get_model(), AutoConfig.for_model(**json.loads(config)))
        except UnsupportedModelError as error:
            return str(error)
        except (RuntimeError, ValueError) as error:  # Of the backend's own cache update, for shapes it does not know.
            return f"its cache cannot be written: {error}"
        tensor_parallel = get_tp_group()
        num_layers, heads, head_dim = shape
        mine, width = layers[0].layout.offsets.shape[2:]
        if width != head_dim or heads % mine or layers[-1].index >= num_layers:
            return f"it has {mine} KV heads of width {width} on a rank, up to layer {layers[-1].index}, not {shape}"
        # With more ranks than KV heads, several ranks hold the same head: the first of them sends it.
        copies = max(1, tensor_parallel.world_size * mine // heads)
        first = tensor_parallel.rank_in_group // copies * mine
        sent = mine if tensor_parallel.rank_in_group % copies == 0 else 0
        connector.copier = Copier(
            layers,
            outbox=Outbox(Address(*address), rank=get_world_group().rank_in_group, ring_bytes=ring_bytes),
            block_size=connector.block_size,
            heads=(first, first + sent),
            head_dim=head_dim,
            dtype=getattr(torch, dtype),
            ring_bytes=ring_bytes,
        )
        return None

    def kava_flush(self, call: int) -> None:
        """Says, after everything that is under way, that nothing more comes for this call."""
        connector: KavaConnector = get_kv_transfer_group()
        assert connector.copier is not None
        connector.copier.flush(call)


@torch.inference_mode()
def _layers(connector: KavaConnector, model: torch.nn.Module, config: Any) -> list[CachedLayer]:
    if ".models.transformers" in type(model).__module__:
        raise UnsupportedModelError(
            f"vLLM has no code of its own for it and runs that of transformers ({type(model).__name__}), in which kava "
            "does not find the rotation of keys; use extract.backend: hf"
        )
    attentions = connector.vllm_config.compilation_config.static_forward_context
    num_blocks = connector.kv_cache_config.num_blocks
    specs = cache_specs(connector.kv_cache_config)
    # The last position is that of the sampled token, which is never computed.
    positions = connector.vllm_config.model_config.max_model_len - 1
    expected = rotary_tables(config, torch.arange(positions))
    layouts: dict[tuple[Any, ...], CacheLayout] = {}
    tables: dict[tuple[int, int], RotaryTable] = {}
    found = []
    for name in sorted(connector.caches, key=extract_layer_index):
        attention, spec = attentions[name], specs[name]
        if getattr(attention, "kv_sharing_target_layer_name", None) is not None:
            raise UnsupportedModelError(f"layer {name} has no keys of its own but shares those of another layer")
        cache = connector.caches[name]

        def write(keys: Any, values: Any, slots: Any, attention: Any = attention) -> None:
            attention.impl.do_kv_cache_update(attention, keys, values, attention.kv_cache, slots)

        heads, head_dim = spec.num_kv_heads, spec.head_size
        kind = (type(attention.impl), cache.dtype, cache.shape, cache.stride(), heads, head_dim)
        if kind not in layouts:
            layouts[kind] = learn_layout(cache, write, block_size=connector.block_size, heads=heads, head_dim=head_dim)
        prove_layout(layouts[kind], cache, write, block_size=connector.block_size, num_blocks=num_blocks)
        index = extract_layer_index(name)
        own = expected[index]
        if own.rotary_dim == 0:  # Some models have the module in such a layer too, and do not call it.
            found.append(CachedLayer(index, cache, layouts[kind], own.to(cache.device)))
            continue
        rotary = _rotary_module(model, name)
        if (id(rotary), id(own)) not in tables:
            table = read_rotary(rotary, positions, cache.dtype, cache.device)
            if problem := table.differs(own.to(cache.device), torch.finfo(cache.dtype).eps):
                raise UnsupportedModelError(f"layer {name}: {type(rotary).__name__} {problem} of transformers")
            tables[id(rotary), id(own)] = table
        found.append(CachedLayer(index, cache, layouts[kind], tables[id(rotary), id(own)]))
    indices = [layer.index for layer in found]
    if not found or indices != list(range(indices[0], indices[0] + len(indices))):
        raise UnsupportedModelError(f"the attention layers of this worker are {indices}, not consecutive ones")
    if len({layer.layout.offsets.shape[2:] for layer in found}) != 1:
        raise UnsupportedModelError("layers differ in KV heads or head_dim")
    return found


def _rotary_module(model: torch.nn.Module, layer_name: str) -> torch.nn.Module:
    path = layer_name.rpartition(".")[0]
    try:
        return model.get_submodule(f"{path}.rotary_emb")
    except AttributeError:
        raise UnsupportedModelError(
            f"layer {layer_name}: {type(model).__name__} has no {path}.rotary_emb, so its keys cannot be un-rotated"
        ) from None


def read_rotary(rotary: Any, positions: int, dtype: torch.dtype, device: torch.device) -> RotaryTable:
    """The table that a rotary module applies, read by letting it rotate ones, and proved on random keys.

    Args:
        rotary: vLLM's module: `(positions, query, key) -> (query, key)`.
        positions: how many.
        dtype: of the model.
        device: of the model.

    Raises:
        UnsupportedModelError: if it does not turn pairs of dimensions by its positions.
    """
    width, head_dim = int(rotary.rotary_dim), int(rotary.head_size)
    interleaved = not getattr(rotary, "is_neox_style", True)  # LongRoPE's module does not say.
    at = torch.arange(positions, device=device)

    def turn(keys: torch.Tensor) -> torch.Tensor:
        flat = keys.to(device, dtype).reshape(len(keys), head_dim)
        _, out = rotary(at[: len(keys)], flat.clone(), flat.clone())
        turned: torch.Tensor = out.view(len(keys), 1, head_dim).float()
        return turned

    ones = torch.zeros(positions, 1, head_dim)
    first = slice(0, width, 2) if interleaved else slice(0, width // 2)
    second = slice(1, width, 2) if interleaved else slice(width // 2, width)
    ones[..., first] = 1
    read = turn(ones)[:, 0]
    table = RotaryTable(read[:, first].contiguous(), read[:, second].contiguous(), interleaved)
    keys = torch.randn(positions, 1, head_dim, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    error = (table.unrotate(turn(keys)) - keys.float()).abs().max().item()
    if not error < 32 * torch.finfo(dtype).eps:
        raise UnsupportedModelError(
            f"{type(rotary).__name__} does not rotate pairs of dimensions as expected (off by {error:.1e})"
        )
    return table
