"""`none`: weights move on demand alone."""

from moetrace.engine.prefetch import NO_PREFETCH
from moetrace.spec.choices import Prefetch

RECORD = Prefetch(
    name="none",
    meaning="weights move on demand alone",
    rule=NO_PREFETCH,
    any_residency=True,
    list_order=10,
)
