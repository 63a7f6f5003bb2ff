"""Progress: a bar on a terminal, one plain line a minute in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_EVERY_SECONDS = 60.0


@contextmanager
def progress(label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Yields a function that is told how many more units are done; callable from any thread."""
    console = Console(file=sys.stderr)  # Named, so that a bar is drawn with characters that it can print.
    if console.is_terminal:
        columns = (TextColumn(f"{label:<10}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(label, total=total)
            yield lambda count: bar.advance(task, count)
        return
    done, started = 0, time.monotonic()
    told = started

    def advance(count: int) -> None:
        nonlocal done, told
        done += count
        now = time.monotonic()
        if now - told >= _EVERY_SECONDS:
            told = now
            rate = done / (now - started)
            left = f", about {(total - done) / rate / 60:.0f} min left" if rate and total > done else ""
            print(f"{label}: {done} of {total} {unit}, {rate:.1f}/s{left}", file=sys.stderr, flush=True)

    yield advance
