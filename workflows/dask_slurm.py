"""The offline pass on workers that SLURM starts: a dask scheduler here, a job for each worker.

    python workflows/dask_slurm.py recipe.yaml --jobs 16 --cores 4 --memory 16GB --walltime 04:00:00 --queue NAME

Runs `kava project RECIPE --scheduler tls://...` and ends the workers after it. Other options go to kava.
Scheduler, workers and kava talk over TLS with a key of this run alone, because a dask scheduler runs code for whoever
can connect to it. Workers read the key from the current folder, which their nodes must see; it is removed at the end.
`--job-script` prints the script of a worker's job and does nothing else. Wants `pip install 'kava[workflows]'`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

_NO_DASHBOARD: Final = "127.0.0.1:0"


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """The options of the cluster, and what is kava's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("--jobs", type=int, default=4, help="workers, each a job of its own")
    parser.add_argument("--cores", type=int, default=4, help="of a job; as many parts at once")
    parser.add_argument("--memory", default="16GB", help="of a job")
    parser.add_argument("--walltime", default="04:00:00")
    parser.add_argument("--queue", help="the partition")
    parser.add_argument("--account")
    parser.add_argument("--interface", help="the network that nodes reach each other by, ib0 for example")
    parser.add_argument("--job-script", action="store_true", help="print the script of a worker's job")
    return parser.parse_known_args()


def make_cluster(options: argparse.Namespace, security: Any) -> Any:
    """The scheduler, here, and how workers are started. A worker has one process: its parts share what is loaded."""
    from dask_jobqueue import SLURMCluster

    return SLURMCluster(
        security=security,
        shared_temp_directory=str(Path.cwd()),
        scheduler_options={"dashboard": False, "dashboard_address": _NO_DASHBOARD},
        worker_extra_args=["--no-dashboard", "--dashboard-address", _NO_DASHBOARD],
        cores=options.cores,
        processes=1,
        memory=options.memory,
        walltime=options.walltime,
        queue=options.queue,
        account=options.account,
        interface=options.interface,
        job_name="kava-worker",
        job_script_prologue=["export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1"],
    )


def client_environment(security: Any) -> dict[str, str]:
    """The environment in which dask's client finds the key; nobody but this user can read that of a process."""
    prefix = "DASK_DISTRIBUTED__COMM__TLS__"
    return {
        **os.environ,
        f"{prefix}CA_FILE": security.tls_ca_file,
        f"{prefix}CLIENT__CERT": security.tls_client_cert,
        f"{prefix}CLIENT__KEY": security.tls_client_key,
    }


def main() -> int:
    """Starts the cluster, runs kava on it, ends it; kava's exit code."""
    from distributed import Security

    options, more = arguments()
    security = Security.temporary()
    with make_cluster(options, security) as cluster:
        cluster.scheduler.http_server.stop()
        if options.job_script:
            print(cluster.job_script())
            return 0
        cluster.scale(jobs=options.jobs)
        words = ["project", options.recipe, "--scheduler", cluster.scheduler_address, *more]
        command = [sys.executable, "-m", "kava", *words]
        return subprocess.run(command, check=False, env=client_environment(security)).returncode


if __name__ == "__main__":
    sys.exit(main())
