"""Where a user's function failed: the step, the layer, and the line of its file.

Compiled code has no lines, but the wrapper of a user's function notes each call (`OWN`). The failed function is called
once more as plain Python, on the current content of the arrays.
"""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from moetrace.engine.replay import Work
from moetrace.engine.state import CPU, DISPATCH, OWN
from moetrace.engine.tiers.tier_records import TERM
from moetrace.engine.view import LayerScratch, view_of
from moetrace.jit.compile import PURE_PYTHON

# Lines that plain Python runs before it is given up: the second time, the function may never return.
_MOST_LINES = 1_000_000
_AS_PYTHON: dict[type | None, type] = {FloatingPointError: ZeroDivisionError}


def place_of(error: Exception, work: Work, cells: Any, scratch: LayerScratch, hooks: tuple[Any, Any]) -> str:
    """Return ` (mine.py, line 7; step 12, layer 3)`: where a hook raised; less where it cannot be found.

    Args:
        error: what it raised.
        work: the block that was replayed.
        cells, scratch: those of the run that failed, the replay's own or the clairvoyant one's.
        hooks: dispatch and residency.
    """
    if PURE_PYTHON:
        return _place_in_python(error)
    last = int(scratch.own["step"].max())
    if last == 0:
        return ""
    layer = int(np.flatnonzero(scratch.own["step"] == last)[-1])
    step, role = last - 1, int(scratch.own["role"][layer])
    function = hooks[role].py_func
    file = Path(function.__code__.co_filename).name
    seen = _seen_again(step, layer, work, scratch)
    line = _line_again(function, error, (_answering(cells), *seen), role == DISPATCH)
    if line is None:
        return f" ({file}; step {step}, layer {layer}); with NUMBA_DISABLE_JIT=1 the line is named"
    return f" ({file}, line {line}; step {step}, layer {layer})"


def _place_in_python(error: Exception) -> str:
    """Return the same of an error in plain Python; without step and layer if it was raised outside a decision."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(last.filename).name}, line {last.lineno}"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if {"view", "layer"} <= frame.f_locals.keys():
            return f" ({place}; step {frame.f_locals['view'].step}, layer {frame.f_locals['layer']})"
    return f" ({place})"


def _seen_again(step: int, layer: int, work: Work, scratch: LayerScratch) -> tuple[Any, ...]:
    """Return the view, layer, load and plan that a hook was called with; the plan as it is now."""
    batch, machine = work.batch, _answering(work.machine)
    place = (step - batch.steps.first) * len(machine.weight_bytes) + layer
    size = int(batch.demand.start[place + 1] - batch.demand.start[place])
    pool = (0.0, 1)  # the age and whether all is full: neither is known after the failure
    view = view_of.py_func(step, layer, batch.steps, machine, _answering(work.setting)[0], _answering(scratch), pool)
    return view, layer, scratch.load[:size].copy(), scratch.plan[:size].copy()


def _line_again(function: Callable, error: Exception, arguments: tuple[Any, ...], decides: bool) -> int | None:
    """Call a function again as it was called when it failed; return the line where it fails alike, else None."""
    if decides:
        arguments[-1][:] = 0
    with np.errstate(divide="raise", over="ignore", invalid="ignore"):
        raised, line = _followed(function, arguments, decides)
    return line if _AS_PYTHON.get(raised, raised) is type(error) else None


def _followed(function: Callable, arguments: tuple[Any, ...], decides: bool) -> tuple[type | None, int | None]:
    """Call a function; return what it raised, and in which line: ValueError for a plan that names no device."""
    plan, line, left = arguments[-1] if decides else np.zeros(0), None, _MOST_LINES
    devices = _devices_of(arguments[1])

    def follow(frame: FrameType, event: str, _: object) -> Any:
        nonlocal line, left
        left -= 1
        if left < 0:
            raise TimeoutError
        if plan.max(initial=0) >= devices:
            raise ValueError
        line = frame.f_lineno if frame.f_code is function.__code__ else line
        return follow

    before = sys.gettrace()
    sys.settrace(follow)
    try:
        function(*arguments)
    except Exception as error:  # noqa: BLE001  a user's function may raise anything
        return type(error), line
    finally:
        sys.settrace(before)
    return None, None


def _devices_of(view: Any) -> int:
    """Return how many devices a plan may name: two, and a CPU beside NDP units."""
    from moetrace.jit.addresses import record_at

    term_at = record_at(view.own, OWN).term_at
    return CPU + (int(record_at(term_at, TERM).has_cpu) if term_at else 0)


def _answering(value: Any) -> Any:
    """Return arrays of records, also those in a named tuple, as ones that answer to ``record.field``."""
    if isinstance(value, tuple):
        return type(value)(*map(_answering, value))
    return value.view(np.recarray) if isinstance(value, np.ndarray) and value.dtype.names else value
