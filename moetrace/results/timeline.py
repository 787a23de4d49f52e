"""The time line of a window of steps: every slice of work as a row, and the counters beside them.

It is not a drawing of the timing model but a recording of it: the replay itself noted each slice while it computed
with it (`moetrace.engine.tape`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from moetrace.engine.cluster.cluster_lane import ClusterLane, ClusterRecording
from moetrace.engine.machine import NO_ROW
from moetrace.engine.recording import Recording
from moetrace.engine.run import AnyLane, Lane, Run
from moetrace.engine.state import FIRST_GROUP
from moetrace.engine.tape import COUNT, KINDS
from moetrace.results.cluster_timeline import cluster_slices
from moetrace.results.frames import SLICE_STEPS
from moetrace.spec.errors import UsageError
from moetrace.spec.later import Later

if TYPE_CHECKING:
    import polars as pl
else:
    pl = Later("polars")


def timeline_frame(run: Run) -> pl.DataFrame:
    """Return a row for each slice of the recorded steps, policy by policy, step by step, in order of their start.

    Columns: `policy`; `unit` (`gpu`, `ndp0` .., `link_in`, `link_out`, `cpu`, `disk`, `remote`; null of a step, a
    layer, a wait, a cold start, evictions and moves); `kind` (`step`, `layer`, `wait`, `cold`, `dense`, `expert`,
    `fetch`, `prefetch`, `activations`, `head`; with more tiers `evict`, `activations-cpu`, `outside`, `read`,
    `read-ahead`, `move`, `remote`); `name`; `start_s` (since the trace began) and `duration_s`; `step`; `layer` and
    `expert` (null where there is no such number); `rows` and `bytes` (of a unit's shard, so that all add up);
    `resident` (of an expert, whether the GPU held it when the router spoke). Those of a cluster are in
    `cluster_timeline`.
    """
    return pl.concat([slices_of(run, lane, recording) for lane, recording in recordings(run)])


def counter_frame(run: Run) -> pl.DataFrame:
    """Return the counts of resident experts and queued transfers at each change, policy by policy.

    Columns: `policy`; `at_s` (since the trace began); `step`; `residents`, experts that the GPU holds; `queued`, and
    `queued_bytes`, transfers of the prefetch queue that have yet to be completed.
    """
    return pl.concat([counts_of(lane, recording) for lane, recording in recordings(run)])


def recordings(run: Run) -> Iterator[tuple[AnyLane, Recording | ClusterRecording]]:
    """Yield each policy's lane, and its recording.

    Raises UsageError if nothing was recorded.
    """
    for lane in run.lanes:
        if lane.recording is None:
            raise UsageError("Nothing was recorded for a timeline: replay with timeline=(A, B), steps A to B - 1.")
        yield lane, lane.recording


def step_starts_s(lane: AnyLane, first: int, stop: int) -> np.ndarray:
    """Return float64 [stop - first + 1]: when each step begins and the last one ends, as in `steps.parquet`."""
    durations_s, edge_s = lane.log.step["duration_s"], 0.0
    for begin in range(0, first, SLICE_STEPS):
        part_s = durations_s[begin : min(begin + SLICE_STEPS, first)]
        edge_s = float(np.cumsum(np.concatenate(([edge_s], part_s)))[-1])
    return np.cumsum(np.concatenate(([edge_s], durations_s[first:stop])))


def slices_of(run: Run, lane: AnyLane, recording: Recording | ClusterRecording) -> pl.DataFrame:
    """Return the rows of `timeline_frame` that are one policy's."""
    starts_s = step_starts_s(lane, recording.first, recording.stop)
    if isinstance(lane, ClusterLane):
        return cluster_slices(lane, starts_s)
    assert isinstance(recording, Recording)
    notes, share, groups = recording.slices, lane.machine.share, len(lane.state.scratch.groups)
    # A group of units is one row of the tape, but each of its units is busy. Each row after the groups is one part.
    behind = notes["unit"] >= FIRST_GROUP + groups
    in_group = (notes["unit"] >= FIRST_GROUP) & ~behind
    copies = np.where(in_group, share, 1)
    first_copy = np.cumsum(copies) - copies
    of = np.repeat(np.arange(len(notes)), copies)
    notes, in_group, behind = notes[of], in_group[of], behind[of]
    unit = np.where(in_group, FIRST_GROUP + (notes["unit"] - FIRST_GROUP) * share, notes["unit"])
    unit += np.where(behind, groups * (share - 1), 0)
    unit += np.arange(len(of)) - first_copy[of]
    part = np.where(in_group, share, 1)
    names = _names_of(lane)
    frame = pl.DataFrame(
        {
            "unit": pl.Series(unit).replace_strict(names, default=None, return_dtype=pl.String),
            "kind": pl.Series(KINDS).gather(notes["kind"]),
            "start_s": starts_s[notes["step"] - recording.first] + notes["start_s"],
            "duration_s": np.ascontiguousarray(notes["duration_s"]),
            "step": np.ascontiguousarray(notes["step"]),
            "layer": np.ascontiguousarray(notes["layer"]),
            "expert": np.ascontiguousarray(notes["expert"]),
            "rows": notes["rows"] / part,
            "bytes": notes["bytes"] / part,
            "resident": np.ascontiguousarray(notes["resident"]),
        }
    )
    steps = _steps_of(run, lane, recording, starts_s)
    # Steps first, then layers: slices that begin together are sorted from the outside in.
    frame = pl.concat([steps.select(frame.columns), frame]).with_columns(pl.lit(lane.policy.name).alias("policy"))
    order = pl.col("kind").replace_strict({"step": 0, "layer": 1}, default=2, return_dtype=pl.Int8)
    return frame.sort("step", "start_s", order, maintain_order=True).select(
        "policy",
        "unit",
        "kind",
        _name(),
        "start_s",
        "duration_s",
        "step",
        _unless(pl.col("layer") < 0, "layer"),
        _unless(pl.col("expert") < 0, "expert"),
        _unless(pl.col("kind") != "expert", "rows"),
        _unless(pl.col("kind").is_in(["step", "layer", "wait", "cold", "evict", "remote"]), "bytes"),
        _unless(pl.col("resident") < 0, "resident").cast(pl.Boolean),
    )


def _names_of(lane: Lane) -> dict[int, str]:
    """Names of parts by their row in the unit log, if each unit of a group had one of its own."""
    names, in_group, groups = {}, 0, len(lane.state.scratch.groups)
    for part in lane.parts:
        if part.log_row >= FIRST_GROUP + groups:
            names[part.log_row + groups * (lane.machine.share - 1)] = part.name
        elif part.log_row >= FIRST_GROUP:
            names[FIRST_GROUP + in_group] = part.name
            in_group += 1
        elif part.log_row != NO_ROW:
            names[part.log_row] = part.name
    return names


def _steps_of(run: Run, lane: Lane, recording: Recording, starts_s: np.ndarray) -> pl.DataFrame:
    steps = np.arange(recording.first, recording.stop)
    nothing = np.zeros(len(steps))
    return pl.DataFrame(
        {
            "unit": pl.Series([None] * len(steps), dtype=pl.String),
            "kind": pl.repeat("step", len(steps), eager=True),
            "start_s": starts_s[:-1],
            "duration_s": np.ascontiguousarray(lane.log.step["duration_s"][recording.first : recording.stop]),
            "step": steps,
            **{name: np.full(len(steps), -1) for name in ("layer", "expert", "resident")},
            "rows": nothing,
            "bytes": nothing,
        }
    )


def _name() -> pl.Expr:
    """`L3 E17`, `fetch L3 E17`, `L3 E17 outside`, `L3 dense`, `head`, `step 12`; of a layer, `L3`."""
    layer, expert = pl.format("L{}", "layer"), pl.format("L{} E{}", "layer", "expert")
    kind = pl.col("kind")
    return (
        pl.when(kind == "expert")
        .then(expert)
        .when(kind == "outside")
        .then(pl.format("{} {}", expert, kind))
        .when(kind.is_in(["fetch", "prefetch", "read", "read-ahead", "move"]))
        .then(pl.format("{} {}", kind, expert))
        .when(kind.is_in(["dense", "activations", "activations-cpu", "evict", "remote"]))
        .then(pl.format("{} {}", layer, kind))
        .when(kind == "layer")
        .then(layer)
        .when(kind == "step")
        .then(pl.format("step {}", "step"))
        .otherwise(kind)
        .alias("name")
    )


def _unless(is_none: pl.Expr, column: str) -> pl.Expr:
    return pl.when(is_none).then(None).otherwise(pl.col(column)).alias(column)


def counts_of(lane: AnyLane, recording: Recording | ClusterRecording) -> pl.DataFrame:
    """Return the rows of `counter_frame` that are one policy's; a cluster has no such rows."""
    starts_s = step_starts_s(lane, recording.first, recording.stop)
    counts = recording.counts if isinstance(recording, Recording) else np.zeros(0, COUNT)
    what = ("residents", "queued", "queued_bytes")
    frame = pl.DataFrame(
        {
            "policy": pl.repeat(lane.policy.name, len(counts), eager=True),
            "at_s": starts_s[counts["step"] - recording.first] + counts["at_s"],
            **{name: np.ascontiguousarray(counts[name]) for name in ("step", *what)},
        }
    )
    changed = pl.any_horizontal(pl.col(name) != pl.col(name).shift() for name in what).fill_null(True)
    return frame.filter(changed)
