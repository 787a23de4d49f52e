"""How the figures of a cluster come from its log."""

from moetrace.engine.cluster.cluster_lane import ClusterLane
from moetrace.engine.cluster.fabric import schedules_of
from moetrace.results.cluster_figures import ClusterFigures


def cluster_figures(lane: ClusterLane, total_s: float, phases: list[str]) -> ClusterFigures:
    """Return the figures of a policy; ``phases`` are those of the trace."""
    total, clock, layers = lane.books.total[0], lane.books.clock[0], lane.log.layer
    taxed = bool(lane.fabric.gpus["serial"][0])
    shares = {
        f"{stage}_share": _ratio(float(total[f"{stage}_s"]), total_s) for stage in ("dispatch", "experts", "combine")
    }
    heads_s = float(lane.books.total["head_s"][0])
    return ClusterFigures(
        cuts={phase: schedule for phase, schedule in schedules_of(lane.fabric).items() if phase in phases},
        exposed_s=float(total["exposed_s"]),
        attention_share=_ratio(float(total["attention_s"]) + heads_s, total_s),
        **shares,
        imbalance_rows=_ratio(float(layers["imbalance_rows_sum"].sum()), int(layers["imbalance_count"].sum())),
        fan_out=_ratio(int(total["distinct"]), int(total["routed"])),
        network_bytes=float(total["network_bytes"]),
        moved_bytes=float(total["moved_bytes"]),
        plans=int(clock["plans"]),
        pauses=int(clock["pauses"]),
        pause_s=float(total["pause_s"]),
        launch_tax_s=float(total["launch_tax_s"]) if taxed else None,
        locality_tax_s=float(total["locality_tax_s"]) if taxed else None,
        barrier_tax_s=float(total["barrier_tax_s"]) if taxed else None,
    )


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
