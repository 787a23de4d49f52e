"""The figures that only a cluster has (docs/cluster.md)."""

from typing import Annotated

import msgspec
from msgspec import Meta

from moetrace.results.figure import Count, Figure


class ClusterFigures(msgspec.Struct, kw_only=True):
    """The figures of a policy on a cluster, in the file's order; shares are of `total_s`."""

    cuts: Annotated[
        dict[str, str],
        Meta(description="the schedule in steps of each phase; `apart`: shared experts are a stage of their own"),
    ]
    exposed_s: Annotated[
        float,
        Figure(
            "s",
            "time beyond the same steps with transfers that take none, without pauses",
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
