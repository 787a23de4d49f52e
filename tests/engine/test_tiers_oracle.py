"""The oracle of version 2: with all off it is version 1's; each mechanism by hand on small cases."""

import itertools
import math
from types import SimpleNamespace

import msgspec
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.by_hand import model_of, one, trace_of
from support.drawn_machines import machine_cases, machine_policies, plain_policy
from support.oracle import simulate
from support.strategies import all_policies, cases
from support.tiers_by_hand import exactly, rows_of, run, system_with
from support.tiers_oracle import from_specs, replay

STEP_TIMES = ("start_s", "duration_s", "dense_s", "moe_s", "head_s", "wait_s")
STEP_COUNTS = ("hits", "misses", "late", "demand_bytes", "prefetch_bytes")
TALLIES = ("late", "wasted", "used", "optimal_fallbacks")


def same_as_version_1(trace, model, system, policy, slots):
    old = simulate(trace, model, system, policy, slots)
    new = replay(trace, *from_specs(trace, model, system, policy, slots))
    for name in STEP_TIMES + STEP_COUNTS:
        np.testing.assert_allclose(new.per_step(name), old.steps[name], rtol=1e-12, err_msg=name)
    for name in TALLIES:
        assert getattr(new, name) == getattr(old, name), name
    for name in ("work_bound_s", "clairvoyant_s"):
        np.testing.assert_allclose(getattr(new, name), getattr(old, name), rtol=1e-12, err_msg=name)
    for i, unit in enumerate(old.units["unit"]):
        for column, value in new.unit[unit].items():
            np.testing.assert_allclose(value, old.units[column][i], rtol=1e-9, atol=1e-18, err_msg=f"{unit} {column}")
    in_use = new.carrying_s / new.total_s
    np.testing.assert_allclose(in_use, old.units["utilization"][old.units["unit"].tolist().index("link_in")], rtol=1e-9)
    for layer, expected in enumerate(old.layers["imbalance"]):
        seen = [step.imbalance[layer] for step in new.steps if not math.isnan(step.imbalance[layer])]
        np.testing.assert_allclose(np.mean(seen) if seen else math.nan, expected, rtol=1e-12)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases(max_steps=6, max_experts=8), data=st.data())
def test_off_is_version_1(case, data):
    allowed = [policy for policy in all_policies(case.system.units) if policy.dispatch != "split"]
    policy = data.draw(st.sampled_from(allowed), label="policy")
    same_as_version_1(case.trace, case.model, case.system, policy, case.slots)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=machine_cases(max_steps=6), data=st.data())
def test_off_is_version_1_on_machines_with_a_cpu(case, data):
    policy = plain_policy(data.draw(machine_policies(case), label="policy"))
    same_as_version_1(case.trace, case.model, case.plain, policy, case.slots)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=machine_cases(max_steps=5), placement=st.sampled_from(["ep", "tp"]))
def test_cheapest_is_the_older_oracles(case, placement):
    if "ndp" in case.system:
        policy = plain_policy({"placement": placement, "dispatch": "cheapest", "residency": "lru"})
        same_as_version_1(case.trace, case.model, case.plain, policy, case.slots)


# --- Three devices, on the machine of `tiers_by_hand` -----------------------------------------------------------------
# Hot 0, warm 1, cold 2. The CPU takes 0.2 ms a row; all channels 0.8 GB/s, one unit 0.4 GB/s.
TIERS = {
    "cpu": {"tflops": 0.01, "bandwidth_gb_s": 1.0},
    "link": {"stream": 0},
    "ndp": {"contention": True, "outside_gb_s": 0.4},
    "host": {"channels_gb_s": 0.8},
}
STRIPED = {(0, 0): "striped", (0, 1): "striped"}
HOT_WARM_COLD = trace_of(rows_of(20, 6, 1))


def tiers(layout=STRIPED, activation_bytes=2, **options):
    model = model_of(experts=3, activation_bytes=activation_bytes)
    chosen = {"placement": "mixed", "layout": layout} | options
    return run(HOT_WARM_COLD, system_with(2, **TIERS), model, **chosen)


def test_three_devices_on_three_experts():
    # GPU: fetched in 4 ms, and run beside it in 2: 4. CPU: 1.25 ms at all channels, 6 rows of 8 us each way: 1.346.
    # Unit 0: 2 ms for expert 2, 1.25 ms for each of the two that others read, 8 us each way: 4.516.
    seen = tiers(user=lambda *_: {0: 1, 1: 2, 2: 0}, take=True)
    assert seen.steps[0].moe_s == [exactly(4.516e-3)]
    busy = {name: unit["busy_s"] * 1e3 for name, unit in seen.unit.items()}
    assert busy == {
        "gpu": exactly(4.7),  # dense 2.7 for 27 rows, expert 2
        "ndp0": exactly(4.5),
        "ndp1": 0,  # runs nothing, and so nothing disturbs it
        "cpu": exactly(1.25),
        "link_in": exactly(4 + 0.056),
        "link_out": exactly(0.056),
    }
    assert seen.steps[0].plan == [{0: 1, 1: 2, 2: 0}]
    # Hot localized on unit 1: fetched at 0.25, as before; unit 1 runs nothing, so only expert 1 disturbs unit 0.
    seen = tiers({(0, 0): 1, (0, 1): "striped"}, user=lambda *_: {0: 1, 1: 2, 2: 0}, take=True)
    assert seen.steps[0].moe_s == [exactly(4e-3)]
    assert seen.unit["ndp0"]["busy_s"] == exactly(3.25e-3)


def test_cheapest_and_bottleneck():
    # Own costs (GPU, CPU, home): hot max(2, 4), 4, striped 10: a tie, GPU. Warm 4, 1.25, 3: CPU. Cold 4, 2.5, 2: home.
    assert tiers(dispatch="cheapest").steps[0].plan == [{0: 1, 1: 2, 2: 0}]
    # Unit 0 ends last at 4.516; expert 2 on the GPU would be 8, on the CPU 1.25 + 2.5 + 0.112 = 3.862: moved, 4 in all.
    # Then the GPU is last, and expert 0 does not get faster elsewhere.
    seen = tiers(dispatch="bottleneck")
    assert seen.steps[0].plan == [{0: 1, 1: 2, 2: 2}]
    assert seen.steps[0].moe_s == [exactly(4e-3)]


def test_optimal_of_three_devices_is_the_best_of_27():
    def placed(plan):
        return tiers(user=lambda *_: plan, take=True).steps[0].moe_s[0]

    every = {plan: placed(dict(enumerate(plan))) for plan in itertools.product(range(3), repeat=3)}
    seen = tiers(dispatch="optimal", take=True, regret=True)
    assert seen.steps[0].moe_s[0] == exactly(min(every.values()))
    fewest = min(3 - plan.count(0) for plan, moe in every.items() if moe < min(every.values()) * (1 + 1e-12))
    assert sum(device > 0 for device in seen.steps[0].plan[0].values()) == fewest
    assert (seen.regret, seen.equal_decisions, seen.decisions) == (0, 3, 3)
    worse = tiers(dispatch="cheapest", regret=True)
    assert worse.regret == exactly(4.516e-3 / min(every.values()) - 1)


def test_optimal_ties_by_demand_order_as_version_1():
    # Two equal experts, both resident, and a unit as fast as the GPU: one of them runs there, the first.
    system = system_with(1, ndp={"bandwidth_gb_s": 1.0, "gmac_s": 10.0})
    kept = {"residency": "static-layers", "gpu_layers": 1, "gpu_layers_end": "last", "scope": "global"}
    seen = run(trace_of(rows_of(1, 1)), system, slots=2, dispatch="optimal", **kept)
    assert seen.steps[0].plan == [{0: 1, 1: 0}]
    assert seen.steps[0].moe_s == [exactly(1e-3)]


def test_units_and_a_cpu_get_their_own_activations():
    # Rows of 8 us. Two rows choose 0 (unit 0) and 1 (unit 1), and 2 on the CPU: units get each row twice, host once.
    model = model_of(experts=3, top_k=3)
    trace = trace_of([one(0, 1, 2), one(0, 1, 2)])
    for kind, sent_us in {"per-unit": 32, "host": 16}.items():
        system = system_with(2, cpu={}, ndp={"activations": kind})
        seen = run(trace, system, model, user=lambda *_: {0: 0, 1: 0, 2: 2}, take=True)
        assert seen.unit["link_out"]["busy_s"] == exactly((sent_us + 16) * 1e-6)
        assert seen.steps[0].moe_s == [exactly((2 + 2 * sent_us / 1e3) * 1e-3)]


# --- Dispatch --------------------------------------------------------------------------------------------------------


def test_hot_ratio_on_the_machine_of_monde():
    # 32 GB/s and 8 units of 64 GB/s: 32/(32 + 512) = 1/17.
    system = system_with(8, ndp={"bandwidth_gb_s": 64.0}, link={"bandwidth_gb_s": 32.0})
    for active in (1, 2, 16, 17, 18, 34, 35, 51, 119, 120, 128):
        seen = run(trace_of(rows_of(*[1] * active)), system, dispatch="hot:ratio")
        assert sum(device == 1 for device in seen.steps[0].plan[0].values()) == -(-active // 17)


def test_fiddler_knows_the_stream():
    # 4 rows are 4 ms at home. A miss takes 5, streamed without limit 4: not less than home; 5 rows: 5 at home.
    system = system_with(1, link={"stream": 0})
    plans = [run(trace_of(rows_of(n)), system, dispatch="fiddler").steps[0].plan[0][0] for n in (4, 5)]
    assert plans == [0, 1]


# --- Properties ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases(max_steps=4, max_experts=6, max_units=3), chunks=st.sampled_from([2, 8, 64, "auto"]))
def test_chunks_never_delay_if_starts_are_free(case, chunks):
    if case.system.ndp is None:
        return
    system = {name: SimpleNamespace(**msgspec.structs.asdict(getattr(case.system, name))) for name in ("gpu", "ndp")}
    link = SimpleNamespace(bandwidth_gb_s=case.system.link.bandwidth_gb_s, latency_us=0.0)
    system = SimpleNamespace(**system, link=link, cpu=None)
    system.ndp.command_us = 0.0
    times = []
    for system.ndp.chunks in (1, chunks):
        times.append(run(case.trace, system, case.model, case.slots, dispatch="ndp").per_step("moe_s"))
    assert (times[1] <= times[0] * (1 + 1e-9)).all()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases(max_steps=4, max_experts=6, max_units=0), parts=st.sampled_from([2, 5, 0]))
def test_streams_never_delay(case, parts):
    times = []
    for stream in (1, parts):
        link = SimpleNamespace(**msgspec.structs.asdict(case.system.link) | {"stream": stream})
        system = SimpleNamespace(gpu=case.system.gpu, ndp=None, cpu=None, link=link)
        times.append(run(case.trace, system, case.model, case.slots, residency="lru").per_step("moe_s"))
    assert (times[1] <= times[0] * (1 + 1e-9)).all()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=machine_cases(max_steps=3, max_experts=5), data=st.data())
def test_bottleneck_is_between_optimal_and_cheapest(case, data):
    system = case.plain
    if system.cpu is None or system.ndp is None:
        return
    system.link.stream = data.draw(st.sampled_from([1, 0, 4]))
    system.ndp.contention = data.draw(st.booleans())
    system.ndp.outside_gb_s = system.link.bandwidth_gb_s * data.draw(st.sampled_from([0.5, 2.0]))
    system.host = SimpleNamespace(channels_gb_s=system.link.bandwidth_gb_s * data.draw(st.sampled_from([0.7, 4.0])))
    system.cpu.chunks = data.draw(st.sampled_from([1, "auto"]))
    placement = data.draw(st.sampled_from(["ep", "tp"]))
    kinds = ("optimal", "bottleneck", "cheapest")
    options = {"placement": placement, "take": True}
    times = [run(case.trace, system, case.model, 0, dispatch=kind, **options).per_step("moe_s") for kind in kinds]
    assert (times[0] <= times[1] * (1 + 1e-9)).all()
    assert (times[1] <= times[2] * (1 + 1e-9)).all()
