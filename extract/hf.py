"""A teacher under Hugging Face transformers: padded forward passes, hooks on every attention layer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from importlib import metadata
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from ..decoding import continue_prompts
from ..hub import ModelSource, load_model
from ..store import KVGeometry, at_work
from ..tap import KVTap, decoder, probe_geometry
from .rope import forget_longest_pass, frequency_class, max_positions
from .signals import Signals
from .teacher import Captured, device_name, provenance
from .tokens import Tokens

if TYPE_CHECKING:
    import torch

    from .generate import GenerateSettings


class HFTeacher:
    """A loaded model that captures its own pre-RoPE keys and values."""

    def __init__(
        self,
        model: Any,
        *,
        batch_tokens: int = 4096,
        padding_side: Literal["left", "right"] = "right",
        importance: bool = False,
        confidence: bool = False,
        logits: int | None = None,
    ) -> None:
        """Wraps a model.

        Args:
            model: with its language-model head, if `confidence` or `logits` are wanted.
            batch_tokens: tokens of one forward pass at most, padding included.
            padding_side: of a batch.
            importance: also capture how much the answer attends to each rationale token.
            confidence: also capture loss and entropy of the text.
            logits: also capture so many of the likeliest next tokens after each token, with their log-probabilities.

        Raises:
            UnsupportedModelError: if its architecture is not known, or what it does to its logits.
            RecipeError: if there are not so many `logits`.
        """
        self.signals = Signals(model, importance, confidence, logits)
        self.model, self.batch_tokens, self.padding_side = model, batch_tokens, padding_side
        self.geometry: KVGeometry = probe_geometry(model)
        self.backend = provenance("hf", metadata.version("transformers"), device_name(model.device), batch_tokens)

    @classmethod
    def load(
        cls,
        source: ModelSource,
        *,
        dtype: str,
        device: str = "auto",
        batch_tokens: int = 4096,
        importance: bool = False,
        confidence: bool = False,
        logits: int | None = None,
    ) -> HFTeacher:
        """Loads the model; arguments as for the class.

        Raises:
            ModelNotFoundError: if it cannot be loaded.
            UnsupportedModelError: if its architecture is not known.
        """
        model = load_model(source, dtype=dtype, device=device)
        return cls(model, batch_tokens=batch_tokens, importance=importance, confidence=confidence, logits=logits)

    @property
    def max_tokens(self) -> int:
        """Tokens that the model reads; see `max_positions`."""
        return max_positions(self.model.config)

    def capture(self, samples: Sequence[Tokens]) -> Iterator[Captured]:
        """Pre-RoPE keys and values of each sample, in the model's dtype, by batches of like length.

        The language-model head is not run but for `confidence` and `logits`. Padding is masked and not returned. A
        batch is handed over while the device is at work on the next.
        """
        before: Callable[[], list[Captured]] = list
        kinds = [frequency_class(self.model.config, int(tokens.positions.max()) + 1) for tokens in samples]
        for batch in plan_batches([len(tokens) for tokens in samples], self.batch_tokens, kinds):
            launched = self._launch(batch, [samples[index] for index in batch])
            yield from before()
            before = launched
        yield from before()

    def generate(
        self,
        prompts: Sequence[list[int]],
        settings: GenerateSettings,
        *,
        stop_ids: Sequence[int],
        numbers: Sequence[int],
    ) -> list[list[int]]:
        """Continue each prompt, in batches of similar length; each is drawn with a seed of its own.

        Prompts that may grow past a length at which rotary frequencies change share a batch only with their like.
        """
        written: list[list[int]] = [[] for _ in prompts]
        ends = [len(p) + settings.max_new_tokens for p in prompts]
        config = self.model.config
        kinds = [0 if frequency_class(config, end) == frequency_class(config, 1) else end for end in ends]
        for batch in plan_batches(ends, self.batch_tokens, kinds):
            forget_longest_pass(self.model)
            continued = continue_prompts(
                self.model,
                [prompts[index] for index in batch],
                stop_ids=stop_ids,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                seeds=[settings.seed + numbers[index] for index in batch],
            )
            for index, tokens in zip(batch, continued, strict=True):
                written[index] = tokens
            at_work()
        return written

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self.model, self.signals

    def _launch(self, indices: list[int], batch: list[Tokens]) -> Callable[[], list[Captured]]:
        """Starts a forward pass and the copies of its keys and values; the result waits for them."""
        import torch

        device = next(self.model.parameters()).device
        longest = max(len(tokens) for tokens in batch)
        ids, mask, positions = (torch.zeros((len(batch), longest), dtype=torch.int64) for _ in range(3))
        rows = []
        for row, tokens in enumerate(batch):
            start = longest - len(tokens) if self.padding_side == "left" else 0
            rows.append(slice(start, start + len(tokens)))
            ids[row, rows[row]] = torch.from_numpy(tokens.input_ids).to(torch.int64)
            positions[row, rows[row]] = torch.from_numpy(tokens.positions).to(torch.int64)
            mask[row, rows[row]] = 1
        with torch.inference_mode(), KVTap(self.model, queries=self.signals.importance) as tap:
            forget_longest_pass(self.model)
            hidden = decoder(self.model)(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                position_ids=positions.to(device),
                use_cache=False,
            ).last_hidden_state
            keys, values = (_to_host(tensor) for tensor in tap.stack())
            computed = self.signals.compute(tap, hidden, batch, rows)
            signals = [{name: _to_host(tensor) for name, tensor in found.items()} for found in computed]
        copied = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

        def result() -> list[Captured]:
            if copied is not None:
                copied.synchronize()
            return [
                Captured(
                    index,
                    keys[row, cut].clone(),
                    values[row, cut].clone(),
                    self.signals.extras(batch[row], signals[row], self.geometry),
                )
                for index, (row, cut) in zip(indices, enumerate(rows), strict=True)
            ]

        return result


def plan_batches(lengths: Sequence[int], batch_tokens: int, kinds: Sequence[Hashable] | None = None) -> list[list[int]]:
    """Indices grouped so that each group, padded to its longest, stays within `batch_tokens`; a group has one at least.

    Sorted by length, longest first, so that padding is small and running out of memory happens at once or never. With
    `kinds`, only samples of equal kind share a group: a model chooses rotary frequencies by the longest of a batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for index in order:
        first = batches[-1][0] if batches else None
        alike = first is not None and (kinds is None or kinds[first] == kinds[index])
        if first is not None and alike and lengths[first] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU; from CUDA the copy is only started, into page-locked memory."""
    import torch

    if tensor.device.type != "cuda":
        return tensor.to("cpu")
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
