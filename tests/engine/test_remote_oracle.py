"""Remote functions against the oracle of more tiers, on random machines and policies."""

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from support.drawn_runs import replay
from support.plain_python import as_plain_python
from support.strategies import Case, cases, policies
from support.tiers_oracle import from_specs
from support.tiers_oracle import replay as replay_slowly

from moetrace.results.remote_use import remote_figures
from moetrace.spec import Cpu, Remote

RANDOM = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
OF_STEPS = ("duration_s", "moe_s", "wait_s", "dense_s", "hits", "misses", "demand_bytes", "prefetch_bytes")
FUNCTIONS = st.builds(
    Remote,
    tflops_per_vcpu=st.sampled_from([0.0005, 0.002, 0.1]),
    bandwidth_gb_s_per_vcpu=st.sampled_from([0.1, 0.5, 5.0]),
    vcpus=st.sampled_from([1.0, 2.5]),
    start_ms=st.sampled_from([0.0, 10.0]),
    payload_mb=st.sampled_from([0.0005, 0.001024, 0.003, 6.0]),
    load_gb_s=st.sampled_from([0.1, 1.0]),
    network_gb_s=st.sampled_from([0.0005, 0.01, 1.0]),
    call_ms=st.sampled_from([0.0, 0.3, 2.0]),
    usd_per_gb_s=st.just(1.0),
)
CPU = Cpu(tflops=0.01, bandwidth_gb_s=0.8, command_us=30.0)


@as_plain_python
@RANDOM
@given(case=cases(max_steps=6, max_experts=8), functions=FUNCTIONS, has_cpu=st.booleans(), data=st.data())
def test_functions_against_the_oracle(case, functions, has_cpu, data):
    """`split` and `optimal` are others' tests; of `foresee` the oracle knows no remote experts."""
    machine = replace(case.system, remote=functions, cpu=CPU if has_cpu else None)
    drawn = policies(machine.units or has_cpu)
    spec = data.draw(drawn.filter(lambda one: one.dispatch not in ("split", "optimal") and one.residency != "foresee"))
    if machine.ndp is not None and has_cpu:
        spec = replace(spec, dispatch=data.draw(st.sampled_from([spec.dispatch, "cheapest", "bottleneck"])))
    share, copies = data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])), data.draw(st.sampled_from([None, 1, 2, 3]))
    first = None if spec.loads else data.draw(st.sampled_from([None, 1, 2]))
    spec = replace(spec, remote=share, replicas=copies, plan_steps=first)
    lane = replay(Case(case.trace, case.model, machine, case.slots), [spec]).lanes[0]
    slow = replay_slowly(case.trace, *from_specs(case.trace, case.model, machine, spec, case.slots))
    for name in OF_STEPS:
        np.testing.assert_allclose(lane.log.step[name], slow.per_step(name), rtol=1e-9, atol=1e-14, err_msg=name)
    found = remote_figures(machine, lane)
    ours = [found["remote_s"], found["remote_calls"], found["cold_s"], lane.clairvoyant_s, lane.work_bound_s]
    theirs = [slow.remote_s, slow.remote_calls, slow.per_step("cold_s")[0], slow.clairvoyant_s, slow.work_bound_s]
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-14)
