"""`lfu-window`: the GPU evicts the expert demanded least in the last steps."""

from moetrace.engine.residency import a_step_on
from moetrace.spec.choices import CachePolicy, Residency


def by_recent_frequency(state, view, layer, load, plan):
    """Score an expert by the number of its demands in the last steps: of each step, `memory` has a bit."""
    for e in range(state.shape[1]):
        cell = state[layer, e]
        cell.memory, left = a_step_on(cell.memory)
        cell.score -= left
    for i in range(load.size):
        cell = state[layer, view.active[i].expert]
        cell.memory += 1.0
        cell.score += 1.0


RECORD = Residency(
    name="lfu-window",
    meaning="the GPU evicts the expert demanded least in the last 48 steps",
    hook=by_recent_frequency,
    prefetches=("online", "oracle"),
    cache=CachePolicy(
        replays="moetrace.analyze.cache.kernels.replays:lfu_window",
        list_order=72,
    ),
    list_order=92,
)
