"""`--rank auto`: which of how many processes this is, by what the launcher put into the environment.

torchrun says RANK and WORLD_SIZE. srun says SLURM_PROCID and, for its step, SLURM_STEP_NUM_TASKS (SLURM_NTASKS); an
array job says SLURM_ARRAY_TASK_ID, _COUNT, _MIN, _MAX and _STEP, and where each of its tasks is itself an srun of
several, they multiply. Nothing is read unless it is asked for: a job that happens to run under srun does all the work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ...errors import RecipeError

_TORCHRUN: Final = ("RANK", "WORLD_SIZE")
_ARRAY: Final = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX")
_NO_STEP: Final = 0xFFFFFFF0
"""Numbers from here on are not those of steps that srun started: the batch script has one of them, or none."""
_STEP_SIZE: Final = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")


def rank_from_environment(environment: Mapping[str, str]) -> tuple[int, int]:
    """Rank and world size that a launcher states.

    Raises:
        RecipeError: if no launcher does, if one says half of it, or if two contradict each other; it names them.
    """
    given = {name: _number(environment, name) for name in environment if name in _NAMES and environment[name] != ""}
    torchrun = _pair(given, *_TORCHRUN)
    array = _array(given)
    step = _step(given)
    if torchrun is not None:
        if array is not None and array[1] > 1 and torchrun[1] > 1:
            raise RecipeError(
                f"--rank auto: {_told(given, *_TORCHRUN)} and {_told(given, *_ARRAY[:2])} would both split the parts; "
                "say --rank and --world-size"
            )
        if step is not None and torchrun[1] > 1 and torchrun[1] % step[1]:
            told = _told(given, *_TORCHRUN, "SLURM_PROCID", *_STEP_SIZE)
            raise RecipeError(f"--rank auto: {told} contradict each other; say --rank and --world-size")
        if torchrun[1] > 1 or (array is None and step is None):
            return torchrun
    if array is None and step is None:
        raise RecipeError(
            "--rank auto: no launcher is known here: neither RANK and WORLD_SIZE (torchrun), nor SLURM_PROCID and "
            "SLURM_NTASKS (srun), nor SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT are set; say --rank and "
            "--world-size"
        )
    (outer, arrays), (inner, tasks) = array or (0, 1), step or (0, 1)
    return outer * tasks + inner, arrays * tasks


def _step(given: Mapping[str, int]) -> tuple[int, int] | None:
    size = next((name for name in _STEP_SIZE if name in given), None)
    if "SLURM_PROCID" not in given and size is None:
        return None
    in_script = "SLURM_JOB_ID" in given and given.get("SLURM_STEP_ID", _NO_STEP) >= _NO_STEP
    if "SLURM_PROCID" not in given or size is None:
        if (size == "SLURM_NTASKS" and given[size] == 1) or (in_script and size is None and given["SLURM_PROCID"] == 0):
            return 0, 1
        missing = "SLURM_PROCID" if size else "SLURM_NTASKS"
        raise RecipeError(
            f"--rank auto: {_told(given, 'SLURM_PROCID', *_STEP_SIZE)} but no {missing}: start kava with srun"
        )
    # In the batch script itself SLURM_NTASKS is the allocation's, and nobody runs the other ranks.
    if in_script and given[size] > 1:
        raise RecipeError(
            f"--rank auto: {size}={given[size]} but no SLURM_STEP_ID: this is the batch script, whose other "
            f"{given[size] - 1} tasks nobody starts; write srun before kava"
        )
    return _checked(given, "SLURM_PROCID", size)


def _array(given: Mapping[str, int]) -> tuple[int, int] | None:
    if not any(name in given for name in (*_ARRAY, "SLURM_ARRAY_TASK_STEP")):
        return None
    if missing := [name for name in _ARRAY if name not in given]:
        there = [name for name in (*_ARRAY, "SLURM_ARRAY_TASK_STEP") if name in given]
        raise RecipeError(f"--rank auto: {_told(given, *there)} but no {', '.join(missing)}: half of an array job")
    index, count, first, last = (given[name] for name in _ARRAY)
    step = given.get("SLURM_ARRAY_TASK_STEP", 1)
    place, rest = divmod(index - first, max(step, 1))
    if rest or not 0 <= place < count or (last - first) // max(step, 1) + 1 != count:
        told = _told(given, *_ARRAY, "SLURM_ARRAY_TASK_STEP")
        raise RecipeError(
            f"--rank auto: {told} contradict each other: an array with gaps; submit an even one like 0-7, or say "
            "--rank and --world-size"
        )
    return place, count


def _pair(given: Mapping[str, int], rank: str, size: str) -> tuple[int, int] | None:
    if rank not in given and size not in given:
        return None
    for name, other in ((rank, size), (size, rank)):
        if name not in given:
            raise RecipeError(f"--rank auto: {_told(given, other)} but no {name}: set both or neither")
    return _checked(given, rank, size)


def _checked(given: Mapping[str, int], rank: str, size: str) -> tuple[int, int]:
    if not 0 <= given[rank] < given[size]:
        raise RecipeError(f"--rank auto: {_told(given, rank, size)} contradict each other")
    return given[rank], given[size]


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if not text.strip().isdigit():
        raise RecipeError(f"--rank auto: {name}={text!r} is not a number")
    return int(text)


def _told(given: Mapping[str, int], *names: str) -> str:
    return ", ".join(f"{name}={given[name]}" for name in names if name in given)


_NAMES: Final = {
    *_TORCHRUN,
    *_ARRAY,
    *_STEP_SIZE,
    "SLURM_ARRAY_TASK_STEP",
    "SLURM_PROCID",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
}
