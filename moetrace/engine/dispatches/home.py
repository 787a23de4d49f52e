"""`home`: every expert at home, as `ndp`; beside units the CPU counts as a part of the machine."""

from moetrace.engine.dispatches.ndp import all_at_home
from moetrace.spec.choices import Dispatch

RECORD = Dispatch(
    name="home",
    meaning="all active experts run where they live: on the NDP units, else on the CPU",
    hook=all_at_home,
    ignores_residency=True,
    beside_units=True,
    reads_state=False,
    list_order=11,
)
