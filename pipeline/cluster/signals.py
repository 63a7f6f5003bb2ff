"""Stopping on a signal: a batch system asks before it kills."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(KeyboardInterrupt):
    """A signal asked this process to stop. Like Ctrl-C, nothing on the way takes it for an error of its own."""


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Raises `Stopped` in the main thread at the first SIGTERM or SIGUSR1; later ones are ignored while it cleans up.

    The part that is being captured is dropped then; parts that are transformed on threads are finished.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        for other in STOP_SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        name = signal.Signals(number).name
        raise Stopped(f"stopped by {name}; finished parts are kept, the same command goes on")

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
