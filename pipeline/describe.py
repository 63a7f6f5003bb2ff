"""The line that people read about a stage's store."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..store import KVStore

if TYPE_CHECKING:
    from .store_stages import StoreStage


def describe(stage: StoreStage, store: KVStore) -> str:
    """What there is of a stage's store by now, for people."""
    store = stage.current(store)
    failed, missing = len(store.failed), set(stage.wanted(store.manifest)) & set(store.missing_parts())
    size = store.size_on_disk() / 1e6
    place = stage.output if store.path == stage.building else store.path
    note = f", {failed} failed samples" if failed else ""
    if met := store.coverage():
        text, with_target = (sum(counts[i] for counts in met.values()) for i in range(2))
        note += f", {with_target / max(text, 1):.1%} of text tokens have a target"
    if missing:
        note += f"; {len(missing)} parts are not there yet, which are not among {stage.share}"
    return f"{store.num_tokens} tokens of {store.geometry}, {size:.1f} MB at {place}{note}"


def short(value: Any) -> str:
    """Return a value as JSON of at most 40 characters."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
