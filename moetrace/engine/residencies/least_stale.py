"""`least-stale` (arXiv 2602.03921): the GPU evicts an expert of the layer that comes last in order."""

from moetrace.engine.residency import score_of_layer
from moetrace.spec.choices import CachePolicy, Residency


def by_layer(state, view, layer, load, plan):
    """Score the experts of a layer by when it ran: one of the layer that ran last goes first."""
    layers, experts = state.shape
    if view.step == 0 and layer == 0:
        for coming in range(1, layers):  # as if they had run in a step before
            for e in range(experts):
                state[coming, e].score = score_of_layer(-1, coming, layers)
    score = score_of_layer(view.step, layer, layers)
    for e in range(experts):
        state[layer, e].score = score


RECORD = Residency(
    name="least-stale",
    meaning="the GPU evicts an expert of the layer that comes last in order",
    hook=by_layer,
    prefetches=("oracle",),
    cache=CachePolicy(
        replays="moetrace.analyze.cache.kernels.replays:least_stale",
        list_order=90,
    ),
    list_order=110,
)
