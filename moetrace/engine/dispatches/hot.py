"""`hot` (MoNDE): the H most demanded experts are fetched."""

from moetrace.engine.layer import give_rest, less, ndp_end_s, take_from_group
from moetrace.engine.tiers.tier_moves import hottest
from moetrace.spec.choices import Dispatch


def hottest_on_gpu(state, view, layer, load, plan):
    """Fetch the H most demanded, with the H of least time, the smallest on a tie."""
    give_rest(view, load.size, plan)
    best_s, best = ndp_end_s(view), 0
    free_s, arrival_s = 0.0, 0.0
    for i in range(load.size):
        expert = view.active[i]
        take_from_group(view.groups, expert)
        arrival_s += expert.fetch_s
        free_s = max(free_s, arrival_s) + expert.gpu_s
        moe_s = max(free_s, ndp_end_s(view))
        if less(moe_s, best_s):
            best_s, best = moe_s, i + 1
        if not less(free_s, best_s):
            break  # the GPU's time is already as long, and only grows
    for i in range(load.size):
        plan[i] = i < best


def hottest_with_tiers(state, view, layer, load, plan):
    """Do the same on a machine with more tiers."""
    hottest(view, load.size, plan)


RECORD = Dispatch(
    name="hot",
    meaning="the most demanded experts are fetched to the GPU, the rest stay",
    hook=hottest_on_gpu,
    tiers_hook=hottest_with_tiers,
    partners=(("residency", "none"), ("prefetch", "none")),
    ignores_residency=True,
    reads_state=False,
    list_order=30,
)
