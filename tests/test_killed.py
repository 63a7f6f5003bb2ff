"""200 kills at random moments, over the stages that write stores: in the end, the bits of a run that nobody killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures.command import kava, write_recipe

STAGES = {
    "extract": ("teachers/big.zarr", 60),
    "resample": ("resampled/big.zarr", 50),
    "project": ("targets/big.zarr", 50),
    "select": ("selected/big.zarr", 40),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_random_moments_ends_bit_identical(tmp_path: Path, tiny_models: dict[str, Path], stage: str) -> None:
    recipe = write_recipe(
        tmp_path, tiny_models, resample={"materialize": True}, select={"tokens": 4, "method": "uniform"}
    )
    if stage != "extract":
        kava("run", recipe, "--until", {"resample": "reference", "project": "resample", "select": "project"}[stage])
    folder, kills = STAGES[stage]
    words = [str(recipe), stage, str(tmp_path / "run" / folder), str(kills), "0"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(
        [sys.executable, "-m", "fixtures.killing", *words], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout.splitlines()[-1])
    assert told["kills"] == kills
    assert told["changing"] >= kills // 5, "the kills came when nothing was being written"
    assert told["compared"] >= 1
