"""`relayout` (TriMoE): hot experts move to the GPU, warm ones are spread over the units, cold ones stand on one."""

from moetrace.engine.prefetch import RELAYOUT
from moetrace.spec.choices import Prefetch

RECORD = Prefetch(
    name="relayout",
    meaning="experts move to the GPU, over all units or to one unit, by their average load",
    rule=RELAYOUT,
    parameters=("prefetch_blocks",),
    residencies=("ewma",),
    partners=(("placement", "mixed"),),
    list_order=50,
)
