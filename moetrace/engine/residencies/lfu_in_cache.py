"""`lfu-in-cache`: the GPU evicts the expert demanded least since its admission."""

from moetrace.engine.residency import demands
from moetrace.spec.choices import CachePolicy, Residency


def by_frequency_in_cache(state, view, layer, load, plan):
    """Score an expert by the number of its demands since it was admitted, which is the first of them."""
    for i in range(load.size):
        cell = state[layer, view.active[i].expert]
        cell.score = demands(cell.score, True, cell.resident)


RECORD = Residency(
    name="lfu-in-cache",
    meaning="the GPU evicts the expert demanded least since its admission",
    hook=by_frequency_in_cache,
    cache=CachePolicy(
        replays="moetrace.analyze.cache.kernels.replays:lfu_in_cache",
        list_order=70,
    ),
    list_order=90,
)
