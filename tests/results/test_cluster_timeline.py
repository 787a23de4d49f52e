"""The time line of a cluster: the oracle's schedule, and the sums of the tables of the same replay."""

import gzip
import itertools
import json

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, assume, given, settings
from support.cluster_cases import cluster_cases
from support.cluster_replays import replayed

import moetrace as mt
from moetrace.engine.cluster import cluster_lane
from moetrace.engine.cluster.cluster_tape import KINDS
from moetrace.results.frames import unit_frame
from moetrace.results.timeline import timeline_frame

KIND_OF = {"A": "attention", "S": "shared", "A2E": "dispatch", "E": "experts", "E2A": "combine", "K": "kernels"}
RESOURCES = ("gpus", "network", "attention", "dispatch", "experts", "combine")


def with_rows(rows, parts):
    """The parts of so many rows that have any, and how many each has; the oracle counts only these."""
    sizes = [(part + 1) * rows // parts - part * rows // parts for part in range(parts)]
    return [(part, size) for part, size in enumerate(sizes) if size]


def recorded(case):
    return replayed(case, range(len(case.trace.offset) - 1))


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cluster_cases())
def test_resources_follow_the_oracles_schedule(case):
    fused = case.policy.get("execution") == "fused"
    assume(not (fused and "gpus_per_node" in case.system["network"]))
    run, expected = recorded(case), case.run()
    frame = timeline_frame(run)
    overhead_s = case.system["gpu"].get("layer_overhead_us", 0.0) * 1e-6
    for number, step in enumerate(expected.steps):
        own = frame.filter(pl.col("unit").is_in(RESOURCES), pl.col("kind") != "head", step=number)
        own = own.with_columns(pl.col("micro_batch", "chunk").fill_null(0)).sort(
            "layer", "micro_batch", "chunk", "kind"
        )
        batches = with_rows(step.rows, step.r1)
        wanted = []
        for span in step.spans:
            kind = "fused" if fused and span.stage == "E" else KIND_OF[span.stage]
            end_s = span.end_s - (overhead_s if kind == "attention" else 0.0)
            # Spans no longer than rounding may have a slice or not.
            if end_s - span.start_s > 1e-12:
                begin_s = step.start_s + step.pause_s + span.start_s
                batch, size = batches[span.batch]
                chunk = 0 if span.stage in "AS" else with_rows(size, step.r2)[span.chunk][0]
                wanted.append((span.layer, batch, chunk, kind, begin_s, end_s - span.start_s))
        own = own.filter(pl.col("duration_s") > 1e-12)
        wanted.sort(key=lambda row: row[:4])
        assert own.select("layer", "micro_batch", "chunk", "kind").rows() == [row[:4] for row in wanted]
        end_s = step.start_s + step.duration_s
        np.testing.assert_allclose(own["start_s"], [row[4] for row in wanted], rtol=1e-9, atol=1e-12 * max(end_s, 1))
        np.testing.assert_allclose(own["duration_s"], [row[5] for row in wanted], rtol=1e-9, atol=1e-12)
        last_s = frame.filter(pl.col("kind") != "step", step=number).select(pl.col("start_s") + pl.col("duration_s"))
        # The host's overhead has no slice: without experts and head it is what a step ends with.
        least_s = end_s if step.head_s else max(row[4] + row[5] for row in wanted)
        assert least_s * (1 - 1e-12) <= last_s.max().item() <= end_s * (1 + 1e-12)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cluster_cases())
def test_sums_are_those_of_the_tables_and_nothing_runs_twice_at_a_time(case):
    run = recorded(case)
    frame, table = timeline_frame(run), unit_frame(run)
    sums = frame.drop_nulls("unit").group_by("unit").agg(pl.sum("duration_s", "rows", "bytes"))
    table = table.join(sums, on="unit", how="left", suffix="_slices").fill_null(0)
    if case.policy.get("execution") == "fused":  # whose parts overlap within one slice
        table = table.filter(~pl.col("unit").is_in(RESOURCES))
    np.testing.assert_allclose(table["duration_s"], table["busy_s"], rtol=1e-9, atol=1e-13)
    on_gpus = ~pl.col("unit").is_in(["gpus", "attention", "experts"])
    np.testing.assert_allclose(*(table.filter(on_gpus)[name] for name in ("bytes_slices", "bytes")), rtol=1e-9)
    rows = table.filter(~pl.col("unit").is_in(RESOURCES))
    assert rows["rows_slices"].to_list() == rows["rows"].to_list()
    steps = frame.filter(kind="step")
    assert steps["duration_s"].to_list() == run.lanes[0].log.step["duration_s"].tolist()
    end_s = float(steps.select(pl.col("start_s") + pl.col("duration_s")).max().item())
    whole = frame.with_columns(
        pl.coalesce("unit", pl.when(kind="step").then(pl.lit("steps")).otherwise(pl.lit("moves")))
    )
    for (unit,), track in whole.group_by("unit"):
        track = track.sort("start_s")
        start, stop = track["start_s"].to_numpy(), (track["start_s"] + track["duration_s"]).to_numpy()
        assert np.all(stop[:-1] <= start[1:] + 1e-12 * end_s), unit
        assert stop[-1] <= end_s * (1 + 1e-12)


def test_shared_experts_are_read_once_whether_they_run_apart_or_not():
    trace = mt.generate_trace("tiny-olmoe", requests=2, prompt=4, output=2, batch=2)
    policies = ["ep-serial", "findep"]  # of which findep runs them apart
    shared = {"model.shared_params_per_layer": 300_000, "model.dense_params_per_layer": 900_000}
    shared |= {"policy.findep.shared": "apart", "policy.findep.schedule": "pipeline:1,1", "policy.findep.order": None}
    found = mt.replay(trace, system="h100-x8", policies=policies, overrides=shared, timeline=(0, trace.steps))
    sums = found.timeline.filter(pl.col("kind").is_in(["attention", "shared", "head"])).group_by("policy", "unit")
    sums = sums.agg(pl.sum("bytes")).filter(pl.col("unit").str.contains("[0-9]"))
    assert sums["bytes"].n_unique() == 1
    assert set(found.timeline.filter(kind="shared")["policy"]) == {"findep"}


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cluster_cases())
def test_a_window_is_a_part_of_the_whole_and_changes_nothing(case):
    steps = len(case.trace.offset) - 1
    first, stop = steps // 3, max(steps // 3 + 1, 2 * steps // 3)
    plain, whole, part = replayed(case), recorded(case), replayed(case, range(first, stop))
    for other in (whole, part):
        for one, two in zip(plain.lanes[0].log, other.lanes[0].log, strict=True):
            assert one.tobytes() == two.tobytes()
    inside = pl.col("step").is_between(first, stop - 1)
    assert timeline_frame(part).equals(timeline_frame(whole).filter(inside))


def test_the_file_has_a_track_for_each_resource_and_gpu(tmp_path):
    trace = mt.generate_trace("tiny-olmoe", requests=4, prompt=6, output=12, batch=4, seed=1)
    policies = ["ep-serial", "two-batch-overlap", "eplb"]
    overrides = {"policy.eplb.window": 4, "policy.eplb.migrate": "async", "policy.eplb.migrate_share": 0.01}
    result = mt.replay(trace, system="h100-x8", policies=policies, overrides=overrides, timeline=(0, 12))
    result.write(tmp_path / "out")
    found = json.loads(gzip.decompress((tmp_path / "out" / "timeline.json.gz").read_bytes()))
    events = found["traceEvents"]
    for pid, policy in enumerate(policies, 1):
        named = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name" and e["pid"] == pid}
        moves = ["migration"] if policy == "eplb" else []
        assert list(named.values()) == ["steps", *moves, "gpus", "network", *(f"gpu{i}" for i in range(8))]
        used = {named[event["tid"]] for event in events if event["ph"] == "X" and event["pid"] == pid}
        assert used == set(named.values())
        for tid in named:
            track = sorted((e["ts"], e["dur"]) for e in events if e["ph"] == "X" and (e["pid"], e["tid"]) == (pid, tid))
            assert all(a + b <= c + 1e-9 for (a, b), (c, _) in itertools.pairwise(track))
    names = {event["name"] for event in events if event["ph"] == "X"}
    assert {"step 3", "L2 attention", "L2 attention 1", "L2 dispatch 1,0", "L5 combine", "head", "migration"} <= names
    of_gpus = [e["args"] for e in events if e["ph"] == "X" and e["name"] == "L0 experts" and "rows" in e["args"]]
    assert set(of_gpus[0]) == {"step", "layer", "micro_batch", "chunk", "rows", "bytes"}
    assert set(result.timeline["kind"]) <= {*KINDS, "step"}
    assert result.timeline_counters.is_empty()


def test_a_tape_without_room_is_an_error(monkeypatch):
    trace = mt.generate_trace("tiny-olmoe", requests=1, prompt=2, output=2)
    monkeypatch.setattr(cluster_lane, "most_slices", lambda *_: 3)
    with pytest.raises(RuntimeError, match="step 0 has more to note than its tape has room for"):
        mt.replay(trace, system="h100-x8", policies="ep-serial", timeline=(0, 1))
