from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fixtures.stores import GEOMETRY, write_store
from hypothesis import given, settings
from hypothesis import strategies as st

from kava.errors import StageError
from kava.train import LOSSES, KVLoss
from kava.train.losses import LossOptions, _layer_weights, relation

B, T, L, H, D = 2, 7, 3, 2, 8


def _tensors(seed: int = 0) -> tuple[dict[str, dict[int, torch.Tensor]], dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = {
        name: {layer: torch.randn(B, T, H, D, generator=generator).requires_grad_() for layer in range(L)}
        for name in ("keys", "values")
    }
    target = {name: torch.randn(B, T, L, H, D, generator=generator) for name in ("keys", "values")}
    return student, target, torch.rand(B, T, generator=generator) < 0.6


def _loss(name: str, *, key_weight: float = 1, value_weight: float = 1, **more: Any) -> KVLoss:
    std = {"keys": (0.5, 1.0, 2.0), "values": (1.0, 3.0, 0.25)}
    return KVLoss(name, key_weight, value_weight, more.pop("layers", (0, 1, 2)), std, **more)


def _dot(one: list[float], two: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(one, two, strict=True))


def _by_hand(
    name: str, own: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, std: float, options: LossOptions
) -> list[float]:
    """The error of every token in the mask, by plain loops over numbers."""
    errors = []
    for b, t in mask.nonzero().tolist():
        s, w = own[b, t].tolist(), target[b, t].tolist()
        if name in ("mse", "smooth_l1"):
            parts = [abs(x - y) / std for u, v in zip(s, w, strict=True) for x, y in zip(u, v, strict=True)]
            errors.append(mean(e**2 if name == "mse" else e**2 / 2 if e < 1 else e - 0.5 for e in parts))
        elif name in ("cosine", "cosine_magnitude"):
            heads = []
            for u, v in zip(s, w, strict=True):
                one, two = math.hypot(*u), math.hypot(*v)
                error = 1 - _dot(u, v) / (one * two)
                if name == "cosine_magnitude":
                    error += options.magnitude_weight * math.log(one / two) ** 2
                heads.append(error)
            errors.append(mean(heads))
        else:
            count = options.relation_heads or len(w)
            earlier = [j for j in range(t + 1) if mask[b, j]]
            divergences = []
            for a in range(count):
                p, q = (_relations(side[b], t, earlier, a, count, std) for side in (target, own))
                divergences.append(sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
            errors.append(mean(divergences))
    return errors


def _relations(tokens: torch.Tensor, t: int, earlier: list[int], a: int, count: int, std: float) -> list[float]:
    """What token `t` of a sample is like, by relation head `a` of `count`: shares of the earlier tokens."""
    flat = [[x / std for x in row] for row in tokens.flatten(1).tolist()]
    width = len(flat[0]) // count
    rows = [row[a * width : (a + 1) * width] for row in flat]
    weights = [math.exp(_dot(rows[t], rows[j]) / math.sqrt(width)) for j in earlier]
    return [weight / sum(weights) for weight in weights]


OPTIONS = [LossOptions(), LossOptions(magnitude_weight=0.3, relation_heads=4)]


@pytest.mark.parametrize("options", OPTIONS, ids=["default", "other"])
@pytest.mark.parametrize("name", LOSSES)
def test_against_float64_by_hand(name: str, options: LossOptions) -> None:
    student, target, mask = _tensors()
    layer_weights, segments = (1.0, 0.0, 2.5), torch.randint(0, 4, (B, T), generator=torch.Generator().manual_seed(1))
    of_segment = {"prompt": 0.5, "rationale": 3.0, "none": 0.0}
    loss = _loss(
        name,
        key_weight=2,
        value_weight=0.5,
        layer_weights=layer_weights,
        segment_weights=of_segment,
        options=options,
    )
    found = loss(student, target, mask, segments.to(torch.uint8))
    token_weights = [[0.0, 0.5, 3.0, 1.0][s] for s in segments[mask].tolist()]
    total = 0.0
    for kind, weight in (("keys", 2), ("values", 0.5)):
        for layer in range(L):
            own, wanted = student[kind][layer].detach().double(), target[kind][:, :, layer].double()
            errors = _by_hand(name, own, wanted, mask, loss.std[kind][layer], options)
            term = _dot(token_weights, errors) / sum(token_weights)
            assert float(found[f"{kind}_{layer}"]) == pytest.approx(term, rel=2e-5)
            total += weight * layer_weights[layer] * term
    assert float(found["kv"].detach()) == pytest.approx(total / (2.5 * 3.5), rel=2e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_masked_tokens_have_no_part_in_it(name: str) -> None:
    student, target, mask = _tensors()
    one = _loss(name)(student, target, mask)["kv"]
    for tensor in target.values():
        tensor[~mask] = float("nan")
    two = _loss(name)(student, target, mask)["kv"]
    assert torch.equal(one, two)
    two.backward()  # type: ignore[no-untyped-call]
    gradient = student["keys"][0].grad
    assert gradient is not None
    assert gradient[mask].any()
    assert not gradient[~mask].any()


@pytest.mark.parametrize("name", LOSSES)
def test_zero_at_the_target_and_never_nan(name: str) -> None:
    student, target, mask = _tensors()
    same = {kind: {layer: target[kind][:, :, layer].clone() for layer in range(L)} for kind in target}
    assert float(_loss(name)(same, target, mask)["kv"]) == pytest.approx(0, abs=1e-6)
    for segments in ({}, {"prompt": 2.0}):
        loss = _loss(name, segment_weights=segments)
        empty = loss(student, target, torch.zeros_like(mask), torch.zeros(B, T, dtype=torch.uint8))["kv"]
        assert float(empty.detach()) == 0
        empty.backward()  # type: ignore[no-untyped-call]
    zero = {kind: {layer: torch.zeros(B, T, H, D, requires_grad=True) for layer in range(L)} for kind in target}
    found = _loss(name)(zero, target, mask)["kv"]
    assert torch.isfinite(found)
    found.backward()  # type: ignore[no-untyped-call]
    assert all(t.grad is not None and t.grad.isfinite().all() for side in zero.values() for t in side.values())


@settings(deadline=None, max_examples=50)
@given(
    name=st.sampled_from(sorted(LOSSES)),
    weight=st.floats(0.01, 100),
    seed=st.integers(0, 1000),
    more=st.integers(1, 5),
)
def test_uniform_weights_and_padding_change_no_bit_and_no_digit(name: str, weight: float, seed: int, more: int) -> None:
    student, target, mask = _tensors(seed)
    plain = _loss(name)(student, target, mask)["kv"]
    segments = torch.arange(B * T, dtype=torch.uint8).view(B, T) % 4
    same = _loss(
        name,
        layer_weights=_layer_weights([weight] * L, tuple(range(L))),
        segment_weights=dict.fromkeys(("none", "prompt", "rationale", "answer"), weight),
    )
    assert torch.equal(same(student, target, mask, segments)["kv"], plain)
    padded = {kind: {i: F.pad(t, (0, 0, 0, 0, 0, more)) for i, t in student[kind].items()} for kind in student}
    wider = {kind: F.pad(t, (0, 0, 0, 0, 0, 0, 0, more), value=torch.nan) for kind, t in target.items()}
    torch.testing.assert_close(_loss(name)(padded, wider, F.pad(mask, (0, more)))["kv"], plain, rtol=1e-5, atol=1e-7)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 1000), heads=st.sampled_from([1, 2, 4, 8]), wide=st.sampled_from([(2, 8), (4, 8), (8, 1)]))
def test_relation_sees_neither_rotation_nor_the_number_of_heads(seed: int, heads: int, wide: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(B, T, H, D, generator=generator, dtype=torch.float64)
    target = torch.randn(B, T, *wide, generator=generator, dtype=torch.float64)
    mask = torch.rand(B, T, generator=generator) < 0.6
    options = LossOptions(relation_heads=heads)
    plain = relation(own, target, mask, 0.7, options)
    assert (plain >= -1e-12).all()
    split = own.reshape(B, T, heads, -1)
    rotations = torch.linalg.qr(
        torch.randn(heads, split.shape[-1], split.shape[-1], generator=generator, dtype=torch.float64)
    )[0]
    turned = torch.einsum("btad,ade->btae", split, rotations).reshape(B, T, H, D)
    torch.testing.assert_close(relation(turned, target, mask, 0.7, options), plain)
    # The same numbers in other heads are the same to it.
    torch.testing.assert_close(relation(own.reshape(B, T, D, H), target, mask, 0.7, options), plain)
    # Samples do not see each other, and no token a later one.
    alone = torch.cat([relation(own[b : b + 1], target[b : b + 1], mask[b : b + 1], 0.7, options) for b in range(B)])
    torch.testing.assert_close(alone, plain)
    early = mask.clone()
    early[:, T // 2 :] = False
    torch.testing.assert_close(relation(own, target, early, 0.7, options), plain[early[mask]])


def test_only_the_chosen_layers_and_sides() -> None:
    student, target, mask = _tensors()
    loss = _loss("mse", value_weight=0, layers=(1,))
    assert loss.names == ("keys",)
    found = loss(student, {"keys": target["keys"][:, :, 1:2]}, mask)
    assert set(found) == {"kv", "keys_1"}
    torch.testing.assert_close(found["keys_1"], _loss("mse")(student, target, mask)["keys_1"])
    with pytest.raises(ValueError, match=r"3 layers of target keys for a loss on layers \(1,\)"):
        loss(student, target, mask)
    found["kv"].backward()  # type: ignore[no-untyped-call]
    assert student["keys"][1].grad is not None
    assert student["keys"][0].grad is None
    assert student["values"][1].grad is None


def test_normalised_by_the_store(tmp_path: Path) -> None:
    store, _ = write_store(tmp_path / "s.zarr", [9, 30, 12], kind="target")
    loss = KVLoss.for_store(store, loss="mse", key_weight=1, value_weight=1, layers=[0, 2])
    assert loss.layers == (0, 2)
    assert loss.std["keys"] == tuple(store.statistics()["keys_std"].tolist())
    with pytest.raises(StageError, match=rf"3 is not one of the student's layers 0\.\.{GEOMETRY.num_layers - 1}"):
        KVLoss.for_store(store, loss="mse", key_weight=1, value_weight=1, layers=[3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_weights": [1, 2]}, "train.layer_weights: 2 weights for 3 layers"),
        ({"layer_weights": {5: 1.0}}, "train.layer_weights: layer 5 has no KV loss"),
        ({"layer_weights": [0, 0, 0]}, "train.layer_weights: all are 0"),
        ({"loss": "relation", "options": LossOptions(relation_heads=5)}, "train.relation_heads: 5 does not divide"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    store, _ = write_store(tmp_path / "s.zarr", [9, 5], kind="target")
    wanted = {"loss": "mse", "key_weight": 1, "value_weight": 1, "layers": None, **changes}
    with pytest.raises(StageError, match=message):
        KVLoss.for_store(store, **wanted)


def test_weights_by_layer(tmp_path: Path) -> None:
    store, _ = write_store(tmp_path / "s.zarr", [9, 5], kind="target")
    loss = KVLoss.for_store(store, loss="mse", key_weight=1, value_weight=1, layers=[2, 0], layer_weights={0: 3.0})
    assert loss.layer_weights == (1.0, 3.0)


def test_mse_keeps_one_float32_difference_of_what_is_compared_for_its_gradient() -> None:
    student, target, mask = _tensors()
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = _loss("mse")(student, {name: tensor.bfloat16() for name, tensor in target.items()}, mask)["kv"]
    differences = 2 * L * int(mask.sum()) * H * D * 4
    assert differences <= sum(kept.values()) < 1.1 * differences
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(tensor.grad is not None for tensors in student.values() for tensor in tensors.values())
