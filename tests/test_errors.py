"""Errors travel: from worker processes of dask and of torch, which make them anew in one way or another."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest

from kava.errors import KavaError


def _all(base: type[KavaError]) -> Iterator[type[KavaError]]:
    yield base
    for child in base.__subclasses__():
        yield from _all(child)


@pytest.mark.parametrize("kind", sorted(set(_all(KavaError)), key=repr))
def test_every_error_can_be_made_again_elsewhere(kind: type[KavaError]) -> None:
    error = kind("what, where, and how to fix it")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    # As tblib does once dask is there, for every exception of the process.
    assert isinstance(kind.__new__(kind, *error.args), kind)
