"""`fifo`: the GPU evicts the expert that it has kept longest."""

from moetrace.spec.choices import BY_ADMISSION, CachePolicy, Residency

RECORD = Residency(
    name="fifo",
    meaning="the GPU evicts the expert that it has kept longest",
    order=BY_ADMISSION,
    prefetches=("oracle",),
    cache=CachePolicy(
        replays="moetrace.analyze.cache.kernels.replays:fifo",
        list_order=20,
    ),
    list_order=60,
)
