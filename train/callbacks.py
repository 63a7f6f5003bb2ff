"""What happens between the Trainer's steps: the log, progress, and stopping on a signal."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from ..errors import STOP_SIGNALS
from ..store.files import make_folder, read_small
from ..store.safe_json import LOG_BYTES, parse_json
from .ranks import Ranks
from .trackers import finish_trackers, tracker_callbacks


class JsonLog(TrainerCallback):  # type: ignore[misc]
    """One JSON object a line, for every log of the Trainer."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Appends the log."""
        if state.is_world_process_zero and logs:
            self._write({"step": state.global_step, **logs})

    def warn(self, step: int, message: str) -> None:
        """Appends a warning, and prints it on stderr."""
        print(f"kava: step {step}: {message}", file=sys.stderr, flush=True)
        self._write({"step": step, "warning": message})

    def rewind(self, step: int) -> None:
        """Drops what was written after `step` finished steps, which will be written again, and a torn last line."""
        if not os.path.lexists(self.path):
            return
        kept = []
        for line in read_small(self.path, LOG_BYTES).splitlines(keepends=True):
            try:
                found = parse_json(line, self.path)
            except ValueError:
                continue
            if isinstance(found, dict) and isinstance(found.get("step"), int) and found["step"] <= step:
                kept.append(line)
        self.path.write_bytes(b"".join(kept))

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class Log:
    """Where the first rank writes what happens; the others write nothing."""

    def __init__(self, out: Path, begun: int, ranks: Ranks, report_to: Sequence[str]) -> None:
        """Begins, or goes on after `begun` finished steps."""
        self.callbacks: list[Any] = []
        self._writer: Any = None
        self._trackers = report_to if ranks.is_first else ()
        if ranks.is_first:
            make_folder(out)
            lines = JsonLog(out / "metrics.jsonl")
            lines.rewind(begun)
            if "tensorboard" in report_to:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=begun + 1)
                self.callbacks = [TensorBoardCallback(self._writer)]
            self.callbacks += [*tracker_callbacks(report_to, out), lines]

    def warn(self, step: int, message: str) -> None:
        """Tells of a warning."""
        if self.callbacks:
            self.callbacks[-1].warn(step, message)

    def close(self) -> None:
        """Nothing is written after this."""
        if self._writer is not None:
            self._writer.close()
        finish_trackers(self._trackers)


class Steps(TrainerCallback):  # type: ignore[misc]
    """Calls a function with the step reached and the last one."""

    def __init__(self, on_step: Callable[[int, int], None]) -> None:
        self.on_step = on_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tells of the step."""
        self.on_step(state.global_step, state.max_steps)


class StopOnSignal(TrainerCallback):  # type: ignore[misc]
    """While it is open, SIGTERM, SIGUSR1 and Ctrl-C end the training after the step in hand, with a checkpoint.

    A context manager; the handlers from before are always put back. A second Ctrl-C does not wait for the step, and
    one that is ignored, as in the background of a script, stays so. Processes forked meanwhile, which read the store,
    do not react. Outside the main thread, where Python allows no handlers, nothing is caught. Of several ranks all stop
    after the same step, whichever of them was sent the signal.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.caught: str | None = None
        """The name of the signal."""
        self._ranks = ranks
        self._before: dict[signal.Signals, Any] = {}
        self._owner = os.getpid()

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._note)
                for number in STOP_SIGNALS
                if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN
            }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._owner:
            self.caught = signal.Signals(number).name
            if number == signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks for a checkpoint and the end."""
        if self.agree():
            control.should_save = control.should_training_stop = True

    def agree(self) -> bool:
        """Whether any rank was sent a signal; all then have caught it."""
        number = int(self._ranks.max([float(signal.Signals[self.caught] if self.caught else 0)])[0])
        self.caught = signal.Signals(number).name if number else None
        return number > 0
