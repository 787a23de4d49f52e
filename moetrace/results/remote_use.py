"""Use and cost of remote functions in a replay (timing model, section 11)."""

from typing import Any

import numpy as np

from moetrace.engine.run import AnyLane
from moetrace.spec import System


def remote_usd(system: System, lane: AnyLane) -> float | None:
    """Return what the remote functions of a policy cost, by use; None if it has no functions.

    They are paid for the seconds in which each copy works, and for its memory: `memory_gb`, or the bytes of the remote
    experts of its layer. The machine is not in it: it is paid by the time.
    """
    if lane.remote is None or system.remote is None:
        return None
    memory_gb = lane.remote.function_bytes / 1e9
    if system.remote.memory_gb is not None:
        memory_gb = np.full_like(memory_gb, system.remote.memory_gb)
    return float(system.remote.usd_per_gb_s * np.sum(memory_gb * lane.remote.books["work_s"]))


def remote_figures(system: System, lane: AnyLane) -> dict[str, Any]:
    """Return the figures that only a policy with remote experts has; nothing of others."""
    if lane.remote is None:
        return {}
    books = lane.remote.books
    counts = {"remote_calls": "calls", "remote_experts": "experts", "remote_rows": "rows"}
    return {
        "remote_s": float(books["work_s"].sum()),
        **{name: int(books[column].sum()) for name, column in counts.items()},
        "remote_usd": remote_usd(system, lane),
        "cold_s": lane.cold_s,
    }
