"""`fiddler` (arXiv 2402.07033): each expert, regardless of the others, where it is done sooner."""

from moetrace.engine.layer import less
from moetrace.engine.tiers.tier_moves import sooner_on_gpu
from moetrace.spec.choices import Dispatch


def each_where_sooner(state, view, layer, load, plan):
    """Run residents on the GPU; fetch another one if that and running it takes less than running it at home."""
    for i in range(load.size):
        expert = view.active[i]
        plan[i] = expert.resident or less(expert.fetch_s + expert.gpu_s, expert.ndp_s)


def each_where_sooner_with_tiers(state, view, layer, load, plan):
    """Do the same on a machine with more tiers, where a fetch and its work may overlap."""
    sooner_on_gpu(view, load.size, plan)


RECORD = Dispatch(
    name="fiddler",
    meaning="residents run on the GPU; each other expert where it would be done sooner, fetched or at home",
    hook=each_where_sooner,
    tiers_hook=each_where_sooner_with_tiers,
    reads_state=False,
    list_order=70,
)
