"""`static-prefill`: kept are the experts that most rows of prefill steps so far chose; of `analyze cache` only."""

from moetrace.spec.choices import CachePolicy, Residency

RECORD = Residency(
    name="static-prefill",
    meaning="what most rows of all prefill steps so far chose is kept",
    instead="is of moetrace analyze cache alone; take residency prefill, which also forgets who has left",
    cache=CachePolicy(
        replays="moetrace.analyze.cache.kernels.replays:static_prefill",
        row_counts=True,
        list_order=110,
    ),
    list_order=130,
)
