"""What a result says of moves between layouts and of evictions that take time, and that others say nothing."""

import pytest

import moetrace as mt
from moetrace.results.record import OF_EVICTIONS, OF_RELAYOUT

OURS = {*OF_RELAYOUT, *OF_EVICTIONS}


@pytest.fixture(scope="module")
def trace():
    return mt.generate_trace("tiny-olmoe", requests=2, prompt=3, output=6)


def test_moves_are_shown_for_a_policy_that_moves(trace):
    """Outside reads are faster than `ndp.move_gb_s` here, so that is the rate of what moves."""
    changed = {"system.ndp.move_gb_s": 0.5}
    result = mt.replay(trace, system="h100-amx-dimm", policies=["monde", "trimoe"], slots=48, overrides=changed)
    monde, moving = result.to_dict()["policies"]
    assert not OURS & {*monde} and OURS & {*moving} == {*OF_RELAYOUT}
    assert moving["moved_bytes"] > 1e5
    assert moving["moved_s"] == pytest.approx(moving["moved_bytes"] / 0.5e9, rel=1e-9)
    assert moving["moved_s"] < moving["total_s"]
    assert result.summary["moved_bytes"].to_list() == [None, moving["moved_bytes"]]


def test_evictions_are_shown_where_they_take_time(trace):
    plain, slow, free = (
        mt.replay(trace, system="edge-ndp", policies="on-demand", slots=20, overrides=changed)
        for changed in ({}, {"system.gpu.evict_us": 500.0}, {"system.gpu.evict_us": 0.0})
    )
    (policy,) = slow.to_dict()["policies"]
    assert not OURS & {*plain.to_dict()["policies"][0]} and OURS & {*policy} == {*OF_EVICTIONS}
    more_s = slow.steps["dense_s"].sum() - plain.steps["dense_s"].sum()
    assert policy["evict_s"] == pytest.approx(more_s, rel=1e-9)
    evictions = policy["evict_s"] / 500e-6
    assert evictions > 0 and evictions == pytest.approx(round(evictions), abs=1e-6)
    assert free.to_dict()["policies"][0]["evict_s"] == 0
