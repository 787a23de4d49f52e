"""`halo` (after HALO, INFOCOM 2026): what matters most runs on the GPU, the least gate mass where rows may get lost."""

from moetrace.engine.tiers.tier_moves import weightiest
from moetrace.spec.choices import Dispatch


def weightiest_on_gpu(state, view, layer, load, plan):
    """Run the H experts of most gate mass on the GPU, with the H of least time, the smallest on a tie."""
    weightiest(view, load.size, plan)


RECORD = Dispatch(
    name="halo",
    meaning="the experts of most gate mass run on the GPU, the rest stay, where rows of theirs may get lost",
    tiers_hook=weightiest_on_gpu,
    reads_state=False,
    weighs=True,
    list_order=95,
)
