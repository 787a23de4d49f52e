"""A trace or the path of its file: what functions take that read one."""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Concatenate, ParamSpec, TypeVar

from moetrace.spec.errors import UsageError
from moetrace.trace.format import Trace

TraceLike = Trace | str | os.PathLike[str]
_Others = ParamSpec("_Others")
_Result = TypeVar("_Result")


@contextmanager
def opened(trace: TraceLike) -> Iterator[Trace]:
    """Yield `trace` itself, or the one in a file of that path, which is closed in the end.

    Raises UsageError for anything else, MoetraceError as `Trace.open` does.
    """
    if isinstance(trace, Trace):
        yield trace
        return
    if not isinstance(trace, str | os.PathLike):
        raise UsageError(f"A trace is a Trace or the path of its file, got {type(trace).__name__}.")
    with Trace.open(trace) as found:
        yield found


def accepts_path(
    function: Callable[Concatenate[Trace, _Others], _Result],
) -> "Callable[Concatenate[TraceLike, _Others], _Result]":
    """Let a function of a trace take the path of its file as well, as `opened` does."""

    @functools.wraps(function)
    def accepting(trace: TraceLike, *args: _Others.args, **kwargs: _Others.kwargs) -> _Result:
        with opened(trace) as found:
            return function(found, *args, **kwargs)

    return accepting
