"""Tokenizers that lose text, give other ids than their file, or ids that their model cannot read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fixtures.command import kava, write_recipe
from fixtures.gguf_files import write_gguf
from fixtures.models import save_model, tiny_config
from fixtures.tokenizers import TEXTS, byte_level_tokenizer, gpt2_tokenizer, qwen_tokenizer, sentencepiece_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kava.errors import CheckpointError, ModelNotFoundError
from kava.extract import Encoder, Record
from kava.extract.tokenizer_check import check_tokenizer
from kava.hub import find_model, load_tokenizer, tokenizer_file
from kava.store import Segment

HARD = [
    *TEXTS,
    "  two leading spaces,\ttabs\r\nand\n\n\nlines  ",
    "\u200bzero width, \ufeffmark, e\u0301 and \u00e9, \u6771\u4eac \U0001f469\u200d\U0001f469\u200d\U0001f467 \ufb01 \u2163 \u00bd",
    "<|end|> <s> </s> [INST] literal tokens",
    "x",
]


def _records(texts: list[str]) -> list[Record]:
    return [Record(f"r{n}", t, ((0, len(t), Segment.ANSWER),), (("user", 0, len(t)),)) for n, t in enumerate(texts)]


def _check(
    tokenizer: Any, texts: list[str], vocab: int | None = None, model_type: str = "qwen2", **encoder: Any
) -> None:
    config = tiny_config(model_type, vocab=vocab or len(tokenizer))
    check_tokenizer("teacher big", Encoder(tokenizer, **encoder), _records(texts), config)


def _trained(pre_tokenizer: Any, *, normalizer: Any = None, decoder: Any = None, **model: Any) -> Any:
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if decoder is not None:
        tokenizer.decoder = decoder
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=["<e>", "<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>")


BYTES = (pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())
SOUND = {
    "byte-level": byte_level_tokenizer,
    "sentencepiece": sentencepiece_tokenizer,
    "gpt2": gpt2_tokenizer,
    "qwen": qwen_tokenizer,
    "nfc": lambda: _trained(BYTES[0], normalizer=normalizers.NFC(), decoder=BYTES[1]),
    "nfkc": lambda: _trained(BYTES[0], normalizer=normalizers.NFKC(), decoder=BYTES[1]),
    "lowercase": lambda: _trained(BYTES[0], normalizer=normalizers.Lowercase(), decoder=BYTES[1]),
    "strip": lambda: _trained(BYTES[0], normalizer=normalizers.Strip(), decoder=BYTES[1]),
    "no accents": lambda: _trained(
        BYTES[0],
        normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
        decoder=BYTES[1],
    ),
    "prefix": lambda: _trained(pre_tokenizers.ByteLevel(add_prefix_space=True), decoder=BYTES[1]),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_tokenizers_pass_on_hard_texts(name: str) -> None:
    tokenizer = SOUND[name]()
    _check(tokenizer, HARD)
    original = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    check_tokenizer("x", Encoder(tokenizer), _records(HARD), tiny_config("qwen2", vocab=len(tokenizer)), original)


@pytest.mark.parametrize(
    ("pre_tokenizer", "decoder", "message"),
    [
        (
            pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), BYTES[0]]),
            BYTES[1],
            r"teacher big: sample 'r0': the tokenizer loses ' ' after 'Natalia'",
        ),
        (
            pre_tokenizers.Sequence([pre_tokenizers.Split("4", "removed"), BYTES[0]]),
            BYTES[1],
            r"the tokenizer loses '4' after 'talia sold clips to '",
        ),
        (pre_tokenizers.Metaspace(), BYTES[1], r"loses|decode to"),
        (
            BYTES[0],
            decoders.Sequence([decoders.ByteLevel(), decoders.Replace("clips", "flips")]),
            "its ids decode to 'f",
        ),
        (BYTES[0], None, "its ids decode to '.*' where the text is"),
    ],
)
def test_lost_text_is_refused_with_its_place(pre_tokenizer: Any, decoder: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        _check(_trained(pre_tokenizer, decoder=decoder), TEXTS[:1])


def test_text_that_a_tokenizer_does_not_know_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer(models.WordLevel({"Natalia": 0, "sold": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    _check(fast, ["Natalia sold", "Natalia said", "sold Natalia"])
    assert "warning: teacher big: 1 of the first 3 samples have text that the tokenizer does not know (<unk>)" in (
        capsys.readouterr().err
    )


def _deepseek(folder: Path, tokenizer_class: str, model_type: str = "llama") -> Path:
    """A byte-level tokenizer.json in a folder that names another class for it."""
    save_model(folder, model_type, byte_level_tokenizer(), layers=2)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": tokenizer_class}))
    return folder


@pytest.mark.parametrize(
    "tokenizer_class", ["LlamaTokenizerFast", "LlamaTokenizer", "GemmaTokenizer", "Qwen2Tokenizer"]
)
def test_a_wrong_class_gives_way_to_tokenizer_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer_class: str
) -> None:
    folder = _deepseek(tmp_path / "model", tokenizer_class)
    source = find_model(str(folder))
    tokenizer, expected = load_tokenizer(source), byte_level_tokenizer()
    for text in HARD:
        assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]
    check_tokenizer("x", Encoder(tokenizer), _records(HARD), tiny_config("llama", vocab=400), tokenizer_file(source))
    differs, believed = True, AutoTokenizer.from_pretrained(folder)
    try:
        differs = any(believed(text)["input_ids"] != expected(text)["input_ids"] for text in HARD)
    except Exception:  # The library has no class of its own: `<unk>` is not in the vocabulary.
        assert tokenizer_class == "GemmaTokenizer"
    if differs:
        assert "gives other tokens than its tokenizer.json, which is used" in capsys.readouterr().err
        with pytest.raises(Exception, match=r"gives other ids than its tokenizer.json|not found in the vocab"):
            check_tokenizer(
                "x", Encoder(believed), _records(HARD), tiny_config("llama", vocab=400), tokenizer_file(source)
            )
    else:
        assert tokenizer_class == "Qwen2Tokenizer"


def test_a_folder_without_a_tokenizer_and_one_with_a_damaged_file(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama", byte_level_tokenizer(), layers=2)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:2000])
    with pytest.raises((CheckpointError, ModelNotFoundError), match=r"^[^\n]*$"):
        load_tokenizer(find_model(str(folder)))
    for each in folder.glob("tokenizer*"):
        each.unlink()
    with pytest.raises(ModelNotFoundError, match=r"there is no tokenizer in .*Copy tokenizer.json"):
        load_tokenizer(find_model(str(tmp_path / "model")))


def test_ids_beyond_the_embedding(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_level_tokenizer()
    highest = max(max(tokenizer(text)["input_ids"]) for text in TEXTS)
    with pytest.raises(
        CheckpointError, match=rf"has id {highest}, but the model has embeddings for {highest} ids only"
    ):
        _check(tokenizer, TEXTS, vocab=highest)
    texts = ["a b c"]
    _check(tokenizer, texts, vocab=300)
    assert "the vocabulary has ids up to 399, the model embeds 300 ids" in capsys.readouterr().err
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    _check(tokenizer, texts, vocab=400)
    with pytest.raises(CheckpointError, match=r"the padding token '<pad>' has id 400"):
        _check(tokenizer, texts, vocab=400, add_eos=True)


@pytest.mark.parametrize("command", ["extract", "plan"])
def test_the_command_refuses_ids_beyond_the_embedding_before_any_capture(
    tmp_path: Path, tiny_models: dict[str, Path], command: str
) -> None:
    small = save_model(tmp_path / "small", "qwen2", byte_level_tokenizer(300), layers=2)
    byte_level_tokenizer(400).save_pretrained(small)
    recipe = write_recipe(tmp_path, tiny_models | {"teacher": small})
    printed = kava(command, recipe, code=2)
    assert "but the model has embeddings for 300 ids only" in printed
    assert not list((tmp_path / "run").rglob("parts/0*"))


def test_a_student_whose_tokenizer_is_not_its_own_is_refused_before_any_capture(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    small = save_model(tmp_path / "small", "qwen2", byte_level_tokenizer(300), layers=3)
    recipe = write_recipe(
        tmp_path, tiny_models, student={"model": str(small), "tokenizer": str(tiny_models["teacher"])}
    )
    for command in (("extract", recipe), ("run", recipe, "--only", "student")):
        assert "student: sample 'r" in kava(*command, code=2)
    assert not list((tmp_path / "run").rglob("parts/0*"))


@pytest.mark.parametrize(
    ("model_type", "add_bos", "warned"),
    [("gemma", False, True), ("gemma", True, False), ("llama", False, True), ("qwen2", False, False)],
)
def test_a_family_that_needs_bos_and_does_not_get_it_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model_type: str, add_bos: bool, warned: bool
) -> None:
    tokenizer = sentencepiece_tokenizer()
    if not add_bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    config = tiny_config(model_type, vocab=500)
    check_tokenizer(str(tmp_path), Encoder(tokenizer), _records(TEXTS[:3]), config)
    assert ("samples do not begin with BOS ('<s>')" in capsys.readouterr().err) == warned


def test_bos_that_a_chat_template_leaves_out_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = sentencepiece_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    _check(tokenizer, TEXTS[:3], model_type="qwen2", chat_template=True)
    assert "do not begin with BOS" in capsys.readouterr().err


def test_a_gguf_gemma_without_its_bos_is_warned_of(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    folder = save_model(tmp_path / "gemma", "gemma2", sentencepiece_tokenizer(), layers=2, tie_word_embeddings=True)
    metadata = {
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }
    file = write_gguf(folder, tmp_path / "gemma.gguf", metadata=metadata)
    recipe = write_recipe(tmp_path, tiny_models | {"teacher": file})
    assert "warning: teacher big: samples do not begin with BOS ('<s>'), which gemma2 models" in kava("extract", recipe)
