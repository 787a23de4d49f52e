"""`eplb-hierarchical`: EPLB's policy for nodes, which a replay takes as a plan only."""

from moetrace.spec.choices import Placement

RECORD = Placement(
    name="eplb-hierarchical",
    meaning="EPLB's policy for nodes: groups of experts to nodes first, then the same within each node",
    parameters=("loads",),
    instead='is only available in `moetrace analyze balance`; export its plan and use `placement = "plan"`',
    planner="moetrace.analyze.balance.plans:HIERARCHICAL",
    list_order=50,
)
