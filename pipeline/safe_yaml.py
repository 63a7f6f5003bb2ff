"""YAML that may come from elsewhere, parsed so that no document can exhaust the stack or the memory."""

from __future__ import annotations

from typing import Any, Final

import yaml

from ..errors import RecipeError

MAX_VALUES: Final = 100_000
"""Values of a document, aliases written out; a recipe with explicit layer maps of large models has a few hundred."""


def parse_mapping(data: bytes, where: str) -> dict[str, Any]:
    """Return the mapping in a YAML document in UTF-8; only plain values are built, no Python objects.

    Raises:
        RecipeError: if it is not YAML, not a mapping, nested too deeply, or has more than `MAX_VALUES` values.
    """
    try:
        raw = yaml.safe_load(data.decode("utf-8"))
        _check_size(raw)
    except (yaml.YAMLError, ValueError, RecursionError, MemoryError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        reason = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "problem", None) or error
        raise RecipeError(f"{where}{place}: not YAML: {' '.join(str(reason).split())}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{where}: must be a mapping of sections, not {type(raw).__name__}")
    return raw


def _check_size(raw: Any) -> None:
    """Count the values with every alias written out: a few lines of aliases can stand for billions, or be endless."""
    waiting, count = [raw], 0
    while waiting:
        value = waiting.pop()
        count += 1
        if count > MAX_VALUES:
            raise ValueError(f"it has more than {MAX_VALUES:,} values")
        if isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple | set):
            waiting.extend(value)
