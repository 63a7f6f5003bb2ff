"""What killed processes left beside the outputs of a run, and its removal."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from ..errors import KavaError
from ..store.files import is_writable
from ..store.leftovers import Leftover, leftovers_of, remove_beside, remove_leftover
from ..store.replace import next_path
from .run import Run
from .stage import Stage
from .stages import stages_of


def leftovers(run: Run) -> list[Leftover]:
    """Return every hidden file or folder of a run that no process is writing, and rebuilds that go on.

    What living processes are writing is left out: it is gone when they are. So is what another user must not see.
    """
    named: list[Leftover] = []
    for output in _outputs(run):
        with suppress(PermissionError):
            named += filter(_is_named, leftovers_of(output))
    return named


def remove_all(stages: Iterable[Stage], say: Callable[[str, str], None]) -> None:
    """Remove what killed processes left beside the outputs of stages, once nobody holds its lock.

    A rebuild that the next run would complete stays.
    """
    for stage in stages:
        if not is_writable(stage.output.parent):
            for leftover in filter(_is_named, leftovers_of(stage.output)):
                say(stage.label, f"left alone, as nothing can be removed here: {describe_leftover(leftover)}")
            continue
        for leftover in leftovers_of(stage.output):
            if leftover.use != "abandoned":
                if _is_named(leftover):
                    say(stage.label, f"left alone: {describe_leftover(leftover)}")
            elif leftover.path == next_path(stage.output) and _goes_on(stage):
                say(stage.label, f"{leftover.path}: an unfinished rebuild; kava run --force {stage.name} completes it")
            else:
                line = describe_leftover(leftover)
                remove_leftover(leftover)
                say(stage.label, f"removed {line}")
        if any(stage.output.parent.glob(f".{stage.output.name}.*")):
            remove_beside(stage.output)


def describe_leftover(leftover: Leftover) -> str:
    """Return one line for people: path, size, what it is, and whether it is in use."""
    use = {
        "abandoned": "",
        "in use": "; a process is writing it",
        "unknown": "; whether its writer is alive cannot be told here, so remove it by hand if it is not",
    }[leftover.use]
    return f"{leftover.path} ({leftover.size / 1e6:.1f} MB): {leftover.kind}{use}"


def _goes_on(stage: Stage) -> bool:
    """Whether the output is not complete, and its rebuild is of what the recipe describes."""
    try:
        return stage.status().state != "complete" and stage.rebuild().status().state in ("partial", "complete")
    except KavaError:
        return True


def _is_named(leftover: Leftover) -> bool:
    return leftover.use != "in use" or leftover.path.name.endswith(".next")


def _outputs(run: Run) -> Iterator[Path]:
    """The outputs of every stage, and of trainings under another name than the recipe's."""
    outputs = [stage.output for stage in stages_of(run)]
    for folder in (run.trained_dir().parent, run.compare_dir):
        for suffix in (".next", ".discarded") if os.access(folder, os.R_OK | os.X_OK) else ():
            outputs += [p.with_name(p.name[1:].removesuffix(suffix)) for p in sorted(folder.glob(f".*{suffix}"))]
    yield from dict.fromkeys(outputs)
