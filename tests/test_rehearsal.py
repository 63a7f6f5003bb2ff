"""A cluster in miniature: hosts with networks of their own, ranks, a dask scheduler and workers over TCP, a cut cable."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from fixtures.command import KAVA, kava, write_recipe
from fixtures.hosts import hosts
from fixtures.stores import tree

STORES = ("student", "teachers", "reference.zarr", "targets", "projectors")
PARTS = 24
# So that a host which is not heard of any more is given up in seconds.
DASK = {"SCHEDULER__WORKER_TTL": "10s", "COMM__TIMEOUTS__TCP": "15s", "COMM__TIMEOUTS__CONNECT": "30s"}


@pytest.mark.slow
def test_several_hosts_and_one_is_cut_off(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """Two ranks capture, workers on two hosts project; one is cut off in the middle. The bits are those of one process."""
    (tmp_path / "alone").mkdir()
    alone = write_recipe(tmp_path / "alone", tiny_models, samples_per_part=1)
    kava("run", alone, "--until", "project")
    (tmp_path / "many").mkdir()
    recipe = write_recipe(tmp_path / "many", tiny_models, samples_per_part=1)
    root = tmp_path / "many/run"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    environment |= {f"DASK_DISTRIBUTED__{name}": value for name, value in DASK.items()}
    with hosts(3, tmp_path) as (head, left, right):
        ranks = [
            host.start([*KAVA, "extract", recipe, "--rank", rank, "--world-size", 2], environment)
            for rank, host in enumerate((left, right))
        ]
        assert [rank.wait(timeout=300) for rank in ranks] == [0, 0], left.printed() + right.printed()
        assert (tree(root / "teachers")) == tree(alone.parent / "run/teachers")
        kava("run", recipe, "--only", "student", "--only", "reference")
        dask = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--no-dashboard", "--no-show"]
        head.start([*dask, "--host", head.address, "--port", "8786"], environment)
        scheduler = f"tcp://{head.address}:8786"
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", scheduler, "--nthreads", "1", "--no-dashboard"]
        for host in (left, right):
            host.start([*worker, "--no-nanny", "--host", host.address], environment)
        _wait(lambda: all("Registered to" in host.printed() for host in (left, right)), head, left, right)
        driver = head.start([*KAVA, "project", recipe, "--scheduler", scheduler], environment)
        parts = root / "targets/big.zarr/parts"
        while not list(parts.glob("[0-9]*")):
            assert driver.poll() is None, head.printed()
            time.sleep(0.001)
        right.cut_off()
        done = len(list(parts.glob("[0-9]*")))
        assert done < PARTS, "the cut came when all was done"
        assert driver.wait(timeout=300) == 0, head.printed() + left.printed()
    assert len(list(parts.glob("[0-9]*"))) == PARTS
    kava("project", recipe)  # Takes away what the host that was cut off had begun.
    for name in STORES:
        assert tree(root / name) == tree(alone.parent / "run" / name), name


def _wait(until: object, *machines: object) -> None:
    began = time.monotonic()
    while not until():  # type: ignore[operator]
        assert time.monotonic() - began < 120, "\n".join(m.printed() for m in machines)  # type: ignore[attr-defined]
        time.sleep(0.1)
