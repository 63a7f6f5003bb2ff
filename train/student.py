"""The student before training: weights, config and tokenizer in one folder."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from ..errors import RecipeError
from ..hub import (
    ModelSource,
    find_model,
    load_model,
    load_tokenizer,
    model_identity,
    one_line,
    refuse_unknown_rope,
    token_digests,
    weights_digest,
)
from ..store.files import disk_errors, fsync, make_folder
from ..store.leftovers import remove_temporary
from ..store.maker import hold, mark
from ..store.sealed import write_record
from ..tap import attention_layout, probe_geometry
from .settings import ByteLevelBPE, StudentSettings

END = "<|endoftext|>"
"""The one special token of a tokenizer trained here: end of sequence, and padding."""
_TORCH_WRITES: Final = ("inline_container", "iostream error")
"""In what torch says where its writer fails: that has no error class of its own."""
_OS_ERROR: Final = re.compile(r"\(os error (\d+)\)")
"""In what safetensors and tokenizers say, whose classes tell even less."""


def make_student(
    settings: StudentSettings,
    folder: Path,
    texts: Iterable[str],
    record: Mapping[str, Any] | None = None,
    on_saved: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write the student, its tokenizer and their record to `folder`, whole or not at all.

    Args:
        settings: where the student comes from.
        folder: a new folder, in the layout of `save_pretrained`.
        texts: what a new tokenizer is trained on.
        record: fields of its record in addition to the files and the digest of the weights.
        on_saved: called with the folder in which model and tokenizer are saved, before the record seals it.

    Raises:
        RecipeError: if the config is not one of a causal language model that kava knows, or has another geometry.
        ModelNotFoundError: if a model or tokenizer cannot be loaded.
        RetryLaterError: if the disk is full.
    """
    import torch

    tokenizer = student_tokenizer(settings, texts)
    if settings.model is not None:
        model = load_model(model_source(settings), dtype=settings.dtype, device="cpu")
    else:
        config = student_config(settings, tokenizer)
        torch.manual_seed(settings.seed)
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings.dtype))
    geometry = probe_geometry(model)
    if settings.geometry is not None and settings.geometry != geometry:
        raise RecipeError(f"student.geometry: the recipe states {settings.geometry}, the model has {geometry}")
    remove_temporary(folder)
    # Another process may be at the same, where a file system knows no locks.
    temporary = folder.with_name(f".tmp-{folder.name}-{mark()}")
    with saving(folder):
        lock = hold(temporary)
        try:
            make_folder(temporary)
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            on_saved(temporary)
            write_record(temporary, {**(record or {}), "weights": weights_digest(temporary)})
            _move(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            lock.release()


def _move(made: Path, folder: Path) -> None:
    """Gives a student its name, unless another process was faster with the same one."""
    try:
        made.rename(folder)
        fsync(folder.parent)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


def student_origin(settings: StudentSettings) -> dict[str, Any]:
    """Return digests of the model and the tokenizer that the recipe names for the student, whatever their spelling.

    Raises:
        ModelNotFoundError: if one of them cannot be reached.
    """
    origin: dict[str, Any] = {}
    if settings.model is not None:
        identity = model_identity(model_source(settings), compute_dtype=settings.dtype)
        origin["model"] = {"revision": identity.revision, "weights": identity.weights_digest}
    if not isinstance(settings.tokenizer, ByteLevelBPE):
        source = tokenizer_source(settings)
        tokenizer = load_tokenizer(source)
        # Which id ends a sample is no part of the map from text to ids.
        special = [tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id]
        origin["tokenizer"] = [*token_digests(source, chat_template=True), special]
    return origin


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """`disk_errors`, also for what torch, safetensors and tokenizers, which write without Python, make of a full disk.

    Raises:
        RetryLaterError: the disk is full or failing.
        StoreError: the place cannot be written.
    """
    with disk_errors(path):
        try:
            yield
        except Exception as error:
            if found := _OS_ERROR.search(str(error)):
                number = int(found[1])
            elif isinstance(error, RuntimeError) and any(sign in str(error) for sign in _TORCH_WRITES):
                number = errno.EIO  # It does not say which.
            else:
                raise
            raise OSError(number, os.strerror(number)) from error


def student_config(settings: StudentSettings, tokenizer: Any | None) -> Any:
    """The transformers config that the recipe's `student.config` describes.

    Raises:
        RecipeError: if transformers refuses it.
        UnsupportedModelError: if the architecture is not known.
    """
    from transformers import AutoConfig

    assert settings.config is not None
    values = dict(settings.config)
    model_type = values.pop("model_type")
    if tokenizer is not None:
        values["vocab_size"] = len(tokenizer)
        values["eos_token_id"] = tokenizer.eos_token_id
        values["bos_token_id"] = tokenizer.bos_token_id
        values["pad_token_id"] = tokenizer.pad_token_id
    try:
        config = AutoConfig.for_model(model_type, **values)
    except Exception as error:
        raise RecipeError(f"student.config: {one_line(error)}") from None
    if unknown := sorted(set(values) - set(config.to_dict())):
        raise RecipeError(f"student.config: {model_type} has no setting {unknown[0]!r}")
    attention_layout(config)
    refuse_unknown_rope("student.config", config)
    return config


def load_student(folder: Path, *, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """The model and tokenizer in a folder; see `load_model`."""
    source = find_model(str(folder.resolve()))
    return load_model(source, dtype=dtype, device=device), load_tokenizer(source)


def padding(tokenizer: Any) -> int:
    """The token that batches are padded with, which is never seen."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(found or 0)


def model_source(settings: StudentSettings) -> ModelSource:
    """Where the model is that the student begins as.

    Raises:
        ModelNotFoundError: if it cannot be reached.
    """
    assert settings.model is not None
    return find_model(settings.model, revision=settings.revision, trust_remote_code=settings.trust_remote_code)


def student_tokenizer(settings: StudentSettings, texts: Iterable[str]) -> Any:
    """The student's tokenizer; one that is trained here is trained on `texts`.

    Raises:
        ModelNotFoundError: if it cannot be loaded.
    """
    if isinstance(settings.tokenizer, ByteLevelBPE):
        return train_tokenizer(texts, settings.tokenizer.vocab_size)
    return load_tokenizer(tokenizer_source(settings))


def tokenizer_source(settings: StudentSettings) -> ModelSource:
    """Where the tokenizer is that the recipe names.

    Raises:
        ModelNotFoundError: if it cannot be reached.
    """
    if settings.tokenizer is None:
        return model_source(settings)
    assert isinstance(settings.tokenizer, str)
    return find_model(settings.tokenizer, trust_remote_code=settings.trust_remote_code)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, as a fast transformers tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 257:
        raise RecipeError(f"student.tokenizer.vocab_size: {vocab_size} is less than 256 bytes and one special token")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END)
