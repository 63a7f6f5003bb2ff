"""The Snakefile: part ranges at once, a stage again, a job killed; the bits of one process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from fixtures.command import kava, write_recipe
from fixtures.documents import ROOT
from fixtures.stores import tree

from kava.store.fingerprint import file_stamp

STORES = ("teachers/big.zarr", "targets/big.zarr")
SNAKEMAKE = [
    *(sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "workflows/Snakefile")),
    *("--profile", str(ROOT / "workflows/profiles/local"), "--cores", "4", "--resources", "gpu=4"),
]


def snakemake(folder: Path, *words: str, parts: int = 2, code: int = 0, begin: bool = False, more: str = "") -> Any:
    """Runs it in `folder`, whose recipe is recipe.yaml; what it printed, or with `begin` the process."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*SNAKEMAKE, *words, "--config", "recipe=recipe.yaml", f"parts_per_job={parts}", *more.split()]
    options: dict[str, Any] = {"cwd": folder, "env": environment, "text": True, "stderr": subprocess.STDOUT}
    if begin:
        return subprocess.Popen(command, stdout=subprocess.PIPE, **options)
    run = subprocess.run(command, stdout=subprocess.PIPE, **options)
    assert run.returncode == code, run.stdout
    return run.stdout


def jobs(printed: str) -> dict[str, int]:
    """How many jobs of each rule are planned."""
    found: dict[str, int] = {}
    for table in re.findall(r"^job +count\n[- ]+\n(.*?)\n\n", printed, re.S | re.M):
        found |= {name: int(count) for name, count in (line.split() for line in table.splitlines())}
    return {name: count for name, count in found.items() if name not in ("all", "total")}


@pytest.mark.slow
def test_four_jobs_at_once_and_a_stage_again(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe = write_recipe(tmp_path, tiny_models, run_dir="run", samples_per_part=3)  # 8 parts, 4 ranges.
    planned = jobs(snakemake(tmp_path, "-n"))
    assert planned == {"extract": 4, "student": 1, "project": 4, "train": 1}
    assert not (tmp_path / "run").exists()
    assert jobs(snakemake(tmp_path, "-n", "--until", "extract")) == {"extract": 4}
    snakemake(tmp_path)
    one = tmp_path / "one"
    kava("run", recipe, "-s", f"run_dir={one}", "--until", "project", cwd=tmp_path)
    before = {name: tree(tmp_path / "run" / name) for name in STORES}
    assert before == {name: tree(one / name) for name in STORES}
    assert "Nothing to be done" in snakemake(tmp_path)

    def written(name: str) -> list[tuple[int, ...]]:
        return [file_stamp(path) for path in sorted((tmp_path / "run" / name / "parts").glob("0*"))]

    made, weights = {name: written(name) for name in STORES}, tmp_path / "run/students/kv/model.safetensors"
    trained = weights.stat().st_mtime_ns
    printed = snakemake(tmp_path, "--forcerun", "project")
    assert jobs(printed) == {"project": 4, "train": 1}
    assert written("teachers/big.zarr") == made["teachers/big.zarr"]
    assert not set(written("targets/big.zarr")) & set(made["targets/big.zarr"])
    assert before == {name: tree(tmp_path / "run" / name) for name in STORES}
    assert weights.stat().st_mtime_ns == trained, "the targets have the same content, so the student is that of them"
    # Another setting of training: that alone is made again.
    whole = yaml.safe_load(recipe.read_text())
    whole["train"]["learning_rate"] = 2e-3
    recipe.write_text(yaml.safe_dump(whole))
    assert jobs(snakemake(tmp_path, "-n")) == {"train": 1}


@pytest.mark.slow
def test_a_job_that_is_killed_is_completed_by_the_next_run(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe = write_recipe(tmp_path, tiny_models, run_dir="run", samples_per_part=1)  # 24 parts, 4 ranges.
    run = snakemake(tmp_path, "--until", "project", parts=6, begin=True)
    store, victim, stop = tmp_path / "run/teachers/big.zarr", None, time.monotonic() + 200
    while victim is None:
        assert time.monotonic() < stop
        time.sleep(0.005)
        begun = list(store.glob("parts/0*"))
        victim = next((p for p in psutil.Process(run.pid).children(recursive=True) if begun and _captures(p)), None)
    os.kill(victim.pid, signal.SIGKILL)
    printed, _ = run.communicate(timeout=300)
    assert run.returncode != 0, printed
    left = jobs(snakemake(tmp_path, "-n", "--until", "project", parts=6))
    assert left["extract"] == 1
    snakemake(tmp_path, "--until", "project", parts=6)
    kava("run", recipe, "-s", "run_dir=one", "--until", "project", cwd=tmp_path)
    for name in STORES:
        assert tree(tmp_path / "run" / name) == tree(tmp_path / "one" / name)


def _captures(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return bool(words[1:4] == ["-m", "kava", "extract"])


@pytest.mark.slow
def test_several_teachers_slots_and_arms_are_planned(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe = write_recipe(
        tmp_path,
        tiny_models,
        run_dir="run",
        fuse={"weights": "fixed"},
        select={"tokens": 4, "method": "uniform"},
        compare={"arms": ["none", "kv"], "seeds": [0, 1]},
    )
    whole = yaml.safe_load(recipe.read_text())
    whole["teachers"]["other"] = whole["teachers"]["big"]
    recipe.write_text(yaml.safe_dump(whole))
    assert jobs(snakemake(tmp_path, "-n")) == {
        "extract": 6,
        "student": 1,
        "project": 6,
        "select": 6,
        "fuse": 3,
        "compare": 4,
        "compared": 1,
    }
    assert "kava: recipe" in snakemake(tmp_path, "-n", more="set=train.alhpa=1", code=1)
    # An arm that learns of another teacher waits for that one's targets, and no other does.
    del whole["fuse"], whole["select"]
    whole["train"]["teacher"] = "big"
    whole["compare"] = {"arms": {"none": {}, "second": {"teacher": "other"}}, "seeds": [0]}
    recipe.write_text(yaml.safe_dump(whole))
    assert jobs(snakemake(tmp_path, "-n")) == {"extract": 6, "student": 1, "project": 6, "compare": 2, "compared": 1}
    (one,) = re.findall(
        r"^rule compare:\n    input: (.*)\n", snakemake(tmp_path, "-n", "run/snakemake/compare/second/0"), re.M
    )
    assert "project/other/" in one
    assert "project/big/" not in one
