"""`replay`: a trace, a machine and policies in, a `Result` out."""

import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import SupportsIndex

from moetrace.engine.run import run_setups
from moetrace.engine.setup import unneeded_units
from moetrace.results.break_even import break_even_tokens
from moetrace.results.resolve import Policy, resolve
from moetrace.results.result import Result
from moetrace.results.summary import trace_facts
from moetrace.results.window import Window, window_of
from moetrace.spec import Model, System
from moetrace.spec.cores import cores
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.spec.forks import refuse_if_forked
from moetrace.trace import Trace
from moetrace.trace.opening import opened

DEFAULT_SYSTEM = "edge-ndp"


def replay(
    trace: Trace | str | os.PathLike[str],
    *,
    system: str | Path | System = DEFAULT_SYSTEM,
    policies: Policy | Sequence[Policy] | None = None,
    model: str | Path | Model | None = None,
    overrides: Mapping[str, object] | None = None,
    slots: SupportsIndex | str | None = None,
    ignore_capacity: bool = False,
    jobs: SupportsIndex | None = None,
    progress: Callable[[int], None] | None = None,
    timeline: Window = False,
    regret: bool = False,
    decisions: bool = False,
    code: bool = True,
) -> Result:
    """Replay a trace through policies on a system, in one pass over it.

    docs/timing-model.md defines every figure. The same trace, specs and version give the same result to the last bit.

    Args:
        trace: A trace or the path of its file.
        system: A preset's name, a TOML file or a System.
        policies: One policy or several. Each is a preset's name, a TOML file, `file.py:function`, a PolicySpec or a
            function. A function is the dispatch beside an LRU cache. Speed-ups are against the first policy. Equal
            names get a number. By default two that suit the system: `monde` and `edge-ndp` with NDP units,
            `n-cpu-moe` and `hybrid` with a CPU, `resident` and `on-demand-lfu` with only a link; `resident` only
            without a link.
        model: A preset's name, a TOML, config.json or GGUF file, a model's folder or a Model. By default the preset
            that the trace names.
        overrides: New values of single fields, by path: `{"system.ndp.units": 6}`. A path begins with `model`, `system`
            or `policy`. `policy.FIELD` is set in every policy, `policy.NAME.FIELD` in that one.
        slots: Experts that the GPU can hold: a number, a share of all as `"25%"`, or memory as `"4000MiB"`, counted in
            the largest expert. By default the GPU's memory decides.
        ignore_capacity: Replay even if the experts do not fit the NDP units.
        jobs: Threads. By default one a policy, at most one a core. They do not change the result.
        progress: A function that gets the number of rows since its last call. A trace of verified steps is replayed a
            second time with one row of a request a step, and its rows are counted twice.
        timeline: The steps whose every slice of work is recorded, for `Result.timeline` and `Result.write_timeline`: a
            window `(A, B)`, from step A up to B without it as in Python, or True for the first 16 steps. Memory grows
            with the window.
        regret: Also solve each layer by dispatch `optimal`, from the same state: the figures `regret`,
            `regret_equal_share`, `regret_layers` and `regret_left_out`. No other figure changes.
        decisions: Keep every decision beside that of `optimal`, in a temporary file, for `Result.decisions` and
            `Result.write_decisions`. This includes `regret`.
        code: False refuses policies that name a Python file, whose code would run.

    Returns:
        The result. It has frames and `summary.json` as a dict, and `Result.write` writes files.

    Raises:
        UsageError: A name or value is unknown or wrong, or values do not go together. The message says what to do.
        MoetraceError: A file is damaged or cannot be read.

    Examples:
        >>> import moetrace as mt
        >>> result = mt.replay("traces/tiny-olmoe.h5", policies=["monde", "edge-ndp"], slots=48)
        >>> for name, total_s in result.summary.select("name", "total_s").rows():
        ...     print(f"{name} {total_s:.2f} s")
        monde 12.96 s
        edge-ndp 5.93 s
    """
    refuse_if_forked()
    with opened(trace) as found:
        found.check_has_rows()  # before its model is asked for: no model would help
        jobs = _whole("jobs", jobs)
        slots = slots if isinstance(slots, str) else _whole("slots", slots)
        setup, warnings = resolve(found, model, system, policies, {} if overrides is None else overrides, code)
        jobs = min(cores(), len(setup.policies)) if jobs is None else _at_least_one("jobs", jobs)
        window = window_of(timeline, found.steps, warnings)
        setup = replace(setup, slots=slots, ignore_capacity=ignore_capacity, window=window)
        setup = replace(setup, regret=regret or decisions, decisions=decisions)
        if policies is None and (note := unneeded_units(found, setup)):
            warnings.append(note)
        (run,) = run_setups(found, [setup], jobs=jobs, progress=progress)
        if isinstance(run, MoetraceError):
            raise run
        break_even = break_even_tokens(found, setup, run, jobs=jobs, progress=progress)
        return Result(run, (*warnings, *run.warnings), trace_facts(found), break_even)


def _whole(name: str, value: SupportsIndex | None) -> int | None:
    """The whole number itself, NumPy's too."""
    try:
        return None if value is None else operator.index(value)
    except TypeError:
        raise UsageError(f"{name} is {value!r}, but must be a whole number.") from None


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise UsageError(f"{name} is {value}, but must be at least 1.")
    return value
