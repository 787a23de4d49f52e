"""`tp` and `tp:g`: a part of each expert on every unit, or on every unit of a group of g."""

from moetrace.engine.placement import round_robin
from moetrace.spec.choices import Placement

RECORD = Placement(
    name="tp",
    meaning="each expert split over all units, or over groups of g",
    hook=round_robin,
    letter="g",
    largest=65535,
    splits=True,
    planner="moetrace.analyze.balance.plans:ONE_COPY",
    list_order=70,
)
