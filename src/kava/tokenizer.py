"""Tokenizers, as their `tokenizer.json` describes them.

transformers builds some tokenizers anew by the class that a folder names, and a wrong class loses every space. The
ids are therefore compared with those that the library tokenizers reads from the file.
"""

from __future__ import annotations

import datetime
import json
import re
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from .errors import CheckpointError, ModelNotFoundError
from .gguf import converted
from .lfs import lfs_pointer
from .notices import notice
from .sources import ModelSource, check_source, loading, model_file
from .store import digest_json

_TOKENIZERS: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.*",
    "*.tiktoken",
    "*.spm",
    "spiece.model",
    "tekken.json",
)
"""Files of which a folder with a tokenizer has at least one."""
_RENDERING_VERSION: Final = 2
"""Changes whenever the same template gives other tokens or segments than before."""
_UNKNOWN_PART: Final = re.compile(r"untagged enum|unknown variant")
"""In what tokenizers says of a file of a newer version."""
_PROBES: Final = (
    "Natalia sold 48/2 = 24 clips in May; it's $12.50.\n\n  Two  spaces,\ta tab. DON'T\u2019S",
    " Él compró 3 cafés; 東京 naïve cafe\u0301 \U0001f469\u200d\U0001f469\u200d\U0001f467 über 99\u00a0%.\r\n",
    "def f(x):\n    return x**2  # 1,234,567\n#### 72",
)
"""Texts on which tokenizers differ that are not the same."""


@cache
def load_tokenizer(source: ModelSource) -> Any:
    """Return the model's fast tokenizer, which gives the ids of its `tokenizer.json` where it has one.

    Raises:
        ModelNotFoundError: if it cannot be loaded, or has no fast form (byte spans need one).
        CheckpointError: if transformers cannot load what `tokenizer.json` describes.
        DamagedStoreError: if kava wrote the folder, and a file of it is not as it was written.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    check_source(source, quick=True)
    if source.is_local and not source.gguf_file:
        _refuse_without_tokenizer(source)
    with loading(source):
        original = tokenizer_file(source)
        if source.gguf_file:
            return PreTrainedTokenizerFast.from_pretrained(converted(source.gguf_path))
        tokenizer = AutoTokenizer.from_pretrained(source.location, **source.options)
    if not tokenizer.is_fast:
        raise ModelNotFoundError(f"model {source.name!r} has no fast tokenizer; kava needs one for byte spans")
    if original is None or _same_ids(tokenizer, original):
        return tokenizer
    with loading(source):
        plain = PreTrainedTokenizerFast.from_pretrained(source.location, **source.options)
    if not _same_ids(plain, original):
        raise CheckpointError(
            f"model {source.name!r}: transformers reads other tokens from the folder than its tokenizer.json gives. "
            "Compare tokenizer_config.json with tokenizer.json"
        )
    notice(
        f"model {source.name!r}: its tokenizer class {type(tokenizer).__name__} gives other tokens than its "
        "tokenizer.json, which is used"
    )
    return plain


def tokenizer_file(source: ModelSource) -> Any | None:
    """Return the tokenizer that `tokenizer.json` describes, read without transformers; None if there is no such file.

    Raises:
        CheckpointError: if the file is damaged.
    """
    from tokenizers import Tokenizer

    path = None if source.gguf_file else model_file(source, "tokenizer.json")
    if path is None:
        return None
    if pointer := lfs_pointer(path):
        raise CheckpointError(f"model {source.name!r}: tokenizer.json: {pointer}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # It has no class of its own.
        if _UNKNOWN_PART.search(str(error)):
            raise CheckpointError(
                f"model {source.name!r}: tokenizer.json holds a part that tokenizers {metadata.version('tokenizers')} "
                f"does not know ({error}). Upgrade tokenizers and transformers, or copy the file again"
            ) from error
        raise CheckpointError(f"model {source.name!r}: tokenizer.json is damaged: {error}. Copy it again") from error
    # Saved with a training's settings, it would cut and pad every text; transformers drops them as well.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _same_ids(tokenizer: Any, original: Any) -> bool:
    """Whether both give the same ids for every probe; a tokenizer of a wrong class may fail instead."""
    try:
        found = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in _PROBES]
    except Exception:  # The library tokenizers has no class of its own for it.
        return False
    return found == [original.encode(text, add_special_tokens=False).ids for text in _PROBES]


def _refuse_without_tokenizer(source: ModelSource) -> None:
    folder = Path(source.location)
    if not any(path for pattern in _TOKENIZERS for path in folder.glob(pattern)):
        if ggufs := sorted(folder.glob("*.gguf")):
            raise ModelNotFoundError(f"model {source.name!r}: the folder holds GGUF files. Name one, as in {ggufs[0]}")
        raise ModelNotFoundError(
            f"model {source.name!r}: there is no tokenizer in {folder}. Copy tokenizer.json and tokenizer_config.json "
            "there"
        )


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of everything that maps text to ids: vocabulary, merges, normaliser, post-processor."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return digest_json({k: v for k, v in state.items() if k not in ("truncation", "padding")})


def chat_template_digest(tokenizer: Any, date: datetime.date | None = None) -> str:
    """Digest of all that determines how messages are rendered.

    Args:
        tokenizer: with its chat template and the special tokens that the template may print.
        date: that the template prints as today's; it counts only if the template may print one.
    """
    template = tokenizer.chat_template
    dated = any(name in json.dumps(template) for name in ("strftime_now", "date_string"))
    content = {
        "template": template,
        "special_tokens": tokenizer.special_tokens_map,
        "date": str(date) if dated and date is not None else None,
        "version": _RENDERING_VERSION,
    }
    return digest_json(json.loads(json.dumps(content, default=str)))
