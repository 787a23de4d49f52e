"""Processes of this machine: started early, never twice, and none outlives its work. Loads nothing heavy."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import Any

_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_LOOK_UP_S = 5.0


def start_early() -> None:
    """Begin to import what workers need, in a process that they are then forked off; returns at once.

    Half a second or so on the first call, which the caller's own imports and reading can hide.
    """
    if _METHOD == "forkserver":
        from multiprocessing import forkserver

        with _no_main_module(), contextlib.suppress(OSError):  # else it is tried again, and refused, later
            forkserver.set_forkserver_preload(["moetrace.engine.run"])  # not Polars, which starts threads
            forkserver.ensure_running()


@contextlib.contextmanager
def processes(jobs: int) -> Iterator[Executor]:
    """Yield a pool of processes, none of which outlives the block, nor this process."""
    start_early()
    pool = _Pool(jobs, mp_context=multiprocessing.get_context(_METHOD), initializer=_begin_worker)
    try:
        yield pool
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown(cancel_futures=True)


class _Pool(ProcessPoolExecutor):
    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        with _no_main_module():  # this is what starts a process
            return super().submit(fn, *args, **kwargs)


@contextlib.contextmanager
def _no_main_module() -> Iterator[None]:
    """Hide the caller's main module, which workers would import though nothing here needs it.

    A script without `if __name__ == "__main__"` would else start a sweep in each of them.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, and end when it does, even if it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: Any) -> None:
    """Wait for the end of the parent, and end.

    A pipe says so, unless a child that the parent forked has it open too; then the system does, where it can be asked.
    """
    ends = [parent.sentinel]
    with contextlib.suppress(AttributeError, OSError):  # not Linux; or it is gone
        ends.append(os.pidfd_open(parent.pid))  # type: ignore[attr-defined]
    while not wait(ends, _LOOK_UP_S) and _is_there(parent.pid):
        pass
    os._exit(1)


def _is_there(pid: int) -> bool:
    if os.name != "posix":  # there, signal 0 ends a process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
