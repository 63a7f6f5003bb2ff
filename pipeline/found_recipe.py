"""Recipes that nobody named: the `recipe.yaml` beside a store, or in the folder of a trained student.

Such a file came with the folder, perhaps from elsewhere. It is read as data: code of a model or tokenizer runs only if
the recipe that was named on the command line allows it. Every command that reads an unnamed recipe does so here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from ..errors import RecipeError
from ..store.files import read_small
from .recipe import Recipe, check_recipe, parse_recipe

NAME: Final = "recipe.yaml"
_RECIPE_BYTES: Final = 1 << 20
_RUNS_CODE: Final = "trust_remote_code"


def find_recipe(*folders: Path) -> Path | None:
    """Return the recipe in the first of these folders that has one."""
    return next((folder / NAME for folder in folders if os.path.lexists(folder / NAME)), None)


def load_found_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe that was found and not named; permission to run code is ignored, and reported on stderr.

    Args:
        path: the recipe.
        overrides: `key.sub=value`, of the command line. They cannot give the permission either.

    Raises:
        RecipeError: if it is not a valid recipe.
        DamagedStoreError: if it is a link or a special file, or larger than a recipe is.
    """
    try:
        raw = parse_recipe(path, read_small(path, _RECIPE_BYTES), overrides)
    except FileNotFoundError:
        raise RecipeError(f"recipe {path}: no such file. Name one with --recipe") from None
    if ignored := list(_forbid_code(raw, "")):
        print(
            f"kava: {path}: ignored {', '.join(ignored)}. Code runs only if the recipe named on the command line "
            "(--recipe) allows it",
            file=sys.stderr,
            flush=True,
        )
    return check_recipe(path, raw)


def _forbid_code(section: Any, where: str) -> Iterator[str]:
    """Withdraw the permission wherever it is given; yield the keys that gave it."""
    if isinstance(section, list):
        for number, value in enumerate(section):
            yield from _forbid_code(value, f"{where}{number}.")
    if isinstance(section, dict):
        for key, value in section.items():
            if key == _RUNS_CODE and value is not False:
                section[key] = False
                yield f"{where}{key}: {str(value)[:20]}"
            else:
                yield from _forbid_code(value, f"{where}{key}.")
