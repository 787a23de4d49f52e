"""Where tasks run: here, in processes of this machine, or on a Dask cluster; and what happens when workers die."""

import contextlib
import logging
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, wait
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from moetrace.batch.processes import processes
from moetrace.batch.work import Outcome, Task, failed, work
from moetrace.jit.apart import LOOK_UP_S
from moetrace.spec.errors import MoetraceError, UsageError, printable

ATTEMPTS = 3  # of Dask, to run a task whose worker was lost
# Pools that may break: enough to find a few cells whose replay kills its process among the cells of their tasks.
_MOST_POOLS = 30
_ENDS_ALL = (BrokenExecutor, CancelledError, OSError)  # of the executor, not of a cell: a lost scheduler is an OSError
_KILLED = "each process that replays it is killed (not enough memory?): the next run tries it again."
_ADDRESS = re.compile(r"(\w+://)?(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):\d{1,5}/?", re.ASCII)


class Farm(NamedTuple):
    """How to get an executor, how many tasks it works on at once, and how many it should be given."""

    open: Callable[[], AbstractContextManager[Executor]]
    jobs: int
    window: int
    killed: tuple[type[Exception], ...] = ()  # what a future raises whose workers died, where the executor lives on


class Inline(Executor):
    """Runs each submitted task at once, in this thread: Ctrl-C ends it as it would any loop."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Run the function; return a future that is done."""
        future: Future = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001  the future raises it
            future.set_exception(error)
        return future


def local_farm(jobs: int) -> Farm:
    """Processes of this machine; with one job, this process."""
    if jobs == 1:
        return Farm(Inline, 1, 1)
    return Farm(lambda: processes(jobs), jobs, jobs + 1)


@contextlib.contextmanager
def lasting(farm: Farm) -> Iterator[Farm]:
    """Yield a farm whose executor lives on from one run of tasks to the next; one that broke is replaced."""
    executor: Executor | None = None
    with contextlib.ExitStack() as stack:

        @contextlib.contextmanager
        def open_once() -> Iterator[Executor]:
            nonlocal executor
            if executor is None or getattr(executor, "_broken", False):
                executor = stack.enter_context(farm.open())
            yield executor

        yield farm._replace(open=open_once)


def run_tasks(tasks: Sequence[Task], farm: Farm, take: Callable[[list[Outcome]], None]) -> None:
    """Run tasks, and hand over what each found as it comes.

    Work of workers that died is done again when all else is done, one task at a time and in halves. So a cell that
    kills its worker twice, the second time as the only cell of a task, is found and fails; it does not stop the others.

    Raises MoetraceError if workers died too often; results handed over before stay.
    """
    waiting, suspects, blamed = deque(tasks), deque[Task](), set[str]()
    for _ in range(_MOST_POOLS):
        alone = False
        with farm.open() as executor:
            lost = _drain(executor, waiting, farm, take)
            if not (lost or waiting):  # some wait still if a worker died that had nothing to do
                alone, lost = True, _drain(executor, suspects, farm._replace(window=1), take)
        if not (lost or waiting or suspects):
            return
        for task in lost:
            key = task.cells[0][0]
            if alone and len(task.cells) == 1:
                if key in blamed:
                    take([Outcome(key, None, _KILLED)])
                    continue
                blamed.add(key)
            suspects.extendleft(reversed(_halves(task)))
    raise MoetraceError(
        f"Workers were killed {_MOST_POOLS} times (not enough memory?); finished cells are kept, so the same command "
        "goes on from there: try fewer --jobs."
    )


def _drain(executor: Executor, waiting: deque[Task], farm: Farm, take: Callable[[list[Outcome]], None]) -> list[Task]:
    """Run what waits until all is done, or the executor breaks; return the tasks whose workers died."""
    flying: dict[Future, Task] = {}
    lost: list[Task] = []
    try:
        while waiting or flying:
            while waiting and len(flying) < farm.window:
                flying[executor.submit(work, waiting[0])] = waiting[0]
                waiting.popleft()
            for future in wait(flying, LOOK_UP_S, FIRST_COMPLETED).done:
                error = future.exception()
                if isinstance(error, farm.killed):
                    lost.append(flying[future])
                elif isinstance(error, Exception) and not isinstance(error, _ENDS_ALL):
                    take(failed(flying[future], error))  # what came back cannot be read, say
                else:
                    take(future.result())
                del flying[future]
    except BrokenExecutor:
        for future, task in flying.items():
            if future.done() and not future.cancelled() and future.exception() is None:
                take(future.result())
            else:
                lost.append(task)
    return lost


def _halves(task: Task) -> list[Task]:
    middle = (len(task.cells) + 1) // 2
    return [task._replace(cells=part) for part in (task.cells[:middle], task.cells[middle:]) if part]


@contextlib.contextmanager
def dask_farm(address: str) -> Iterator[tuple[Farm, str | None]]:
    """Yield a Dask cluster as a farm, and the link of its dashboard; lost workers' tasks are run again, three times.

    Raises UsageError if `address` is no address, MoetraceError if `distributed` is missing, no scheduler answers or it
    has no workers.
    """
    if not _ADDRESS.fullmatch(address):  # of which Dask's client would leave a traceback
        raise UsageError(f"A Dask scheduler's address is as tcp://host:8786, got {printable(address)!r}.")
    try:
        import distributed
        from distributed.comm.core import CommClosedError
    except ImportError:
        raise MoetraceError("--dask needs distributed: pip install '.[dask]' in the clone of moetrace.") from None
    try:
        client = distributed.Client(address, timeout=5, set_as_default=False)
    except (OSError, ValueError, ImportError) as error:
        why = str(error).partition("\n")[0] or type(error).__name__
        raise MoetraceError(f"No Dask scheduler answers at {address} ({why.rstrip('.')}): is it running?") from None
    with _quiet("distributed.client"), client:
        threads = sum(dict(client.nthreads()).values())  # pyright: ignore
        if threads == 0:
            raise MoetraceError(f"The Dask scheduler at {address} has no workers: start some with dask worker.")
        farm = Farm(lambda: client.get_executor(retries=ATTEMPTS), threads, 2 * threads, (distributed.KilledWorker,))
        try:
            yield farm, client.dashboard_link
        except (OSError, distributed.CancelledError) as error:
            if isinstance(error, OSError) and not isinstance(error, CommClosedError):
                raise
            raise MoetraceError(f"The Dask scheduler at {address} went away; finished cells are kept.") from None


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a logger from printing tracebacks of errors that are reported in a sentence."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
