"""A replay beside the oracle's, figure by figure."""

import numpy as np

from moetrace.engine.run import Run
from moetrace.engine.state import FIRST_GROUP, GPU, LINK_IN, LINK_OUT
from moetrace.spec import Gpu, Link, Model, Ndp, System
from support import oracle
from support.drawn_runs import replay
from support.strategies import Case, arrivals, routing

STEP_TIMES = ("duration_s", "dense_s", "moe_s", "head_s", "wait_s", "demand_bytes", "prefetch_bytes", "imbalance")
COUNTS = ("hits", "misses", "late")


def close(actual, expected) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-18)


def unit_column(lane, units: int, column: str) -> list[float]:
    """One figure of the GPU, each NDP unit and both link directions, in the oracle's order (its idle CPU left out)."""
    share, log = lane.machine.share, lane.log.unit[column]
    part = share if column in ("rows", "bytes") else 1
    return [log[GPU], *(log[FIRST_GROUP + u // share] / part for u in range(units)), log[LINK_IN], log[LINK_OUT]]


def check(case: Case, outcome: Run, index: int, expected: oracle.Outcome) -> None:
    lane = outcome.lanes[index]
    log = lane.log
    for name in COUNTS:
        assert log.step[name].tolist() == expected.steps[name].astype(int).tolist(), name
    for name in STEP_TIMES:
        close(log.step[name], expected.steps[name])
    close(log.step["duration_s"].sum(), expected.total_s)
    for name in ("hits", "misses", "gpu_experts", "ndp_experts"):
        assert log.layer[name].tolist() == expected.layers[name].astype(int).tolist(), name
    for name in ("dense_s", "moe_s", "demand_bytes"):
        close(log.layer[name], expected.layers[name])
    with np.errstate(invalid="ignore"):
        close(log.layer["imbalance_sum"] / log.layer["imbalance_count"], expected.layers["imbalance"])
    in_order = [i for i, name in enumerate(expected.units["unit"]) if name != "cpu"]
    for column in ("busy_s", "experts", "rows", "bytes"):
        close(unit_column(lane, case.system.units, column), expected.units[column][in_order])
    working_s = np.subtract(*(unit_column(lane, case.system.units, column) for column in ("busy_s", "shared_s")))
    close(working_s / expected.total_s, expected.units["utilization"][in_order])
    assert log.tally["wasted"][0] == expected.wasted
    assert log.tally["used"][0] == expected.used
    assert log.fallbacks[0] == expected.optimal_fallbacks
    close(outcome.work_bound_s, expected.work_bound_s)
    close(lane.lower_bound_s, expected.lower_bound_s)
    close(lane.clairvoyant_s, expected.clairvoyant_s)


def small_case(rng: np.random.Generator, steps: int = 14, experts: int = 6, top_k: int = 2, most: int = 4) -> Case:
    """A trace of 3 layers and a machine of 4 units on which every decision goes both ways."""
    offset = np.concatenate(([0], np.cumsum(rng.integers(1, most + 1, steps))))
    rows = int(offset[-1])
    ids = routing(rng, rows, (3, experts, top_k), 0.05)
    sizes = rng.integers(500_000, 1_500_000, (3, experts))
    trace = oracle.OracleTrace(ids, *arrivals(rng, rows, False), offset, sizes)
    model = Model(
        name="small",
        moe_layers=3,
        experts=experts,
        top_k=top_k,
        hidden=512,
        expert_intermediate=1024,
        expert_matrices=1,
        weight_bits=16,
        dense_weight_bits=16,
        dense_params_per_layer=2**19,
        once_params=2**20,
        kv_bytes_per_token_layer=1000,
    )
    gpu = Gpu(name="g", tflops=0.01, bandwidth_gb_s=1.1, memory_gb=1.0, reserve_gb=0.0, launch_us=30.0)
    ndp = Ndp(units=4, gmac_s=0.3, bandwidth_gb_s=0.4, capacity_gb=1.0, command_us=20.0)
    link = Link(bandwidth_gb_s=0.9, latency_us=10.0)
    return Case(trace, model, System(name="small", gpu=gpu, ndp=ndp, link=link), 7)


def compare(case: Case, policies) -> None:
    outcome = replay(case, policies)
    for i, policy in enumerate(policies):
        check(case, outcome, i, oracle.simulate(case.trace, case.model, case.system, policy, slots=case.slots))
