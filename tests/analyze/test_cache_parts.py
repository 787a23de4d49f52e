"""Caches that are emptied between requests, caches of unequal parts, and LFU of a window."""

import numpy as np
import pytest
from support.small_caches import GENERAL, ONE_AT_A_TIME, POLICIES, frame_of, oracle_frame, small_trace

from moetrace.analyze.cache.hits import cache_hits
from moetrace.spec.errors import UsageError
from moetrace.trace import Trace


def of_requests(seed: int, requests: int = 4, most: int = 1) -> dict:
    """A small trace whose steps are of one request each, which come in turn."""
    given = small_trace(seed, most=most)
    owner = np.sort(np.random.default_rng(seed).integers(0, requests, len(given["steps"])))
    return given | {"request": np.repeat(owner, given["steps"]), "position": np.arange(len(given["experts"]))}


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_scope_request_is_each_request_by_itself(policy, sequential, monkeypatch):
    if policy in ONE_AT_A_TIME and not sequential:
        pytest.skip("defined one access at a time")
    given = of_requests(7, most=2)
    capacities = [3, 8]
    whole = cache_hits(Trace.from_arrays(**given), capacities, [policy], scope="request", sequential=sequential)
    hits = np.zeros(len(capacities), int)
    for request in np.unique(given["request"]):
        steps = given["request"][np.cumsum(given["steps"]) - 1] == request
        rows = given["request"] == request
        own = {name: given[name][rows] for name in ("experts", "request", "position", "row_phase", "recorded")}
        own |= {name: given[name][steps] for name in ("steps", "phase")}
        alone = Trace.from_arrays(**(given | own))
        hits += cache_hits(alone, capacities, [policy], sequential=sequential).filter(phase="all")["hits"].to_numpy()
    if policy != "static-hindsight":  # that counts the whole trace
        assert whole.filter(phase="all")["hits"].to_list() == hits.tolist()
    with monkeypatch.context() as patch:
        patch.setattr("moetrace.trace.format.BLOCK_BYTES", 1)
        cut = cache_hits(Trace.from_arrays(**given), capacities, [policy], scope="request", sequential=sequential)
    assert cut.equals(whole)


@pytest.mark.parametrize("sequential", [False, True])
def test_a_budget_is_each_layer_by_itself(tmp_path, sequential):
    given = small_trace(3, equal=True)
    trace = Trace.from_arrays(**given)
    numbers = [1, 5, 3]
    (tmp_path / "b.csv").write_text("\n".join(map(str, numbers)))
    names = list(POLICIES) if sequential else GENERAL
    names = [name for name in names if name != "least-stale"]  # with one layer only it is LRU
    how = {"scope": "layer", "sequential": sequential}
    found = cache_hits(trace, [9], names, budget=tmp_path / "b.csv", **how).filter(phase="all")
    hits = np.zeros(len(names), int)
    for layer, number in enumerate(numbers):
        one = {name: given[name][:, [layer]] for name in ("experts", "recorded")}
        alone = Trace.from_arrays(**(given | one | {"expert_bytes": given["expert_bytes"][[layer]]}))
        hits += cache_hits(alone, [number], names, sequential=sequential).filter(phase="all")["hits"].to_numpy()
    assert found["hits"].to_list() == hits.tolist()
    (tmp_path / "b.csv").write_text("3\n3\n3\n")
    equal = cache_hits(trace, [9, 10], names, budget=tmp_path / "b.csv", **how)
    assert equal.equals(cache_hits(trace, [9, 10], names, **how))
    auto = cache_hits(trace, [9], ["static-hindsight"], budget="auto", **how)
    assert (auto["hits"] <= auto["accesses"]).all() and auto["hits"][0] > 0


def test_a_budget_of_caches_needs_scope_layer(tmp_path):
    trace = Trace.from_arrays(**small_trace(3))
    for scope, capacity in (("global", 9), ("request", 9), ("layer", "9KiB")):
        with pytest.raises(UsageError, match="a budget gives each layer's cache experts: use scope layer, and capac"):
            cache_hits(trace, [capacity], scope=scope, budget="auto")


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sequential", [False, True])
def test_a_window_of_48_steps(scope, sequential):
    """In 110 steps accesses leave the window."""
    given = small_trace(5, steps=110, most=2)
    frame = cache_hits(Trace.from_arrays(**given), [9], ["lfu-window"], scope=scope, sequential=sequential)
    assert frame_of(frame) == oracle_frame(given, "lfu-window", 9, scope, sequential, True)


@pytest.mark.parametrize("how", [{}, {"scope": "request"}, {"scope": "layer", "budget": "auto"}])
def test_no_capacities_are_an_empty_table(how):
    trace = Trace.from_arrays(**small_trace(3))
    frame = cache_hits(trace, [], list(POLICIES), sequential=True, **how)
    assert frame.shape[0] == 0
    assert frame.columns == cache_hits(trace, [9], ["lru"], sequential=True, **how).columns
