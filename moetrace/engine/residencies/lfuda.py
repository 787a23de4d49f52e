"""`lfuda`: the GPU drops the least count, to which the age of the cache at the last demand is added."""

from moetrace.engine.residency import counted
from moetrace.spec.choices import BY_AGE, CachePolicy, Residency


def by_count_and_age(state, view, layer, load, plan):
    """Count a demand, up to a limit; score the expert by its count and how old the cache is now."""
    for i in range(load.size):
        cell = state[layer, view.active[i].expert]
        cell.memory = counted(cell.memory, view.most_count)
        cell.score = view.age + cell.memory


RECORD = Residency(
    name="lfuda",
    meaning="the GPU evicts the expert demanded least, and forgets: counts are limited, and the cache ages",
    hook=by_count_and_age,
    parameters=("most_count", "evicted_share"),
    order=BY_AGE,
    prefetches=("oracle",),
    cache=CachePolicy(
        replays="moetrace.analyze.cache.kernels.replays:lfuda",
        list_order=75,
    ),
    list_order=95,
)
