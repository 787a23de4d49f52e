"""`cheapest`: each expert, regardless of the others, on the device that takes least for it."""

from moetrace.engine.tiers.tier_moves import cheapest
from moetrace.spec.choices import Dispatch


def each_where_cheapest(state, view, layer, load, plan):
    """Give each expert to GPU, CPU or home."""
    cheapest(view, load.size, plan)


RECORD = Dispatch(
    name="cheapest",
    meaning="each expert where it takes least by itself: GPU with its fetch, home, or a CPU beside NDP units",
    tiers_hook=each_where_cheapest,
    parameters=("with_cpu",),
    beside_units=True,
    uses_cpu=True,
    reads_state=False,
    list_order=80,
)
