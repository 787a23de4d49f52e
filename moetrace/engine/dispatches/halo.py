"""`halo` (after HALO, INFOCOM 2026): what matters most runs on the GPU, the least gate mass where rows may get lost."""

from moetrace.engine.tiers.tier_moves import weightiest
from moetrace.spec.choices import Dispatch


def weightiest_on_gpu(state, view, layer, load, plan):
    """Move experts to the GPU by gate mass, unless the layer gets slower."""
    weightiest(view, load.size, plan)


RECORD = Dispatch(
    name="halo",
    meaning="experts move to the GPU by gate mass, most first, unless the layer gets slower",
    tiers_hook=weightiest_on_gpu,
    reads_state=False,
    weighs=True,
    list_order=95,
)
