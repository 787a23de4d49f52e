"""`hot:ratio` (MoNDE): as `hot`, with the H of its closed form, in which both sides read as long."""

from moetrace.engine.tiers.tier_moves import hottest_by_ratio
from moetrace.spec.choices import Dispatch


def hottest_by_rates(state, view, layer, load, plan):
    """Fetch the H most demanded."""
    hottest_by_ratio(view, load.size, plan)


RECORD = Dispatch(
    name="hot:ratio",
    meaning="as hot, but the share of fetched experts is the link's rate over the sum of that and home's memory "
    "bandwidth",
    tiers_hook=hottest_by_rates,
    partners=(("residency", "none"), ("prefetch", "none")),
    ignores_residency=True,
    reads_state=False,
    list_order=31,
)
