"""Where speculation begins to pay: what a step that verifies several rows of a request costs in steps of one row."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moetrace.engine.run import Run, run_setups
from moetrace.engine.setup import Setup
from moetrace.spec.errors import MoetraceError
from moetrace.trace import Trace
from moetrace.trace.rebatch import rebatch
from moetrace.trace.schema import DECODE


def verified_batch(trace: Trace) -> tuple[int, int | None] | None:
    """Batch and chunk of a trace of verified steps, as `rebatch` noted them in `source`; None of any other trace."""
    said = trace.source.get("parameters") if "rebatch" in trace.source else None
    if not isinstance(said, dict):
        return None
    batch, chunk, verify = (_whole(said.get(name)) for name in ("batch", "chunk", "verify"))
    if batch is None or verify in (None, 1) or (chunk is None and said.get("chunk") is not None):
        return None
    return batch, chunk


def _whole(said: Any) -> int | None:
    return said if type(said) is int and 1 <= said < 2**63 else None


def break_even_tokens(
    trace: Trace, setup: Setup, run: Run, *, jobs: int, progress: Callable[[int], None] | None = None
) -> list[float | None] | None:
    """Replay the requests of a trace of verified steps once more, with one output row of each request a step.

    Args:
        trace: The trace.
        setup: The setup that `run` was made with.
        run: The replay of the trace.
        jobs: Threads.
        progress: A function that gets the number of rows done, of all rows of `trace`.

    Returns:
        For each policy, the seconds of decode steps over those of the same number of steps of one row, with the same
        number of requests: the tokens that a step must keep, in the mean, to be as fast. None where no step has its
        like, and at all if `trace` has no verified steps.

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
                single,
                [replace(setup, window=None, regret=False, decisions=False)],
                jobs=jobs,
                progress=_scaled(progress, trace, single),
            )
            if isinstance(plain, MoetraceError):
                raise plain
            requests, single_requests = _requests_of_steps(trace), _requests_of_steps(single)
    return [
        _ratio(requests, lane.log.step["duration_s"], single_requests, other.log.step["duration_s"])
        for lane, other in zip(run.lanes, plain.lanes, strict=True)
    ]


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


def _requests_of_steps(trace: Trace) -> np.ndarray:
    """How many requests each decode step has, int64 [steps]; 0 for other steps."""
    found = np.zeros(trace.steps, np.int64)
    for block in trace.row_blocks():
        step = np.repeat(np.arange(len(block.offset) - 1), np.diff(block.offset))
        pairs = np.unique((step << 32) + block.request)
        found[block.first_step : block.first_step + len(block.offset) - 1] = np.bincount(
            pairs >> 32, minlength=len(block.offset) - 1
        )
    return np.where(trace.phase == DECODE, found, 0)


def _ratio(requests: np.ndarray, step_s: np.ndarray, single_requests: np.ndarray, single_s: np.ndarray) -> float | None:
    """Seconds of the steps over mean seconds of single steps of equally many requests; only counts that both have."""
    sizes = max(requests.max(), single_requests.max()) + 1
    steps, singles = (np.bincount(each, minlength=sizes) for each in (requests, single_requests))
    both = (steps > 0) & (singles > 0) & (np.arange(sizes) > 0)
    if not both.any():
        return None
    total_s = np.bincount(requests, step_s, minlength=sizes)[both].sum()
    mean_s = np.bincount(single_requests, single_s, minlength=sizes)[both] / singles[both]
    return float(total_s / (steps[both] * mean_s).sum())
