"""GGUF files: the same weights in a transformers folder are what they must equal, or the key that differs is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.gguf_files import write_gguf
from fixtures.models import save_model
from fixtures.tokenizers import TEXTS, byte_level_tokenizer, sentencepiece_tokenizer

from kava.errors import CheckpointError
from kava.gguf_tokenizer import SPLITS
from kava.hub import dense_source, find_model, load_config, load_model, load_tokenizer, stop_token_ids
from kava.store import cache_folder, digest_file
from kava.train.student import train_tokenizer

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
TABLE = [1.0, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 9.0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    save_model(folder, "llama", byte_level_tokenizer(), layers=2)
    return folder


def _model(path: Path) -> Any:
    return load_model(find_model(str(path)), dtype="float32", device="cpu")


def _assert_same_numbers(folder: Path, file: Path) -> None:
    ids = torch.arange(100).view(1, -1) * 3 % 400
    with torch.no_grad():
        expected, found = (_model(path)(ids).logits for path in (folder, file))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "head_dim": 24}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("qwen2_moe", {}),
        ("qwen3_moe", {"norm_topk_prob": True}),
        ("phi3", {"sliding_window": 8}),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        ("stablelm", {}),
        ("starcoder2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
        ("gemma2", {"tie_word_embeddings": True, "attn_logit_softcapping": 7.0}),
        ("gemma3_text", {"tie_word_embeddings": True, "layers": 3}),
    ],
)
def test_every_family_computes_what_its_folder_computes(tmp_path: Path, arch: str, options: dict[str, Any]) -> None:
    folder = save_model(tmp_path / "whole", arch, byte_level_tokenizer(), **{"layers": 2, **options})
    extra = {"ARCH.attention.sliding_window_pattern": 2} if arch == "gemma3_text" else {}
    file = write_gguf(folder, tmp_path / "tiny.gguf", metadata=extra)
    _assert_same_numbers(folder, file)
    assert load_config(find_model(str(file))).model_type == ("llama" if arch == "mistral" else arch)


@pytest.mark.parametrize(
    ("parameters", "metadata", "tensors"),
    [
        (
            {"rope_type": "linear", "factor": 4.0},
            {"ARCH.rope.scaling.type": "linear", "ARCH.rope.scaling.factor": 4.0},
            {},
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            {
                "ARCH.rope.scaling.type": "yarn",
                "ARCH.rope.scaling.factor": 4.0,
                "ARCH.rope.scaling.original_context_length": 64,
                "ARCH.rope.scaling.finetuned": True,
            },
            {},
        ),
        (
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128, "beta_fast": 16.0},
            {
                "ARCH.rope.scaling.type": "yarn",
                "ARCH.rope.scaling.factor": 2.0,
                "ARCH.rope.scaling.yarn_beta_fast": 16.0,
            },
            {},
        ),
        ({"rope_type": "default"}, {"ARCH.rope.scaling.type": "none", "ARCH.rope.scaling.factor": 0.0}, {}),
        (
            {
                "rope_type": "longrope",
                "short_factor": TABLE,
                "long_factor": TABLE,
                "attention_factor": 1.0,
                "original_max_position_embeddings": 256,
            },
            {},
            {"rope_freqs.weight": np.array(TABLE)},
        ),
    ],
    ids=["linear", "yarn", "yarn-without-length", "none", "own-table"],
)
def test_scaled_rotary_frequencies(
    tmp_path: Path, parameters: dict[str, Any], metadata: dict[str, Any], tensors: dict[str, Any]
) -> None:
    rope = {"rope_theta": 10000.0, **parameters}
    folder = save_model(tmp_path / "whole", "llama", byte_level_tokenizer(), layers=2, rope_parameters=rope)
    file = write_gguf(folder, tmp_path / "tiny.gguf", metadata=metadata, tensors=tensors)
    _assert_same_numbers(folder, file)
    assert load_config(find_model(str(file))).rope_parameters == rope
    if parameters["rope_type"] != "default":
        plain = write_gguf(folder, tmp_path / "plain.gguf")
        with pytest.raises(AssertionError):
            _assert_same_numbers(folder, plain)
        _assert_same_numbers(folder, Path(dense_source(find_model(str(file))).location))


def test_llama3_frequencies_are_named_as_meta_names_them(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "whole", "llama", byte_level_tokenizer(), layers=2, rope_parameters=LLAMA3)
    plain = 500000.0 ** (-np.arange(0, 16, 2) / 16)
    scaled = _model(folder).model.rotary_emb.inv_freq.numpy()
    assert np.sum((plain / scaled > 1.001) & (plain / scaled < 7.999)) > 0, "some are between"
    file = write_gguf(folder, tmp_path / "tiny.gguf", tensors={"rope_freqs.weight": plain / scaled})
    _assert_same_numbers(folder, file)
    assert load_config(find_model(str(file))).rope_parameters == pytest.approx(LLAMA3)


def test_longrope(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": TABLE,
        "long_factor": [2 * factor for factor in TABLE],
        "attention_factor": 1.1,
        "original_max_position_embeddings": 64,
    }
    folder = save_model(
        tmp_path / "whole",
        "phi3",
        byte_level_tokenizer(),
        layers=2,
        rope_parameters=rope,
        original_max_position_embeddings=64,
    )
    tensors = {f"rope_factors_{name}.weight": np.array(rope[f"{name}_factor"]) for name in ("short", "long")}
    metadata = {"ARCH.rope.scaling.original_context_length": 64, "ARCH.rope.scaling.attn_factor": 1.1}
    file = write_gguf(folder, tmp_path / "tiny.gguf", metadata=metadata, tensors=tensors)
    _assert_same_numbers(folder, file)
    with pytest.raises(CheckpointError, match=r"rope_factors_long.weight: both tables"):
        load_config(find_model(str(write_gguf(folder, tmp_path / "lacking.gguf", tensors=tensors))))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"ARCH.attention.scale": 0.5}, "llama.attention.scale: kava does not know this setting"),
        ({"ARCH.logit_scale": 0.5}, "llama.logit_scale: kava does not know"),
        ({"ARCH.attention.causal": False}, "llama.attention.causal: the value False is not supported"),
        ({"ARCH.rope.scaling.type": "su"}, "llama.rope.scaling.type: 'su' with factor None"),
        ({"ARCH.rope.scaling.factor": 2.0}, "llama.rope.scaling.factor: there is a factor, but no type"),
        ({"ARCH.rope.scaling.attn_factor": 1.2}, "llama.rope.scaling.attn_factor: the value"),
        ({"ARCH.rope.scaling.yarn_log_multiplier": 0.1}, "llama.rope.scaling.yarn_log_multiplier"),
        ({"ARCH.rope.dimension_count": 8}, "llama.rope.dimension_count: 8 of 16"),
        ({"ARCH.rope.freq_base_swa": 5000.0}, "llama.rope.freq_base_swa"),
        ({"ARCH.attention.sliding_window": 8}, "llama.attention.sliding_window: llama has no such setting"),
        ({"ARCH.attention.head_count_kv": [2, 1]}, "llama.attention.head_count_kv: layers with unequal values"),
        ({"ARCH.expert_count": 8}, "llama.expert_count: llama has no such setting"),
        ({"ARCH.embedding_length": None}, "llama.embedding_length: the file does not state it"),
        ({"split.count": 3}, "split.count: this is one part of a model"),
        ({"adapter.type": "lora"}, "adapter.type: this is one part of a model"),
        ({"tokenizer.ggml.pre": "no-such"}, "tokenizer.ggml.pre: kava does not know the pre-tokenizer 'no-such'"),
        ({"tokenizer.ggml.pre": "default"}, "tokenizer.ggml.pre: kava does not know the pre-tokenizer 'default'"),
        ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre: kava does not know the pre-tokenizer None"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model|'bert'"),
        ({"tokenizer.ggml.normalizer.lowercase": True}, "tokenizer.ggml.normalizer.lowercase: kava does not know"),
        ({"tokenizer.ggml.add_bos_token": True}, "tokenizer.ggml.add_bos_token: the file names no bos_token_id"),
    ],
)
def test_what_changes_numbers_and_is_not_known_is_refused_by_name(
    whole: Path, tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    file = write_gguf(whole, tmp_path / "tiny.gguf", metadata=metadata)
    with pytest.raises(Exception, match=message) as caught:
        load_tokenizer(find_model(str(file)))
    assert "\n" not in str(caught.value)
    assert not list(cache_folder().glob("gguf/.*"))


def test_harmless_metadata_is_read_over(whole: Path, tmp_path: Path) -> None:
    metadata = {
        "general.url": "https://example.org",
        "quantize.imatrix.file": "x",
        "ARCH.rope.scaling.finetuned": False,
        "ARCH.tensor_data_layout": "Meta AI original pth",
        "tokenizer.ggml.fim_pre_token_id": 3,
        "tokenizer.ggml.eot_token_id": 0,
        "split.count": 1,
    }
    _assert_same_numbers(whole, write_gguf(whole, tmp_path / "tiny.gguf", metadata=metadata))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensors": {"blk.0.attn_q.bias": np.ones(96)}}, "blk.0.attn_q.bias: 1 tensors have no place in llama"),
        ({"tensors": {"blk.1.attn_q_norm.weight": np.ones(16)}}, "blk.1.attn_q_norm.weight: 1 tensors"),
        ({"tensors": {"rope_freqs.weight": np.ones(4)}}, "rope_freqs.weight: it has 4 factors for 8 frequencies"),
        ({"without": ("blk.1.attn_k.weight",)}, r"1 tensors missing \(model.layers.1.self_attn.k_proj.weight\)"),
        ({"metadata": {"ARCH.block_count": 1}}, "blk.1.attn_norm.weight, .*9 tensors have no place"),
        ({"metadata": {"ARCH.feed_forward_length": 32}}, "of another shape"),
    ],
)
def test_tensors_must_be_those_of_the_config(
    whole: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    file = write_gguf(whole, tmp_path / "tiny.gguf", **options)
    with pytest.raises(CheckpointError, match=message):
        _model(file)


def test_a_truncated_file(whole: Path, tmp_path: Path) -> None:
    file = write_gguf(whole, tmp_path / "tiny.gguf")
    data = file.read_bytes()
    for length in (10, 5000, len(data) - 5000):
        (tmp_path / f"{length}.gguf").write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=rf"GGUF file {length}.gguf is damaged"):
            _model(tmp_path / f"{length}.gguf")


@pytest.mark.parametrize(("bos", "eos"), [(None, None), (True, None), (False, None), (True, True), (False, True)])
def test_tokens_that_the_file_asks_to_add(tmp_path: Path, bos: bool | None, eos: bool | None) -> None:
    tokenizer = sentencepiece_tokenizer()
    folder = save_model(tmp_path / "whole", "llama", tokenizer, layers=2)
    metadata = {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
    source = find_model(str(write_gguf(folder, tmp_path / "tiny.gguf", metadata=metadata)))
    loaded = load_tokenizer(source)
    begins = bos is not False  # SentencePiece begins with BOS where a file does not say.
    for text in TEXTS[:3]:
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert loaded(text)["input_ids"] == [1] * begins + plain + [2] * bool(eos)
    assert stop_token_ids(source) == [2]


def test_files_of_another_tokenizer_beside_it_are_not_mixed_in(whole: Path, tmp_path: Path) -> None:
    file = write_gguf(whole, tmp_path / "tiny.gguf")
    sentencepiece_tokenizer().save_pretrained(tmp_path)
    tokenizer, expected = load_tokenizer(find_model(str(file))), byte_level_tokenizer()
    assert tokenizer(TEXTS[0])["input_ids"] == expected(TEXTS[0])["input_ids"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (None, "<|end|>", "<|end|>")


def test_the_space_before_the_text(tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer()
    folder = save_model(tmp_path / "whole", "llama", tokenizer, layers=2)
    metadata = {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    loaded = load_tokenizer(find_model(str(write_gguf(folder, tmp_path / "tiny.gguf", metadata=metadata))))
    with_space = tokenizer.convert_ids_to_tokens(tokenizer("sold clips", add_special_tokens=False)["input_ids"])
    found = loaded.convert_ids_to_tokens(loaded("sold clips")["input_ids"])
    assert "".join(with_space) == "▁sold▁clips"
    assert "".join(found) == "sold▁clips"


def test_smollm_splits_digits_before_byte_pairs(tmp_path: Path) -> None:
    """The tokenizer.json of SmolLM2: single digits, then GPT-2's rule."""
    texts = [f"{n} {n}{n} a{n}b $1,{n}0 100 100 1000 2000 20 00 ." for n in range(40)]
    tokenizer = train_tokenizer(texts + TEXTS, 420)
    folder = save_model(tmp_path / "whole", "llama", tokenizer, layers=2)
    text = "He sold 100 clips for $2,000 in 20 days \n\n and 00 more."
    ids = {}
    for pre in ("smollm", "starcoder", "gpt-2", "llama-bpe", "qwen2"):
        metadata = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}
        file = write_gguf(folder, tmp_path / f"{pre}.gguf", metadata=metadata)
        ids[pre] = load_tokenizer(find_model(str(file)))(text)["input_ids"]
    assert ids["smollm"] == ids["starcoder"] == tokenizer(text)["input_ids"]


def test_rules_of_splitting_are_those_of_the_original_tokenizers() -> None:
    from tokenizers import Regex, pre_tokenizers

    def cut(name: str, text: str) -> list[str]:
        split = pre_tokenizers.Split(Regex(SPLITS[name].rule), behavior="isolated")
        return [piece for piece, _ in split.pre_tokenize_str(text)]

    text = "Don't SHE'LL 12345  x\n\n y2!"
    assert cut("llama-bpe", text) == ["Don", "'t", " SHE", "'LL", " ", "123", "45", " ", " x", "\n\n", " y", "2", "!"]
    assert cut("qwen2", "a 123") == ["a", " ", "1", "2", "3"]
    assert cut("tekken", "helloWorld 12") == ["hello", "World", " ", "1", "2"]
    assert cut("gpt-4o", "helloWorld's 1234") == ["hello", "World's", " ", "123", "4"]


def test_words_of_llama3_are_whole_where_the_vocabulary_has_them(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    folder = save_model(tmp_path / "whole", "llama", tokenizer, layers=2)
    merges = [" ".join(m) for m in state["model"]["merges"] if "".join(m) != "\u0120clips"]
    assert len(merges) < len(state["model"]["merges"])
    numbers = {}
    for pre in ("gpt-2", "llama-bpe"):
        metadata = {
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.ggml.merges": merges,
        }
        file = write_gguf(folder, tmp_path / f"{pre}.gguf", metadata=metadata)
        numbers[pre] = len(load_tokenizer(find_model(str(file)))(" clips")["input_ids"])
    assert numbers == {"gpt-2": 2, "llama-bpe": 1}


def test_conversions_of_before_are_not_used(whole: Path, tmp_path: Path) -> None:
    file = write_gguf(whole, tmp_path / "tiny.gguf", metadata={"general.name": "before"})
    old = cache_folder() / "gguf" / digest_file(file)
    old.mkdir(parents=True)
    (old / "config.json").write_text("{}")
    _assert_same_numbers(whole, file)
