"""Checks of a tokenizer against itself and against its model, before anything is computed.

A tokenizer that loses spaces, or gives ids that its model has no embedding for, yields a complete store that is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Final

from ..errors import CheckpointError, CorpusError
from ..notices import notice
from .corpus import Record
from .tokens import Encoder

FIRST: Final = 32
"""Records whose text is encoded and decoded again."""
_REMEDY: Final = "its class is not that of its vocabulary. Correct tokenizer_class in tokenizer_config.json"
_BOS_TOKENS: Final = {"<s>", "<bos>", "<|begin_of_text|>", "<BOS_TOKEN>"}
_BOS_FAMILIES: Final = {"cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "llama", "mistral", "mixtral"}
"""Architectures whose models were trained with BOS before every text, if their vocabulary has one of these tokens."""
_WITHOUT_SPACES: Final = {"WordLevel", "WordPiece"}
"""Models of the library tokenizers whose tokens are words: what separates them is no part of any."""


def check_tokenizer(
    where: str, encoder: Encoder, records: Sequence[Record], config: Any, original: Any | None = None
) -> None:
    """Check that a tokenizer keeps the text of these records, and that its model can read the ids.

    Args:
        where: whose tokenizer it is, for messages: `teacher qwen`.
        encoder: the tokenizer, as records are encoded with it.
        records: the corpus; the text of the first `FIRST` is compared.
        config: the model's config.
        original: the tokenizer that `tokenizer.json` describes, read by the library tokenizers.

    Raises:
        CheckpointError: if ids differ from those of `tokenizer.json`, if text is lost, or if an id has no embedding.
    """
    tokenizer = encoder.tokenizer
    reader = _TextReader(where, tokenizer)
    unknown = 0
    for record in records[:FIRST]:
        ids = tokenizer(record.text, add_special_tokens=False, verbose=False)["input_ids"]
        if original is not None and ids != original.encode(record.text, add_special_tokens=False).ids:
            raise CheckpointError(
                f"{where}: sample {record.sample_id!r}: the tokenizer gives other ids than its tokenizer.json. Compare "
                "tokenizer_config.json with tokenizer.json"
            )
        reader.refuse_uncovered(record)
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            unknown += 1
        else:
            reader.refuse_other_text(record, ids)
    if unknown:
        notice(
            f"{where}: {unknown} of the first {len(records[:FIRST])} samples have text that the tokenizer does not "
            f"know ({tokenizer.unk_token})",
            kind="warning",
        )
    _check_embedding(where, encoder, records, int(config.vocab_size))
    if records:
        _warn_of_bos(where, encoder, records[0], config)


class _TextReader:
    """A tokenizer's own account of which text its tokens stand for."""

    def __init__(self, where: str, tokenizer: Any) -> None:
        from tokenizers import Tokenizer

        self.where, self.tokenizer = where, tokenizer
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        self.drops_spaces = state["model"]["type"] in _WITHOUT_SPACES
        for part in ("pre_tokenizer", "post_processor"):
            _set_all(state.get(part), "trim_offsets", False)  # Else the spaces inside tokens count as left out.
        state["truncation"] = state["padding"] = state["normalizer"] = None
        self.backend = Tokenizer.from_str(json.dumps(state))
        self.normalizer = tokenizer.backend_tokenizer.normalizer
        self.added = set(tokenizer.added_tokens_decoder)

    def refuse_uncovered(self, record: Record) -> None:
        """Refuse text that lies in no token; what the normaliser removes is not looked for.

        Raises:
            CheckpointError: if there is such text.
        """
        text = self._normalized(record.text)
        covered = bytearray(len(text))
        for start, stop in self.backend.encode(text, add_special_tokens=False).offsets:
            covered[start:stop] = b"\1" * (stop - start)
        for start, stop in _gaps(covered):
            lost = text[start:stop]
            if not (self.drops_spaces and lost.isspace()):
                raise CheckpointError(
                    f"{self.where}: sample {record.sample_id!r}: the tokenizer loses {lost[:20]!r} after "
                    f"{text[max(0, start - 20) : start]!r}; {_REMEDY}"
                )

    def refuse_other_text(self, record: Record, ids: list[int]) -> None:
        """Refuse ids that decode to another text, unless the text spells an added token.

        Raises:
            CheckpointError: if they do.
        """
        if self.added.intersection(ids):  # Some add or take a space beside them, by design.
            return
        decoded = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        expected, found = (self._normalized(text).lstrip(" \u2581") for text in (record.text, decoded))
        if self.drops_spaces:
            expected, found = ("".join(text.split()) for text in (expected, found))
        if expected != found:
            at = next((n for n, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), len(found))
            raise CheckpointError(
                f"{self.where}: sample {record.sample_id!r}: its ids decode to {found[at : at + 20]!r} where the text "
                f"is {expected[at : at + 20]!r}; {_REMEDY}"
            )

    def _normalized(self, text: str) -> str:
        return text if self.normalizer is None else str(self.normalizer.normalize_str(text))


def _check_embedding(where: str, encoder: Encoder, records: Sequence[Record], rows: int) -> None:
    """Refuse samples with ids beyond the embedding; a vocabulary that is larger is only said."""
    tokenizer = encoder.tokenizer
    highest = max(tokenizer.get_vocab().values())
    if highest < rows:
        return
    pad = tokenizer.pad_token_id
    if encoder.add_eos and pad is not None and pad >= rows:
        raise CheckpointError(
            f"{where}: the padding token {tokenizer.pad_token!r} has id {pad}, but the model has embeddings for {rows} "
            "ids only. Set pad_token in tokenizer_config.json to another token, or resize the model's embeddings"
        )
    for record in records:
        with suppress(CorpusError):  # What cannot be rendered is reported where it is captured.
            ids = encoder.encode(record).input_ids
            if len(ids) and int(ids.max()) >= rows:
                number = int(ids.max())
                raise CheckpointError(
                    f"{where}: sample {record.sample_id!r}: token {tokenizer.convert_ids_to_tokens(number)!r} has id "
                    f"{number}, but the model has embeddings for {rows} ids only. Use the model's own tokenizer, or "
                    "resize its embeddings"
                )
    notice(
        f"{where}: the vocabulary has ids up to {highest}, the model embeds {rows} ids; no sample has one of the others"
    )


def _warn_of_bos(where: str, encoder: Encoder, record: Record, config: Any) -> None:
    tokenizer = encoder.tokenizer
    bos = tokenizer.bos_token_id
    if bos is None:
        return
    family = config.model_type in _BOS_FAMILIES and tokenizer.bos_token in _BOS_TOKENS
    adds = tokenizer("a", verbose=False)["input_ids"][:1] == [bos]
    with suppress(CorpusError):
        ids = encoder.encode(record).input_ids
        if len(ids) > 1 and ids[0] == ids[1] == bos:
            notice(
                f"{where}: samples begin with BOS twice: the tokenizer adds {tokenizer.bos_token!r}, and the text of "
                "the records begins with it. Remove it from the text",
                kind="warning",
            )
        if (family or adds) and (len(ids) == 0 or ids[0] != bos):
            notice(
                f"{where}: samples do not begin with BOS ({tokenizer.bos_token!r}), which {config.model_type} models "
                "were trained with: without it they predict much worse. Let the tokenizer or its chat template add it",
                kind="warning",
            )


def _gaps(covered: bytearray) -> Iterator[tuple[int, int]]:
    """Ranges of zero bytes."""
    start = covered.find(0)
    while start >= 0:
        stop = covered.find(1, start)
        stop = len(covered) if stop < 0 else stop
        yield start, stop
        start = covered.find(0, stop)


def _set_all(state: Any, name: str, value: Any) -> None:
    """Set a key wherever it stands in nested mappings and lists."""
    if isinstance(state, dict):
        if name in state:
            state[name] = value
        for child in state.values():
            _set_all(child, name, value)
    elif isinstance(state, list):
        for child in state:
            _set_all(child, name, value)
