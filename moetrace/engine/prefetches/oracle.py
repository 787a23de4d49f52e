"""`oracle:d`: what the next d layers need moves ahead, each expert with probability p."""

from moetrace.engine.prefetch import ORACLE
from moetrace.spec.choices import Prefetch

RECORD = Prefetch(
    name="oracle",
    meaning="what the next d layers need moves ahead, with probability p",
    rule=ORACLE,
    parameters=("p", "seed", "prefetch_blocks"),
    letter="d",
    largest=4096,  # blocks of a trace carry as many layers more
    bare=False,
    users=True,
    ahead=True,
    knows_future=True,
    list_order=40,
)
