"""The tokenizer of a GGUF file, as its model was trained with.

A GGUF file holds a vocabulary and the name of the rule that splits text before byte pairs are merged. transformers
takes GPT-2's rule for every name that it does not know, and never adds the tokens that the file asks to add. Here a
name that is not in the table is refused.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .errors import CheckpointError

Refuse = Callable[[str, str], CheckpointError]

_LLAMA3: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2: Final = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_CASED: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+SUFFIX"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*SUFFIX"
    r"|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN: Final = _CASED.replace("SUFFIX", "").replace("DIGITS", r"\p{N}")
_GPT4O: Final = _CASED.replace("SUFFIX", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?").replace("DIGITS", r"\p{N}{1,3}")
_GPT2: Final = "gpt2"
_DIGITS: Final = "digits"


@dataclass(frozen=True)
class _Split:
    """How text is cut before merging, under one name of `tokenizer.ggml.pre`."""

    rule: str
    """A regular expression, `gpt2` for GPT-2's, or `digits` for single digits and then GPT-2's."""
    whole_words: bool = False
    """A word that is in the vocabulary is one token, whatever the merges lead to."""
    add_bos: bool = False
    """Begin with BOS, if the file does not say."""
    nfc: bool = False
    """Compose characters first."""


_LLAMA3_SPLIT: Final = _Split(_LLAMA3, whole_words=True, add_bos=True)
SPLITS: Final[dict[str, _Split]] = {
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), _Split(_DIGITS)),
    **dict.fromkeys(("gpt-2", "gpt2", "mpt", "olmo"), _Split(_GPT2)),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3"), _LLAMA3_SPLIT),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _Split(_LLAMA3)),
    "qwen2": _Split(_QWEN2, nfc=True),
    "deepseek-r1-qwen": _Split(_QWEN2),
    "tekken": _Split(_TEKKEN, whole_words=True, add_bos=True),
    "gpt-4o": _Split(_GPT4O),
}
"""By `tokenizer.ggml.pre`, after llama.cpp's src/llama-vocab.cpp and the models' own tokenizer.json."""
_NAMED: Final = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_READ: Final = {
    *("model", "pre", "tokens", "scores", "token_type", "merges"),
    *("bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id"),
    *("add_bos_token", "add_eos_token", "add_space_prefix"),
}
_HARMLESS: Final = {
    *("eot_token_id", "eom_token_id", "mask_token_id", "cls_token_id", "seperator_token_id", "separator_token_id"),
    *("prefix_token_id", "suffix_token_id", "middle_token_id", "token_type_count", "eog_token_ids"),
    *(f"fim_{name}_token_id" for name in ("pre", "suf", "mid", "pad", "rep", "sep")),
}
"""Below `tokenizer.ggml.`: names of tokens for uses other than prefill."""


def convert_tokenizer(path: Path, architecture: str, metadata: dict[str, Any], refuse: Refuse) -> Any:
    """Return the fast tokenizer of a GGUF file.

    Args:
        path: the file.
        architecture: its `general.architecture`.
        metadata: its metadata by key.
        refuse: makes the error for a key and a reason.

    Raises:
        CheckpointError: if the file asks for something that is not known.
    """
    from transformers import PreTrainedTokenizerFast

    prefix = "tokenizer.ggml."
    stated = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    for name, value in stated.items():
        if name not in _READ | _HARMLESS and value not in (False, "", []):
            raise refuse(f"{prefix}{name}", "kava does not know this setting")
    with tempfile.TemporaryDirectory() as alone:  # Files of another tokenizer beside it would be mixed in.
        (Path(alone) / path.name).symlink_to(path.resolve())
        backend = PreTrainedTokenizerFast.from_pretrained(alone, gguf_file=path.name).backend_tokenizer
    if stated.get("model") == "gpt2":
        add_bos = _split_bytes(backend, stated.get("pre"), refuse)
    elif stated.get("model") == "llama":
        add_bos = True
        _space_prefix(backend, architecture, stated.get("add_space_prefix", True), refuse)
    else:
        raise refuse(f"{prefix}model", f"the tokenizer {stated.get('model')!r} is not supported")
    ids = {name: stated.get(f"{key}_token_id") for name, key in _NAMED.items()}
    tokens = {name: None if number is None else stated["tokens"][number] for name, number in ids.items()}
    _add_ends(backend, tokens, stated.get("add_bos_token", add_bos), stated.get("add_eos_token", False), refuse)
    template = metadata.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **tokens)


def _split_bytes(backend: Any, name: str | None, refuse: Refuse) -> bool:
    """Set the pre-tokenizer and normaliser of a byte-level vocabulary; returns whether it begins with BOS."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    if name not in SPLITS:
        raise refuse("tokenizer.ggml.pre", f"kava does not know the pre-tokenizer {name!r}, only {', '.join(SPLITS)}")
    split = SPLITS[name]
    parts: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.rule in (_GPT2, _DIGITS))]
    if split.rule == _DIGITS:
        parts.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif split.rule != _GPT2:
        parts.insert(0, pre_tokenizers.Split(Regex(split.rule), behavior="isolated"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    backend.normalizer = normalizers.NFC() if split.nfc else None
    backend.model.ignore_merges = split.whole_words
    return split.add_bos


def _space_prefix(backend: Any, architecture: str, wanted: bool, refuse: Refuse) -> None:
    """Make a SentencePiece vocabulary put a space before the text, or not."""
    first = backend.encode("a", add_special_tokens=False).tokens
    if wanted == (first[:1] != ["a"]):
        return
    if architecture.startswith("gemma") or wanted:
        raise refuse("tokenizer.ggml.add_space_prefix", f"{wanted} is not what {architecture} has")
    from tokenizers import normalizers, pre_tokenizers

    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.normalizer = normalizers.Sequence([])
    if backend.encode("a", add_special_tokens=False).tokens[:1] != ["a"]:
        raise refuse("tokenizer.ggml.add_space_prefix", f"{wanted} is not supported for {architecture}")


def _add_ends(backend: Any, tokens: dict[str, str | None], bos: bool, eos: bool, refuse: Refuse) -> None:
    """Add BOS and EOS around every text, as the file asks."""
    from tokenizers import processors

    ends = {"bos": tokens["bos_token"] if bos else None, "eos": tokens["eos_token"] if eos else None}
    for name, asked in (("bos", bos), ("eos", eos)):
        if asked and ends[name] is None:
            raise refuse(f"tokenizer.ggml.add_{name}_token", f"the file names no {name}_token_id")
    used = [token for token in ends.values() if token is not None]
    template = [*([ends["bos"]] if ends["bos"] else []), "$A", *([ends["eos"]] if ends["eos"] else [])]
    backend.post_processor = processors.TemplateProcessing(
        single=template, pair=None, special_tokens=[(token, backend.token_to_id(token)) for token in set(used)]
    )
