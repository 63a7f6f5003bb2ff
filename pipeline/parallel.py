"""Work on parts, under dask: threads here, processes here, or a cluster by the address of its scheduler.

A part is one task, and one folder that one worker writes under a name of its own and renames when it is whole. So no
two workers ever write to one file, a worker that dies loses the part in hand and nothing else, and a part that was
given out twice is kept once. A task holds a few samples, in float32: its memory does not grow with the corpus.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final, TypeVar

from ..errors import BackendNotInstalledError, KavaError, RecipeError, RetryLaterError
from ..store import PartReader, Split, num_cpus

if TYPE_CHECKING:
    from distributed import Client

_In = TypeVar("_In")
_Out = TypeVar("_Out")
_PROCESSES: Final = "processes:"


def run_parts(
    work: Callable[[int], int], parts: Sequence[int], *, scheduler: str | None, on_part: Callable[[int], None]
) -> None:
    """Calls `work` on every part, in any order and several at once; the first error stops what has not begun.

    Args:
        work: picklable, idempotent.
        parts: numbers of the parts.
        scheduler: None for threads of this process, `synchronous` for none, `processes:N` for N worker processes of
            this machine, or the address of a dask scheduler (`tcp://host:8786`) whose workers see the same files.
        on_part: called in this process with each finished part.

    Raises:
        RecipeError: if `scheduler` is none of these.
        RetryLaterError: if the scheduler cannot be reached, or workers kept dying.
    """
    check_scheduler(scheduler)
    if _is_distributed(scheduler):
        assert scheduler is not None
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
        # A pool of its own: after an error, tasks that still run are waited for. Nothing is written after that.
        with done, ThreadPoolExecutor(num_cpus(), "kava-part") as pool:
            dask.compute(*tasks, scheduler=scheduler or "threads", pool=pool, optimize_graph=False)
    finally:
        torch.set_num_threads(threads)


def check_scheduler(scheduler: str | None) -> None:
    """Check the value of `--scheduler`, and that what it needs is installed; see `run_parts`.

    Raises:
        RecipeError: if it is not a scheduler.
        BackendNotInstalledError: without dask.distributed.
    """
    if _is_distributed(scheduler):
        if find_spec("distributed") is None:
            raise BackendNotInstalledError("--scheduler needs dask.distributed: pip install 'kava[distributed]'")
    elif scheduler not in (None, "threads", "synchronous"):
        raise RecipeError(f"--scheduler {scheduler}: give tcp://HOST:PORT, processes:N, threads or synchronous")


def _is_distributed(scheduler: str | None) -> bool:
    return scheduler is not None and ("://" in scheduler or scheduler.startswith(_PROCESSES))


def ahead(work: Callable[[_In], _Out], items: Iterable[_In]) -> Generator[_Out, None, None]:
    """The results of `work`, in order; a thread of its own makes the next one while the caller is at the last.

    Leave it by `contextlib.closing`: it waits for its thread.
    """
    with ThreadPoolExecutor(1, "kava-ahead") as pool:
        waiting: deque[Future[_Out]] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        for last in waiting:
            yield last.result()


def walk(
    reader: PartReader, read: Callable[[int], _Out], fail: Callable[[int, str, Split, str], None]
) -> Generator[tuple[int, _Out], None, None]:
    """A part's samples in the order in which they were written, each by its position, read `ahead`.

    Those that failed are handed on instead. Leave it by `contextlib.closing`.

    Args:
        reader: of the part.
        read: gives what is wanted of the sample at a position.
        fail: called for a failed one, with position, id, split and reason: a writer's.
    """
    failed = reader.failed
    with closing(ahead(read, [position for position in reader.order if position not in failed])) as found:
        for position in reader.order:
            if position in failed:
                fail(position, reader.sample_id(position), Split(int(reader.splits[position])), failed[position])
            else:
                yield position, next(found)


def _run_distributed(
    work: Callable[[int], int], parts: Sequence[int], scheduler: str, on_part: Callable[[int], None]
) -> None:
    from distributed import CancelledError, KilledWorker, as_completed
    from distributed.comm import CommClosedError

    with _client(scheduler) as client:
        futures = client.map(_single_threaded, parts, work=work, pure=False, retries=2)
        for future in as_completed(futures):
            try:
                result = future.result()
            except (CancelledError, CommClosedError) as error:
                raise RetryLaterError(
                    f"--scheduler {scheduler} went away: {error}; finished parts are kept, the same command goes on"
                ) from None
            except KilledWorker as error:
                raise RetryLaterError(
                    f"--scheduler {scheduler}: workers died again and again (out of memory?): {error}; finished parts "
                    "are kept, the same command goes on"
                ) from None
            if isinstance(result, KavaError):
                raise result
            on_part(int(result))


@contextmanager
def _client(scheduler: str) -> Iterator[Client]:
    from distributed import Client

    if not scheduler.startswith(_PROCESSES):
        try:
            client = Client(scheduler, timeout="20s")
        except (OSError, ValueError) as error:
            raise RetryLaterError(f"--scheduler {scheduler}: cannot be reached: {error}") from None
        except TypeError:  # What distributed raises if an encrypted address is given without any certificate.
            raise RecipeError(
                f"--scheduler {scheduler}: TLS needs a certificate. Set distributed.comm.tls in dask's configuration, "
                "see docs/howto/slurm.md"
            ) from None
        with client:
            yield client
        return
    count = scheduler.removeprefix(_PROCESSES)
    if not count.isdigit() or int(count) < 1:
        raise RecipeError(f"--scheduler {scheduler}: write processes:N with a number of worker processes")
    from .local_cluster import local_client

    with local_client(int(count)) as client:
        yield client


def _single_threaded(part: int, work: Callable[[int], int]) -> int | KavaError:
    """Our own errors are results: a cluster would try them again, and log them at length, which changes nothing."""
    import torch

    torch.set_num_threads(1)
    try:
        return work(part)
    except KavaError as error:
        return error
