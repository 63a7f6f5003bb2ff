"""The offline pass under dask: the same bits from any number of workers, whoever dies."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import threading
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from fixtures.command import kava, write_recipe
from fixtures.stores import tree
from fixtures.tasks import dies, fails

from kava.errors import KavaError, RecipeError, RetryLaterError
from kava.pipeline import load_recipe
from kava.pipeline.local_cluster import local_client
from kava.pipeline.parallel import ahead, run_parts
from kava.pipeline.project_stage import ProjectStage
from kava.pipeline.run import Run
from kava.store import KVStore


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> tuple[Path, dict[str, bytes]]:
    """A recipe with targets of 24 parts, and their bytes as one thread makes them."""
    recipe = write_recipe(tmp_path_factory.mktemp("parallel"), tiny_models, samples_per_part=1)
    kava("run", recipe, "--until", "reference")
    kava("project", recipe, "--scheduler", "synchronous")
    return recipe, tree(recipe.parent / "run/targets")


def _again(recipe: Path, scheduler: str | None) -> dict[str, bytes]:
    kava("project", recipe, "--force", *(["--scheduler", scheduler] if scheduler else []))
    made: dict[str, bytes] = tree(recipe.parent / "run/targets")
    return made


def test_threads_processes_and_clusters_write_the_same_bits(made: tuple[Path, dict[str, bytes]]) -> None:
    from distributed import LocalCluster

    recipe, expected = made
    assert _again(recipe, None) == expected
    assert _again(recipe, "processes:2") == expected
    with LocalCluster(n_workers=3, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster:
        assert _again(recipe, cluster.scheduler_address) == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no processors are set aside here")
def test_threads_are_as_many_as_the_processors_that_were_given() -> None:
    allowed = os.sched_getaffinity(0)
    at_once, most, lock = 0, 0, threading.Lock()

    def work(part: int) -> int:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.05)
        with lock:
            at_once -= 1
        return part

    os.sched_setaffinity(0, {min(allowed)})
    try:
        run_parts(work, range(6), scheduler=None, on_part=lambda part: None)
    finally:
        os.sched_setaffinity(0, allowed)
    assert most == 1


def test_a_worker_that_dies_costs_only_its_part(made: tuple[Path, dict[str, bytes]]) -> None:
    from distributed import LocalCluster

    recipe, expected = made
    run = Run(load_recipe(recipe))
    stage = ProjectStage(run, "big")
    shutil.rmtree(stage.output)
    killed: list[int] = []

    def kill_one(cluster: LocalCluster) -> None:
        parts = run.target_path("big") / "parts"
        while len(list(parts.glob("[0-9]*"))) < 3:
            time.sleep(0.002)
        killed.append(next(iter(cluster.workers.values())).pid)
        os.kill(killed[0], signal.SIGKILL)

    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster:
        killer = threading.Thread(target=kill_one, args=(cluster,))
        killer.start()
        stage.make(cluster.scheduler_address)
        killer.join()
    assert not psutil.pid_exists(killed[0])
    store = KVStore.create(run.target_path("big"), stage.manifest())  # Takes away what the dead one had begun.
    assert store.missing_parts() == []
    assert tree(recipe.parent / "run/targets") == expected


def test_a_part_given_out_twice_is_kept_once(made: tuple[Path, dict[str, bytes]]) -> None:
    recipe, expected = made
    run = Run(load_recipe(recipe))
    stage = ProjectStage(run, "big")
    transform = stage.prepare(KVStore.open(run.teacher_path("big")))
    assert transform(5) == 5
    assert tree(recipe.parent / "run/targets") == expected


@pytest.mark.parametrize("scheduler", [None, "synchronous", "processes:1"])
def test_an_error_of_a_task_is_the_commands(scheduler: str | None) -> None:
    with pytest.raises(KavaError, match="part 2 is broken"):
        run_parts(fails, range(4), scheduler=scheduler, on_part=lambda part: None)


def _listening() -> dict[tuple[str, int], psutil.Process]:
    """Every address on which this process or one below it takes connections from a network."""
    here = psutil.Process()
    return {
        tuple(found.laddr): process
        for process in [here, *here.children(recursive=True)]
        for found in process.net_connections("inet")
        if found.status == psutil.CONN_LISTEN
    }


def _answer(opened: socket.socket) -> bytes:
    with opened:
        try:
            opened.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            return opened.recv(1 << 16)
        except (ssl.SSLError, ConnectionError):
            return b""


def test_worker_processes_take_work_from_nobody_else() -> None:
    """Every listening socket is on the loopback address and speaks TLS, and refuses who does not have its key."""
    from distributed import Client, Security

    before = set(_listening())
    with local_client(2) as client:
        client.wait_for_workers(2, timeout=60)
        found = {address: process for address, process in _listening().items() if address not in before}
        assert len(found) == 5  # The scheduler, two workers, and the two nannies that watch them.
        assert client.scheduler.address in {f"tls://{host}:{port}" for host, port in found}
        for host, port in found:
            assert host == "127.0.0.1"
            assert b"HTTP" not in _answer(socket.create_connection((host, port), timeout=10))
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            encrypted = context.wrap_socket(socket.create_connection((host, port), timeout=10))
            assert encrypted.version() == "TLSv1.3"
            assert _answer(encrypted) == b""  # A client without a certificate is refused when it reads.
        for security in (Security.temporary(), None):
            scheme = "tcp" if security is None else "tls"
            address = client.scheduler.address.replace("tls", scheme)
            with pytest.raises(OSError, match=r"Timed out|TLS|reset"):
                Client(address, security=security, timeout="2s")
        assert client.submit(abs, -3).result(timeout=30) == 3


@pytest.mark.slow
def test_workers_that_keep_dying_end_the_run() -> None:
    with pytest.raises(RetryLaterError, match="workers died again and again"):
        run_parts(dies, [0], scheduler="processes:1", on_part=lambda part: None)


@pytest.mark.slow
def test_a_scheduler_that_is_not_there() -> None:
    with pytest.raises(RetryLaterError, match="cannot be reached"):
        run_parts(fails, [0], scheduler="tcp://127.0.0.1:9", on_part=lambda part: None)


def test_schedulers_that_are_none() -> None:
    with pytest.raises(RecipeError, match=r"--scheduler tls://127\.0\.0\.1:9: TLS needs a certificate"):
        run_parts(fails, [0], scheduler="tls://127.0.0.1:9", on_part=lambda part: None)
    for wrong in ("processes:none", "processes:0", "nonsense"):
        with pytest.raises(RecipeError, match="--scheduler"):
            run_parts(fails, [0], scheduler=wrong, on_part=lambda part: None)


def test_one_is_made_ahead_in_order() -> None:
    made: list[int] = []
    begun = threading.Event()

    def work(item: int) -> int:
        made.append(item)
        if item == 1:
            begun.set()
        if item == 3:
            raise KavaError("item 3 is broken")
        return 10 * item

    with closing(ahead(work, range(9))) as results:
        assert next(results) == 0
        assert begun.wait(30)
        assert [next(results), next(results)] == [10, 20]
        with pytest.raises(KavaError, match="item 3 is broken"):
            next(results)
    assert 5 not in made
    assert list(ahead(str, [])) == []
    assert list(ahead(str, [4])) == ["4"]
