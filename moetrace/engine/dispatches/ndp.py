"""`ndp`: every expert at home; on a machine without units, on the CPU."""

from moetrace.spec.choices import Dispatch


def all_at_home(state, view, layer, load, plan):
    """Leave every expert where it lives."""
    for i in range(load.size):
        plan[i] = 0


RECORD = Dispatch(
    name="ndp",
    meaning="all active experts run on the NDP units, without units on the CPU",
    hook=all_at_home,
    ignores_residency=True,
    reads_state=False,
    list_order=10,
)
