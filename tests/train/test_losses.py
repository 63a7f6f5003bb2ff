from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures.stores import GEOMETRY, write_store

from kava.errors import StageError
from kava.train import LOSSES, KVLoss

B, T, L, H, D = 2, 7, 3, 2, 8


def _tensors(seed: int = 0) -> tuple[dict[str, dict[int, torch.Tensor]], dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = {
        name: {layer: torch.randn(B, T, H, D, generator=generator).requires_grad_() for layer in range(L)}
        for name in ("keys", "values")
    }
    target = {name: torch.randn(B, T, L, H, D, generator=generator) for name in ("keys", "values")}
    return student, target, torch.rand(B, T, generator=generator) < 0.6


def _loss(name: str, *, key_weight: float = 1, value_weight: float = 1, layers: tuple[int, ...] = (0, 1, 2)) -> KVLoss:
    return KVLoss(name, key_weight, value_weight, layers, {"keys": (0.5, 1.0, 2.0), "values": (1.0, 3.0, 0.25)})


def _by_hand(name: str, own: torch.Tensor, target: torch.Tensor, std: float) -> float:
    own, target = own.detach().double(), target.double()
    if name == "mse":
        return float((((own - target) / std) ** 2).mean())
    if name == "smooth_l1":
        error = ((own - target) / std).abs()
        return float(torch.where(error < 1, error**2 / 2, error - 0.5).mean())
    dot = (own * target).sum(-1) / (own.norm(dim=-1) * target.norm(dim=-1))
    return float((1 - dot).mean())


@pytest.mark.parametrize("name", LOSSES)
def test_against_float64_by_hand(name: str) -> None:
    student, target, mask = _tensors()
    loss = _loss(name, key_weight=2, value_weight=0.5)
    found = loss(student, target, mask)
    total = 0.0
    for kind, weight in (("keys", 2), ("values", 0.5)):
        for layer in range(L):
            term = _by_hand(name, student[kind][layer][mask], target[kind][:, :, layer][mask], loss.std[kind][layer])
            assert float(found[f"{kind}_{layer}"]) == pytest.approx(term, rel=1e-5)
            total += weight * term
    assert float(found["kv"].detach()) == pytest.approx(total / (L * 2.5), rel=1e-5)


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
    empty = _loss(name)(student, target, torch.zeros_like(mask))["kv"]
    assert float(empty.detach()) == 0
    empty.backward()  # type: ignore[no-untyped-call]
    zero = {kind: {layer: torch.zeros(B, T, H, D) for layer in range(L)} for kind in target}
    assert torch.isfinite(_loss(name)(zero, target, mask)["kv"])


def test_only_the_chosen_layers_and_sides() -> None:
    student, target, mask = _tensors()
    found = _loss("mse", value_weight=0, layers=(1,))(student, target, mask)
    assert set(found) == {"kv", "keys_1"}
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
