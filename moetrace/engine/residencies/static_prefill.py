"""`static-prefill`: kept are the experts accessed most often in prefill steps so far; of `analyze cache` only."""

from moetrace.spec.choices import CachePolicy, Residency

RECORD = Residency(
    name="static-prefill",
    meaning="what all prefill steps so far used most is kept",
    instead="is of moetrace analyze cache alone; take residency prefill, which also forgets who has left",
    cache=CachePolicy(
        replays="moetrace.analyze.cache.kernels.replays:static_prefill",
        list_order=110,
    ),
    list_order=130,
)
