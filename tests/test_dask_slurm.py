"""A worker's job, as dask-jobqueue writes it for SLURM."""

from __future__ import annotations

import subprocess
import sys

from fixtures.documents import ROOT


def test_the_script_of_a_workers_job() -> None:
    words = [
        "recipe.yaml",
        "--job-script",
        "--cores",
        "3",
        "--memory",
        "5GB",
        "--walltime",
        "01:00:00",
        "--queue",
        "cpu",
    ]
    run = subprocess.run(
        [sys.executable, "workflows/dask_slurm.py", *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for wanted in ("#SBATCH -p cpu", "#SBATCH --cpus-per-task=3", "#SBATCH -t 01:00:00", "OMP_NUM_THREADS=1"):
        assert wanted in run.stdout
    assert "--nthreads 3" in run.stdout
    assert "tcp://" in run.stdout
