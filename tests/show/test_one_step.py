"""The time line of one step, from a file in the Trace Event Format."""

import gzip
import json

import pytest

import moetrace as mt
from moetrace.results.record import TIMELINE_FILE
from moetrace.show.charts.one_step import one_step

pytest.importorskip("altair")


def named(what, name, **where):
    return {"ph": "M", "name": what, "args": {"name": name}, **where}


def work(kind, tid, step, ts, dur):
    return {"ph": "X", "name": kind, "cat": kind, "pid": 1, "tid": tid, "ts": ts, "dur": dur, "args": {"step": step}}


EVENTS = [
    named("process_name", "mine </script>", pid=1),
    named("thread_name", "steps", pid=1, tid=1),
    named("thread_name", "gpu", pid=1, tid=2),
    named("thread_name", "ndp0", pid=1, tid=3),
    work("step", 1, 7, 0, 1000),
    work("dense", 2, 7, 0, 400),
    work("step", 1, 8, 1000, 2000),
    work("dense", 2, 8, 1000, 500),
    work("expert", 3, 8, 1500, 250.5),
    work("expert", 2, 8, 1500, 1500),
    {"ph": "C", "name": "queue", "pid": 1, "ts": 0, "args": {"experts": 3}},
]


def write(folder, value):
    (folder / TIMELINE_FILE).write_bytes(gzip.compress(json.dumps(value).encode()))
    return folder / TIMELINE_FILE


def test_the_last_step_is_drawn_from_its_start(tmp_path):
    found = one_step(write(tmp_path, {"traceEvents": EVENTS, "otherData": {}}))
    assert found is not None and found.words.startswith("Step 8,")
    assert found.table.rows() == [
        ("mine </script>", "GPU", "dense", 1, 0.5),
        ("mine </script>", "NDP 0", "expert", 1, 0.2505),
        ("mine </script>", "GPU", "expert", 1, 1.5),
    ]
    ((title, chart),) = found.panels
    assert title == "mine </script>"
    assert "GPU,dense,dense,0.0,0.5,0.5" in str(chart.to_dict())


def test_nothing_recorded_is_no_section(tmp_path):
    assert one_step(tmp_path / TIMELINE_FILE) is None
    assert one_step(write(tmp_path, {"traceEvents": []})) is None


@pytest.mark.parametrize(
    "content",
    [b"", b"no gzip", gzip.compress(b"{", mtime=0)[:-4], gzip.compress(b"[]"), gzip.compress(b'{"traceEvents": [{}]}')],
    ids=["empty", "no gzip", "cut", "a list", "no event"],
)
def test_a_file_that_is_no_timeline_is_refused_in_one_sentence(tmp_path, content):
    (tmp_path / TIMELINE_FILE).write_bytes(content)
    with pytest.raises(mt.MoetraceError, match="is not what moetrace writes"):
        one_step(tmp_path / TIMELINE_FILE)


def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path):
    (tmp_path / TIMELINE_FILE).write_bytes(gzip.compress(bytes(65 << 20), 1, mtime=0))
    with pytest.raises(mt.MoetraceError, match="too long for a report"):
        one_step(tmp_path / TIMELINE_FILE)
