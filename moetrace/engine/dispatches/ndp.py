"""`ndp`: every expert on its units."""

from moetrace.spec.choices import Dispatch


def all_on_ndp(state, view, layer, load, plan):
    """Leave every expert to its units."""
    for i in range(load.size):
        plan[i] = 0


RECORD = Dispatch(
    name="ndp",
    meaning="all active experts run on the NDP units",
    hook=all_on_ndp,
    ignores_residency=True,
    reads_state=False,
    list_order=10,
)
