"""`lru`: the GPU drops what was touched longest ago."""

from moetrace.spec.choices import BY_TOUCH, CachePolicy, Residency

RECORD = Residency(
    name="lru",
    meaning="the GPU drops what was touched longest ago",
    order=BY_TOUCH,
    prefetches=("oracle",),
    cache=CachePolicy(
        replays="moetrace.analyze.cache.kernels.replays:lru",
        list_order=10,
    ),
    list_order=50,
)
