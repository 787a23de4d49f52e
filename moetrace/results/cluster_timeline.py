"""The time line of a cluster: what each GPU and each resource does, stage by stage (docs/timeline.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moetrace.engine.cluster.cluster_tape import KINDS, NOBODY
from moetrace.spec.later import Later

if TYPE_CHECKING:
    import polars as pl

    from moetrace.engine.cluster.cluster_lane import ClusterLane
else:
    pl = Later("polars")

MOVES = "migration"  # the track of what waits for experts to move, and of their moving beside the steps
ARGUMENTS = {
    "attention": ("step", "layer", "micro_batch", "bytes"),
    "shared": ("step", "layer", "micro_batch", "bytes"),
    "dispatch": ("step", "layer", "micro_batch", "chunk", "bytes"),
    "experts": ("step", "layer", "micro_batch", "chunk", "rows", "bytes"),
    "combine": ("step", "layer", "micro_batch", "chunk", "bytes"),
    "kernels": ("step", "layer"),
    "fused": ("step", "layer"),
    "head": ("step", "bytes"),
    "pause": ("step", "bytes"),
    "migration": ("step",),
}


def cluster_slices(lane: ClusterLane, starts_s: np.ndarray) -> pl.DataFrame:
    """Return the rows of `timeline_frame` that are one policy's; starts_s float64 [steps + 1] of the window.

    Beside the columns of every time line there are `micro_batch` and `chunk`, null where a slice has no such number.
    """
    recording = lane.recording
    assert recording is not None
    notes, first, log = recording.slices, recording.first, lane.log.step[recording.first : recording.stop]
    names = {row: part.name for row, part in enumerate(lane.parts)}
    at = notes["step"] - first
    numbers = ("step", "layer", "micro_batch", "chunk", "rows", "bytes", "duration_s")
    frame = pl.DataFrame(
        {
            "unit": pl.Series(notes["unit"]).replace_strict(names, default=None, return_dtype=pl.String),
            "kind": pl.Series(KINDS).gather(notes["kind"]),
            "start_s": starts_s[at] + log["pause_s"][at] + notes["start_s"],
            **{name: np.ascontiguousarray(notes[name]) for name in numbers},
        }
    )
    steps, none = np.arange(first, recording.stop), np.full(len(log), NOBODY)
    whole = pl.DataFrame(
        {
            "unit": pl.Series([None] * len(steps), dtype=pl.String),
            "kind": pl.repeat("step", len(steps), eager=True),
            "start_s": starts_s[:-1],
            "step": steps,
            **dict.fromkeys(("layer", "micro_batch", "chunk"), none),
            **{name: np.zeros(len(steps)) for name in ("rows", "bytes")},
            "duration_s": np.ascontiguousarray(log["duration_s"]),
        },
        schema_overrides={"step": pl.Int64},
    )
    frame = pl.concat([whole.select(frame.columns), frame]).with_columns(
        *(pl.when(pl.col(name) >= 0).then(pl.col(name)).alias(name) for name in ("layer", "micro_batch", "chunk"))
    )
    is_step, unit = pl.col("kind") == "step", pl.col("unit")
    resources = {"gpus", "network", "attention", "dispatch", "experts", "combine"}
    bare = unit.is_in(resources) & pl.col("kind").is_in(["attention", "shared", "experts", "head", "kernels", "fused"])
    return frame.sort("step", "start_s", ~is_step, maintain_order=True).select(
        pl.lit(lane.policy.name).alias("policy"),
        "unit",
        "kind",
        _name(bool(lane.fabric.gpus["serial"][0])),
        "start_s",
        "duration_s",
        "step",
        "layer",
        "micro_batch",
        "chunk",
        pl.lit(None, pl.Int64).alias("expert"),
        pl.when((pl.col("kind") == "experts") & ~bare).then(pl.col("rows")).alias("rows"),
        pl.when(~pl.col("kind").is_in(["step", "kernels", "fused", "migration"]) & ~bare)
        .then(pl.col("bytes"))
        .alias("bytes"),
        pl.lit(None, pl.Boolean).alias("resident"),
    )


def cluster_tracks(lane: ClusterLane) -> list[str]:
    """Return a policy's tracks from top to bottom: resources, then the GPUs."""
    names, gpus = [part.name for part in lane.parts], len(lane.fabric.lead)
    if not lane.fabric.gpus["colocated"][0]:
        gpus += len(lane.fabric.slowness)
    moves = [MOVES] if lane.windows is not None else []
    return ["steps", *moves, *names[gpus:], *names[:gpus]]


def step_arguments(lane: ClusterLane, step: int) -> dict[str, Any]:
    """Return the facts about a step beside its phase and rows."""
    figures = lane.log.step[step]
    return {name: float(figures[name]) for name in ("network_bytes", "moved_bytes")}


def _name(is_serial: bool) -> pl.Expr:
    """`L3 attention`, of a pipeline `L3 attention 1` and `L3 dispatch 1,0` (micro-batch, chunk); `head`, `step 12`."""
    of_layer = pl.format("L{} {}", "layer", "kind")
    if not is_serial:
        part = pl.format("{} {}", of_layer, "micro_batch")
        chunk = pl.format("{},{}", part, "chunk")
        of_layer = pl.coalesce(chunk, part, of_layer)
    kind = pl.col("kind")
    return (
        pl.when(kind == "step").then(pl.format("step {}", "step")).otherwise(pl.coalesce(of_layer, kind)).alias("name")
    )
