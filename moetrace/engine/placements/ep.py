"""`ep`: expert e on unit e mod N."""

from moetrace.engine.placement import round_robin
from moetrace.spec.choices import Placement

RECORD = Placement(
    name="ep",
    meaning="each expert whole on one unit, unit = id mod N",
    hook=round_robin,
    planner="moetrace.analyze.balance.plans:ONE_COPY",
    list_order=10,
)
