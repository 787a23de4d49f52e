"""`lru`: the GPU evicts the least recently used expert."""

from moetrace.spec.choices import BY_TOUCH, CachePolicy, Residency

RECORD = Residency(
    name="lru",
    meaning="the GPU evicts the least recently used expert",
    order=BY_TOUCH,
    prefetches=("oracle",),
    cache=CachePolicy(
        replays="moetrace.analyze.cache.kernels.replays:lru",
        list_order=10,
    ),
    list_order=50,
)
