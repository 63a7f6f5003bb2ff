"""Which stages a command runs: their names, in order, and what `--from`, `--until` and `--only` leave of them."""

from __future__ import annotations

from typing import Final

from ...errors import RecipeError

STAGES: Final = ("generate", "student", "extract", "reference", "resample", "project", "select", "fuse", "train")


def choose_stages(first: str | None, until: str | None, only: list[str] | None) -> list[str]:
    """The names of the stages to run, in order.

    Raises:
        RecipeError: if a name is none, or the options do not go together.
    """
    if only and (first or until):
        raise RecipeError("--only goes without --from and --until")
    for name, flag in ((first, "--from"), (until, "--until"), *((o, "--only") for o in only or [])):
        if name is not None:
            check_stage(name, flag)
    if only:
        return [name for name in STAGES if name in only]
    start, stop = STAGES.index(first or STAGES[0]), STAGES.index(until or STAGES[-1])
    if start > stop:
        raise RecipeError(f"--from {first} comes after --until {until}; the order is {', '.join(STAGES)}")
    return list(STAGES[start : stop + 1])


def check_stage(name: str, flag: str) -> None:
    """Checks the name of a stage that was given with `flag`.

    Raises:
        RecipeError: if there is none of this name, with the nearest that there is.
    """
    if name not in STAGES:
        import difflib

        near = difflib.get_close_matches(name, STAGES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the stages are {', '.join(STAGES)}"
        raise RecipeError(f"{flag} {name}: there is no such stage; {hint}")
