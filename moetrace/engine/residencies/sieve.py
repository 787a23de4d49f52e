"""`sieve` (Zhang et al. 2024): the GPU evicts the first expert not demanded since a hand passed it."""

from moetrace.spec.choices import BY_HAND, CachePolicy, Residency

RECORD = Residency(
    name="sieve",
    meaning="the GPU evicts the first expert not demanded since a hand passed it",
    order=BY_HAND,
    prefetches=("oracle",),
    cache=CachePolicy(
        replays="moetrace.analyze.cache.kernels.replays:sieve",
        list_order=30,
    ),
    list_order=70,
)
