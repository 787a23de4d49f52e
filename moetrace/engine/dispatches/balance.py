"""`balance` (arXiv 2601.03992): experts move to the GPU one by one while the layer gets faster."""

from moetrace.engine.dispatch import move_while_faster
from moetrace.engine.tiers.tier_moves import balance
from moetrace.spec.choices import Dispatch


def balanced(state, view, layer, load, plan):
    """Start with every expert on its units."""
    move_while_faster(view, load.size, plan)


def balanced_with_tiers(state, view, layer, load, plan):
    """Do the same on a machine with more tiers."""
    balance(view, load.size, plan)


RECORD = Dispatch(
    name="balance",
    meaning="experts move to the GPU one by one while the layer gets faster",
    hook=balanced,
    tiers_hook=balanced_with_tiers,
    reads_state=False,
    list_order=40,
)
