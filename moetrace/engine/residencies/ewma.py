"""`ewma`: the GPU evicts the expert with the least moving average of load."""

from moetrace.engine.residency import faded, gained
from moetrace.spec.choices import CachePolicy, Residency


def by_average(state, view, layer, load, plan):
    """Score every expert of the layer ``alpha * n / T + (1 - alpha) * score``."""
    for e in range(state.shape[1]):
        state[layer, e].score = faded(state[layer, e].score, view.alpha)
    for i in range(load.size):
        state[layer, view.active[i].expert].score += gained(load[i], view.rows, view.alpha)


RECORD = Residency(
    name="ewma",
    meaning="the GPU evicts the expert with the least moving average of load",
    hook=by_average,
    parameters=("alpha",),
    prefetches=("oracle",),
    cache=CachePolicy(
        replays="moetrace.analyze.cache.kernels.replays:ewma",
        row_counts=True,
        list_order=80,
    ),
    list_order=100,
)
