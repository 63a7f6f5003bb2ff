"""Work on parts, under dask: threads here, or a cluster by the address of its scheduler."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from ..errors import KavaError, RetryLaterError


def run_parts(
    work: Callable[[int], int], parts: Sequence[int], *, scheduler: str | None, on_part: Callable[[int], None]
) -> None:
    """Calls `work` on every part, in any order and several at once; the first error stops what has not begun.

    Args:
        work: picklable, idempotent.
        parts: numbers of the parts.
        scheduler: None for threads of this process, `synchronous` for none, or the address of a dask scheduler
            (`tcp://host:8786`) whose workers see the same files.
        on_part: called in this process with each finished part.

    Raises:
        RetryLaterError: if the scheduler cannot be reached.
    """
    if scheduler is not None and "://" in scheduler:
        _run_distributed(work, parts, scheduler, on_part)
        return
    import dask
    import torch
    from dask.callbacks import Callback

    tasks = [dask.delayed(work, pure=False)(part, dask_key_name=("part", part)) for part in parts]
    done = Callback(posttask=lambda key, result, *_: on_part(int(result)))
    # One torch thread for each task: the tasks are the parallelism, and the bits do not depend on how many there are.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with done:
            dask.compute(*tasks, scheduler=scheduler or "threads", num_workers=os.cpu_count(), optimize_graph=False)
    finally:
        torch.set_num_threads(threads)


def _run_distributed(
    work: Callable[[int], int], parts: Sequence[int], scheduler: str, on_part: Callable[[int], None]
) -> None:
    try:
        from distributed import Client, as_completed
    except ImportError:
        raise KavaError("--scheduler needs dask.distributed: pip install 'kava[distributed]'") from None
    try:
        client = Client(scheduler, timeout="20s")
    except (OSError, ValueError) as error:
        raise RetryLaterError(f"--scheduler {scheduler}: cannot be reached: {error}") from None
    with client:
        futures = client.map(_single_threaded, parts, work=work, pure=False, retries=2)
        for future in as_completed(futures):
            on_part(int(future.result()))


def _single_threaded(part: int, work: Callable[[int], int]) -> int:
    import torch

    torch.set_num_threads(1)
    return work(part)
