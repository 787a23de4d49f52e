"""`lfu`: the GPU evicts the expert demanded least, counts being halved every `half_life` steps."""

from moetrace.engine.residency import demands
from moetrace.spec.choices import CachePolicy, Residency


def by_frequency(state, view, layer, load, plan):
    """Score an expert by the number of its demands so far."""
    if layer == 0 and view.half_life > 0 and view.step > 0 and view.step % view.half_life == 0:
        for cell_layer in range(state.shape[0]):
            for e in range(state.shape[1]):
                state[cell_layer, e].score *= 0.5
    for i in range(load.size):
        cell = state[layer, view.active[i].expert]
        cell.score = demands(cell.score, False, False)


RECORD = Residency(
    name="lfu",
    meaning="the GPU evicts the expert demanded least",
    hook=by_frequency,
    parameters=("half_life",),
    prefetches=("oracle",),
    cache=CachePolicy(
        replays="moetrace.analyze.cache.kernels.replays:lfu",
        list_order=60,
    ),
    list_order=80,
)
