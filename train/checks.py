"""Whether targets are a student's own, and whether it can be trained as asked, before it is."""

from __future__ import annotations

from typing import Any

from ..errors import StageError
from ..hub import tokenizer_digest
from ..store import LOGITS
from ..tap import probe_geometry
from .data import Targets


def check_targets(store: Targets, model: Any, tokenizer: Any, corpus_digest: str | None, *, logits: bool) -> None:
    """Refuses targets that this student cannot be trained on.

    Args:
        store: the targets.
        model: the student.
        tokenizer: the student's.
        corpus_digest: the corpus that they must be of; None to accept any.
        logits: whether they must hold the teacher's logits.

    Raises:
        StageError: saying what does not fit, and which stage to run.
    """
    manifest = store.manifest
    if manifest.kind == "selected":
        raise StageError(
            f"{store.path} is a selected store: its slots are no targets for the student's tokens; train on what "
            "kava project makes"
        )
    if manifest.kind != "target":
        raise StageError(f"{store.path} is a {manifest.kind} store, not targets; run kava project first")
    if missing := store.missing_parts():
        raise StageError(f"{store.path}: {len(missing)} of {manifest.num_parts} parts are missing; run kava project")
    if logits and LOGITS[0] not in manifest.extras:
        raise StageError(
            f"{store.path} has no logits, which train.logits needs: capture with extract.logits, from a teacher whose "
            "tokenizer is the student's; fused targets have none"
        )
    problems = []
    if (own := probe_geometry(model)) != manifest.geometry:
        problems.append(f"geometry: {manifest.geometry} there, {own} in the student")
    if (digest := tokenizer_digest(tokenizer)) != manifest.tokenizer_digest:
        problems.append(f"tokenizer: {manifest.tokenizer_digest} there, {digest} in the student")
    if corpus_digest is not None and corpus_digest != manifest.corpus_digest:
        problems.append(f"corpus: {manifest.corpus_digest} there, {corpus_digest} in the recipe")
    if problems:
        raise StageError(f"{store.path} was made for another student ({'; '.join(problems)}); run kava project again")


def check_packing(model: Any) -> None:
    """Refuses an attention that would not tell samples in one row apart.

    Raises:
        StageError: if it is none of those that build their mask from `position_ids`.
    """
    found = model.config._attn_implementation
    if found not in ("sdpa", "eager"):
        raise StageError(
            f"train.pack_tokens: attention {found!r} is not known to keep packed samples apart; leave it out"
        )


def check_sharding(model: Any, *, bf16: bool) -> None:
    """Refuses weights of low precision that autocast is to train in shards: accelerate would make them float32.

    Raises:
        StageError: if they are.
    """
    if bf16 and (found := next((p.dtype for p in model.parameters() if p.dtype.itemsize < 4), None)):
        raise low_precision_shards(str(found).removeprefix("torch."))


def low_precision_shards(dtype: str) -> StageError:
    """Return the error about weights of this dtype; see `check_sharding`."""
    return StageError(
        f"train.fsdp: the student's weights are {dtype}, and with train.bf16 they must be float32: set "
        "student.dtype: float32, or leave out train.bf16"
    )
