"""`--scheduler processes:N`: worker processes of this machine that take work from this process alone.

Whoever can connect to a dask scheduler or worker can run code as its owner, and every user of a machine can connect to
its loopback addresses. So scheduler and workers talk over TLS with a key that exists in the memory of these processes
only, each side refuses a peer without it, and no HTTP server is left listening.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import dask
from distributed import Client, LocalCluster, Security, WorkerPlugin

from ..errors import BackendNotInstalledError

# dask starts an HTTP server in every process, whatever it is told. Without pages, and on the loopback address, until
# it is stopped.
_NO_PAGES: Final[dict[str, list[str]]] = {"distributed.scheduler.http.routes": [], "distributed.worker.http.routes": []}
_LOOPBACK: Final = "127.0.0.1"


class _WithoutHttp(WorkerPlugin):  # type: ignore[misc]  # distributed is untyped here.
    """Stops the HTTP server of a worker, also of one that takes the place of another."""

    idempotent = True

    def setup(self, worker: Any) -> None:
        """Stop the server when the worker starts."""
        worker.http_server.stop()


@contextmanager
def local_client(count: int) -> Iterator[Client]:
    """Yield a client of `count` worker processes of one thread each, which end with it.

    Raises:
        BackendNotInstalledError: if the library that makes keys is not installed.
    """
    try:
        security = Security.temporary()
    except ImportError:
        raise BackendNotInstalledError(
            "--scheduler processes:N needs the package cryptography: pip install 'kava[distributed]'"
        ) from None
    options: dict[str, Any] = {
        "host": _LOOPBACK,
        "security": security,
        "dashboard_address": f"{_LOOPBACK}:0",
        "scheduler_kwargs": {"dashboard": False},
        "n_workers": count,
        "threads_per_worker": 1,
    }
    with dask.config.set(_NO_PAGES), LocalCluster(processes=True, **options) as cluster, Client(cluster) as client:
        cluster.scheduler.http_server.stop()
        client.register_plugin(_WithoutHttp())
        yield client
