"""A teacher run over the parts of a stage's store that are missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import KavaError
from ..extract import Corpus, Encoder, Teacher, capture_store
from ..progress import progress
from ..store import KVStore
from .context import context_limit
from .direct import capture_targets
from .transform import Transform

if TYPE_CHECKING:
    from .store_stages import StoreStage


def capture(
    stage: StoreStage,
    store: KVStore,
    corpus: Corpus,
    encoder: Encoder,
    teacher: Teacher,
    *,
    transform: Transform | None = None,
) -> None:
    """Runs a teacher over this process's missing parts, and writes what it gives, or targets made of that.

    Raises:
        KavaError: if the loaded model is not what its config promised.
    """
    if transform is None and teacher.geometry != store.geometry:
        raise KavaError(f"{stage.label}: the loaded model has {teacher.geometry}, its config promised {store.geometry}")
    parts, settings = stage.missing(store), stage.run.recipe.extract
    limit = "" if stage.teacher is None else context_limit(stage.run, stage.teacher)[1]
    samples = [index for part in parts for index in store.manifest.part_samples(part)]
    total = sum(len(corpus.records[index].text.encode()) for index in samples)
    # Text length is known at once, tokens only part by part: the bar counts bytes of text.
    with progress(stage.label, total, "bytes of text") as advance:
        if transform is None:
            capture_store(store, corpus, encoder, teacher, settings, parts=parts, on_text=advance, limit=limit)
        else:
            capture_targets(
                transform, store, corpus, encoder, teacher, settings, parts=parts, on_text=advance, limit=limit
            )
