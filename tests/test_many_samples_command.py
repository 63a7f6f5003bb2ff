"""Memory of every stage stays flat while the corpus grows."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from fixtures.command import KAVA, write_recipe

COUNTS = (2_000, 30_000)
GROWTH = 40
"""Megabytes that a stage may take more for 28,000 further samples: 1.4 KB each, most of it noise of the allocator."""


def peak(*words: str) -> float:
    """Run the command; return its peak memory in megabytes."""
    process = subprocess.Popen([*KAVA, *words], stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, words
    return usage.ru_maxrss / 1024


@pytest.mark.slow
def test_memory_of_each_stage_is_flat(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    peaks: dict[str, list[float]] = {}
    for count in COUNTS:
        root = tmp_path / str(count)
        root.mkdir()
        train = {"max_steps": 2, "eval_steps": None, "alpha": 1.0, "batch_size": 4}
        recipe = write_recipe(
            root,
            tiny_models,
            corpus={"heldout": {"ratio": 0.001}},
            samples_per_part=500,
            project={"heads": "random", "calibration_samples": 50},
            train=train,
        )
        with (root / "corpus.jsonl").open("w") as file:
            for number in range(count):
                file.write(json.dumps({"id": f"r{number}", "prompt": f"{number}", "answer": f"{2 * number}"}) + "\n")
        for stage in (["run", "--until", "student"], ["extract"], ["project"], ["train"], ["status"]):
            found = peak(stage[0], str(recipe), *stage[1:])
            peaks.setdefault(" ".join(stage), []).append(found)
        store = str(root / "run/teachers/big.zarr")
        peaks.setdefault("verify", []).append(peak("verify", store))
        peaks.setdefault("inspect", []).append(peak("inspect", store))
    print(peaks)
    assert all(many - few < GROWTH for few, many in peaks.values()), peaks
