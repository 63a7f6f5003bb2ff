"""Rows that hold several samples: each is computed, compared and predicted as if it were alone."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fixtures.models import ARCHITECTURES, OPTIONS, tiny_model
from fixtures.stores import sample

from kava.errors import StageError
from kava.store import KVGeometry, KVSample
from kava.tap import ATTENTION_LAYOUTS, KVTap
from kava.train import LOSSES, KVLoss, TargetCollator
from kava.train.checks import check_packing
from kava.train.data import IGNORED

GEOMETRY = KVGeometry(num_layers=4, num_key_value_heads=2, head_dim=16)
ROWS = [[13, 5, 1, 9], [20, 11]]
"""Tokens of samples; longer and shorter than the sliding window of 8 of those models that have one."""
COLLATOR = TargetCollator(0, ("prompt", "rationale", "answer"))


def _rows() -> list[list[KVSample]]:
    numbers = itertools.count()
    return [[sample(next(numbers), tokens, geometry=GEOMETRY) for tokens in row] for row in ROWS]


def _packed(rows: list[list[KVSample]]) -> dict[str, Any]:
    size = (len(rows), max(sum(map(len, row)) for row in rows))
    tensors = {name: torch.zeros(*size, *GEOMETRY.shape) for name in ("keys", "values")}
    for row, samples in enumerate(rows):
        joined = {name: torch.cat([getattr(s, name) for s in samples]) for name in tensors}
        for name, tensor in tensors.items():
            tensor[row, : len(joined[name])] = joined[name]
    return COLLATOR.collate(rows, tensors)


def _pass(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, KVTap]:
    with KVTap(model) as tap:
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=batch.get("attention_mask"),
            position_ids=batch.get("position_ids"),
            use_cache=False,
        ).logits
    return logits, tap


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *OPTIONS])
def test_every_architecture_keeps_packed_samples_apart(architecture: str) -> None:
    """Logits, and pre-RoPE keys and values of every layer, against the sample alone: float32, to rounding."""
    model = tiny_model(architecture)
    layout = ATTENTION_LAYOUTS[OPTIONS.get(architecture, (architecture,))[0]]
    if layout.attn_implementation:
        model.set_attn_implementation(layout.attn_implementation)
    rows = _rows()
    with torch.no_grad():
        logits, tap = _pass(model, _packed(rows))
        packed = (logits, *tap.stack())
        for row, samples in enumerate(rows):
            start = 0
            for one in samples:
                ids = torch.from_numpy(one.input_ids).long()[None]
                with KVTap(model) as tap:
                    logits = model(input_ids=ids, use_cache=False).logits
                for found, alone in zip(packed, (logits, *tap.stack()), strict=True):
                    difference = (found[row, start : start + len(one)] - alone[0]).abs().max()
                    assert difference < 1e-5 * alone.abs().max(), architecture
                start += len(one)


def test_without_positions_they_would_not_be_kept_apart() -> None:
    """That the test above can fail."""
    model, batch = tiny_model("llama"), _packed(_rows())
    with torch.no_grad():
        apart = _pass(model, batch)[0]
        together = _pass(model, batch | {"position_ids": None})[0]
    assert torch.equal(apart[0, :13], together[0, :13])
    assert (apart[0, 13:] - together[0, 13:]).abs().max() > 1e-2 * apart.abs().max()


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_those_of_one_sample_a_row(name: str) -> None:
    """Cross-entropy, KV loss and the gradient of both; segments weighted, tokens without a target left out."""
    model, rows = tiny_model("llama"), _rows()
    std = dict.fromkeys(("keys", "values"), (0.5, 1.0, 2.0, 1.5))
    loss = KVLoss(name, 1, 2, (0, 1, 2, 3), std, segment_weights={"prompt": 0.5, "rationale": 2})
    found: list[tuple[torch.Tensor, dict[str, torch.Tensor], tuple[torch.Tensor, ...]]] = []
    for batch in (_packed(rows), COLLATOR([one for row in rows for one in row])):
        logits, tap = _pass(model, batch)
        ce = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        student = {"keys": tap.keys, "values": tap.values}
        kv = loss(student, batch, batch["kv_mask"], batch["segments"], batch.get("sample_numbers"))
        gradients = torch.autograd.grad(ce + 100 * kv["kv"], list(model.parameters()))
        found.append((ce, kv, gradients))
    (ce, kv, gradients), (plain_ce, plain_kv, plain) = found
    torch.testing.assert_close(ce, plain_ce)
    for term, value in kv.items():
        torch.testing.assert_close(value, plain_kv[term], rtol=2e-5, atol=1e-7)
    for one, two in zip(gradients, plain, strict=True):
        assert (one - two).abs().max() < 1e-4 * two.abs().max()


def test_nothing_is_predicted_from_another_sample() -> None:
    rows = _rows()
    labels = _packed(rows)["labels"]
    firsts = [[0, *np.cumsum([len(one) for one in row])[:-1].tolist()] for row in rows]
    for row, starts in enumerate(firsts):
        assert set(labels[row, starts].tolist()) == {IGNORED}
    alone = COLLATOR([one for row in rows for one in row])["labels"]
    assert (labels[:, 1:] != IGNORED).sum() == (alone[:, 1:] != IGNORED).sum() > 20


def test_attention_that_is_not_known_to_keep_them_apart_is_refused() -> None:
    model = tiny_model("llama")
    check_packing(model)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(StageError, match=r"train.pack_tokens: attention 'flash_attention_2' is not known"):
        check_packing(model)
