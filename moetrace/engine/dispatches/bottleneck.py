"""`bottleneck` (TriMoE): from `cheapest`, what ends last gives up its costliest expert while the layer gets faster."""

from moetrace.engine.tiers.tier_refine import refine
from moetrace.spec.choices import Dispatch


def refined(state, view, layer, load, plan):
    """Begin with the cheapest device of each expert, then move one by one."""
    refine(view, load.size, plan)


RECORD = Dispatch(
    name="bottleneck",
    meaning="as cheapest; then the device that ends last gives up its costliest expert, while the layer gets faster",
    tiers_hook=refined,
    parameters=("with_cpu",),
    beside_units=True,
    uses_cpu=True,
    reads_state=False,
    list_order=81,
)
