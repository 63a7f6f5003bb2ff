"""Hostile manifests, tables and headers by the hundred: they open, or end in one line, within memory and time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def _try(cases: int, seed: int) -> dict[str, int]:
    """How many of five times as many cases opened and were refused, in a process of limited memory."""
    code = f"import sys; sys.path.insert(0, {str(TESTS)!r}); from fixtures.hostile import main; main({cases}, {seed})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr[-4000:]
    found: dict[str, int] = json.loads(run.stdout.splitlines()[-1])
    assert found["opened"] + found["refused"] == 5 * cases
    assert found["refused"] > cases
    return found


def test_hostile_headers_are_opened_or_refused() -> None:
    _try(20, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_many_hostile_headers_are_opened_or_refused(seed: int) -> None:
    _try(1000, seed)
