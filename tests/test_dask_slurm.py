"""A worker's job, as dask-jobqueue writes it for SLURM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures.command import kava, write_recipe
from fixtures.documents import ROOT

from kava.store import KVStore


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
    assert "tls://" in run.stdout
    assert "--tls-key" in run.stdout
    assert "BEGIN" not in run.stdout
    assert not list(ROOT.glob(".dask-jobqueue*"))  # Key files are removed.


SBATCH = """#!/bin/sh
cp "$1" "$FAKE_SLURM/job.sh"  # As SLURM does: the caller removes its file.
setsid sh "$FAKE_SLURM/job.sh" > "$FAKE_SLURM/worker.log" 2>&1 &
echo "$!" > "$FAKE_SLURM/pid"
echo "Submitted batch job 7"
"""


@pytest.mark.slow
def test_targets_are_made_by_workers_over_tls(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """With programs in the place of SLURM's that run a job here."""
    recipe = write_recipe(tmp_path, tiny_models)
    kava("run", recipe, "--until", "reference")
    programs = {"sbatch": SBATCH, "scancel": "#!/bin/sh\nkill -- -$(cat $FAKE_SLURM/pid)\n"}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "FAKE_SLURM": str(tmp_path)}
    words = [str(recipe), "--jobs", "1", "--cores", "1", "--memory", "2GB"]
    run = subprocess.run(
        [sys.executable, ROOT / "workflows/dask_slurm.py", *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr + (tmp_path / "worker.log").read_text()
    assert KVStore.open(tmp_path / "run/targets/big.zarr").missing_parts() == []
    assert "tls://" in (tmp_path / "worker.log").read_text()
    assert not list(tmp_path.glob(".dask-jobqueue*"))
