"""The figures that only a cluster has, and how they come from its log (docs/cluster.md)."""

from typing import Annotated

import msgspec
from msgspec import Meta

from moetrace.engine.cluster.cluster_lane import ClusterLane
from moetrace.engine.cluster.fabric import schedules_of
from moetrace.results.figure import Count, Figure


class ClusterFigures(msgspec.Struct, kw_only=True):
    """What a policy did on a cluster, its fields in the file's order; shares are of `total_s`."""

    cuts: Annotated[dict[str, str], Meta(description="the schedule in steps of each phase")]
    exposed_s: Annotated[
        float,
        Figure(
            "s",
            "time beyond the same steps with transfers that take none, pauses included",
            "lower",
            "transfers that nothing hides",
            "exposed",
        ),
    ]
    attention_share: Annotated[
        float | None, Figure("share", "attention, shared experts and head", None, "attention", "atten-\ntion")
    ]
    dispatch_share: Annotated[
        float | None, Figure("share", "transfers to the experts", None, "to the experts", "dis-\npatch")
    ]
    experts_share: Annotated[float | None, Figure("share", "experts of the busiest GPU", None, "experts", "experts")]
    combine_share: Annotated[float | None, Figure("share", "transfers back", None, "back", "com-\nbine")]
    imbalance_rows: Annotated[
        float | None,
        Figure(
            "ratio",
            "most rows of a GPU / mean of all that hold experts, over layers with rows",
            "lower",
            "imbalance of rows",
            "rows\nmax/mean",
        ),
    ]
    fan_out: Annotated[
        float | None,
        Figure("ratio", "GPUs that a row's experts stand on, mean over rows and layers", None, "fan-out", "fan-\nout"),
    ]
    network_bytes: Annotated[
        float, Figure("bytes", "activations over the wire, both ways", "lower", "over the network", "network")
    ]
    moved_bytes: Annotated[
        float, Figure("bytes", "experts that moved for new plans", "lower", "moved for plans", "moved")
    ]
    plans: Annotated[Count, Figure("count", "plans that were made from the steps before", None, "plans", "plans")]
    pauses: Annotated[Count, Figure("count", "steps that waited for experts to move", "lower", "pauses")]
    pause_s: Annotated[float, Figure("s", "time of these waits", "lower", "in pauses", "pauses")]
    launch_tax_s: Annotated[
        float | None,
        Figure("s", "launches of a layer's further kernels", "lower", "launch tax", "launch\ntax"),
    ]
    locality_tax_s: Annotated[
        float | None,
        Figure("s", "what rows take between the kernels of a layer", "lower", "locality tax", "locality\ntax"),
    ]
    barrier_tax_s: Annotated[
        float | None,
        Figure(
            "s",
            "what GPUs lose where transfers and experts wait for each other",
            "lower",
            "barrier tax",
            "barrier\ntax",
        ),
    ]


def cluster_figures(lane: ClusterLane, total_s: float, phases: list[str]) -> ClusterFigures:
    """Return the figures of a policy; ``phases`` are those of the trace."""
    total, clock, layers = lane.books.total[0], lane.books.clock[0], lane.log.layer
    taxed = bool(lane.fabric.gpus["taxed"][0])
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
