"""`static-prefill`: kept are the experts that most rows of prefill steps so far chose; of `analyze cache` only."""

from moetrace.spec.choices import CachePolicy, Residency

RECORD = Residency(
    name="static-prefill",
    meaning="the experts that most rows of all prefill steps so far chose are kept",
    instead="is only in moetrace analyze cache; use residency prefill, which also forgets requests that have left",
    cache=CachePolicy(
        replays="moetrace.analyze.cache.kernels.replays:static_prefill",
        row_counts=True,
        list_order=110,
    ),
    list_order=130,
)
