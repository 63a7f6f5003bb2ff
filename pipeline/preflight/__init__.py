"""Preflight checks: detect problems of the whole recipe before any expensive work.

`kava plan`, `kava run --dry-run`, `kava run` and the command of every stage run the same list of checks, also those
that concern stages which other commands run: a mistake in `train` is reported before the capture. No weights are
loaded and nothing is written. A check is a function that yields the reasons why a scope cannot be run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from ...errors import BrokenRecipeError
from ...notices import notices_held
from .corpora import check_corpus
from .extras import check_extras
from .folders import check_folders
from .models import check_fit, check_student, check_teachers, refuse_teacher
from .scope import Scope
from .trainings import check_comparison, check_training

Check = Callable[[Scope], Iterable[str]]

CHECKS: Final[tuple[Check, ...]] = (
    check_folders,
    check_corpus,
    check_extras,
    check_teachers,
    check_student,
    check_fit,
    check_training,
    check_comparison,
)
"""All checks, in the order in which their problems are listed."""

__all__ = ["CHECKS", "Scope", "find_problems", "refuse_broken", "refuse_teacher"]


def find_problems(scope: Scope) -> list[str]:
    """Return every reason why a command cannot do what the recipe asks for, each once; empty if there is none."""
    return list(dict.fromkeys(problem for check in CHECKS for problem in check(scope)))


def refuse_broken(scope: Scope) -> None:
    """Refuse a recipe that is broken.

    Raises:
        BrokenRecipeError: with every problem.
    """
    with notices_held():
        if problems := find_problems(scope):
            raise BrokenRecipeError(*problems)
