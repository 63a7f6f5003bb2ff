"""Memory of every stage stays flat while the corpus grows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures.command import write_recipe

COUNTS = (2_000, 20_000)
GROWTH = 40
"""Megabytes that a stage may take more for 18,000 further samples: 2 KB each, most of it noise of the allocator."""


# A process of its own, because a child begins with the peak of the process that it was forked off.
MEASURE = """
import os, sys
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
_, status, usage = os.wait4(pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


# Samples wait for the disk in a queue of 512 MiB at most, which a tiny teacher fills: here it is a small one.
COMMAND = """
import sys
import kava.store.writer as writer
init = writer.BackgroundWriter.__init__
writer.BackgroundWriter.__init__ = lambda self, *words, **options: init(self, *words, **{"queue_bytes": 4 << 20} | options)
from kava.pipeline.cli import main
sys.argv[0] = "kava"
main()
"""


def peak(*words: str) -> float:
    """Run the command; return its peak memory in megabytes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, sys.executable, "-c", COMMAND, *words]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return int(run.stdout) / 1024


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
