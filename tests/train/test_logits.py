"""The logit loss against loops in float64 and the divergence over the whole vocabulary; and training by it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fixtures.stores import manifest, sample, write_store
from hypothesis import given, settings
from hypothesis import strategies as st

from kava.errors import StageError
from kava.extract.signals import signal_arrays
from kava.hub import tokenizer_digest
from kava.store import LOGITS, KVGeometry, KVStore
from kava.train import TrainSettings, load_student, train_student
from kava.train.data import TargetCollator
from kava.train.logits import logit_loss

GEOMETRY = KVGeometry(num_layers=3, num_key_value_heads=4, head_dim=8)
LENGTHS = [9, 14, 6, 11, 8, 17, 5, 12, 10]


def _cached(teacher: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logs = teacher.double().log_softmax(-1)
    best = logs.topk(k)
    return best.indices, best.values, logs.scatter(1, best.indices, -torch.inf).logsumexp(1)


def _by_hand(student: list[float], ids: list[int], logprobs: list[float], tail: float, temperature: float) -> float:
    """Of one token, by plain loops; ids that the student does not have are counted to the tail first."""
    known = [(i, math.exp(p)) for i, p in zip(ids, logprobs, strict=True) if i < len(student)]
    rest = math.exp(tail) + sum(math.exp(p) for i, p in zip(ids, logprobs, strict=True) if i >= len(student))
    wanted = [p for _, p in known] + [rest]
    total = sum(math.exp(x) for x in student)
    own = [math.exp(student[i]) / total for i, _ in known]
    own.append(math.fsum(math.exp(x) / total for i, x in enumerate(student) if i not in dict(known)))
    if temperature != 1:
        for side in (wanted, own):
            powers = [p ** (1 / temperature) for p in side]
            side[:] = [p / sum(powers) for p in powers]
    return temperature**2 * math.fsum(p * math.log(p / q) for p, q in zip(wanted, own, strict=True) if p > 0)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(
    ("k", "teacher_size", "student_size"), [(3, 20, 20), (1, 20, 20), (20, 20, 20), (9, 24, 15), (4, 9, 20)]
)
def test_against_float64_by_hand(k: int, teacher_size: int, student_size: int, temperature: float) -> None:
    """Vocabularies of two sizes too: heads that are padded to more rows than the tokenizer has tokens."""
    generator = torch.Generator().manual_seed(k)
    teacher, student = (3 * torch.randn(30, size, generator=generator) for size in (teacher_size, student_size))
    cached = _cached(teacher, k)
    found = logit_loss(student, *cached, temperature=temperature)
    if teacher_size > student_size:
        assert (cached[0] >= student_size).any()
    for row, error in enumerate(found.tolist()):
        ids, logprobs, tail = (c[row] for c in cached)
        hand = _by_hand(student[row].tolist(), ids.tolist(), logprobs.tolist(), float(tail), temperature)
        assert error == pytest.approx(hand, rel=1e-4, abs=2e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_all_tokens_cached_is_the_divergence_over_the_vocabulary(temperature: float) -> None:
    """Value and gradient, against torch's own in float64."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = (4 * torch.randn(12, 50, generator=generator) for _ in range(2))
    student.requires_grad_()
    logit_loss(student, *_cached(teacher, 50), temperature=temperature).sum().backward()  # type: ignore[no-untyped-call]
    other = student.detach().double().requires_grad_()
    one, two = ((side.double() / temperature).log_softmax(-1) for side in (other, teacher))
    whole = temperature**2 * F.kl_div(one, two, reduction="none", log_target=True).sum(-1)
    whole.sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(
        logit_loss(student, *_cached(teacher, 50), temperature=temperature).double(), whole, rtol=1e-5, atol=1e-6
    )
    assert student.grad is not None
    torch.testing.assert_close(student.grad.double(), other.grad, rtol=1e-4, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), size=st.integers(2, 12), scale=st.floats(0.1, 8))
def test_more_tokens_tell_more(seed: int, size: int, scale: float) -> None:
    """Never negative, nothing for a student that agrees, and growing with k up to the whole divergence."""
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (scale * torch.randn(4, size, generator=generator) for _ in range(2))
    found = torch.stack([logit_loss(student, *_cached(teacher, k)) for k in range(1, size + 1)])
    assert (found >= -1e-5).all()
    assert (found.diff(dim=0) >= -1e-4).all()
    for k in range(1, size + 1):
        assert logit_loss(teacher + 3, *_cached(teacher, k)).abs().max() < 1e-4


def test_a_sure_student_has_a_finite_gradient() -> None:
    """All the probability on one of the cached tokens: of the tail nothing would be left by subtraction."""
    student = torch.zeros(2, 40)
    student[:, 0] = 200.0
    student.requires_grad_()
    teacher = torch.zeros(2, 40)
    teacher[:, 0] = 0.1
    for k in (1, 4, 40):
        loss = logit_loss(student, *_cached(teacher, k))
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        assert loss.isfinite().all()
        assert (loss > 30).all()
        assert gradient.isfinite().all()
        assert (gradient[:, 0] > 0.5).all()


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> KVStore:
    """Random targets whose logits are those of another random head, the last row of a sample without any."""
    digest = tokenizer_digest(load_student(tiny_models["student"])[1])
    description = manifest(
        len(LENGTHS),
        kind="target",
        geometry=GEOMETRY,
        tokenizer_digest=digest,
        extras=signal_arrays(GEOMETRY, importance=False, confidence=False, logits=5),
    )
    store = KVStore.create(tmp_path_factory.mktemp("targets") / "t.zarr", description)
    generator = torch.Generator().manual_seed(1)
    for part in store.missing_parts():
        with store.write_part(part) as writer:
            for position, index in enumerate(description.part_samples(part)):
                made = sample(index, LENGTHS[index], geometry=GEOMETRY, extras=description.extras)
                ids, logprobs, tail = _cached(3 * torch.randn(LENGTHS[index], 500, generator=generator), 5)
                ids[-1], logprobs[-1], tail[-1] = -1, torch.nan, torch.nan
                made.extras.update(
                    logit_ids=ids.numpy().astype(np.int32),
                    logprobs=logprobs.numpy().astype(np.float32),
                    logprob_tail=tail.numpy().astype(np.float32),
                )
                writer.append(position, made)
            writer.commit()
    return KVStore.open(store.path)


def _train(student: Path, targets: KVStore, out: Path, on_step: Any = None, **changes: Any) -> list[dict[str, Any]]:
    settings = {"max_steps": 4, "alpha": 1.0, "batch_size": 2, "logging_steps": 1, "learning_rate": 3e-3, **changes}
    train_student(student, targets, out, TrainSettings.model_validate(settings), on_step=on_step or (lambda *_: None))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_alone_and_with_keys_and_values(targets: KVStore, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    logits = {"weight": 4.0, "temperature": 2.0}
    lines = _train(
        tiny_models["student"], targets, tmp_path / "alone", alpha=0, logits=logits, max_steps=40, learning_rate=1e-2
    )
    steps = [line for line in lines if "ce" in line]
    for line in steps:
        assert "kv" not in line
        assert line["loss"] == pytest.approx(line["ce"] + 4 * line["logits"], rel=1e-5)
    assert lines[0]["logits_gradient_share"] > 0.01
    assert "heldout_logits" in lines[-1]
    assert min(line["logits"] for line in steps[-8:]) < 0.9 * lines[0]["logits"]
    for line in _train(tiny_models["student"], targets, tmp_path / "both", alpha=0.25, logits=logits)[:4]:
        assert line["loss"] == pytest.approx(line["ce"] + 0.25 * line["kv"] + 4 * line["logits"], rel=1e-5)


def test_held_out_is_by_hand(targets: KVStore, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Of the untouched student, token by token, one sample after the other: padding in a batch changes nothing."""
    lines = _train(
        tiny_models["student"], targets, tmp_path / "x", alpha=0, logits={}, max_steps=1, learning_rate=1e-30
    )
    model = load_student(tiny_models["student"])[0].eval()
    collate = TargetCollator(0, ("prompt", "rationale", "answer"))
    found = []
    for index in (2, 5, 8):
        one = targets[index]
        labels = collate([one])["labels"][0].tolist()
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(one.input_ids).long()[None]).logits[0].double().tolist()
        for t in range(len(one) - 1):
            if labels[t + 1] != -100:
                ids, logprobs, tail = (one.extras[name][t].tolist() for name in LOGITS)
                found.append(_by_hand(logits[t], ids, logprobs, tail, 1.0))
    assert lines[-1]["heldout_logits"] == pytest.approx(math.fsum(found) / len(found), rel=1e-5)


def test_padding_has_no_part_in_it(targets: KVStore) -> None:
    """What is behind a sample's end is neither read nor learned from."""
    batch = TargetCollator(0, ("prompt", "rationale", "answer"))([targets[0], targets[1]])
    assert (batch["logit_ids"][0, LENGTHS[0] :] == -1).all()
    assert batch["logprobs"].shape == (2, 14, 5)
    assert batch["logprob_tail"].shape == (2, 14)
    np.testing.assert_array_equal(batch["logit_ids"][1].numpy(), targets[1].extras["logit_ids"])


def test_a_step_is_its_tokens_however_they_are_cut(
    targets: KVStore, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    found = []
    for name, changes in (("one", {"batch_size": 6}), ("three", {"batch_size": 2, "gradient_accumulation_steps": 3})):
        settings = {"logits": {"weight": 3}, "arguments": {"optim": "sgd"}, "learning_rate": 1e-2, **changes}
        found.append(_train(tiny_models["student"], targets, tmp_path / name, **settings)[:4])
    for one, three in zip(*found, strict=True):
        for term in ("loss", "logits", "ce", "kv", "grad_norm"):
            assert one[term] == pytest.approx(three[term], rel=1e-4)


def test_packed_samples_do_not_see_each_other(targets: KVStore, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """All samples in one step, a row each or all in one: the same means, whoever is behind whom."""
    found = []
    for name, changes in (("rows", {"batch_size": 6}), ("packed", {"batch_size": 1, "pack_tokens": 59})):
        settings = {"alpha": 0, "logits": {}, "max_steps": 1, "learning_rate": 1e-30, **changes}
        (line, *_) = _train(tiny_models["student"], targets, tmp_path / name, **settings)
        found.append([line["logits"], line["ce"]])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_it_resumes_under_lora_and_checkpointing(
    targets: KVStore, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "logits": {"weight": 2.0},
        "lora": {"r": 4, "dropout": 0.1},
        "gradient_checkpointing": True,
        "save_steps": 2,
        "measure_steps": 2,
    }

    def fall(step: int, total: int) -> None:
        if step == 3:
            raise RuntimeError("power")

    whole = _train(tiny_models["student"], targets, tmp_path / "whole", **settings)
    with pytest.raises(RuntimeError, match="power"):
        _train(tiny_models["student"], targets, tmp_path / "cut", on_step=fall, **settings)
    again = _train(tiny_models["student"], targets, tmp_path / "cut", **settings)
    names = ("ce", "kv", "logits", "logits_gradient_share", "heldout_logits")
    assert [[line.get(n) for n in names] for line in again] == [[line.get(n) for n in names] for line in whole]


def test_targets_without_logits_are_refused(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    digest = tokenizer_digest(load_student(tiny_models["student"])[1])
    store, _ = write_store(tmp_path / "t.zarr", [5, 6], kind="target", geometry=GEOMETRY, tokenizer_digest=digest)
    with pytest.raises(StageError, match=r"has no logits, which train.logits needs: capture with extract.logits"):
        _train(tiny_models["student"], store, tmp_path / "x", logits={})
