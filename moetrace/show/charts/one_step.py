"""The time line of one step, from the `timeline.json.gz` of a replay: what each unit and link did, and when."""

import gzip
import os
import zlib
from pathlib import Path
from typing import Annotated, Any

import msgspec
import polars as pl
from msgspec import Meta

from moetrace.engine import tape
from moetrace.engine.cluster import cluster_tape
from moetrace.results.read_json import MOST_JSON_BYTES, decode_json
from moetrace.results.record import TIMELINE_FILE, TIMELINE_MARK
from moetrace.show.charts.style import ChartGroup, colour, data, part_label
from moetrace.spec.errors import MoetraceError, printable
from moetrace.spec.ordinary_file import open_ordinary

# All kinds of slices but the frames: steps, and layers, which are their parts together.
_KINDS = tuple(dict.fromkeys(kind for kind in (*tape.KINDS, *cluster_tape.KINDS) if kind != "layer"))
_MOST_PANELS = 4
_MOST_SLICES = 2500  # of a panel
_NAMES = {"link_in prefetch": "prefetch", "link_in activations": "link in, activations", "layers": "waiting"}
_NAMES |= {"evictions": "evictions", "link_out cpu": "link out, CPU", "link_in activations cpu": "link in, CPU"}


class _Event(msgspec.Struct):
    ph: str
    name: str
    pid: int = 0
    tid: int = 0
    cat: str = ""
    ts: Annotated[float, Meta(ge=0)] = 0.0
    dur: Annotated[float, Meta(ge=0)] = 0.0
    args: dict[str, Any] = {}


class _Timeline(msgspec.Struct):
    traceEvents: list[_Event]  # noqa: N815 (the format's own name)
    otherData: dict[str, Any] = {}  # noqa: N815


def one_step(path: Path, of: str | None = None) -> ChartGroup | None:
    """Draw the last step that was recorded, a panel for each policy; None if there is no such file, or nothing in it.

    Raises MoetraceError if the file is not what `moetrace replay --timeline` writes, or is marked as of another
    summary.json than the one whose hash is `of`.
    """
    if not os.path.lexists(path):
        return None
    found = _read(path)
    mark, events = found.otherData.get(TIMELINE_MARK), found.traceEvents
    if of is not None and mark is not None and mark != of:
        raise MoetraceError(f"{path} is of another result than the files beside it: write the folder again.")
    processes = {e.pid: str(e.args.get("name")) for e in events if e.ph == "M" and e.name == "process_name"}
    tracks = {(e.pid, e.tid): str(e.args.get("name")) for e in events if e.ph == "M" and e.name == "thread_name"}
    steps = [e for e in events if e.ph == "X" and e.cat == "step" and isinstance(e.args.get("step"), int)]
    if not steps:
        return None
    last = max(e.args["step"] for e in steps)
    drawn, tables = [], []
    end_ms = max(e.dur for e in steps if e.args["step"] == last) / 1e3
    for step in [e for e in steps if e.args["step"] == last][:_MOST_PANELS]:
        slices = _slices(events, tracks, step)
        if not slices.is_empty():
            name = processes.get(step.pid, f"policy {step.pid}")
            drawn.append((name, slices, [track for (pid, _), track in tracks.items() if pid == step.pid]))
            sums = slices.group_by("track", "kind", maintain_order=True).agg(pl.len().alias("slices"), pl.sum("ms"))
            tables.append(sums.select(pl.lit(name).alias("policy"), pl.all()))
    if not drawn:
        return None
    used = {kind for _, slices, _ in drawn for kind in slices["kind"]}
    kinds = [kind for kind in _KINDS if kind in used]
    panels = [(name, _panel(slices, order, kinds, end_ms)) for name, slices, order in drawn]
    words = (
        f"Step {last:,}, the last that was recorded: each bar is one piece of work, from left to right in ms since the "
        "step began. The step waits for the long bars that nothing overlaps. The whole record opens in Perfetto "
        f"({TIMELINE_FILE})."
    )
    return ChartGroup("one_step", "One step in time", words, panels, pl.concat(tables))


def _read(path: Path) -> _Timeline:
    try:
        with open_ordinary(path, follow=False) as file, gzip.GzipFile(fileobj=file) as packed:
            content = packed.read(MOST_JSON_BYTES + 1)  # no more than that is unpacked
    except (OSError, EOFError, zlib.error) as error:
        raise MoetraceError(f"{path} is not what moetrace writes: {printable(str(error))}.") from None
    if len(content) > MOST_JSON_BYTES:
        raise MoetraceError(f"{path} is too long for a report: record fewer steps with --window.")
    return decode_json(path, content, _Timeline)


def _slices(events: list[_Event], tracks: dict[tuple[int, int], str], step: _Event) -> pl.DataFrame:
    """Return track, kind, name, start and end in ms since the step began, and duration, of its first slices."""
    rows = [
        {
            "track": _short(tracks.get((e.pid, e.tid), str(e.tid))),
            "kind": e.cat,
            "name": e.name,
            "start": max(0.0, e.ts - step.ts) / 1e3,
            "end": (e.ts - step.ts + e.dur) / 1e3,
            "ms": e.dur / 1e3,
        }
        for e in events
        if e.ph == "X" and e.pid == step.pid and e.cat in _KINDS and e.args.get("step") == step.args["step"]
    ]
    frame = pl.DataFrame(rows, schema=dict.fromkeys(("track", "kind", "name"), pl.String) | _times())
    return frame.with_columns(pl.col("start", "end", "ms").round_sig_figs(6)).head(_MOST_SLICES)


def _panel(slices: pl.DataFrame, order: list[str], kinds: list[str], end_ms: float) -> Any:
    import altair as alt

    used = set(slices["track"].to_list())
    shown = [_short(track) for track in order if _short(track) in used]
    return (
        alt.Chart(data(slices))
        .mark_bar(stroke="#80808060", strokeWidth=0.5, height={"band": 0.8})
        .encode(
            x=alt.X(
                "start:Q",
                title="ms since the step began",
                scale=alt.Scale(domain=[0, end_ms], nice=False),
                axis=alt.Axis(tickCount=5),
            ),
            x2="end:Q",
            y=alt.Y("track:N", title=None, sort=shown, axis=alt.Axis(ticks=False, domain=False, labelPadding=6)),
            color=colour("kind", kinds),
            tooltip=["name:N", "kind:N", "track:N", alt.Tooltip("ms:Q", format=",.4~g")],
        )
        .properties(height=26 * len(shown))
    )


def _short(track: str) -> str:
    return _NAMES.get(track) or part_label(track)


def _times() -> dict[str, Any]:
    return dict.fromkeys(("start", "end", "ms"), pl.Float64)
