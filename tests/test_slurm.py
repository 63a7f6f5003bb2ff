"""The sbatch files: read by shellcheck, and run by a real SLURM."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fixtures import slurm
from fixtures.command import kava, rows, write_recipe
from fixtures.documents import ROOT
from fixtures.stores import tree

SCRIPTS = sorted((ROOT / "workflows/slurm").glob("*.sbatch"))


def test_scripts_are_clean() -> None:
    shell = [*SCRIPTS, *(ROOT / "workflows").glob("*.sh"), ROOT / ".ci/run", ROOT / ".ci/wheel"]
    run = subprocess.run(["shellcheck", *map(str, shell)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert len(SCRIPTS) == 3


def _submit(environment: dict[str, str], *words: object) -> str:
    run = subprocess.run(
        ["sbatch", "--parsable", "--mem=0", *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def _wait_for(environment: dict[str, str], seconds: float, *, folder: Path) -> None:
    """Until no job waits or runs; all must have completed."""
    stop = time.monotonic() + seconds
    while not (states := set(slurm.jobs(environment).values())) <= {"COMPLETED"}:
        logs = {path.name: path.read_text() for path in folder.glob("*.log")}
        assert time.monotonic() < stop, (slurm.jobs(environment), logs)
        assert not states & {"FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}, (slurm.jobs(environment), logs)
        time.sleep(0.5)


@pytest.mark.slow
@pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing())
def test_the_scripts_under_slurm(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """Capture by an array of which one task is told to stop and is put back, targets and a student after it: the same bits."""
    recipe = write_recipe(tmp_path, tiny_models, samples_per_part=2)
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps(row) for row in rows(240)))
    run, one, store = tmp_path / "run", tmp_path / "one", tmp_path / "run/teachers/big.zarr"
    (root := tmp_path / "slurm").mkdir()
    with slurm.running(root) as found:
        environment = found | {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "OMP_NUM_THREADS": "1",
        }
        extract, project, train = (ROOT / f"workflows/slurm/{name}.sbatch" for name in ("extract", "project", "train"))
        here = [f"--chdir={tmp_path}", "--cpus-per-task=1"]
        first = _submit(environment, *here, "--array=0-1", extract, recipe)
        second = _submit(environment, *here, "--array=0-1", f"--dependency=afterok:{first}", project, recipe)
        _submit(environment, *here, f"--dependency=afterok:{second}", train, recipe)
        stop = time.monotonic() + 240
        while not list(store.glob("parts/0*")):
            assert time.monotonic() < stop, [path.read_text() for path in tmp_path.glob("*.log")]
            time.sleep(0.02)
        subprocess.run(["scancel", "--signal=USR1", f"{first}_0"], env=environment, check=True, timeout=30)
        _wait_for(environment, 400, folder=tmp_path)
    log = "".join(path.read_text() for path in tmp_path.glob("kava-extract-*.log"))
    assert "stopped by SIGUSR1; finished parts are kept" in log
    assert re.search(r"extract big: .* tokens", log)
    states = json.loads(kava("status", recipe, "--json"))["stages"]
    assert {row["state"] for row in states} == {"complete"}
    kava("run", recipe, "-s", f"run_dir={one}", "--until", "project")
    for name in ("teachers/big.zarr", "targets/big.zarr"):
        assert tree(run / name) == tree(one / name)


@pytest.mark.slow
@pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing())
def test_tasks_of_a_training_see_all_devices_of_their_node(tmp_path: Path) -> None:
    """Each takes that of its LOCAL_RANK: bound to one of its own, the second would find no second one."""
    (tmp_path / "kava").write_text('#!/bin/sh\necho "$RANK of $WORLD_SIZE, $LOCAL_RANK: $SLURMD_TRES_BIND"\n')
    (tmp_path / "kava").chmod(0o755)
    (root := tmp_path / "slurm").mkdir()
    with slurm.running(root) as found:
        environment = found | {"PATH": os.pathsep.join([str(tmp_path), os.environ["PATH"]])}
        here = [f"--chdir={tmp_path}", "--cpus-per-task=1", "--ntasks=2", "--gpus-per-task=1"]
        _submit(environment, *here, ROOT / "workflows/slurm/train.sbatch", "recipe.yaml")
        _wait_for(environment, 60, folder=tmp_path)
    (log,) = tmp_path.glob("kava-train-*.log")
    assert sorted(log.read_text().splitlines()) == ["0 of 2, 0: gpu:none", "1 of 2, 1: gpu:none"]
