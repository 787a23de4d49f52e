"""Balance: several intervals in one pass, and on how many units the experts of each row are."""

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.balance_traces import EXPERTS, LAYERS, counted, small_trace

from moetrace.analyze.balance.imbalance import COPY_RULES
from moetrace.analyze.balance.plans import Tier, make_plan
from moetrace.analyze.balance.units import balance
from moetrace.jit.random import drawn


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), intervals=st.lists(st.integers(1, 30), min_size=2, max_size=4, unique=True))
def test_several_intervals_give_the_figures_of_separate_runs(seed, intervals):
    trace, asked = small_trace(seed, steps=30), {"tier": Tier(3, 2), "window": 5, "fan_out": True}
    whole = balance(trace, ["ep", "eplb"], interval=intervals, **asked)
    assert whole.trace["intervals"] == intervals
    for at, interval in enumerate(intervals):
        alone = balance(trace, ["ep", "eplb"], interval=interval, **asked)
        for frame in ("summary", "layers", "over_time"):
            some = getattr(whole, frame).filter(pl.col("interval").is_null() | (pl.col("interval") == interval))
            assert some.equals(getattr(alone, frame)), frame
        assert whole.staleness.filter(interval=interval).equals(alone.staleness)
        for name in ("rebalances", "rebalance_steps"):
            assert [whole.trace[name][at]] == alone.trace[name]
    assert (whole.summary["plan"] == "re-made").sum() == sum(interval < 25 for interval in intervals)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32), placement=st.sampled_from(["ep", "eplb", "tp:2"]), copies=st.sampled_from(COPY_RULES)
)
def test_fan_out_is_that_of_each_row(seed, placement, copies):
    trace, tier = small_trace(seed, steps=12), Tier(6, 5, nodes=3)
    found = balance(trace, [placement], tier=tier, window=0, copies=copies, seed=9, fan_out=True)
    plan = make_plan(placement, tier, (LAYERS, EXPERTS), counted(trace).sum(0))
    ids, on_units, on_nodes = trace.read("experts", 0, trace.rows), [], []
    for layer in range(LAYERS):
        held = [(b, e) for b, of_bin in enumerate(plan.expert_of_slot[layer].tolist()) for e in of_bin if e >= 0]
        units, nodes = [], []
        for step in range(trace.steps):
            nth = dict.fromkeys(range(EXPERTS), 0)
            for place, row in enumerate(range(trace.offset[step], trace.offset[step + 1])):
                bins = set()
                for e in (int(e) for e in ids[row, layer] if e != 255):
                    having = [b for b, other in held if other == e]
                    number = {"even": nth[e] - step, "row": place}.get(copies)
                    if number is None:
                        number = int(drawn(9, step, layer, place, e))
                    nth[e] += 1
                    bins.add(having[number % len(having)])
                if bins:
                    own = {b * plan.share + part for b in bins for part in range(plan.share)}
                    units.append(len(own))
                    nodes.append(len({unit // 2 for unit in own}))
        on_units.append(units)
        on_nodes.append(nodes)
    for column, of_layers in (("fan_out", on_units), ("fan_out_nodes", on_nodes)):
        assert found.layers[column].to_list() == pytest.approx([np.mean(of) if of else None for of in of_layers])
        pooled = [n for of in of_layers for n in of]
        assert found.summary[column].item() == pytest.approx(np.mean(pooled))
    without = balance(trace, [placement], tier=tier, window=0, copies=copies, seed=9)
    assert without.summary["fan_out"].null_count() == 1
    assert without.layers.drop("fan_out", "fan_out_nodes").equals(found.layers.drop("fan_out", "fan_out_nodes"))
