"""`s3-fifo` (Yang et al. 2023): defined one access at a time, so of `analyze cache` only."""

from moetrace.spec.choices import CachePolicy, Residency

RECORD = Residency(
    name="s3-fifo",
    meaning="a small queue, whose experts are evicted unless demanded twice, and a main one",
    instead="is only in moetrace analyze cache, where accesses come one at a time; use residency sieve or fifo",
    cache=CachePolicy(
        replays="moetrace.analyze.cache.kernels.replays:s3_fifo",
        one_at_a_time=True,
        list_order=40,
    ),
    list_order=140,
)
