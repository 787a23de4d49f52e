"""Where speculation begins to pay: what a step that verifies several rows of a request costs in steps of one row."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from moetrace.engine.run import Run, run_setups
from moetrace.engine.setup import Setup
from moetrace.spec.errors import MoetraceError
from moetrace.trace import Trace
from moetrace.trace.rebatch import rebatch
from moetrace.trace.schema import DECODE


def verified_batch(trace: Trace) -> tuple[int, int | None] | None:
    """Batch and chunk of a trace of verified steps, as `rebatch` told them in `source`; None of any other trace."""
    said = trace.source.get("parameters") if "rebatch" in trace.source else None
    if not isinstance(said, dict):
        return None
    batch, chunk, verify = (said.get(name) for name in ("batch", "chunk", "verify"))
    numbers = [batch, verify] if chunk is None else [batch, verify, chunk]
    if not all(type(number) is int and 1 <= number < 2**63 for number in numbers) or verify == 1:
        return None
    return batch, chunk


def break_even_tokens(
    trace: Trace, setup: Setup, run: Run, *, jobs: int, progress: Callable[[int], None] | None = None
) -> list[float | None] | None:
    """Replay the requests of a trace of verified steps once more, with one output row of each request a step.

    Args:
        trace: The trace.
        setup: What `run` was made with.
        run: The replay of the trace.
        jobs: Threads.
        progress: A function that gets the number of rows done, of all rows of `trace`.

    Returns:
        For each policy, the seconds that a decode step takes for a request of it, over the same with one row a step:
        the tokens that a step must keep, in the mean, to be as fast. None where there is nothing to compare, and at all
        if `trace` has no verified steps.

    Raises:
        MoetraceError: As a replay does; or there is no room for the file of single steps, which lies in the system's
            folder for temporary files until the replay is over.
    """
    told = verified_batch(trace)
    if told is None:
        return None
    batch, chunk = told
    with tempfile.TemporaryDirectory(prefix="moetrace-") as folder:
        path = Path(folder) / "single-steps.h5"
        rebatch(trace, path, batch=batch, chunk=chunk, verify=1)
        with Trace.open(path) as single:
            (plain,) = run_setups(
                single, [replace(setup, window=None)], jobs=jobs, progress=_scaled(progress, trace, single)
            )
            if isinstance(plain, MoetraceError):
                raise plain
            verified_s, single_s = _request_step_s(trace, run), _request_step_s(single, plain)
    return [one / other if other else None for one, other in zip(verified_s, single_s, strict=True)]


def _scaled(progress: Callable[[int], None] | None, trace: Trace, single: Trace) -> Callable[[int], None] | None:
    """Progress of the rows of `single` as if they were all those of `trace`."""
    if progress is None:
        return None
    done = 0

    def advance(rows: int) -> None:
        nonlocal done
        before, done = done, done + rows
        progress(trace.rows * done // single.rows - trace.rows * before // single.rows)

    return advance


def _request_step_s(trace: Trace, run: Run) -> list[float]:
    """Seconds of the decode steps over the requests in each, summed: one a policy; 0 without decode steps."""
    pairs = 0
    for block in trace.row_blocks():
        step = np.repeat(np.arange(len(block.offset) - 1), np.diff(block.offset))
        is_decode = trace.phase[block.first_step + step] == DECODE
        pairs += len(np.unique((step[is_decode] << 32) + block.request[is_decode]))
    is_decode = run.schedule.phase == DECODE
    return [float(np.sum(lane.log.step["duration_s"][is_decode])) / max(pairs, 1) for lane in run.lanes]
