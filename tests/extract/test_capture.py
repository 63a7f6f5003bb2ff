from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.models import tiny_model
from fixtures.stores import manifest, tree
from fixtures.tokenizers import TEXTS, byte_level_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from kava.errors import CorpusError, StoreError
from kava.extract import Captured, CaptureSettings, Corpus, Encoder, Record, Tokens, capture_store
from kava.extract.hf import HFTeacher, plan_batches
from kava.extract.signals import signal_arrays
from kava.store import KVStore, Segment

ENCODER = Encoder(byte_level_tokenizer(400))


def _corpus(count: int = 9) -> Corpus:
    texts = [(TEXTS[n % len(TEXTS)] * 2)[: 20 + 17 * n] for n in range(count)]
    return Corpus(
        [Record(f"r{n}", t, ((0, len(t), Segment.ANSWER),), (("user", 0, len(t)),)) for n, t in enumerate(texts)]
    )


def _store(path: Path, teacher: HFTeacher, count: int = 9) -> KVStore:
    return KVStore.create(path, manifest(count, 4, geometry=teacher.geometry, dtype="float32", page_tokens=8))


@pytest.fixture(scope="module")
def teacher() -> HFTeacher:
    return HFTeacher(tiny_model("llama", vocab=400), batch_tokens=120)


@given(st.lists(st.integers(1, 500), max_size=60), st.integers(1, 1000))
def test_batches_hold_every_sample_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = plan_batches(lengths, budget)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    for batch in batches:
        padded = max(lengths[i] for i in batch) * len(batch)
        assert padded <= budget or len(batch) == 1
    firsts = [lengths[b[0]] for b in batches]
    assert firsts == sorted(firsts, reverse=True)
    kinds = [length > 100 for length in lengths]
    apart = plan_batches(lengths, budget, kinds)
    assert sorted(i for b in apart for i in b) == list(range(len(lengths)))
    assert all(len({kinds[i] for i in b}) == 1 for b in apart)
    assert len(apart) <= len(batches) + 1


def test_every_token_of_every_sample_is_stored(tmp_path: Path, teacher: HFTeacher) -> None:
    store, corpus = _store(tmp_path / "s.zarr", teacher), _corpus()
    told: list[int] = []
    capture_store(store, corpus, ENCODER, teacher, CaptureSettings(), on_text=told.append)
    assert sum(told) == sum(len(r.text.encode()) for r in corpus.records)
    assert store.verify() == []
    for record, sample in zip(corpus.records, store, strict=True):
        tokens = ENCODER.encode(record)
        assert sample.sample_id == record.sample_id
        np.testing.assert_array_equal(sample.input_ids, tokens.input_ids)
        np.testing.assert_array_equal(sample.spans, tokens.spans)
        (captured,) = teacher.capture([tokens])
        torch.testing.assert_close(sample.keys, captured.keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sample.values, captured.values, rtol=1e-5, atol=1e-5)


class _FailsAfter(HFTeacher):
    """A teacher that is cut off in the middle."""

    def __init__(self, teacher: HFTeacher, samples: int) -> None:
        super().__init__(teacher.model, batch_tokens=teacher.batch_tokens)
        self.left = samples

    def capture(self, samples: Sequence[Tokens]) -> Iterator[Captured]:
        for captured in super().capture(samples):
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("out of memory")
            yield captured


def test_an_interrupted_capture_goes_on_and_ends_bit_identical(tmp_path: Path, teacher: HFTeacher) -> None:
    settings, corpus = CaptureSettings(), _corpus()
    whole = _store(tmp_path / "whole.zarr", teacher)
    capture_store(whole, corpus, ENCODER, teacher, settings)
    for samples in (0, 1, 4, 5, 8):
        path = tmp_path / f"{samples}.zarr"
        with pytest.raises(RuntimeError, match="out of memory"):
            capture_store(_store(path, teacher), corpus, ENCODER, _FailsAfter(teacher, samples), settings)
        capture_store(_store(path, teacher), corpus, ENCODER, teacher, settings)
        assert tree(path) == tree(whole.path)


def test_another_backend_goes_on_only_if_asked_to(tmp_path: Path, teacher: HFTeacher) -> None:
    store, corpus = _store(tmp_path / "s.zarr", teacher), _corpus()
    capture_store(store, corpus, ENCODER, teacher, CaptureSettings(), parts=[0])
    assert store.part(0).written_by == teacher.backend
    other = HFTeacher(teacher.model)
    other.backend = "vllm 0.99"
    with pytest.raises(StoreError, match=r"part 0 was captured by hf .*, this is vllm 0.99.*mix_backends: true"):
        capture_store(store, corpus, ENCODER, other, CaptureSettings())
    capture_store(store, corpus, ENCODER, other, CaptureSettings(mix_backends=True))
    assert store.missing_parts() == []
    assert store.part(2).written_by == "vllm 0.99"
    assert store.written_by == {teacher.backend: 1, "vllm 0.99": 2}


def test_only_some_parts(tmp_path: Path, teacher: HFTeacher) -> None:
    store = _store(tmp_path / "s.zarr", teacher)
    capture_store(store, _corpus(), ENCODER, teacher, CaptureSettings(), parts=[1])
    assert store.committed_parts() == [1]


def test_too_long_stops_or_is_recorded(tmp_path: Path, teacher: HFTeacher) -> None:
    long = TEXTS[0] * 20
    too_long = Record("long", long, ((0, len(long), Segment.ANSWER),), (("user", 0, len(long)),))
    corpus = Corpus([*_corpus().records[:5], too_long, *_corpus().records[6:]])
    store = _store(tmp_path / "s.zarr", teacher)
    with pytest.raises(CorpusError, match=r"'long': \d+ tokens, the model reads at most 256.*too_long: skip"):
        capture_store(store, corpus, ENCODER, teacher, CaptureSettings())
    assert store.committed_parts() == [0]
    capture_store(store, corpus, ENCODER, teacher, CaptureSettings(too_long="skip"))
    assert list(store.failed) == ["long"]
    assert len(store.indices()) == 8
    assert store.verify() == []


def test_logits_that_are_no_numbers_fail_their_sample(tmp_path: Path) -> None:
    """The head alone is damaged: keys and values are finite."""
    model = tiny_model("llama", vocab=400)
    with torch.no_grad():
        model.lm_head.weight[7] = torch.inf
    teacher = HFTeacher(model, batch_tokens=120)
    teacher.signals.logits = 3
    extras = signal_arrays(teacher.geometry, importance=False, confidence=False, logits=3)
    store = KVStore.create(
        tmp_path / "s.zarr", manifest(2, 4, geometry=teacher.geometry, dtype="float32", page_tokens=8, extras=extras)
    )
    capture_store(store, _corpus(2), ENCODER, teacher, CaptureSettings())
    assert store.failed == {"r0": "non-finite logits", "r1": "non-finite logits"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2"])
def test_other_batches_differ_by_rounding_alone(tmp_path: Path, model_type: str, dtype: str) -> None:
    """Equal fingerprint: a relative RMS difference below 4 machine epsilons; equal `written_by`: the same bits."""
    stores = {}
    for name, batch_tokens in (("small", 40), ("again", 40), ("large", 4000)):
        teacher = HFTeacher(tiny_model(model_type, vocab=400).to(getattr(torch, dtype)), batch_tokens=batch_tokens)
        stores[name] = _store(tmp_path / name, teacher)
        capture_store(stores[name], _corpus(), ENCODER, teacher, CaptureSettings())
    small, again, large = stores.values()
    assert small.manifest.fingerprint == large.manifest.fingerprint
    assert small.written_by == again.written_by
    assert small.written_by.keys().isdisjoint(large.written_by)
    assert tree(small.path) == tree(again.path)
    for tensors in ("keys", "values"):
        one, two = (torch.cat([getattr(s, tensors).flatten() for s in store]).double() for store in (small, large))
        difference = ((one - two).square().mean() / one.square().mean()).sqrt().item()
        assert difference < 4 * torch.finfo(getattr(torch, dtype)).eps
