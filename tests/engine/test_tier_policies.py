"""Dispatches that know a CPU beside NDP units, in whole replays: by hand, a user's own, what is refused, and TriMoE."""

import msgspec
import numpy as np
import pytest
from support import in_ms

import moetrace as mt
from moetrace.engine.placement import Placing
from moetrace.engine.placements.mixed import as_laid_out
from moetrace.engine.run import run_setups
from moetrace.engine.setup import Setup, check_setup
from moetrace.generators import generate_trace
from moetrace.results.frames import layer_frame, unit_frame
from moetrace.spec import PolicySpec, load_model, load_policy, load_system
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.spec.fits import check_layout
from moetrace.spec.participants import check_policy, idle_cpu, idle_loss, seen_by

OWN = """
def spread(state, view, layer, load, plan):
    for i in range(load.size):
        plan[i] = 2 if view.active[i].cpu_s <= view.active[i].device_s[0] else 0

def beyond(state, view, layer, load, plan):
    plan[0] = 3

def always(state, view, layer, load, plan):
    plan[0] = 2
"""
BESIDE = {"ndp": {}, "cpu": {"bandwidth_gb_s": 1.0, "tflops": 0.004}}
BOTTLENECK = in_ms.policy("bottleneck")
TRACE = in_ms.steps(in_ms.rows(0, 0, 0, 0, 1, 1, 2), in_ms.rows(0, 1))


def replayed(on, *policies, trace=TRACE):
    setup = Setup(model=in_ms.model(), system=on, policies=policies, slots=0)
    (run,) = run_setups(trace, [setup])
    if isinstance(run, MoetraceError):
        raise run
    return run


@pytest.mark.parametrize(
    ("link_gb_s", "ms", "rows_on_cpu", "devices"),
    [(0.125, 5.5, 10, (0, 0, 3)), (0.25, 4.0, 0, (1, 0, 2)), (0.5, 2.5, 4, (1, 0, 2)), (1.0, 3.0, 0, (3, 0, 0))],
)
def test_three_experts_of_trimoe_by_hand(link_gb_s, ms, rows_on_cpu, devices):
    """6, 3 and 1 rows. CPU: 1 ms of weights, 0.5 ms a row. Unit: 2 ms, 1 ms a row. GPU: 1 ms, and fetches that stream.

    Fetches of 8 ms: all go to the CPU, 3 + 1.5 + 1 = 5.5. Its costliest, the first, would make that 8 on the GPU, 6 on
    the unit: nothing moves. Of 4: it moves to the GPU, whose end is 4 then. The GPU ends last, and has one only, which
    would make it 5.5 on the CPU, 6 on the unit. Of 2: the first is cheapest on the GPU; the CPU's 1.5 + 1 end last, and
    the second would make that 4 on the GPU, 3 on the unit. Of 1: the GPU is cheapest for all and ends at 3; its first
    would take as long on the CPU.
    """
    trace = in_ms.steps(in_ms.rows(0, 0, 0, 0, 0, 0, 1, 1, 1, 2))
    lane = in_ms.replay(trace, in_ms.system(link={"stream": 0, "bandwidth_gb_s": link_gb_s}, **BESIDE), BOTTLENECK)
    act_ms = rows_on_cpu * 1e-6 / (link_gb_s * 1e6)  # 1e-6 bytes a row, one way, where the CPU ends last
    assert in_ms.moe_ms(lane) == pytest.approx([ms + 2 * act_ms], rel=1e-12)
    assert lane.log.layer[0][["gpu_experts", "ndp_experts", "cpu_experts"]].tolist() == devices
    on_gpu = devices[0]
    assert lane.log.unit["busy_s"][0] == pytest.approx(1e-3 * (1 + on_gpu), rel=1e-12)  # dense is 1 ms
    assert lane.log.unit["bytes"][1] == pytest.approx(1e6 * on_gpu, abs=1e-3)


def test_a_cpu_is_a_part_of_the_tables():
    run = replayed(in_ms.system(**BESIDE), in_ms.policy("cheapest"), in_ms.policy("home"))
    layers, units = layer_frame(run), unit_frame(run)
    assert layers["cpu_experts"].to_list() == [5, 0] and layers["ndp_experts"].to_list() == [0, 5]
    rows = {(row["policy"], row["unit"]): row for row in units.iter_rows(named=True)}
    cpu = rows["cheapest", "cpu"]
    assert (cpu["experts"], cpu["rows"], cpu["bytes"]) == (5, 9, 5e6)
    assert cpu["busy_s"] == pytest.approx(6e-3) and cpu["utilization"] == pytest.approx(6 / 8, rel=1e-6)
    assert rows["home", "cpu"]["busy_s"] == 0
    # Both count the CPU among what could share the work: 7 MB at 1, 0.5 and 1 GB/s.
    assert run.lanes[0].work_bound_s == run.lanes[1].work_bound_s
    plain = replayed(in_ms.system(**BESIDE), in_ms.policy("balance"))
    assert "cpu_experts" not in layer_frame(plain).columns
    assert plain.lanes[0].work_bound_s > run.lanes[0].work_bound_s


def test_a_user_s_function_may_use_the_cpu(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    spec = PolicySpec(name="own", dispatch=f"{tmp_path / 'own.py'}:spread", with_cpu=True)
    on = in_ms.system(**BESIDE)
    lane = replayed(on, spec).lanes[0]
    assert lane.log.layer["cpu_experts"][0] == 5
    assert in_ms.moe_ms(lane) == pytest.approx([4.0, 2.0])
    for with_cpu, function, sentence in (
        (None, "always", r"plan\[i\] must be 0 or 1 \(own.py, line 10"),
        (True, "beyond", r"plan\[i\] must be 0, 1 or 2 \(own.py, line 7"),
    ):
        wrong = PolicySpec(name="own", dispatch=f"{tmp_path / 'own.py'}:{function}", with_cpu=with_cpu)
        with pytest.raises(MoetraceError, match=sentence):
            replayed(on, wrong)
    for parts, missing in (({"ndp": {}}, r"\[cpu\]"), ({"cpu": {}}, r"\[ndp\]")):
        with pytest.raises(UsageError, match=f"with_cpu = true needs NDP units and a CPU .* has no {missing}; add it"):
            replayed(in_ms.system(**parts), spec)
        denied = load_policy(BOTTLENECK, {"with_cpu": False})
        with pytest.raises(UsageError, match=f"with_cpu = false needs NDP units and a CPU .* has no {missing}; add it"):
            check_policy(denied, in_ms.system(**parts))
    assert "unless with_cpu is true" in str(idle_cpu(msgspec.structs.replace(spec, with_cpu=None), on))


def test_who_takes_part():
    on = in_ms.system(**BESIDE)
    for name, takes_part in (("cheapest", True), ("bottleneck", True), ("home", True), ("optimal", False)):
        assert (seen_by(in_ms.policy(name), on).cpu is not None) == takes_part
    off = load_policy("trimoe-no-cpu")
    assert seen_by(off, on).cpu is None and "with_cpu is false" in str(idle_cpu(off, on))
    with pytest.raises(UsageError, match=r"with_cpu applies to dispatch cheapest or bottleneck or file\.py:function"):
        load_policy("monde", {"with_cpu": True})
    check_policy(in_ms.policy("bottleneck"), in_ms.system(cpu={}))


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({"ndp": {}, "link": {"stream": 0}}, "link.stream"),
        ({"ndp": {"chunks": "auto"}}, "ndp.chunks"),
        ({"cpu": {"chunks": 4}}, "cpu.chunks"),
        ({"ndp": {"activations": "host"}}, 'ndp.activations = "host"'),
        ({"ndp": {"outside_gb_s": 1, "contention": True}}, "ndp.outside_gb_s"),
        ({"ndp": {}, "host": {"channels_gb_s": 1}}, "host.channels_gb_s"),
        ({"ndp": {}, "gpu": {"evict_us": 1}}, "gpu.evict_us"),
        ({"ndp": {}, "link": {"loss": 0.1}}, "link.loss"),
        ({"ndp": {}, "link": {"loss": 0.1, "stream": 2}}, "link.stream, link.loss"),
    ],
)
def test_split_says_what_it_does_not_know_and_what_to_use(parts, named):
    with pytest.raises(UsageError) as caught:
        replayed(in_ms.system(**parts), in_ms.policy("split", placement="tp"))
    said = f'and system by-hand has {named}: use dispatch = "balance", or leave that out.'
    assert said in str(caught.value)
    if "ndp" in parts:
        with pytest.raises(
            UsageError, match=r'use dispatch = "balance", or "bottleneck", which uses the CPU, too, or l'
        ):
            replayed(in_ms.system(**{"cpu": {}} | parts), in_ms.policy("split", placement="tp"))


@pytest.mark.parametrize("home", ["ndp", "cpu"])
def test_lines_of_tiers_with_nothing_on_are_version_1(home):
    """An eviction that takes no time to speak of: the same figures through the lines of machines with more tiers."""
    trace = in_ms.steps(*(in_ms.rows(*ids) for ids in ([0, 0, 1, 2], [1, 2, 3], [3, 3, 0, 1], [2], [0, 1, 2, 3])))
    on = {"ndp": {"units": 2}} if home == "ndp" else {"cpu": {}}
    plain = in_ms.system(**on)
    forced = in_ms.system(gpu={"evict_us": 1e-9}, **on)
    for dispatch in ("balance", "hot", "optimal", "fiddler", "home", "in-place"):
        policy = in_ms.policy(dispatch, "none" if dispatch == "hot" else "lru")
        one, other = (in_ms.replay(trace, system, policy, slots=4) for system in (plain, forced))
        assert one.tiers is None and other.tiers is not None
        np.testing.assert_allclose(other.log.step["moe_s"], one.log.step["moe_s"], rtol=1e-12)
        for column in ("busy_s", "rows", "bytes"):
            np.testing.assert_allclose(other.log.unit[column][:4], one.log.unit[column][:4], rtol=1e-12)
        assert other.clairvoyant_s == pytest.approx(one.clairvoyant_s, rel=1e-12)


def test_a_plain_machine_keeps_its_lower_bound():
    policies = [in_ms.policy("hot:ratio"), in_ms.policy("balance"), in_ms.policy("bottleneck")]
    ratio, balance, bottleneck = replayed(in_ms.system(ndp={}), *policies).lanes
    assert ratio.lower_bound_s == balance.lower_bound_s == bottleneck.lower_bound_s > balance.work_bound_s
    assert ratio.log.step["moe_s"].sum() >= balance.log.step["moe_s"].sum()


@pytest.mark.parametrize("batch", [256, 512])
def test_each_ablation_of_trimoe_is_slower(batch):
    """Layers and steps enough for experts to have moved to where their load says."""
    model = msgspec.structs.replace(load_model("qwen3-235b-a22b"), moe_layers=4)
    trace = generate_trace(model, requests=batch, prompt=1, output=16, batch=batch, zipf=0.9, stick=0.3)
    policies = [load_policy(name) for name in ("trimoe", "trimoe-no-cpu", "trimoe-greedy", "trimoe-static")]
    setup = Setup(model=model, system=load_system("h100-amx-dimm"), policies=policies, slots=32)
    (run,) = run_setups(trace, [setup])
    assert not isinstance(run, MoetraceError)
    whole_s, *ablations_s = (lane.log.step["moe_s"].sum() for lane in run.lanes)
    assert min(ablations_s) > whole_s


def test_presets_of_trimoe_and_monde_go_where_they_are_for():
    for name in ("trimoe", "trimoe-no-cpu", "trimoe-greedy", "trimoe-static"):
        check_policy(mt.load_policy(name), mt.load_system("h100-amx-dimm"))
    check_policy(mt.load_policy("monde-ratio"), mt.load_system("monde-cxl"))


def test_a_link_that_loses_no_rows_is_noted():
    on = in_ms.system(ndp={}, link={"loss": 0.1, "loss_mode": "relaxed"})
    said = idle_loss(in_ms.policy("gpu"), on)
    assert said == (
        'link.loss_mode = "relaxed" of by-hand changes nothing in policy gpu: dispatch gpu runs every expert on the '
        "GPU, so only weights travel, and lost ones are sent again."
    )
    assert idle_loss(in_ms.policy("ndp"), on) is None
    for link in ({}, {"loss": 0.1}, {"loss": 0, "loss_mode": "relaxed"}):
        assert idle_loss(in_ms.policy("gpu"), in_ms.system(ndp={}, link=link)) is None
    setup = Setup(model=in_ms.model(), system=on, policies=[in_ms.policy("gpu")])
    assert said in check_setup(TRACE, setup)[1]


@pytest.mark.parametrize(
    ("lines", "unit", "need_gb"),
    [("0,0,1\n0,2,1\n", 1, 4), ("0,0,striped\n0,2,1\n", 1, 3.5), ("0,1,0\n0,3,striped\n", 0, 3.5)],
)
def test_a_layout_has_room_on_each_unit(tmp_path, lines, unit, need_gb):
    """Four experts of 1 MB on two units; with `ep` each unit has two."""
    (tmp_path / "layout.csv").write_text(lines)
    layout = in_ms.policy("home", placement="mixed", layout=str(tmp_path / "layout.csv"))
    small = in_ms.system(ndp={"units": 2, "capacity_gb": need_gb * 0.999e-3})
    with pytest.raises(UsageError) as error:
        replayed(small, layout)
    assert str(error.value) == (
        f"Policy home: its layout puts {need_gb * 1e-3:.4g} GB on unit {unit}, and a unit of system by-hand has "
        f"{need_gb * 0.999e-3:g} GB: move experts to other units, raise system.ndp.capacity_gb, or, in a replay, pass "
        "--ignore-capacity."
    )
    groups = as_laid_out(Placing("home", np.arange(1), 4, 2, 1, None, None, layout=layout.layout))
    sizes = np.full((1, 4), 1e6)
    check_layout("home", small, groups, sizes, ignore_capacity=True)
    check_layout("home", in_ms.system(ndp={"units": 2, "capacity_gb": need_gb * 1e-3}), groups, sizes)
