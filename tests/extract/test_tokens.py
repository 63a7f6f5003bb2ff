from __future__ import annotations

from itertools import pairwise

import pytest
from fixtures.tokenizers import byte_level_tokenizer, gpt2_tokenizer, qwen_tokenizer, sentencepiece_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from kava.extract import Encoder, Record
from kava.store import Segment

TOKENIZERS = {
    "byte-level": byte_level_tokenizer(),
    "sentencepiece": sentencepiece_tokenizer(),
    "gpt2": gpt2_tokenizer(),
    "qwen2.5": qwen_tokenizer(),
}
MIXED = "Él pagó 1,234 € — 東京 🇩🇪 👩‍👩‍👧  naïve\n\n\tend."

ENCODERS = {name: Encoder(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def _record(*parts: str) -> Record:
    kinds = [Segment.PROMPT, Segment.RATIONALE, Segment.ANSWER]
    text, segments = "", []
    for part, kind in zip(parts, kinds, strict=False):
        segments.append((len(text), len(text) + len(part), kind))
        text += part
    turns = [("user", *segments[0][:2])]
    if len(segments) > 1:
        turns.append(("assistant", segments[1][0], len(text)))
    return Record("id", text, tuple(segments), tuple(turns))


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1, max_size=60))
def test_spans_tile_any_text(name: str, text: str) -> None:
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        return
    tokens = ENCODERS[name].encode(_record(text))
    spans = [(a, b) for a, b in tokens.spans.tolist() if b > a]
    assert all(b == c for (_, b), (c, _) in pairwise(spans)), spans
    if spans:
        assert spans[0][0] == 0
        assert spans[-1][1] == len(raw)
    assert (tokens.spans >= 0).all()


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", [MIXED, "Hello world", " leading", "x", "🙂"])
def test_each_span_holds_the_tokens_own_bytes(name: str, text: str) -> None:
    encoder = Encoder(TOKENIZERS[name])
    tokens, raw = encoder.encode(_record(text)), text.encode()
    first = True
    for token, (start, stop) in zip(tokens.input_ids.tolist(), tokens.spans.tolist(), strict=True):
        if token in encoder.tokenizer.all_special_ids:
            assert start == stop
            continue
        own = encoder._token_bytes(token)
        assert own is not None
        if name == "sentencepiece" and first:
            assert own.startswith(b" ")
            own = own[1:]
        first = False
        assert raw[start:stop] == own


def test_tokens_inside_one_character_have_one_byte_each() -> None:
    tokens = Encoder(TOKENIZERS["sentencepiece"]).encode(_record("🙂"))
    assert tokens.spans.tolist()[-4:] == [[0, 1], [1, 2], [2, 3], [3, 4]]
    assert tokens.spans.tolist()[0] == [0, 0]


def test_normalised_text_keeps_to_characters() -> None:
    """Qwen's tokenizer composes e + accent; the accent's bytes belong to the token that swallowed it."""
    tokens = Encoder(TOKENIZERS["qwen2.5"]).encode(_record("e\u0301te\u0301"))
    assert Encoder(TOKENIZERS["qwen2.5"]).tokenizer.decode(tokens.input_ids) == "\u00e9t\u00e9"
    assert tokens.spans.tolist() == [[0, 7]]


def test_bos_and_eos_are_no_text() -> None:
    tokens = Encoder(TOKENIZERS["sentencepiece"], add_eos=True).encode(_record("one two"))
    assert tokens.input_ids[0] == 1
    assert tokens.input_ids[-1] == 2
    assert tokens.spans[[0, -1]].tolist() == [[0, 0], [0, 0]]
    assert tokens.segments[[0, -1]].tolist() == [0, 0]
    assert tokens.positions.tolist() == list(range(len(tokens)))


def test_segments_follow_the_last_byte() -> None:
    record = _record("How many?", "\nTwo and two.", "\n#### 4")
    for tokenizer in TOKENIZERS.values():
        tokens = Encoder(tokenizer).encode(record)
        for (start, stop), segment in zip(tokens.spans.tolist(), tokens.segments.tolist(), strict=True):
            if stop > start:
                assert segment == 1 + (stop > 9) + (stop > 22)


@pytest.mark.parametrize("name", ["byte-level", "qwen2.5"])
@pytest.mark.parametrize("prompt", ["How many? 東京", "user", "  padded  "])
def test_chat_templates_have_empty_spans_around_exact_ones(name: str, prompt: str) -> None:
    record = _record(prompt, "\nuser: two", "\n#### 4")
    record = Record(
        "id", record.text, record.segments, (("user", 0, len(prompt)), ("assistant", len(prompt) + 1, len(record.text)))
    )
    encoder = Encoder(TOKENIZERS[name], chat_template=True)
    tokens, raw = encoder.encode(record), record.text.encode()
    covered = b"".join(raw[a:b] for a, b in tokens.spans.tolist())
    kept = prompt.strip() if name == "byte-level" else prompt
    assert covered == (kept + "user: two\n#### 4").encode()
    assert (tokens.spans[:, 0] == tokens.spans[:, 1]).sum() >= 4
    plain = Encoder(TOKENIZERS[name]).tokenizer
    assert (
        tokens.input_ids.tolist()
        == plain(
            plain.apply_chat_template(
                [{"role": "user", "content": prompt}, {"role": "assistant", "content": "user: two\n#### 4"}],
                tokenize=False,
            ),
            add_special_tokens=False,
        )["input_ids"]
    )
