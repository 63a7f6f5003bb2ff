"""Choosing the held-out records."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np

from ..errors import CorpusError
from ..store import Split
from .corpus_settings import HeldoutSettings
from .record_file import RecordFile

_LONGEST: Final = 64
"""Bytes of an id, at most, for ids to be sorted in an array of NumPy's."""


class Groups:
    """The group of each record: a number, and what it stands for."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.numbers = array("q")

    def append(self, name: str) -> None:
        """Adds the group of the next record."""
        self.numbers.append(self.names.setdefault(name, len(self.names)))


def hold_out(records: RecordFile, groups: Groups | None, settings: HeldoutSettings, label: str) -> None:
    """Marks the held-out records.

    Args:
        records: whose `splits` are set.
        groups: of the records, if the settings name a group field.
        settings: how to choose.
        label: of the corpus, for messages.

    Raises:
        CorpusError: if a value does not occur, or too few records are left.
    """
    if settings.values is not None:
        assert groups is not None
        if missing := sorted(set(settings.values) - groups.names.keys()):
            raise CorpusError(
                f"corpus {label}: no record has {settings.group} {missing[0]!r}, named by corpus.heldout.values"
            )
        _mark(records, groups, settings.values)
        return
    assert settings.ratio is not None
    number = len(records) if groups is None else len(groups.names)
    count = max(1, round(settings.ratio * number))
    if count >= number:
        raise CorpusError(f"corpus {label}: {number} samples or groups are too few to hold out {settings.ratio:g}")
    # The same draw as of the sorted names themselves.
    ranks = random.Random(settings.seed).sample(range(number), count)
    if groups is not None:
        names = sorted(groups.names)
        _mark(records, groups, [names[rank] for rank in ranks])
        return
    order = _sorted_order(records.sample_ids(), records)
    for rank in ranks:
        records.splits[int(order[rank])] = Split.HELDOUT


def _mark(records: RecordFile, groups: Groups, chosen: Iterable[str]) -> None:
    numbers = {groups.names[name] for name in chosen}
    for index, number in enumerate(groups.numbers):
        if number in numbers:
            records.splits[index] = Split.HELDOUT


def _sorted_order(names: Iterable[str], records: RecordFile) -> Sequence[Any] | np.ndarray[Any, Any]:
    """Indices of the ids in ascending order: UTF-8 bytes sort as the code points do."""
    longest = max(len(name.encode()) + (_LONGEST if "\0" in name else 0) for name in names)
    if longest <= _LONGEST:
        encoded = np.fromiter((name.encode() for name in records.sample_ids()), f"S{longest}", len(records))
        return np.argsort(encoded, kind="stable")
    ids = list(records.sample_ids())
    return sorted(range(len(ids)), key=ids.__getitem__)
