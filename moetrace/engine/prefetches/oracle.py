"""`oracle:d`: experts that the next d layers need move ahead, each with probability p."""

from moetrace.engine.prefetch import ORACLE
from moetrace.spec.choices import Prefetch

RECORD = Prefetch(
    name="oracle",
    meaning="experts that the next d layers need move ahead, with probability p",
    rule=ORACLE,
    parameters=("p", "seed", "prefetch_blocks"),
    letter="d",
    largest=4096,  # blocks of a trace also hold this number of later layers
    bare=False,
    users=True,
    ahead=True,
    knows_future=True,
    list_order=40,
)
