"""`striped`: each expert spread over all units, as `tp`; for machines whose units can be read from outside."""

from moetrace.engine.placement import round_robin
from moetrace.spec.choices import Placement

RECORD = Placement(
    name="striped",
    meaning="each expert spread over all units, as tp",
    hook=round_robin,
    splits=True,
    needs_units=True,
    list_order=72,
)
