"""`timeline.json.gz`: the time line in the Trace Event Format, as Perfetto and chrome://tracing open it.

The format is Google's ("Trace Event Format", JSON object form): complete slices (`ph` X), counters (C), names (M); `ts`
and `dur` in microseconds, to three places.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from moetrace.engine.cluster.cluster_lane import ClusterLane
from moetrace.engine.machine import NO_ROW
from moetrace.engine.run import AnyLane, Lane, Run
from moetrace.engine.state import LINK_IN, LINK_OUT
from moetrace.engine.tape import EXPERT
from moetrace.results import cluster_timeline
from moetrace.results.record import TIMELINE_MARK, TIMELINE_SCHEMA
from moetrace.results.timeline import counts_of, recordings, slices_of
from moetrace.spec.later import Later
from moetrace.trace.schema import PHASE_NAMES
from moetrace.version import __version__

if TYPE_CHECKING:
    import polars as pl
else:
    pl = Later("polars")

# Tracks of their own: steps, layers, and transfers that share a link's direction without waiting for each other.
_OWN_TRACKS = {
    "step": "steps",
    "layer": "layers",
    "wait": "layers",
    "cold": "layers",
    "evict": "evictions",
    "move": "moves",
}
_OWN_TRACKS |= dict.fromkeys(("pause", "migration"), cluster_timeline.MOVES)
_LINK_IN_TRACKS = {"fetch": "link_in", "prefetch": "link_in prefetch", "activations": "link_in activations"}
# Transfers to and from a CPU that works beside units.
_CPU_TRACKS = {"link_out": "link_out cpu", "link_in": "link_in activations cpu"}
_ARGUMENTS = {
    "dense": ("step", "layer", "bytes"),
    "expert": ("step", "layer", "expert", "rows", "bytes", "resident"),
    "fetch": ("step", "layer", "expert", "bytes"),
    "prefetch": ("step", "layer", "expert", "bytes"),
    "activations": ("step", "layer", "bytes"),
    "head": ("step", "bytes"),
    "wait": ("step",),
    "cold": ("step",),
    "evict": ("step", "layer"),
    "activations-cpu": ("step", "layer", "bytes"),
    "outside": ("step", "layer", "expert"),
    "read": ("step", "layer", "expert", "bytes"),
    "read-ahead": ("step", "layer", "expert", "bytes"),
    "move": ("step", "layer", "expert", "bytes"),
    "remote": ("step", "layer"),
}

Event = dict[str, Any]


def write_timeline(run: Run, file: Any, summary_sha256: str) -> None:
    """Write the recorded steps into a file that is open for writing; the same steps give the same bytes.

    `summary_sha256` says which summary.json they go with.

    Raises UsageError if nothing was recorded.
    """
    first, stop = next((recording.first, recording.stop) for _, recording in recordings(run))
    about = {
        "schema": TIMELINE_SCHEMA,
        "moetrace": __version__,
        "model": run.model.name,
        "system": run.system.name,
        "slots": run.slots,
        "window": [first, stop],
        TIMELINE_MARK: summary_sha256,
    }
    start = f'{{"displayTimeUnit":"ns","otherData":{_compact(about)},"traceEvents":['
    with (
        gzip.GzipFile("", "wb", 6, file, mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8", newline="\n") as text,
    ):
        text.write(start)
        for number, event in enumerate(timeline_events(run)):
            text.write(("\n" if number == 0 else ",\n") + _compact(event))
        text.write("\n]}\n")


def timeline_events(run: Run) -> Iterator[Event]:
    """Yield the events: each policy a process, each unit and link direction a thread."""
    for pid, (lane, recording) in enumerate(recordings(run), 1):
        yield from _slice_events(run, lane, pid, slices_of(run, lane, recording))
        yield from _counter_events(pid, counts_of(lane, recording))


def _slice_events(run: Run, lane: AnyLane, pid: int, slices: pl.DataFrame) -> Iterator[Event]:
    is_cluster = isinstance(lane, ClusterLane)
    tracks = cluster_timeline.cluster_tracks(lane) if is_cluster else _tracks_of(run, lane)
    tid = {track: number for number, track in enumerate(tracks, 1)}
    yield _name(pid, None, "process_name", name=f"{lane.policy.name} on {run.system.name}")
    yield _name(pid, None, "process_sort_index", sort_index=pid)
    for track in tid:
        yield _name(pid, tid[track], "thread_name", name=track)
        yield _name(pid, tid[track], "thread_sort_index", sort_index=tid[track])
    layers, listed = iter(()) if is_cluster else _layer_arguments(lane), _ARGUMENTS
    if is_cluster:
        listed = cluster_timeline.ARGUMENTS
    for row in _on_whole_ns(_with_tracks(slices)).iter_rows(named=True):
        kind = row["kind"]
        if kind == "step":
            arguments = _step_arguments(run, lane, row["step"])
        elif kind == "layer":
            arguments = {"step": row["step"], "layer": row["layer"], **next(layers)}
        else:
            arguments = {name: _plain(row[name]) for name in listed[kind] if not is_cluster or row[name] is not None}
        yield {
            "ph": "X",
            "name": row["name"],
            "cat": kind,
            "pid": pid,
            "tid": tid[row["track"]],
            "ts": _plain(row["ts"]),
            "dur": _plain(row["dur"]),
            "args": arguments,
        }


def _tracks_of(run: Run, lane: Lane) -> list[str]:
    """Return a policy's tracks from top to bottom."""
    names = [part.name for part in lane.parts if part.log_row not in (NO_ROW, LINK_IN, LINK_OUT)]
    tracks, links = ["steps", "layers", *names], list(_LINK_IN_TRACKS.values())
    if run.system.link is not None:
        tracks += [*(part.name for part in lane.parts if part.log_row == LINK_OUT), *links]
    tiers = lane.tiers
    if tiers is not None:
        tracks += _CPU_TRACKS.values() if tiers.term["has_cpu"][0] else ()
        tracks += [_OWN_TRACKS["evict"]] if tiers.term["evict_s"][0] else []
        tracks += [_OWN_TRACKS["move"]] if tiers.layout is not None else []
    return tracks


def _counter_events(pid: int, counts: pl.DataFrame) -> Iterator[Event]:
    counters = (
        ("experts resident", "experts", "residents"),
        ("prefetch queue", "experts", "queued"),
        ("prefetch queue bytes", "bytes", "queued_bytes"),
    )
    for name, unit, column in counters:
        changes = counts.filter((pl.col(column) != pl.col(column).shift()).fill_null(True))
        for at_s, value in changes.select("at_s", column).iter_rows():
            yield {
                "ph": "C",
                "name": name,
                "pid": pid,
                "ts": _plain(round(at_s * 1e9) / 1e3),
                "args": {unit: _plain(value)},
            }


def _name(pid: int, tid: int | None, what: str, **arguments: Any) -> Event:
    thread = {} if tid is None else {"tid": tid}
    return {"ph": "M", "name": what, "pid": pid, **thread, "args": arguments}


def _with_tracks(slices: pl.DataFrame) -> pl.DataFrame:
    kind, unit = pl.col("kind"), pl.col("unit")
    of_link = kind.replace_strict(_LINK_IN_TRACKS, default=None, return_dtype=pl.String)
    own = kind.replace_strict(_OWN_TRACKS, default=None, return_dtype=pl.String)
    return slices.with_columns(
        pl.when(kind == "activations-cpu")
        .then(unit.replace(_CPU_TRACKS))
        .when(unit == "link_in")
        .then(of_link)
        .otherwise(pl.coalesce(own, unit))
        .alias("track")
    )


def _on_whole_ns(slices: pl.DataFrame) -> pl.DataFrame:
    """Add `ts` and `dur` in microseconds, on whole nanoseconds.

    Perfetto counts in them: a slice that ended after the next one of its track began, by rounding, would be dropped
    there. So none does, and what rounding took from one slice goes to the next: a track's sum is right to 1 ns.
    """
    parts = []
    for track in slices.partition_by("track", maintain_order=True):
        start = np.maximum.accumulate(np.rint(track["start_s"].to_numpy() * 1e9))
        room = np.diff(start, append=np.inf)
        lengths, owed = [], 0.0
        for wanted, most in zip((track["duration_s"].to_numpy() * 1e9).tolist(), room.tolist(), strict=True):
            length = min(max(round(wanted + owed), 0), most)
            owed += wanted - length
            lengths.append(length / 1e3)
        parts.append(track.with_columns(pl.Series("ts", start / 1e3), pl.Series("dur", lengths)))
    return pl.concat(parts)


def _step_arguments(run: Run, lane: AnyLane, step: int) -> Event:
    schedule = run.schedule
    about = {"step": step, "phase": PHASE_NAMES[schedule.phase[step]], "rows": int(schedule.rows[step])}
    if isinstance(lane, ClusterLane):
        return about | {name: _plain(value) for name, value in cluster_timeline.step_arguments(lane, step).items()}
    figures = lane.log.step[step]
    counts = {name: int(figures[name]) for name in ("hits", "misses", "late")}
    moved = {name: _plain(float(figures[name])) for name in ("demand_bytes", "prefetch_bytes")}
    return about | counts | moved


def _layer_arguments(lane: Lane) -> Iterator[Event]:
    """Yield hits and misses of each layer of each recorded step, in order."""
    assert lane.recording is not None
    notes, layers = lane.recording.slices, len(lane.log.layer)
    experts = notes[notes["kind"] == EXPERT]
    if lane.tiers is not None:  # an expert that is spread over units has a slice on each
        experts = experts[np.unique(experts[["step", "layer", "expert"]], return_index=True)[1]]
    at = (experts["step"] - lane.recording.first) * layers + experts["layer"]
    cells = (lane.recording.stop - lane.recording.first) * layers
    hits = np.bincount(at, experts["resident"], minlength=cells)
    active = np.bincount(at, minlength=cells)
    for hit, size in zip(hits.tolist(), active.tolist(), strict=True):
        yield {"hits": int(hit), "misses": size - int(hit)}


def _plain(value: Any) -> Any:
    """The value, a whole number without the `.0`."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
