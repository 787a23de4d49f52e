"""`arc` (Megiddo and Modha 2003): defined one access at a time, so of `analyze cache` only."""

from moetrace.spec.choices import CachePolicy, Residency

RECORD = Residency(
    name="arc",
    meaning="a balance of those demanded once and more often, led by what was evicted lately",
    instead="is of moetrace analyze cache alone, where accesses come one at a time; take residency lru or lfu",
    cache=CachePolicy(
        replays="moetrace.analyze.cache.kernels.replays:arc",
        one_at_a_time=True,
        list_order=50,
    ),
    list_order=150,
)
