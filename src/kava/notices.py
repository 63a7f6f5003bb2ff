"""Lines on stderr that are not errors: each is printed once per process, by the first process of a distributed job."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Literal

_printed: Final[set[str]] = set()
_held: Final[list[str]] = []
_holding: Final[list[bool]] = []


def notice(message: str, *, kind: Literal["note", "warning"] = "note") -> None:
    """Print a line on stderr, unless this process has printed it before.

    Args:
        message: one line, without a final period if it names a value last.
        kind: `warning` for anything that may change numbers.
    """
    line = f"{kind}: {message}"
    if line in _printed:
        return
    _printed.add(line)
    if os.environ.get("RANK", "0") != "0":
        return
    if _holding:
        _held.append(line)
    else:
        print(line, file=sys.stderr, flush=True)


@contextmanager
def notices_held() -> Iterator[None]:
    """Hold notices back until the block has ended.

    After an error they are held until `print_held`, so that whoever reports the error prints the reason first.
    """
    _holding.append(True)
    try:
        yield
    finally:
        _holding.pop()
    if not _holding:
        print_held()


def print_later(line: str) -> None:
    """Hold a line back until `print_held`, which the report of an error ends with."""
    _held.append(line)


def print_held() -> None:
    """Print the notices that an error has left behind."""
    for line in _held:
        print(line, file=sys.stderr, flush=True)
    _held.clear()


@contextmanager
def transformers_log() -> Iterator[list[str]]:
    """Yield a list that collects the warnings that transformers logs meanwhile, which are then printed nowhere else."""
    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    import transformers  # noqa: F401 - it sets its logger up when it is imported

    logger = logging.getLogger("transformers")
    before = logger.handlers, logger.level, logger.propagate
    logger.handlers, logger.propagate = [Collector()], False
    logger.setLevel(logging.WARNING)
    try:
        yield lines
    finally:
        logger.handlers, level, logger.propagate = before
        logger.setLevel(level)


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing progress bars meanwhile."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
