"""`belady`: the GPU evicts the expert whose next use is farthest in the future."""

from moetrace.spec.choices import CachePolicy, Residency


def by_next_use(state, view, layer, load, plan):
    """Score an expert by how soon it is demanded next."""
    for i in range(load.size):
        state[layer, view.active[i].expert].score = -view.active[i].next_use


RECORD = Residency(
    name="belady",
    meaning="the GPU evicts the expert whose next use is farthest in the future",
    hook=by_next_use,
    next_steps=True,
    knows_future=True,
    cache=CachePolicy(
        replays="moetrace.analyze.cache.kernels.replays:belady",
        next_use=True,
        list_order=120,
    ),
    list_order=120,
)
