"""Where a Hugging Face model keeps its keys before rotary embedding, and its values; and a tap on them.

Teacher capture and student training read the same tensors through this one tap. An architecture is one row of
`ATTENTION_LAYOUTS`; a model whose row is missing is refused, because a guess would be silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from .errors import AlignmentError, UnsupportedModelError
from .store import KVGeometry

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class AttentionLayout:
    """Where one attention module computes its pre-RoPE keys and its values."""

    keys: tuple[str, ...] = ("k_proj",)
    """The submodule whose output is the last thing that happens to keys before rotary embedding: the first of these
    that the attention has, for norms that a config may leave out."""
    values: str = "v_proj"
    queries: tuple[str, ...] = ("q_proj",)
    """The same for queries."""
    output: str = "o_proj"
    """The projection of what the heads have read."""
    fused: bool = False
    """`keys`, `values` and `queries` name one projection whose output is `[queries | keys | values]`."""
    heads_first: bool = False
    """An output of `keys` and `queries` with four axes is `[b, h, t, d]` instead of `[b, t, h, d]`."""
    rotates: Callable[[Any], bool] = lambda attention: True
    """Whether this attention module rotates its keys and queries at all."""
    attn_implementation: str | None = None
    """The only attention that computes this architecture exactly, where the default does not."""


_NORMED: Final = AttentionLayout(keys=("k_norm",), queries=("q_norm",))
_OPTIONAL_NORM: Final = AttentionLayout(
    keys=("k_layernorm", "k_proj"), queries=("q_layernorm", "q_proj"), heads_first=True
)

ATTENTION_LAYOUTS: Final[dict[str, AttentionLayout]] = {
    "llama": AttentionLayout(),
    "mistral": AttentionLayout(),
    "mixtral": AttentionLayout(),
    "qwen2": AttentionLayout(),
    "qwen2_moe": AttentionLayout(),
    "qwen3": _NORMED,
    "qwen3_moe": _NORMED,
    "gemma": AttentionLayout(),
    "gemma2": AttentionLayout(attn_implementation="eager"),  # SDPA leaves out the soft-capping of attention scores.
    "gemma3_text": replace(_NORMED, heads_first=True),
    "phi": replace(_OPTIONAL_NORM, output="dense"),
    "phi3": AttentionLayout(keys=("qkv_proj",), values="qkv_proj", queries=("qkv_proj",), fused=True),
    "cohere": AttentionLayout(keys=("k_norm", "k_proj"), queries=("q_norm", "q_proj")),
    "cohere2": AttentionLayout(rotates=lambda attention: attention.sliding_window is not None),
    "ernie4_5": AttentionLayout(),
    "exaone4": replace(
        _NORMED, heads_first=True, rotates=lambda attention: attention.is_sliding or attention.sliding_window is None
    ),
    "glm": AttentionLayout(),
    "glm4": AttentionLayout(),
    "granite": AttentionLayout(),
    "helium": AttentionLayout(),
    "olmo2": _NORMED,
    "olmo3": _NORMED,
    "seed_oss": AttentionLayout(),
    "smollm3": AttentionLayout(rotates=lambda attention: bool(attention.use_rope)),
    "stablelm": _OPTIONAL_NORM,
    "starcoder2": AttentionLayout(),
}
"""By `config.model_type`."""


def attention_layout(config: Any) -> AttentionLayout:
    """The layout of a model with this config.

    Raises:
        UnsupportedModelError: if it is not known.
    """
    if config.model_type not in ATTENTION_LAYOUTS:
        raise UnsupportedModelError(
            f"architecture {config.model_type!r} is not supported: it is not known where it keeps its keys before "
            f"rotary embedding. Supported: {', '.join(ATTENTION_LAYOUTS)}. To add one, see docs/architecture.md"
        )
    return ATTENTION_LAYOUTS[config.model_type]


def sliding_window(attention: Any) -> int | None:
    """How many tokens an attention module sees, its own among them; None for all before it."""
    if not getattr(attention, "is_sliding", True):
        return None
    window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    return None if window is None else int(window)


class KVTap:
    """Collects pre-RoPE keys and values of every forward pass while it is open, with their gradient.

    A context manager; its hooks are always removed. After a forward pass `keys[l]` and `values[l]` are
    `[b, t, h, d]` tensors of the model's dtype, one per layer; with `queries` the attention's pre-RoPE queries
    `[b, t, num_attention_heads, d]` too. A further pass replaces them.
    """

    def __init__(self, model: nn.Module, *, layers: Sequence[int] | None = None, queries: bool = False) -> None:
        self.layout = attention_layout(model.config)
        self._attentions = [layer.self_attn for layer in decoder(model).layers]
        self._wanted = range(len(self._attentions)) if layers is None else layers
        self._handles: list[RemovableHandle] = []
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.queries: dict[int, torch.Tensor] = {}
        self._want_queries = queries

    def __enter__(self) -> KVTap:
        for index in self._wanted:
            attention, layout = self._attentions[index], self.layout
            places = [(layout.keys, self.keys), ((layout.values,), self.values)]
            if self._want_queries:
                places.append((layout.queries, self.queries))
            for names, found in places[:1] if layout.fused else places:
                hook = self._fused_hook(index, attention) if layout.fused else self._hook(index, attention, found)
                self._handles.append(_submodule(attention, names).register_forward_hook(hook))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def stack(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all tapped layers, each `[b, t, l, h, d]`."""
        import torch

        return (
            torch.stack([self.keys[index] for index in self._wanted], dim=2),
            torch.stack([self.values[index] for index in self._wanted], dim=2),
        )

    def _hook(self, index: int, attention: Any, found: dict[int, torch.Tensor]) -> Any:
        heads_first, head_dim = self.layout.heads_first, int(attention.head_dim)

        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if output.dim() == 4:
                found[index] = output.transpose(1, 2) if heads_first else output
            else:
                found[index] = _heads(output, head_dim)

        return hook

    def _fused_hook(self, index: int, attention: Any) -> Any:
        head_dim = int(attention.head_dim)
        width = attention.num_key_value_heads * head_dim

        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            self.queries[index] = _heads(output[..., : -2 * width], head_dim)
            self.keys[index] = _heads(output[..., -2 * width : -width], head_dim)
            self.values[index] = _heads(output[..., -width:], head_dim)

        return hook


def _submodule(attention: nn.Module, names: Sequence[str]) -> nn.Module:
    """The first of these that there is."""
    for name in names[:-1]:
        if hasattr(attention, name):
            return attention.get_submodule(name)
    return attention.get_submodule(names[-1])


def _heads(flat: torch.Tensor, head_dim: int) -> torch.Tensor:
    """`[b, t, h * d]` as `[b, t, h, d]`."""
    return flat.view(*flat.shape[:-1], -1, head_dim)


def decoder(model: Any) -> Any:
    """The stack of decoder layers below the language-model head."""
    base = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    if not hasattr(base, "layers"):
        raise UnsupportedModelError(f"{type(model).__name__} has no decoder layers where kava looks for them")
    return base


def probe_geometry(model: Any) -> KVGeometry:
    """Counts layers, KV heads and head width on the tensors of a one-token forward pass.

    The model's own cache is the authority; the tap and the config are checked against it. Works on a model on the
    `meta` device too, that is without weights.

    Raises:
        AlignmentError: if the three disagree.
        UnsupportedModelError: if layers differ in shape or share their keys.
    """
    import torch

    device = next(model.parameters()).device
    ids = torch.zeros((1, 1), dtype=torch.int64, device=device)
    with torch.no_grad(), KVTap(model) as tap:
        cache = decoder(model)(input_ids=ids, use_cache=True).past_key_values
    shapes = {(layer.keys.shape[1], layer.keys.shape[3]) for layer in cache.layers}
    if len(shapes) != 1 or len(cache.layers) != len(tap.keys):
        raise UnsupportedModelError(f"{type(model).__name__}: layers of unequal KV shape {sorted(shapes)} or shared KV")
    (heads, head_dim) = shapes.pop()
    geometry = KVGeometry(num_layers=len(cache.layers), num_key_value_heads=heads, head_dim=head_dim)
    tapped = {tuple(t.shape[2:]) for t in [*tap.keys.values(), *tap.values.values()]}
    if tapped != {(heads, head_dim)}:
        raise AlignmentError(f"{type(model).__name__}: the tap sees {sorted(tapped)}, the cache {(heads, head_dim)}")
    stated = (getattr(model.config, "num_key_value_heads", None), getattr(model.config, "head_dim", None))
    for name, said, counted in zip(("num_key_value_heads", "head_dim"), stated, (heads, head_dim), strict=True):
        if said is not None and said != counted:
            raise AlignmentError(f"{type(model).__name__}: config.{name} is {said}, its cache has {counted}")
    return geometry
