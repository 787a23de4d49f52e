"""`optimal`: the least time over all splits."""

from moetrace.engine.dispatch import OPTIMAL_UP_TO, move_while_faster, search_splits
from moetrace.engine.tiers.tier_search import optimal_of
from moetrace.spec.choices import Dispatch


def optimal(state, view, layer, load, plan):
    """Search from the split of `balance`, which stands beyond 20 active experts."""
    best_s = move_while_faster(view, load.size, plan)
    if load.size <= OPTIMAL_UP_TO:
        search_splits(view, load.size, plan, best_s)


def optimal_with_tiers(state, view, layer, load, plan):
    """Do the same on a machine with more tiers."""
    optimal_of(view, load.size, plan)


RECORD = Dispatch(
    name="optimal",
    meaning="the split between GPU and units of least time",
    hook=optimal,
    tiers_hook=optimal_with_tiers,
    reads_state=False,
    counts_fallbacks=True,
    list_order=50,
)
