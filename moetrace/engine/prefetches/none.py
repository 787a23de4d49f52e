"""`none`: weights move only on demand."""

from moetrace.engine.prefetch import NO_PREFETCH
from moetrace.spec.choices import Prefetch

RECORD = Prefetch(
    name="none",
    meaning="weights move only on demand",
    rule=NO_PREFETCH,
    any_residency=True,
    list_order=10,
)
