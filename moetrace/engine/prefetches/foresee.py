"""`foresee`: up to four experts move, those of greatest worth for each byte to go first (`engine/by_worth.py`)."""

from moetrace.engine.prefetch import BY_WORTH
from moetrace.spec.choices import Prefetch

RECORD = Prefetch(
    name="foresee",
    meaning="the experts of greatest worth move, the best for each byte to go first",
    rule=BY_WORTH,
    parameters=("margin", "prefetch_blocks"),
    residencies=("foresee",),
    list_order=35,
)
