"""Which parts a process makes, and what a launcher's environment comes to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kava.errors import STOP_SIGNALS, RecipeError
from kava.pipeline.cluster.environment import rank_from_environment
from kava.pipeline.cluster.options import share_of
from kava.pipeline.cluster.share import Share, format_parts, parse_parts
from kava.pipeline.cluster.signals import Stopped, stopping_on_signals


def array(index: int, count: int, first: int = 0, step: int = 1) -> dict[str, str]:
    values = {"ID": index, "COUNT": count, "MIN": first, "MAX": first + (count - 1) * step, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


def step(rank: int, size: int) -> dict[str, str]:
    return {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_NTASKS": str(size)}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "3"}, (1, 3)),
        (step(3, 8), (3, 8)),
        ({**step(3, 8), "SLURM_STEP_NUM_TASKS": "4"}, (3, 4)),
        (step(0, 1), (0, 1)),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, (0, 1)),
        (array(3, 8), (3, 8)),
        # The batch script of an array, without srun.
        ({**array(3, 8), "SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}, (3, 8)),
        ({**array(3, 8), "SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967291"}, (3, 8)),
        (array(12, 3, first=10), (2, 3)),
        (array(14, 3, first=10, step=4), (1, 3)),
        ({**array(3, 8), **step(0, 1)}, (3, 8)),
        ({**array(1, 3), **step(3, 4)}, (7, 12)),
        ({**array(0, 1, first=5), "SLURM_ARRAY_TASK_ID": "5"}, (0, 1)),
        # torchrun under srun, one of its kind on each of two nodes.
        ({**step(1, 2), "RANK": "5", "WORLD_SIZE": "8"}, (5, 8)),
        ({**step(1, 2), "RANK": "0", "WORLD_SIZE": "1"}, (1, 2)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
    ],
)
def test_ranks_of_launchers(environment: dict[str, str], expected: tuple[int, int]) -> None:
    assert rank_from_environment({"HOME": "/", **environment}) == expected


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({}, ["RANK", "SLURM_PROCID", "SLURM_ARRAY_TASK_ID"]),
        ({"RANK": "1"}, ["RANK=1", "no WORLD_SIZE"]),
        ({"WORLD_SIZE": "4"}, ["WORLD_SIZE=4", "no RANK"]),
        ({"RANK": "4", "WORLD_SIZE": "4"}, ["RANK=4", "WORLD_SIZE=4"]),
        ({"RANK": "one", "WORLD_SIZE": "4"}, ["RANK='one'"]),
        ({"SLURM_PROCID": "1"}, ["SLURM_PROCID=1", "no SLURM_NTASKS"]),
        ({"SLURM_NTASKS": "4"}, ["SLURM_NTASKS=4", "no SLURM_PROCID"]),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, ["SLURM_NTASKS=4", "SLURM_STEP_ID", "srun"]),
        ({"SLURM_ARRAY_TASK_ID": "1"}, ["SLURM_ARRAY_TASK_ID=1", "no SLURM_ARRAY_TASK_COUNT"]),
        ({**array(3, 3), "SLURM_ARRAY_TASK_MAX": "7"}, ["SLURM_ARRAY_TASK_COUNT=3", "SLURM_ARRAY_TASK_MAX=7", "gaps"]),
        ({**array(1, 3, step=2), "SLURM_ARRAY_TASK_ID": "1"}, ["SLURM_ARRAY_TASK_STEP=2"]),
        ({**array(1, 4), "RANK": "1", "WORLD_SIZE": "4"}, ["RANK=1", "SLURM_ARRAY_TASK_ID=1"]),
        ({**step(1, 3), "RANK": "0", "WORLD_SIZE": "4"}, ["WORLD_SIZE=4", "SLURM_NTASKS=3"]),
    ],
)
def test_half_an_environment_is_an_error(environment: dict[str, str], named: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        rank_from_environment(environment)
    assert all(name in str(caught.value) for name in named), str(caught.value)


def test_the_environment_counts_only_when_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in step(0, 4).items():
        monkeypatch.setenv(name, value)
    assert share_of(None, None, None).is_all
    assert share_of("auto", None, None) == share_of("auto", 4, None) == Share(0, 4)
    for rank, size in (("auto", 3), ("1", None), (None, 4), ("4", 4), ("-1", 4), ("x", 4)):
        with pytest.raises(RecipeError, match=r"--rank|--world-size"):
            share_of(rank, size, None)


@given(
    st.sets(st.integers(0, 60), max_size=40),
    st.integers(1, 9),
    st.none() | st.frozensets(st.integers(0, 60), max_size=40),
)
def test_shares_are_all_and_nothing_twice(wanted: set[int], size: int, named: frozenset[int] | None) -> None:
    shares = [Share(rank, size, named).of(wanted) for rank in range(size)]
    assert sorted(part for share in shares for part in share) == sorted(wanted if named is None else wanted & named)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.frozensets(st.integers(0, 99), min_size=1))
def test_parts_are_read_as_they_are_written(parts: frozenset[int]) -> None:
    assert parse_parts(format_parts(parts)) == parts


def test_parts_of_the_command_line() -> None:
    assert parse_parts("12-14") == {12, 13, 14}
    assert parse_parts("0-2, 7") == {0, 1, 2, 7}
    for text in ("", "1-", "-3", "3-1", "1..4", "1,,2", "a", "0-99999999999"):
        with pytest.raises(RecipeError, match="--parts"):
            parse_parts(text)
    with pytest.raises(RecipeError, match="parts 0 to 4, there is no part 5"):
        Share(parts=frozenset({3, 5})).check(5, "x")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_one_signal_stops_and_later_ones_wait(number: signal.Signals) -> None:
    before = {other: signal.getsignal(other) for other in STOP_SIGNALS}

    def work() -> None:
        with stopping_on_signals():
            try:
                os.kill(os.getpid(), number)
            finally:
                os.kill(os.getpid(), number)  # While it cleans up.

    try:
        with pytest.raises(Stopped, match=f"stopped by {number.name}"):
            work()
        os.kill(os.getpid(), number)  # And on its way out.
    finally:
        for other, handler in before.items():
            signal.signal(other, handler)
    with stopping_on_signals():
        assert signal.getsignal(number) is not before[number]
    assert signal.getsignal(number) is before[number]


LINGERING = """
import os, signal, threading, time
from kava.errors import RetryLaterError
from kava.pipeline import cli

@cli.app.command()
def linger(trains: bool = False) -> None:
    threading.Thread(target=lambda: time.sleep(1)).start()  # The interpreter waits for it.
    if trains:
        raise RetryLaterError("stopped after a step")
    os.kill(os.getpid(), signal.SIGTERM)

cli.main()
"""


@pytest.mark.parametrize("options", [[], ["--trains"]])
def test_a_signal_while_the_interpreter_ends_does_not_change_the_exit_code(options: list[str]) -> None:
    words = [sys.executable, "-c", LINGERING, "linger", *options]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "stopped" in process.stderr.readline()
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 75
