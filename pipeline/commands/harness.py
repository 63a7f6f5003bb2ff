"""Tasks of lm-eval on a student: the library's own, and tasks of a folder or a file."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from ...errors import BackendNotInstalledError, RecipeError
from ...hub import hub_reachable

RESAMPLES: Final = 10_000
"""For the standard errors that lm-eval bootstraps, those of perplexity and its like."""
_MISSING: Final = "--tasks needs lm-eval 0.4.12 or newer: pip install 'kava[eval]'"


@dataclass(frozen=True)
class Tasks:
    """Tasks whose definitions and data are there."""

    names: tuple[str, ...]
    """As they were asked for."""
    manager: Any
    """lm-eval's `TaskManager`."""
    loaded: list[Any]
    """Its tasks and groups."""

    @classmethod
    def load(cls, names: Sequence[str], include_path: Path | None = None) -> Tasks:
        """Finds tasks and reads their data.

        Args:
            names: of tasks, groups or tags that lm-eval knows, with wildcards, or YAML files.
            include_path: a folder with YAML files of further tasks; where a name is there twice, it is that one's.

        Raises:
            BackendNotInstalledError: if lm-eval is not installed.
            RecipeError: if there is no such task, or its definition or its data cannot be read.
        """
        if include_path is not None and not include_path.is_dir():
            raise RecipeError(
                f"--include-path {include_path} is not a folder; name the one that has the tasks' YAML files"
            )
        hub_reachable()  # Or else every look-up of data is tried again and again where there is no network.
        manager = _task_manager()(include_path=include_path and str(include_path))
        wanted = [found for name in names for found in (manager.match_tasks([name]) if "*" in name else [name])]
        if not wanted:
            raise RecipeError(f"--tasks {','.join(names)}: lm-eval knows no task that is called so")
        loaded = [task for name in dict.fromkeys(wanted) for task in _load(manager, name, include_path)]
        return cls(tuple(names), manager, loaded)

    def run(self, model: Any, tokenizer: Any, *, batch_size: int, limit: int | None) -> dict[str, Any]:
        """The library's results, by task and group; numbers and texts only.

        Log-likelihoods are taken in float32, whatever the model's dtype.

        Args:
            model: in evaluation mode.
            tokenizer: its own.
            batch_size: requests at a time.
            limit: samples of each task at most, its first ones; None for all.

        Raises:
            RecipeError: if a task does not fit its data, or the library refuses to run it.
        """
        from jinja2 import TemplateError
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        os.environ["DISABLE_MULTIPROC"] = "1"  # It would fork this process for the bootstrap, once for each core.
        try:
            with redirect_stdout(sys.stderr):  # What the library prints goes beside the result.
                # It would load the weights a second time, and onto CUDA whether there is one or not.
                with _quiet("lm_eval.models.huggingface"):
                    loaded = HFLM(
                        pretrained=model,
                        tokenizer=deepcopy(tokenizer),  # It may be given a padding token.
                        batch_size=batch_size,
                        softmax_dtype="float32",
                    )
                found = simple_evaluate(
                    model=loaded,
                    tasks=self.loaded,
                    task_manager=self.manager,
                    batch_size=batch_size,
                    limit=limit,
                    bootstrap_iters=RESAMPLES,
                    log_samples=False,
                )
        except (AssertionError, LookupError, TypeError, ValueError, TemplateError) as error:
            raise RecipeError(f"--tasks {','.join(self.names)}: lm-eval cannot run it: {_reason(error)}") from error
        results: dict[str, Any] = _plain(found["results"])
        return results


def metric_texts(metrics: dict[str, Any]) -> list[str]:
    """A text for each metric of a task, as `acc 0.2500 ± 0.0625`: the error is the standard error.

    Args:
        metrics: by lm-eval's names of metric and filter, `acc,none` and `acc_stderr,none`.
    """
    found = []
    for key, value in metrics.items():
        name, _, by = key.partition(",")
        if not by or name.endswith("_stderr") or not isinstance(value, float):
            continue
        error = metrics.get(f"{name}_stderr,{by}")
        label = name if by == "none" else f"{name} ({by})"
        found.append(f"{label} {value:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else ""))
    return found


def _task_manager() -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise BackendNotInstalledError(_MISSING) from error
    if not hasattr(TaskManager, "load"):
        raise BackendNotInstalledError(_MISSING)
    return TaskManager


def _load(manager: Any, name: str, include_path: Path | None) -> list[Any]:
    """The task or group of this name, or the tasks of the tag."""
    if name not in manager.all_tasks and not Path(name).expanduser().is_file():
        near = get_close_matches(name, manager.all_tasks, n=1)
        raise RecipeError(
            f"--tasks {name}: lm-eval knows no such task, and there is no such file"
            + (f"; did you mean {near[0]}?" if near else "")
            + (
                f"; a file of {include_path} that cannot be read is left out: name the file itself to see why"
                if include_path
                else "; --include-path DIR adds a folder of tasks"
            )
        )
    try:
        with redirect_stdout(sys.stderr):  # What the library prints goes beside the result.
            found = manager.load([name])
    except Exception as error:  # A task's definition can be wrong in any way: it has templates, and Python.
        what = "; without a network its data must be in the local cache (HF_HOME), or in files that the task names"
        raise RecipeError(
            f"--tasks {name}: lm-eval cannot load it: {_reason(error)}" + (what if isinstance(error, OSError) else "")
        ) from error
    return list(found["groups"].values())[:1] or list(found["tasks"].values())


def _reason(error: BaseException) -> str:
    """What an error says, in one line, with what it came from."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return f"{first} ({_reason(error.__cause__)})" if error.__cause__ else first


def _plain(value: Any) -> Any:
    """The same as JSON knows it: NumPy's numbers as Python's, None for what is not a number."""
    text = json.dumps(value, default=lambda other: other.item() if hasattr(other, "item") else str(other))
    return json.loads(text, parse_constant=lambda name: None)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without a logger's warnings: these are of arguments that are not given."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
