"""The timeline of machines with more tiers and other links: its slices are what the books say, in random mixes."""

from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from support.drawn_tiers import tier_cases, tier_policies
from support.plain_python import as_plain_python
from support.tier_runs import run_of, with_what_goes_together

import moetrace as mt
from moetrace.engine.run import Run
from moetrace.results.frames import step_slices, unit_frame
from moetrace.results.timeline import timeline_frame
from moetrace.results.timeline_file import timeline_events

# Slices of no part; in all others one is busy.
NOT_BUSY = ("step", "layer", "wait", "cold", "evict", "move")


def check_books(run: Run, frame: pl.DataFrame) -> None:
    """Busy seconds, rows and bytes of each part are the sums of its slices."""
    busy = frame.filter(~pl.col("kind").is_in(NOT_BUSY))
    sums = busy.group_by("unit").agg(
        pl.sum("duration_s"), pl.sum("rows").alias("slice_rows"), pl.sum("bytes").alias("slice_bytes")
    )
    table = unit_frame(run).join(sums, on="unit", how="left").fill_null(0)
    assert set(busy["unit"]) <= set(table["unit"])
    np.testing.assert_allclose(table["duration_s"], table["busy_s"], rtol=1e-9, atol=1e-15)
    table = table.filter(pl.col("unit") != "remote")  # its slices say when functions work, and not at what
    for ours, theirs in (("slice_rows", "rows"), ("slice_bytes", "bytes")):
        np.testing.assert_allclose(table[ours], table[theirs], rtol=1e-9, atol=1e-15, err_msg=theirs)


def check_order(frame: pl.DataFrame) -> None:
    """Nothing runs twice at a time on one part; each kind of transfer passes one after another."""
    end_s = float((frame["start_s"] + frame["duration_s"]).max())
    tracks = frame.with_columns(
        pl.when(pl.col("unit").is_null() | pl.col("unit").str.starts_with("link"))
        .then(pl.col("kind"))
        .when(pl.col("kind").is_in(["layer", "wait", "cold"]))
        .then(pl.lit("layers"))
        .alias("track")
    )
    for (unit, kind), track in tracks.group_by("unit", "track", maintain_order=True):
        start, stop = track["start_s"].to_numpy(), (track["start_s"] + track["duration_s"]).to_numpy()
        assert np.all(stop[:-1] <= start[1:] + 1e-12 * end_s), (unit, kind)


def check_ends(run: Run, frame: pl.DataFrame) -> None:
    """A layer is the dense work and `moe`, which ends with the last slice of what the layer demands."""
    lane = run.lanes[0]
    layers = frame.filter(kind="layer")
    assert layers["duration_s"].sum() == pytest.approx((lane.log.step["dense_s"] + lane.log.step["moe_s"]).sum())
    assert (layers["duration_s"].sum()) == pytest.approx((lane.log.layer["dense_s"] + lane.log.layer["moe_s"]).sum())
    ends = layers.select("step", "layer", (pl.col("start_s") + pl.col("duration_s")).alias("end_s"))
    demanded = ("dense", "expert", "fetch", "activations", "activations-cpu", "read", "outside", "remote")
    last = frame.filter(pl.col("kind").is_in(demanded)).group_by("step", "layer")
    last = last.agg((pl.col("start_s") + pl.col("duration_s")).max().alias("last_s"))
    both = ends.join(last, on=["step", "layer"], how="left")
    ran = frame.filter(pl.col("kind").is_in(["expert", "remote"])).select("step", "layer").unique()
    ran = both.join(ran, on=["step", "layer"], how="semi")
    total_s = float(ends["end_s"].max())
    np.testing.assert_allclose(ran["last_s"], ran["end_s"], rtol=0, atol=1e-11 * total_s)
    assert (both["last_s"] <= both["end_s"] + 1e-11 * total_s).all()
    steps = pl.concat(step_slices(run)).select("step", "start_s", "duration_s")
    assert frame.filter(kind="step").select(steps.columns).equals(steps)


def check_utilization(run: Run, frame: pl.DataFrame) -> None:
    """Utilization is the share of the time in which a part has at least one slice; not of a link above a disk."""
    table = unit_frame(run)
    assert table["utilization"].is_between(0, 1).all()
    total_s = float(frame.filter(kind="step")["duration_s"].sum())
    for unit, utilization in table.select("unit", "utilization").iter_rows():
        own = frame.filter(~pl.col("kind").is_in(NOT_BUSY), pl.col("unit") == unit).sort("start_s")
        start, stop = own["start_s"].to_numpy(), (own["start_s"] + own["duration_s"]).to_numpy()
        before = np.concatenate(([0.0], np.maximum.accumulate(stop)[:-1]))
        covered_s = np.maximum(stop - np.maximum(start, before), 0.0).sum() if len(own) else 0.0
        np.testing.assert_allclose(utilization, covered_s / total_s, rtol=1e-9, atol=1e-9, err_msg=unit)


def check_moves(run: Run, frame: pl.DataFrame) -> None:
    """Moves between layouts pass while a layer's dense work runs, and add up to what the figures say of them."""
    tiers, moves = run.lanes[0].tiers, frame.filter(kind="move")
    if tiers is None or tiers.layout is None:
        assert moves.is_empty()
        return
    found = moves["bytes"].sum(), moves["duration_s"].sum()
    np.testing.assert_allclose(found, tiers.layout.moved, rtol=1e-9, atol=1e-15)
    beside = moves.join_asof(frame.filter(kind="layer").select("start_s", at_s="start_s"), on="start_s")
    dense = frame.filter(kind="dense").select("start_s", dense_s="duration_s")
    beside = beside.join(dense, left_on="at_s", right_on="start_s", how="left")
    end_s = float((frame["start_s"] + frame["duration_s"]).max())
    evict_s = frame.filter(kind="evict")["duration_s"].max() or 0.0
    overhead_s = run.system.gpu.layer_overhead_s
    left = beside["at_s"] + beside["dense_s"] - beside["start_s"] - beside["duration_s"]
    assert (left >= -(1e-11 * end_s + float(evict_s) + overhead_s)).all()


def check_file(run: Run) -> None:
    """In the file no slice begins before the last one of its track ends; layers have the hits and misses of the log."""
    ends_ns: dict[int, int] = {}
    hits = misses = 0
    for one in timeline_events(run):
        if one["ph"] == "X":
            start_ns = round(one["ts"] * 1e3)
            assert start_ns >= ends_ns.get(one["tid"], 0), one
            ends_ns[one["tid"]] = start_ns + round(one["dur"] * 1e3)
            if one["cat"] == "layer":
                hits, misses = hits + one["args"]["hits"], misses + one["args"]["misses"]
    log = run.lanes[0].log.step
    assert (hits, misses) == (log["hits"].sum(), log["misses"].sum())


def check(run: Run) -> pl.DataFrame:
    frame = timeline_frame(run)
    check_books(run, frame)
    check_order(frame)
    check_moves(run, frame)
    check_ends(run, frame)
    check_file(run)
    if run.system.disk is None:
        check_utilization(run, frame)
    return frame


def recorded(case, policy: dict[str, Any], folder) -> Run:
    with_what_goes_together(case)
    plain = run_of(case, policy, folder)
    run = run_of(case, policy, folder, window=range(plain.schedule.rows.size))
    for ours, theirs in zip(plain.lanes[0].log, run.lanes[0].log, strict=True):  # a tape changes nothing
        assert ours.tobytes() == theirs.tobytes()
    assert plain.lanes[0].losses == run.lanes[0].losses
    return run


@as_plain_python
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=tier_cases(), data=st.data())
def test_any_mix(case, data, tmp_path_factory):
    policy = data.draw(tier_policies(case), label="policy")
    run = recorded(case, policy, tmp_path_factory.mktemp("drawn"))
    frame = check(run)
    for kind in frame["kind"].unique():
        event(kind)


@as_plain_python
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=tier_cases(max_steps=9, max_experts=9, units=(2, 3)), data=st.data())
def test_relayout(case, data, tmp_path_factory):
    policy = data.draw(tier_policies(case, placements=("mixed",), relayout=True), label="policy")
    check(recorded(case, policy, tmp_path_factory.mktemp("drawn")))


@as_plain_python
def test_moves_and_functions_have_slices_and_tracks():
    """Each in the file, too, under a name that says which expert moved, or which layer's functions worked."""
    trace = mt.generate_trace("tiny-olmoe", requests=8, prompt=2, output=3, batch=8)
    for system, policy, kind, track, name in (
        ("h100-amx-dimm", "trimoe", "move", "moves", r"move L\d+ E\d+"),
        ("remoe", "remoe", "remote", "remote", r"L\d+ remote"),
    ):
        result = mt.replay(trace, system=system, policies=policy, slots=20, timeline=True)
        slices = result.timeline.filter(kind=kind)
        assert len(slices) > 3 and slices["name"].str.contains(f"^{name}$").all()
        events = list(timeline_events(result.run))
        tid = {one["args"]["name"]: one["tid"] for one in events if one["name"] == "thread_name"}
        drawn = [one for one in events if one.get("cat") == kind]
        assert len(drawn) == len(slices) and {one["tid"] for one in drawn} == {tid[track]}
        row = result.summary.row(0, named=True)
        if kind == "move":
            assert row["moved_s"] == pytest.approx(slices["duration_s"].sum())
            assert row["moved_bytes"] == pytest.approx(slices["bytes"].sum())
        else:
            busy_s = result.units.filter(unit="remote")["busy_s"].sum()
            assert busy_s == pytest.approx(slices["duration_s"].sum())
