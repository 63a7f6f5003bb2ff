"""The recipe's `compare` section, and the arms that it describes."""

from __future__ import annotations

from ..errors import RecipeError
from ..train.arms import Arm, CompareSettings, NeedsError
from .run import Run


def compare_settings(run: Run) -> CompareSettings:
    """The recipe's `compare` section.

    Raises:
        RecipeError: if it has none.
    """
    if run.recipe.compare is None:
        raise RecipeError("the recipe has no compare section; add one, or say -s 'compare.arms=[none, kv, shuffled]'")
    return run.recipe.compare


def arms_of(run: Run) -> list[Arm]:
    """The arms of a run.

    Raises:
        RecipeError: if one cannot be had of the recipe's `train` section.
    """
    settings, base = compare_settings(run), run.recipe.train
    for key in ("seed", "data_seed"):
        if key in base.arguments and len(settings.seeds) > 1:
            raise RecipeError(f"train.arguments.{key}: would be that of all compare.seeds; leave it out")
    try:
        return settings.resolve(base)
    except NeedsError as error:
        raise RecipeError(str(error)) from None
