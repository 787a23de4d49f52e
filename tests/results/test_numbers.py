"""Specs at the ends of their ranges: every figure is finite, or one sentence says why there is none."""

import json
import math
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import moetrace as mt
from moetrace.batch.work import evaluate
from moetrace.engine.setup import Setup
from moetrace.results import summary
from moetrace.spec import MoetraceError, UsageError, derived
from moetrace.spec.load import field_names

LAYERS, EXPERTS, TOP_K = 2, 6, 2
FIXED = {"name", "gpu.name", "moe_layers", "experts", "top_k"}
# Fields that need a table of bits; most of their largest values are more bits than a weight may have.
OF_A_TABLE = ("weight_bits.", "sparse_launches")
POLICIES = [
    mt.load_policy("on-demand"),
    mt.load_policy("edge-ndp"),
    mt.load_policy("monde"),
    mt.PolicySpec(name="ahead", dispatch="balance", residency="ewma", prefetch="online:2", alpha=1e-6),
    mt.PolicySpec(name="oracle", dispatch="optimal", residency="lfu", prefetch="oracle:3", half_life=10**9),
]


def limits(struct) -> dict[str, tuple[Any, float, float]]:
    """Least and most of each field of a spec that holds a number, and which kind it is."""
    found = {}
    for path in set(field_names(struct)) - FIXED:
        kind: Any = msgspec.inspect.type_info(struct)
        for key in path.split("."):
            kinds = getattr(kind, "types", [kind])
            kind = next(one for one in kinds if isinstance(one, msgspec.inspect.StructType))
            kind = next(field.type for field in kind.fields if field.encode_name == key)
        numbers = [
            one
            for one in getattr(kind, "types", [kind])
            if isinstance(one, msgspec.inspect.FloatType | msgspec.inspect.IntType)
        ]
        if not numbers:  # a choice of words, or a switch
            continue
        (number,) = numbers
        found[path] = (type(number), number.ge, number.lt if number.le is None else number.le)
    return found


# Parts that a machine of one GPU has, and that the GPUs of a cluster have.
CLUSTER = ("gpu.", "network.", "energy.gpu.", "price.gpu.", "price.usd_hour")
ONE_GPU = ("gpu.", "ndp.", "link.", "cpu.", "host.", "energy.", "price.")
# Fields that need other fields, or at whose limit a replay never ends: packets that are always lost.
NOT_ALONE = ("host.slots", "gpu.levels.", "link.loss", "energy.disk.")


def ends(struct, parts=ONE_GPU):
    """Draw values of a spec's numbers: the ends of their ranges, and what lies between."""

    def values(kind, least, most):
        middle = math.sqrt(max(least, 1e-9) * most)
        return st.sampled_from([least, most, int(middle) if kind is msgspec.inspect.IntType else middle])

    ranges = {path: one for path, one in drawn_limits(struct, parts).items() if None not in one}
    return st.fixed_dictionaries({path: values(*one) for path, one in sorted(ranges.items())})


def drawn_limits(struct, parts=ONE_GPU):
    return {
        path: one
        for path, one in limits(struct).items()
        if not path.startswith(OF_A_TABLE + NOT_ALONE) and (struct is not mt.System or path.startswith(parts))
    }


def the_least(struct, parts=ONE_GPU):
    return {path: least for path, (_, least, _) in drawn_limits(struct, parts).items()}


def the_most(struct, parts=ONE_GPU):
    return {path: most for path, (_, _, most) in drawn_limits(struct, parts).items()}


def test_every_number_of_a_spec_has_both_ends():
    for struct in (mt.Model, mt.System):
        for path, (_, least, most) in limits(struct).items():
            assert least is not None and most is not None, f"{struct.__name__}.{path} needs Meta(ge=..., le=...)"
    for field in msgspec.inspect.type_info(mt.PolicySpec).fields:  # type: ignore[attr-defined]
        for kind in getattr(field.type, "types", [field.type]):
            if isinstance(kind, msgspec.inspect.FloatType | msgspec.inspect.IntType):
                assert None not in (kind.ge, kind.le), f"PolicySpec.{field.name} needs Meta(ge=..., le=...)"


@pytest.fixture(scope="module")
def trace():
    rng = np.random.default_rng(0)
    ids = rng.permuted(np.tile(np.arange(EXPERTS, dtype=np.uint8), (12, LAYERS, 1)), axis=2)[..., :TOP_K]
    phase = np.array([0, 1, 1, 0, 1])
    return mt.Trace.from_arrays(ids, num_experts=EXPERTS, steps=np.array([4, 1, 1, 5, 1]), phase=phase)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(model=ends(mt.Model), system=ends(mt.System), slots=st.sampled_from([None, 0, 3]))
@example(model=the_least(mt.Model) | {"weight_bits": 64}, system=the_most(mt.System), slots=3)
@example(model=the_most(mt.Model), system=the_least(mt.System), slots=3)
@example(model=the_least(mt.Model) | {"weight_bits": 64}, system=the_least(mt.System), slots=0)
@example(model=the_most(mt.Model), system=the_most(mt.System), slots=None)
def test_figures_are_finite_or_one_sentence_says_why(trace, model, system, slots):
    check_figures(trace, model, "edge-ndp", system, POLICIES, slots)


CLUSTER_POLICIES = [
    mt.load_policy(mt.PolicySpec(name=f"{number}"), fields)
    for number, fields in enumerate(
        (
            {"schedule": "serial", "placement": "eplb", "window": 1, "interval": 1},
            {"schedule": "serial", "placement": "eplb", "window": 1, "interval": 1, "migrate": "async"},
            {"schedule": "serial", "execution": "fused", "kernels_per_layer": 10**6},
            {"schedule": "pipeline:2,3", "shared": "apart"},
            {"schedule": "pipeline:auto", "plan_steps": 1},
        )
    )
]


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(model=ends(mt.Model), system=ends(mt.System, CLUSTER), gpus=st.sampled_from([1, 3, 4096]))
@example(model=the_least(mt.Model) | {"weight_bits": 64}, system=the_most(mt.System, CLUSTER), gpus=3)
@example(model=the_most(mt.Model), system=the_least(mt.System, CLUSTER), gpus=3)
@example(model=the_least(mt.Model) | {"weight_bits": 64}, system=the_least(mt.System, CLUSTER), gpus=4096)
@example(model=the_most(mt.Model), system=the_most(mt.System, CLUSTER), gpus=1)
def test_figures_of_a_cluster_are_finite_too(trace, model, system, gpus):
    shared = min(model["shared_params_per_layer"], model["dense_params_per_layer"])
    nodes = {"cluster.gpus": gpus, "cluster.gpus_per_node": 2}
    model = model | {"shared_params_per_layer": shared}
    check_figures(trace, model, "h100-x8", system | nodes, CLUSTER_POLICIES, None)


def check_figures(trace, model, system, changes, policies, slots):
    shape = {"moe_layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K}
    idle_w = {f"energy.{part}.idle_w": f"energy.{part}.active_w" for part in ("gpu", "ndp", "cpu")}
    changes |= {idle: min(changes[idle], changes[active]) for idle, active in idle_w.items() if idle in changes}
    try:
        drawn = mt.load_model("tiny-olmoe", model | shape), mt.load_system(system, changes)
    except UsageError as error:  # a reserve of more than the memory, an expert of less than a byte
        assert "wants" in str(error) or "needs" in str(error)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(derived, "MAX_ROWS", 100)
        found = [*derived.model_figures(drawn[0]), *derived.system_figures(drawn[1]), *derived.pair_figures(*drawn)]
    assert all(figure.value is None or math.isfinite(figure.value) for figure in found)
    result = mt.replay(trace, model=drawn[0], system=drawn[1], policies=policies, slots=slots, ignore_capacity=True)
    json.dumps(result.to_dict(), allow_nan=False)
    for frame in (result.summary, result.steps, result.units, result.layers, result.requests, result.accounts):
        for name in frame.select(pl.col(pl.Float64)).columns:
            assert frame[name].drop_nulls().is_finite().all(), name
    assert (result.steps["duration_s"] > 0).all()
    assert result.units["utilization"].drop_nulls().is_between(0, 1).all()


def test_a_figure_that_is_not_finite_is_one_sentence_and_costs_other_cells_nothing(trace, monkeypatch):
    """No spec leads there; a defect would."""
    model = mt.load_model("tiny-olmoe", {"moe_layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K})
    setups = [Setup(model=model, system=mt.load_system("edge-ndp"), policies=[one]) for one in POLICIES[:2]]
    total_s = summary.total_s
    monkeypatch.setattr(summary, "total_s", lambda lane: math.inf if lane.policy.name == "on-demand" else total_s(lane))
    failed, good = evaluate(trace, setups)
    assert isinstance(failed, MoetraceError)
    assert str(failed).startswith("total_s of policy on-demand is inf, and not a finite number: the rates and sizes of")
    assert good["result"]["policies"][0]["total_s"] > 0


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("gpu.tflops", 5e-324, r"gpu.tflops wants a number from 1e-09 to 1e\+09, got 5e-324"),
        ("gpu.compute_efficiency", 1e-300, "gpu.compute_efficiency wants a number from 1e-06 to 1, got 1e-300"),
        ("link.bandwidth_gb_s", 1e18, r"link.bandwidth_gb_s wants a number from 1e-09 to 1e\+09, got 1e\+18"),
        ("link.latency_us", 1e10, r"link.latency_us wants a number from 0 to 1e\+09"),
        ("ndp.capacity_gb", 1e-12, "ndp.capacity_gb wants a number from 1e-09"),
    ],
)
def test_numbers_outside_a_range_are_refused_with_the_range(field, value, says):
    with pytest.raises(UsageError, match=says):
        mt.load_system("edge-ndp", {field: value})
