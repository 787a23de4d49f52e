"""`arc` (Megiddo and Modha 2003): defined one access at a time, so of `analyze cache` only."""

from moetrace.spec.choices import CachePolicy, Residency

RECORD = Residency(
    name="arc",
    meaning="a balance of experts demanded once and more often, set by recent evictions",
    instead="is only in moetrace analyze cache, where accesses come one at a time; use residency lru or lfu",
    cache=CachePolicy(
        replays="moetrace.analyze.cache.kernels.replays:arc",
        one_at_a_time=True,
        list_order=50,
    ),
    list_order=150,
)
