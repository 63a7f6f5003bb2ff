"""Stopping on a signal: a batch system asks before it kills."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...errors import EXIT_RETRY, STOP_SIGNALS, RetryLaterError


class Stopped(BaseException):
    """A signal asked this process to stop. No `Exception`: nothing on the way takes it for an error of its own."""


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Raises `Stopped` in the main thread at the first of `STOP_SIGNALS`; those of a batch system may then come again.

    The part that is being captured is dropped then; parts that are transformed on threads are finished. A second Ctrl-C
    does not wait for that. A signal that was ignored before, as by nohup, stays so.

    Where the process is to leave with `EXIT_RETRY`, nothing is put back: the interpreter has yet to wait for its
    threads, and what a batch system sends meanwhile must not change the exit code.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def heed_no_more() -> None:
        for other in STOP_SIGNALS[:2]:
            signal.signal(other, signal.SIG_IGN)
        if before[signal.SIGINT] is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def stop(number: int, frame: Any) -> None:
        heed_no_more()
        why = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
        raise Stopped(f"{why}; finished parts are kept, the same command goes on")

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop)
    leaves = False
    try:
        yield
    except (Stopped, RetryLaterError):
        leaves = True
        raise
    except SystemExit as error:
        leaves = error.code == EXIT_RETRY
        raise
    finally:
        if leaves:
            heed_no_more()
        else:
            for number, handler in before.items():
                signal.signal(number, handler)
