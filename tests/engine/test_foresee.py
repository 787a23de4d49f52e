"""`foresee` against the oracle, which knows its rules in plain Python; and what must hold of it."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from support.compared import compare, small_case
from support.drawn_runs import replay
from support.one_run import run
from support.strategies import Case, as_arrays, cases

from moetrace.engine.foresight import foresight_of
from moetrace.engine.schedule import Requests
from moetrace.spec import PolicySpec, load_policy
from moetrace.spec.errors import MoetraceError
from moetrace.trace import Trace
from moetrace.trace import format as trace_format

PRESETS = ("foresee", "foresee-no-ahead", "foresee-no-follows", "foresee-long")
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"ahead_layers": 1, "margin": 0.0},
    {"ahead_layers": 0},
    {"follows": False},
    {"now_weight": 0.0},
    {"prefetch_blocks": True},
)


def policies(dispatches=("ndp", "gpu", "balance"), placements=("ep", "tp")) -> list[PolicySpec]:
    """Every variant with the queue, and the residency without it."""
    kinds = [(*pair, variant) for pair in itertools.product(placements, dispatches) for variant in VARIANTS]
    chosen: dict[str, Any] = {"residency": "foresee", "prefetch": "foresee", "scope": "global"}
    found = [{"placement": p, "dispatch": d} | chosen | variant for p, d, variant in kinds]
    found += [{"dispatch": d} | chosen | {"prefetch": "none"} for d in dispatches]
    return [PolicySpec(name=f"policy {i}", **fields) for i, fields in enumerate(found)]


def test_every_variant():
    compare(small_case(np.random.default_rng(3)), policies())


@pytest.mark.parametrize(("seed", "most"), [(1, 1), (2, 1), (3, 9)])
def test_long_traces(seed, most):
    """Batch 1 and large batches, long enough for tables to count."""
    case = small_case(np.random.default_rng(seed), steps=60, most=most)
    compare(case, [load_policy(name) for name in PRESETS])


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases(), data=st.data())
def test_random_traces(case, data):
    """Prompts and answers in one step, absent rows, several rows of a request, slots from none to all."""
    dispatches = ("ndp", "gpu", "balance", "optimal") if case.system.units else ("gpu",)
    compare(case, data.draw(st.lists(st.sampled_from(policies(dispatches)), min_size=1, max_size=4)))


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases(max_steps=20), jobs=st.integers(1, 2))
def test_figures_do_not_depend_on_threads_blocks_or_later_steps(case, jobs):
    """Two threads, blocks of a row each, and the first half of the trace by itself say the same of its steps."""
    chosen = [load_policy(name) if case.system.units else policies(("gpu",), ("ep",))[0] for name in PRESETS[:1]]
    whole = replay(case, chosen).lanes[0].log.step
    experts = case.model.most_experts
    arrays: dict[str, Any] = dict(as_arrays(case.trace, experts))
    trace = Trace.from_arrays(num_experts=experts, **arrays)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_format, "BLOCK_BYTES", 1)  # one step a block
        patch.setattr("moetrace.engine.decoded.BLOCK_BYTES", 1)  # with threads, too
        again = run(trace, case.model, case.system, chosen, jobs=jobs, slots=case.slots, ignore_capacity=True)
    assert again.lanes[0].log.step.tobytes() == whole.tobytes()
    half = case.trace.steps // 2
    if half:
        rows = int(case.trace.offset[half])
        part: dict[str, Any] = {
            name: array[: half if name in ("steps", "phase") else rows] for name, array in arrays.items()
        }
        part |= {"expert_bytes": arrays["expert_bytes"]} if "expert_bytes" in arrays else {}
        begun = replay_arrays(part, case, chosen)
        assert begun["moe_s"].tolist() == whole["moe_s"][:half].tolist()
        assert begun["hits"].tolist() == whole["hits"][:half].tolist()


def replay_arrays(arrays, case, chosen):
    trace = Trace.from_arrays(num_experts=case.model.most_experts, **arrays)
    return run(trace, case.model, case.system, chosen, slots=case.slots, ignore_capacity=True).lanes[0].log.step


def test_it_learns_a_cycle():
    """Experts that take turns, two a step of six, four slots: an LRU cache never hits, who follows is soon known."""
    case = small_case(np.random.default_rng(0), steps=90, most=1)
    case.trace.experts[:] = np.array([[0, 1], [2, 3], [4, 5]])[np.arange(len(case.trace.experts)) % 3][:, None]
    case.trace.request[:], case.trace.row_phase[:] = 0, 1
    case.trace.position[:] = np.arange(len(case.trace.experts))
    case.slots = 12
    lru = PolicySpec(name="lru", placement="tp", dispatch="balance", residency="lru", scope="global")
    outcome = replay(case, [lru, load_policy("foresee")])
    hits = [lane.log.step["hits"][45:].sum() for lane in outcome.lanes]
    assert hits[1] > hits[0]
    assert outcome.lanes[1].log.step["moe_s"][45:].sum() < outcome.lanes[0].log.step["moe_s"][45:].sum()


def test_layers_ahead_that_there_are_not_are_taken_back_with_a_word():
    case = small_case(np.random.default_rng(3))
    asked = [load_policy("foresee", {"name": f"{ahead} ahead", "ahead_layers": ahead}) for ahead in (2, 3, 200)]
    outcome = replay(case, asked)
    assert outcome.warnings == [
        f"policy {ahead} ahead foretells 2 layers ahead, and not {ahead} (ahead_layers): the trace has 3 MoE layers."
        for ahead in (3, 200)
    ]
    two, *others = (lane.log.step.tobytes() for lane in outcome.lanes)
    assert others == [two, two]


def test_where_only_the_gpu_runs_the_units_speed_is_no_matter():
    case = small_case(np.random.default_rng(3), steps=40, most=6)
    only_gpu = load_policy("foresee", {"dispatch": "gpu"})
    compare(case, [only_gpu])
    slow = replace(case.system, ndp=replace(case.system.ndp, gmac_s=1e-3))
    one, other = (replay(Case(case.trace, case.model, on, case.slots), [only_gpu]) for on in (case.system, slow))
    assert one.lanes[0].log.step.tobytes() == other.lanes[0].log.step.tobytes()


def test_tables_that_are_too_large_are_refused():
    none = Requests(*[np.zeros(0, np.int64)] * 9)
    with pytest.raises(MoetraceError, match=r"residency foresee keeps 8\.\d GB of tables for 2 x 23170 experts, more"):
        foresight_of(PolicySpec(name="large", residency="foresee"), none, 2, 23170, 8)
