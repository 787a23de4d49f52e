"""Each layer solved once more by `optimal` from the same state: what the policy's decisions cost beside the best."""

from typing import Any, NamedTuple

import numpy as np

from moetrace.engine.dispatch import OPTIMAL_UP_TO, move_while_faster, search_splits
from moetrace.engine.layer import timeline
from moetrace.engine.state import HOME, ON_GPU, records
from moetrace.engine.tiers.tier_search import is_searched, optimal_of
from moetrace.engine.tiers.tier_times import moe_s, term_of
from moetrace.jit.compile import kernel

# Sums over the layers in which all assignments were tried; `left_out` are the others that run anything.
REGRET = np.dtype(
    [("excess_s", np.float64), ("optimal_s", np.float64)]
    + [(name, np.int64) for name in ("layers", "left_out", "experts", "equal_experts")]
)
# One active expert: what a dispatch could know of it, where it ran, and where `optimal` would have run it.
DECISION = np.dtype(
    [(name, np.int64) for name in ("step", "step_rows")]
    + [(name, np.float64) for name in ("rows", "weight_bytes", "gpu_s", "fetch_s", "ndp_s", "cpu_s")]
    + [(name, np.uint16) for name in ("layer", "expert", "group")]
    + [(name, np.uint8) for name in ("phase", "resident", "device", "optimal")],
    align=True,
)
NOT_SEARCHED = 255  # in the place of the best device


class Decisions(NamedTuple):
    """Decisions of a block, in the order of step, layer and demand."""

    made: Any  # DECISION [n]
    ends: np.ndarray  # int64 [1]: how many there are so far


class Regret(NamedTuple):
    """The record of decisions beside the best ones."""

    tally: Any  # REGRET [1]
    plan: np.ndarray  # uint8 [E]: the best of the layer at hand
    has_home: int  # 0: the GPU is the only device
    decisions: Any = None  # Decisions, where they are exported


def new_regret(experts: int, has_home: bool, exports: bool) -> Regret:
    """Return the books of a lane before the first step."""
    decisions = Decisions(records(0, DECISION), np.zeros(1, np.int64)) if exports else None
    return Regret(records(1, REGRET), np.zeros(experts, np.uint8), int(has_home), decisions)


@kernel
def compare_with_optimal(regret, tiers, machine, view, layer, size, plan):
    """Add a layer's decisions to the books, before its time line is made; without books do nothing."""
    if regret is not None:
        _compare(regret, tiers, machine, view, layer, size, plan)


@kernel(inline=False)
def _compare(regret, tiers, machine, view, layer, size, plan):
    """Do that. Both times are as decisions see them; the units' work in ``view.groups`` is made later once more."""
    if size == 0:
        return
    is_solved = _solve(regret, tiers, view, size)
    tally = regret.tally[0]
    if is_solved:
        best_s = _seen_s(tiers, machine, view, size, regret.plan)
        tally.excess_s += _seen_s(tiers, machine, view, size, plan) - best_s
        tally.optimal_s += best_s
        tally.layers += 1
        tally.experts += size
        for i in range(size):
            tally.equal_experts += plan[i] == regret.plan[i]
    else:
        tally.left_out += 1
    _note(regret.decisions, regret, view, layer, size, plan, is_solved)


@kernel
def _solve(regret, tiers, view, size):
    """Write the best plan, and return whether it is the best of all assignments."""
    best = regret.plan
    for i in range(size):
        best[i] = HOME if regret.has_home else ON_GPU
    return not regret.has_home or _search(tiers, view, size, best)


@kernel
def _search(tiers, view, size, best):
    """Do that with a home; where there are too many assignments, nothing is searched."""
    if tiers is None:
        is_solved = size <= OPTIMAL_UP_TO
        if is_solved:
            search_splits(view, size, best, move_while_faster(view, size, best))
    else:
        is_solved = is_searched(view, size)
        if is_solved:
            optimal_of(view, size, best)
    return is_solved


@kernel
def _seen_s(tiers, machine, view, size, plan):
    """Return a layer's seconds under a plan, as decisions see it."""
    if tiers is None:
        return timeline(machine, view, size, plan, -1).moe_s
    return moe_s(term_of(view), view, size, plan)


@kernel
def _note(decisions, regret, view, layer, size, plan, is_solved):
    """Write a layer's decisions, where they are exported."""
    if decisions is None:
        return
    first = decisions.ends[0]
    for i in range(size):
        expert, made = view.active[i], decisions.made[first + i]
        made.step, made.step_rows, made.phase = view.step, view.rows, view.phase
        made.layer, made.expert, made.group = layer, expert.expert, expert.group
        made.rows, made.weight_bytes, made.resident = expert.rows, expert.weight_bytes, expert.resident
        made.gpu_s, made.fetch_s = expert.gpu_s, expert.fetch_s
        made.ndp_s, made.cpu_s = expert.ndp_s, expert.cpu_s
        made.device = plan[i]
        made.optimal = regret.plan[i] if is_solved else NOT_SEARCHED
    decisions.ends[0] = first + size


def with_room(regret: Regret, decisions: int) -> Regret:
    """Return the books with room for a number of decisions of a block."""
    return regret._replace(decisions=Decisions(records(decisions, DECISION), np.zeros(1, np.int64)))
