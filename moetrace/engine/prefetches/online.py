"""`online:m`: after a layer, up to m of its experts move whose score is above the worst resident one's."""

from moetrace.engine.prefetch import ONLINE
from moetrace.spec.choices import Prefetch

RECORD = Prefetch(
    name="online",
    meaning="up to m experts of a layer move when their score earns a slot",
    rule=ONLINE,
    parameters=("prefetch_blocks",),
    letter="m",
    largest=65535,
    bare=False,
    residencies=("ewma", "lfu", "lfuda"),
    users=True,
    list_order=30,
)
