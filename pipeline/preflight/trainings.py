"""Preflight checks of the recipe's `train` section and of the arms of its comparison."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ...store import Split
from ...train.arms import run_name
from ...train.preflight import check_arguments, check_lora, check_loss, check_precision
from ...train.settings import TrainSettings
from ...train.trackers import check_trackers
from ..comparison import arms_of
from ..places import read_record
from .models import student_geometry
from .scope import Scope


def check_training(scope: Scope) -> Iterator[str]:
    """Yield what a training with the recipe's `train` section would be refused for."""
    if "compare" not in scope.stages:
        yield from _problems(scope, scope.run.recipe.train, scope.run.trained_dir())


def check_comparison(scope: Scope) -> Iterator[str]:
    """Yield what the arms of the recipe's `compare` section would be refused for, each reason once.

    An arm that needs what an override has removed for once, such as `train.alpha`, is refused by `kava compare` alone.
    """
    run, compare = scope.run, scope.run.recipe.compare
    if compare is None:
        return
    if "compare" in scope.stages:
        found = list(scope.problems_of(lambda: arms_of(run)))
        yield from found
        if found:
            return
    train = run.recipe.train
    known = set() if "compare" in scope.stages else set(_problems(scope, train, run.trained_dir()))
    arms_by_problem: dict[str, list[str]] = {}
    for arm in compare.possible(train):
        seed = compare.seeds[0]
        settings = arm.settings(train, seed, compare.steps_between(train))
        for problem in _problems(scope, settings, run.compare_dir / run_name(arm.name, seed)):
            arms_by_problem.setdefault(problem, []).append(arm.name)
    for problem, arms in arms_by_problem.items():
        if problem not in known:
            yield problem if len(arms) > 1 else f"compare.arms.{arms[0]}: {problem}"


def _problems(scope: Scope, settings: TrainSettings, out: Path) -> Iterator[str]:
    run = scope.run
    # With several teachers a training may be told by -s whose targets it reads: only a training needs it.
    if settings.teacher is not None or scope.trains:
        yield from scope.problems_of(lambda: run.teacher_of(settings), key="train.teacher")
    geometry = student_geometry(run)
    if geometry is not None:
        yield from scope.problems_of(lambda: check_loss(geometry, settings))
    if "metrics" not in read_record(out):
        yield from scope.problems_of(partial(check_trackers, settings.report_to))
        if settings.lora is not None:
            yield from scope.problems_of(lambda: check_lora(settings, _student_config(scope)), reached=False)
    has_heldout = scope.corpus is not None and len(scope.corpus.split(Split.HELDOUT)) > 0
    yield from scope.problems_of(partial(check_arguments, settings, out, has_heldout=has_heldout))
    if scope.trains:
        runs_here = not scope.planning
        yield from scope.problems_of(partial(check_precision, settings, run.recipe.student.dtype, runs_here=runs_here))


def _student_config(scope: Scope) -> object:
    """Return the config of the student, before or after it is built.

    Raises:
        ModelNotFoundError: if it cannot be reached.
    """
    from ...hub import load_config
    from ...train.student import model_source, student_config

    settings = scope.run.recipe.student
    if scope.has_student:
        return load_config(scope.run.student_source)
    if settings.model is not None:
        return load_config(model_source(settings))
    return student_config(settings, None)
