"""A student on held-out samples, one number for each: what comparisons of arms are made of.

Everything is in units in which students compare: nats of the same tokens, bytes of text for other tokenizers, and KV
error over the variance of the true targets, whatever loss a student was trained with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import DamagedStoreError, StageError
from ..store import KVSample, Split
from ..store.files import write_atomic
from ..store.safe_json import LOG_BYTES, read_json_object
from ..tap import KVTap, probe_geometry
from .data import IGNORED, TargetCollator

if TYPE_CHECKING:
    from .data import Targets


@dataclass(frozen=True)
class Heldout:
    """What a student makes of the held-out samples, in the order of the store."""

    sample_ids: list[str]
    nats: list[float]
    """Of each sample: cross-entropy summed over its predicted tokens."""
    tokens: list[int]
    """Of each sample: how many are predicted."""
    text_bytes: list[int]
    """Of each sample: UTF-8 bytes of its text."""
    errors: dict[str, list[float]]
    """`keys` and `values`: for each layer the mean squared error over all tokens with a target, over the target's
    variance; empty where the targets were not read."""

    @property
    def metrics(self) -> dict[str, float]:
        """`ce` in nats per token, `perplexity`; `ce_per_byte` and `perplexity_per_byte`; `kv_error` if it is known.

        Per byte: all nats over all bytes of text, so that students with other tokenizers compare.
        """
        nats, per_byte = sum(self.nats), sum(self.nats) / max(sum(self.text_bytes), 1)
        ce = nats / max(sum(self.tokens), 1)
        found = {
            "ce": ce,
            "perplexity": math.exp(min(ce, 700)),
            "ce_per_byte": per_byte,
            "perplexity_per_byte": math.exp(min(per_byte, 700)),
        }
        layers = [error for errors in self.errors.values() for error in errors]
        return found | ({"kv_error": sum(layers) / len(layers)} if layers else {})

    def save(self, path: Path) -> None:
        """Writes it as JSON."""
        write_atomic(path, json.dumps(asdict(self)).encode())

    @classmethod
    def load(cls, path: Path) -> Heldout:
        """Read what `save` wrote.

        Raises:
            DamagedStoreError: if the file is not what `save` writes.
        """
        fields = read_json_object(path, LOG_BYTES)
        if fields.keys() != cls.__dataclass_fields__.keys():
            expected = ", ".join(cls.__dataclass_fields__)
            raise DamagedStoreError(f"{path} is not readable: expected the fields {expected}")
        return cls(**fields)


def evaluate_heldout(
    model: Any,
    store: Targets,
    *,
    pad_token_id: int,
    ce_segments: Sequence[str],
    batch_size: int = 8,
    with_kv: bool = True,
) -> Heldout:
    """Reads every held-out sample once.

    Args:
        model: the student.
        store: its targets.
        pad_token_id: of padding, which is not seen.
        ce_segments: whose tokens are predicted, see `TrainSettings`.
        batch_size: samples in a forward pass.
        with_kv: whether to compare keys and values.

    Raises:
        StageError: if nothing is held out, or the targets are of another geometry.
    """
    indices = store.indices(Split.HELDOUT)
    if not indices:
        raise StageError(f"{store.path}: no sample is held out; give corpus.heldout in the recipe")
    if with_kv and (own := probe_geometry(model)) != store.geometry:
        raise StageError(f"{store.path} has targets of {store.geometry}, the student has {own}")
    device = next(model.parameters()).device
    collator = TargetCollator(pad_token_id, tuple(ce_segments))
    layers = range(store.geometry.num_layers) if with_kv else ()
    squares = {name: torch.zeros(len(layers), dtype=torch.float64) for name in ("keys", "values")}
    found, targeted = Heldout([], [], [], [], {}), 0
    training = model.training
    model.eval()
    with torch.no_grad():
        for samples in _batches(store, indices, batch_size, with_kv):
            batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in collator(samples).items()}
            with KVTap(model, layers=layers) as tap:
                logits = model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
                ).logits
            labels = batch["labels"][:, 1:]
            nats = F.cross_entropy(
                logits[:, :-1].float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
            )
            found.sample_ids.extend(batch["sample_ids"])
            found.nats.extend(nats.double().sum(1).tolist())
            found.tokens.extend((labels != IGNORED).sum(1).tolist())
            found.text_bytes.extend(sample.text_bytes for sample in samples)
            if with_kv:
                mask = batch["kv_mask"]
                targeted += int(mask.sum())
                for name, tapped in (("keys", tap.keys), ("values", tap.values)):
                    for layer, tensor in tapped.items():
                        error = F.mse_loss(tensor.float(), batch[name][:, :, layer].float(), reduction="none")
                        squares[name][layer] += error.mean((-2, -1))[mask].double().sum().cpu()
    model.train(training)
    if with_kv:
        statistics = store.statistics()
        for name, total in squares.items():
            variance = np.asarray(statistics[f"{name}_std"], dtype=np.float64) ** 2
            if not targeted or not (variance > 0).all():
                raise StageError(f"{store.path}: the target {name} of some layer never vary, or no token has a target")
            found.errors[name] = (total.numpy() / targeted / variance).tolist()
    return found


def _batches(store: Targets, indices: Sequence[int], size: int, with_kv: bool) -> Iterator[list[KVSample]]:
    for start in range(0, len(indices), size):
        yield [
            store.sample(index, keys=with_kv, values=with_kv, extras=False) for index in indices[start : start + size]
        ]
