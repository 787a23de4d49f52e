"""The timeline's slices: against the oracle, and against the tables of the same replay."""

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import oracle_timeline
from support.one_run import run
from support.strategies import Case, all_policies, as_arrays, cases, write_loads, write_static

import moetrace as mt
from moetrace.engine import recording
from moetrace.engine.run import Run
from moetrace.engine.state import records
from moetrace.engine.tape import COUNT, SLICE, Tape
from moetrace.results.frames import step_slices, unit_frame
from moetrace.results.timeline import counter_frame, timeline_frame
from moetrace.spec import PolicySpec, load_policy
from moetrace.spec.errors import UsageError
from moetrace.trace import Trace

BUSY = ("dense", "expert", "head", "fetch", "prefetch", "activations")


def recorded(case: Case, policies, window=None) -> Run:
    trace = Trace.from_arrays(num_experts=case.model.experts, **as_arrays(case.trace, case.model.experts))
    window = range(trace.steps) if window is None else window
    return run(trace, case.model, case.system, policies, slots=case.slots, ignore_capacity=True, window=window)


def check_oracle(case: Case, policies) -> None:
    frame = timeline_frame(recorded(case, policies))
    for policy in policies:
        expected = oracle_timeline.slices(case.trace, case.model, case.system, policy, case.slots)
        columns = ("step", "layer", "kind", "unit", "expert", "start_s", "duration_s", "rows", "bytes", "resident")
        ours = frame.filter(pl.col("policy") == policy.name, pl.col("kind").is_in(BUSY))
        ours = ours.with_columns(pl.col("layer", "expert").fill_null(-1)).select(columns).rows()
        ours = sorted(ours, key=oracle_timeline.order)
        assert [row[:5] + row[-1:] for row in ours] == [row[:5] + row[-1:] for row in expected]
        for at in range(5, 9):
            values = [[np.nan if row[at] is None else row[at] for row in rows] for rows in (ours, expected)]
            np.testing.assert_allclose(*values, rtol=1e-9, atol=1e-15)


def check_utilization(run: Run, frame: pl.DataFrame) -> None:
    """Utilization is the share of the time in which a part has at least one slice: never more than 1."""
    table = unit_frame(run)
    assert table["utilization"].is_between(0, 1).all()
    total_s = frame.filter(kind="step").group_by("policy").agg(pl.sum("duration_s").alias("total_s"))
    for row in table.join(total_s, on="policy").iter_rows(named=True):
        own = frame.filter(pl.col("kind").is_in(BUSY), policy=row["policy"], unit=row["unit"]).sort("start_s")
        start, stop = own["start_s"].to_numpy(), (own["start_s"] + own["duration_s"]).to_numpy()
        before = np.concatenate(([0.0], np.maximum.accumulate(stop)[:-1]))
        covered_s = np.maximum(stop - np.maximum(start, before), 0.0).sum() if len(own) else 0.0
        np.testing.assert_allclose(row["utilization"], covered_s / row["total_s"], rtol=1e-9, atol=1e-12)


def check_tables(run: Run) -> None:
    """Ends of steps, busy seconds, rows and bytes are those of the tables; nothing runs twice at a time."""
    frame = timeline_frame(run)
    steps = pl.concat(step_slices(run)).select("policy", "step", "start_s", "duration_s")
    assert frame.filter(kind="step").select(steps.columns).equals(steps)
    busy = frame.filter(pl.col("kind").is_in(BUSY)).group_by("policy", "unit")
    sums = busy.agg(pl.sum("duration_s"), pl.sum("rows").alias("slice_rows"), pl.sum("bytes").alias("slice_bytes"))
    table = unit_frame(run).join(sums, on=["policy", "unit"], how="left").fill_null(0)
    for ours, theirs in (("duration_s", "busy_s"), ("slice_rows", "rows"), ("slice_bytes", "bytes")):
        np.testing.assert_allclose(table[ours], table[theirs], rtol=1e-9, atol=1e-18)
    check_utilization(run, frame)
    end_s = float(steps.select(pl.col("start_s") + pl.col("duration_s")).max().item())
    for (*_, unit, _kind), track in frame.with_columns(
        pl.when(unit="link_in").then("kind").when(pl.col("unit").is_null()).then("kind").alias("track")
    ).group_by("policy", "unit", "track", maintain_order=True):
        start, stop = track["start_s"].to_numpy(), (track["start_s"] + track["duration_s"]).to_numpy()
        assert np.all(stop[:-1] <= start[1:] + 1e-12 * end_s), unit
        assert stop[-1] <= end_s * (1 + 1e-12)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases(max_steps=8), data=st.data())
def test_random_traces(case, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    loads, static = write_loads(folder / "loads.csv", case), write_static(folder / "static.csv", case)
    allowed = all_policies(case.system.units, loads, static)
    policies = data.draw(st.lists(st.sampled_from(allowed), min_size=1, max_size=4, unique_by=lambda p: p.name))
    check_oracle(case, policies)
    check_tables(recorded(case, policies))


MOVING = [
    PolicySpec(name="waits", placement="tp", dispatch="balance", residency="prefill", prefetch="prefill",
               scope="global", prefetch_blocks=True),
    PolicySpec(name="online", placement="tp:2", dispatch="balance", residency="ewma", prefetch="online:2"),
    PolicySpec(name="oracle", dispatch="gpu", residency="lfu", prefetch="oracle:6", half_life=2, p=0.7),
    PolicySpec(name="hot", dispatch="hot"),
    load_policy("foresee"),
    load_policy("foresee-split"),
    load_policy("edge-ndp", {"dispatch": "split", "name": "edge-ndp and split"}),
]  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases().filter(lambda case: case.system.units in (2, 4, 6)))
def test_timelines_of_prefetching_policies_are_those_of_the_oracle(case):
    check_oracle(case, MOVING)
    check_tables(recorded(case, MOVING))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases().filter(lambda case: case.system.units in (2, 4, 6)), data=st.data())
def test_a_window_is_a_part_of_the_whole_and_changes_nothing(case, data):
    steps = case.trace.steps
    first = data.draw(st.integers(0, steps - 1))
    stop = data.draw(st.integers(first + 1, steps))
    trace = Trace.from_arrays(num_experts=case.model.experts, **as_arrays(case.trace, case.model.experts))
    options = {"slots": case.slots, "ignore_capacity": True}
    plain = run(trace, case.model, case.system, MOVING, **options)
    whole, part = recorded(case, MOVING), recorded(case, MOVING, range(first, stop))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moetrace.trace.format.BLOCK_BYTES", 1)  # a step a block
        cut = recorded(case, MOVING, range(first, stop))
    for other in (whole, part, cut):
        for ours, theirs in zip(plain.lanes, other.lanes, strict=True):
            for one, two in zip(ours.log, theirs.log, strict=True):
                assert one.tobytes() == two.tobytes()
            assert ours.clairvoyant_s == theirs.clairvoyant_s
    inside = pl.col("step").is_between(first, stop - 1)
    assert timeline_frame(part).equals(timeline_frame(whole).filter(inside))
    assert timeline_frame(cut).equals(timeline_frame(part))
    assert counter_frame(cut).equals(counter_frame(part))


@pytest.mark.pure
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # 64-bit hashing is meant to overflow
def test_pure_python_selection():
    trace = mt.generate_trace("tiny-olmoe", requests=2, prompt=3, output=3, batch=2)
    policies = ["edge-ndp", "on-demand"]
    result = mt.replay(trace, policies=policies, slots=24, timeline=(0, None))
    check_tables(result.run)


def test_counters_follow_the_queue_and_the_cache():
    trace = mt.generate_trace("tiny-olmoe", requests=1, prompt=8, output=24)
    result = mt.replay(trace, policies=["edge-ndp", "on-demand"], slots=30, timeline=(0, None))
    for lane in result.run.lanes:
        counts = result.timeline_counters.filter(policy=lane.policy.name)
        assert counts["at_s"].is_sorted()
        assert counts["residents"][-1] == lane.state.cache.residents.sum() <= 30
        assert counts["queued"].max() <= 30
    counts = result.timeline_counters.filter(policy="edge-ndp")
    moved = result.timeline.filter(policy="edge-ndp", kind="prefetch")["bytes"].sum()
    # All that the prompt queued has either arrived or is still in the queue.
    assert counts["queued_bytes"].max() == pytest.approx(moved + counts["queued_bytes"][-1])
    assert moved > 0


def test_experts_are_those_of_the_layer():
    trace = mt.generate_trace("tiny-olmoe", requests=1, prompt=8, output=2)
    result = mt.replay(trace, policies="ndp-tp", timeline=(1, 2))
    assert result.timeline["step"].unique().to_list() == [1]
    experts = result.timeline.filter(kind="expert")
    assert experts["unit"].unique().sort().to_list() == [f"ndp{u}" for u in range(6)]
    for layer in range(trace.layers):
        routed = np.unique(trace.read("experts", 8, 9)[:, layer]).tolist()
        for _, unit in experts.filter(layer=layer).group_by("unit"):
            assert sorted(unit["expert"].to_list()) == routed


@pytest.mark.parametrize(
    ("timeline", "message"),
    [
        ((5, 2), "The window 5:2 holds none of the trace's 10 steps: A:B is from step A up to step B, without it."),
        ((10, 12), "The window 10:12 holds none"),
        (slice(None, 0), "The window :0 holds none"),
        (slice(0, 9, 2), "every step from A up to B, got one in 2"),
        ("0:3", "A timeline's window is a pair of step numbers, (A, B), got '0:3'."),
        ((1, 2, 3), "is a pair of step numbers"),
        ((1.5, 2), "is a pair of step numbers"),
        (7, "is a pair of step numbers"),
    ],
)
def test_wrong_windows(timeline, message):
    trace = mt.generate_trace("tiny-olmoe", requests=1, prompt=1, output=9)
    with pytest.raises(UsageError) as caught:
        mt.replay(trace, policies="monde", timeline=timeline)
    assert message in str(caught.value)


def test_windows():
    trace = mt.generate_trace("tiny-olmoe", requests=1, prompt=1, output=19)

    def steps(timeline):
        result = mt.replay(trace, policies="monde", timeline=timeline)
        return result.timeline["step"].unique().sort().to_list(), result.warnings

    assert steps((2, 4)) == ([2, 3], ())
    assert steps((-2, None)) == ([18, 19], ())
    assert steps(slice(0, 1)) == ([0], ())
    assert steps((np.int64(18), 99)) == ([18, 19], ())
    assert steps(True) == (
        list(range(16)),
        ("the timeline covers the first 16 of 20 steps; --window A:B chooses others.",),
    )


def test_without_a_recording():
    result = mt.replay(mt.generate_trace("tiny-olmoe", requests=1, prompt=1, output=1), policies="monde")
    with pytest.raises(UsageError, match="Nothing was recorded for a timeline: replay with timeline="):
        _ = result.timeline


def test_slices_beyond_a_tape_s_room_are_written_nowhere_else():
    """Room is for sixty slices: with three nothing beyond them is touched, and the replay stops with an error."""
    trace = mt.generate_trace("tiny-olmoe", requests=1, prompt=2, output=2)
    tapes = []

    def small(slices: int, counts: int):
        memory = [records(slices, SLICE), records(counts, COUNT)]
        tapes.append(memory)
        return Tape(memory[0][:3], memory[1][:2], np.zeros(2, np.int64), np.zeros(1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "new_tape", small)
        with pytest.raises(mt.MoetraceError, match="step 0 has more to note than its tape has room for"):
            mt.replay(trace, policies="edge-ndp", slots=24, timeline=(0, None))
    ((slices, counts),) = tapes
    assert slices[:3]["duration_s"].all() and not slices[3:]["duration_s"].any()
    assert counts[1]["at_s"] > 0 and not counts[2:]["at_s"].any()
