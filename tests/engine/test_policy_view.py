"""What a user's policy is shown and keeps beside its experts: sums of gates, and numbers of each layer."""

import numpy as np
import pytest
from support.one_run import run

import moetrace as mt
from moetrace.engine import decoded
from moetrace.engine.decoded import Decoded, decoded_bytes, needs_of
from moetrace.engine.plugin import load_hook
from moetrace.engine.run import run_setups
from moetrace.engine.setup import Setup
from moetrace.engine.state import ACTIVE, CELL, GROUP, OWN, View
from moetrace.spec import MoetraceError, load_model, load_policy, load_system

FILE = """
import moetrace as mt


@mt.policy
def weighing(state, view, layer, load, plan):
    for i in range(load.size):
        state[layer, view.active[i].expert].memory += mass_of(view, i)
        view.memory[0] += load[i]
        view.memory[63] = view.step


@mt.policy
def mass_of(view, i):
    return view.gate_mass[i]


@mt.policy
def home(state, view, layer, load, plan):
    for i in range(load.size):
        plan[i] = 0
        state[layer, view.active[i].expert].memory += load[i]


@mt.policy
def broken(state, view, layer, load, plan):
    plan[0] = view.no_such_thing


true = nan = home
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    return f"{tmp_path / 'mine.py'}"


def random_trace(gates: bool) -> mt.Trace:
    """40 rows in steps of 1 to 9 rows, 6 layers, top 4 of 32; some gates are unknown, some choices absent."""
    draw = np.random.default_rng(4)
    experts = np.argsort(draw.random((40, 6, 32)), axis=2)[:, :, :4].astype(np.uint8)
    experts[5:8, 1] = 255
    weights = draw.random((40, 6, 4)).astype(np.float16)
    weights[draw.random(weights.shape) < 1 / 7] = np.nan
    steps = np.array([9, 1, 1, 4, 5, 1, 8, 9, 2])
    return mt.Trace.from_arrays(
        experts,
        num_experts=32,
        model="tiny-olmoe",
        steps=steps,
        phase=np.zeros(9, int),
        **({"gates": weights} if gates else {}),
    )


def mass_by_hand(trace: mt.Trace) -> np.ndarray:
    """Sums of gates of the whole trace, [layers, experts]: choice by choice."""
    mass = np.zeros((trace.layers, trace.num_experts))
    experts = trace.read("experts", 0, trace.rows)
    gates = trace.read("gates", 0, trace.rows) if "gates" in trace.has else np.full(experts.shape, np.nan)
    for (_, layer, _), expert, gate in zip(np.ndindex(experts.shape), experts.flat, gates.flat, strict=True):
        if expert != 255:
            mass[layer, expert] += 1 / 4 if np.isnan(gate) else gate
    return mass


@pytest.mark.pure
@pytest.mark.parametrize("gates", [True, False])
@pytest.mark.parametrize("kind", ["dispatch", "residency"])
def test_gates_and_memory_reach_a_policy(file, gates, kind):
    trace = random_trace(gates)
    policy = load_policy("on-demand", {kind: f"{file}:weighing"})
    machine = {"model": load_model("tiny-olmoe"), "system": load_system("edge-ndp"), "policies": [policy], "slots": 48}
    lane = run(trace, **machine).lanes[0]
    rows = (trace.read("experts", 0, trace.rows) != 255).sum((0, 2))
    wholes = [(lane.state.cells, lane.state.scratch)]
    if kind == "dispatch" and lane.clairvoyant is not None:
        wholes.append(lane.clairvoyant.kept)
    for cells, scratch in wholes:
        np.testing.assert_allclose(cells["memory"], mass_by_hand(trace), rtol=1e-6)
        assert np.array_equal(scratch.own["memory"][:, 0], rows)
        assert (scratch.own["memory"][:, 63] == trace.steps - 1).all()
        assert not scratch.own["memory"][:, 1:63].any()
    needs = needs_of([policy])
    kept = Decoded(trace, needs, decoded_bytes(trace, needs))
    assert kept._kept is not None and Decoded(trace, needs, decoded_bytes(trace, needs) - 1)._kept is None
    (again,) = run_setups(kept, [Setup(**machine)])
    assert np.array_equal(again.lanes[0].state.cells["memory"], lane.state.cells["memory"])


def test_gates_are_not_read_where_no_policy_names_them(file, monkeypatch):
    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(decoded, "with_gates", never)
    trace = random_trace(True)
    assert mt.replay(trace, policies=["edge-ndp", f"{file}:home"], slots=48).summary.height == 2
    with pytest.raises(AssertionError):
        mt.replay(trace, policies=["edge-ndp", f"{file}:weighing"], slots=48)


def test_a_bad_function_does_not_block_its_file(file):
    trace = random_trace(False)
    assert mt.replay(trace, policies=f"{file}:home", slots=48).summary["name"].to_list() == ["home"]
    with pytest.raises(
        MoetraceError, match=r"mine.py:\d+: broken is not a policy: there is no 'no_such_thing' in view"
    ):
        mt.replay(trace, policies=f"{file}:broken", slots=48)
    with pytest.raises(MoetraceError, match=r"mine.py:\d+: mass_of takes 2 arguments"):
        mt.replay(trace, policies=f"{file}:mass_of", slots=48)


@pytest.mark.parametrize("name", ["true", "nan"])
def test_a_function_may_be_called_as_a_value_is(file, name):
    assert load_policy(f"{file}:{name}").name == name
    found = mt.replay(random_trace(False), policies=f"{file}:{name}", slots=48)
    assert found.summary["name"].to_list() == [name]


@pytest.mark.parametrize(
    ("kind", "line", "says"),
    [
        ("dispatch", "view.memory[61 + view.step] = 1", r"IndexError: .*\(own.py, line 6; step 3, layer 0\)"),
        ("residency", "view.memory[61 + view.step] = 1", r"IndexError: .*\(own.py, line 6; step 3, layer 0\)"),
        ("dispatch", "state[0, layer // 4 * 32].score = 1", r"IndexError: .*\(own.py, line 6; step 0, layer 4\)"),
        ("dispatch", "plan[0] = 2 * (view.step // 8)", r"ValueError: plan.*\(own.py, line 6; step 8, layer 0\)"),
        (
            "residency",
            "state[0, 0].score = 1 / (view.rows - 4)",
            r"ZeroDivisionError.*\(own.py, line 6; step 3, layer 0\)",
        ),
    ],
)
def test_an_error_names_line_step_and_layer(tmp_path, kind, line, says):
    lines = [
        "import moetrace",
        "",
        "",
        "def own(state, view, layer, load, plan):",
        "    step = view.step",
        f"    {line}",
        "",
    ]
    (tmp_path / "own.py").write_text("\n".join(lines))
    policy = load_policy("on-demand", {"name": "own", kind: f"{tmp_path / 'own.py'}:own"})
    with pytest.raises(MoetraceError, match=f"Policy own failed: {says}"):
        mt.replay(random_trace(False), policies=policy, slots=48, jobs=1)


@pytest.mark.parametrize("kind", ["dispatch", "residency"])
def test_a_call_leaves_all_references_as_they_were(file, kind):
    """Too few would free an array that the replay still uses."""
    import numba

    @numba.njit
    def made():
        return np.zeros(4, np.int64), np.zeros(4, np.uint8)

    hook = load_hook(kind, f"{file}:{'home' if kind == 'dispatch' else 'weighing'}")
    load, plan = made()  # these count their references where that can be seen
    own, room = np.zeros(1, OWN), (np.zeros(4, ACTIVE), np.zeros(1, GROUP))
    view = View(0, 1, 1, 2, 1, 0.0, 0.0, 0.3, 0, 12.0, 0.0, 0.0, 0.0, 0, 0.0, 0.0, 0, *room, own.ctypes.data)
    counts = load.base.refcount, plan.base.refcount
    for _ in range(3):
        hook(np.zeros((1, 4), CELL), view, 0, load, plan)
    assert (load.base.refcount, plan.base.refcount) == counts
