"""A policy's deadline in results: steps in time, levels, and the energy at them, beside replays on slower machines."""

import json

import numpy as np
import polars as pl
import pytest

import moetrace as mt
from moetrace.results.record import OF_A_DEADLINE, OPTIONAL
from moetrace.spec import Gpu, System, UsageError, load_policy, load_system
from moetrace.spec.frequency import Level
from moetrace.spec.rates import Energy, Watts

LEVELS = [(1.0, 1.0), (0.5, 0.7), (0.25, 0.6)]
IDLE_W, ACTIVE_W = 10.0, 50.0
FIGURES = ("in_time", "mean_frequency")


def machine(scale=1.0, levels=None, memory_scales=True):
    """A GPU that holds everything, at rates that are scaled, or with levels."""
    rates = {"tflops": scale * 40.0, "bandwidth_gb_s": (scale if memory_scales else 1.0) * 200.0}
    choice = {}
    if levels is not None:
        choice = {"levels": [Level(frequency=f, voltage=v) for f, v in levels], "memory_scales": memory_scales}
    gpu = Gpu(name="a GPU", memory_gb=64.0, reserve_gb=8.0, launch_us=5.0, **rates, **choice)
    watts = Watts(idle_w=IDLE_W, active_w=ACTIVE_W)
    return load_system(System(name="mine", gpu=gpu, energy=Energy(gpu=watts)))


@pytest.fixture(scope="module")
def trace():
    return mt.generate_trace("tiny-olmoe", requests=5, prompt=24, output=12, batch=3)


@pytest.mark.parametrize("memory_scales", [True, False])
def test_each_step_is_that_of_a_slower_machine(trace, memory_scales):
    """The GPU works all the time, so at a level a step is one of a replay on a GPU of such rates, busy throughout."""
    slower = [
        mt.replay(trace, system=machine(f, memory_scales=memory_scales), policies="resident").steps["duration_s"]
        for f, _ in LEVELS
    ]
    step_s = np.array([durations.to_numpy() for durations in slower])
    for deadline_s in (step_s[0].min() / 2, *np.quantile(step_s, [0.2, 0.5, 0.9]), step_s.max()):
        level = np.array([max([n for n in range(3) if one[n] <= deadline_s], default=0) for one in step_s.T])
        chosen_s = step_s[level, np.arange(len(level))]
        result = mt.replay(
            trace,
            system=machine(levels=LEVELS, memory_scales=memory_scales),
            policies=load_policy("resident", {"deadline_ms": 1e3 * deadline_s}),
        )
        figures = result.summary.row(0, named=True)
        assert result.steps["level"].to_list() == level.tolist()
        np.testing.assert_allclose(result.steps["duration_s"], chosen_s, rtol=1e-9)
        np.testing.assert_allclose(result.steps["top_duration_s"], step_s[0], rtol=1e-9)
        assert figures["total_s"] == pytest.approx(chosen_s.sum(), rel=1e-9)
        assert figures["in_time"] == np.mean(chosen_s <= deadline_s * (1 + 1e-12))
        power = np.array([f * v**2 for f, v in LEVELS])
        above_j = (ACTIVE_W - IDLE_W) * float(np.sum(power[level] * chosen_s))
        account = result.accounts.row(0, named=True)
        assert account["active_j"] == pytest.approx(above_j, rel=1e-9)
        assert account["idle_j"] == pytest.approx(IDLE_W * chosen_s.sum(), rel=1e-9)
        frequency = np.array([f for f, _ in LEVELS])
        assert figures["mean_frequency"] == pytest.approx(frequency[level].mean(), rel=1e-12)
        assert figures["utilization_gpu"] == pytest.approx(1.0, rel=1e-9)
        assert figures["lower_bound_s"] == pytest.approx(step_s[0].sum(), rel=1e-9)


def test_a_longer_deadline_may_raise_the_energy_of_idling_only(trace):
    """With idle watts the total falls and rises again; without, it never rises."""
    found = {}
    top_ms = 1e3 * mt.replay(trace, system=machine(), policies="resident").steps["duration_s"].to_numpy()
    drawn = [scale * float(np.median(top_ms)) for scale in (0.5, 1.01, 1.5, 2.2, 3.0, 4.5, 100.0)]
    for idle_w in (0.0, 5.0, 20.0):
        watts = {"system.energy.gpu.idle_w": idle_w}
        grid = [
            mt.replay(
                trace,
                system=machine(levels=LEVELS),
                policies="resident",
                overrides=watts | {"policy.deadline_ms": deadline_ms},
            ).summary.row(0, named=True)
            for deadline_ms in drawn
        ]
        found[idle_w] = [row["energy_j"] for row in grid]
        in_time = [row["in_time"] for row in grid]
        assert in_time == sorted(in_time) and in_time[-1] == 1.0
    assert all(later <= sooner * (1 + 1e-12) for sooner, later in zip(found[0.0], found[0.0][1:], strict=False))
    assert min(found[5.0]) < 0.7 * found[5.0][0] and min(found[5.0]) < 0.97 * found[5.0][-1]
    assert min(found[20.0]) == found[20.0][0] < found[20.0][-1]


def test_figures_and_columns_are_there_only_with_a_deadline(trace, tmp_path):
    leveled = machine(levels=LEVELS)
    plain = mt.replay(trace, system=machine(), policies="resident")
    without = mt.replay(trace, system=leveled, policies="resident")
    assert not {*FIGURES} & {*without.summary.columns, *without.to_dict()["policies"][0]}
    assert without.steps.equals(plain.steps) and without.summary.equals(plain.summary)
    deadline_ms = 1e3 * float(plain.steps["duration_s"].median())
    # A deadline on a GPU without levels, or with the top only: no time changes.
    for system, known in ((machine(), None), (machine(levels=LEVELS[:1]), 1.0)):
        result = mt.replay(trace, system=system, policies="resident", overrides={"policy.deadline_ms": deadline_ms})
        figures = result.summary.row(0, named=True)
        in_time = plain.steps["duration_s"] <= deadline_ms / 1e3 * (1 + 1e-12)
        assert (figures["in_time"], figures.get("mean_frequency")) == (in_time.mean(), known)
        assert 0 < figures["in_time"] < 1
        assert result.steps.equals(plain.steps) and result.accounts.equals(plain.accounts)
        assert result.to_dict()["policies"][0]["choices"]["deadline_ms"] == deadline_ms
    # Beside a policy without one, columns are null.
    both = mt.replay(
        trace,
        system=leveled,
        policies=["resident", load_policy("resident", {"name": "lazy", "deadline_ms": 1e6})],
    )
    assert both.steps.filter(policy="resident")["level"].null_count() == len(plain.steps)
    assert both.steps.filter(policy="lazy")["level"].null_count() == 0
    assert both.summary["in_time"].to_list() == [None, 1.0]
    both.write(tmp_path / "out")
    written = pl.read_parquet(tmp_path / "out" / "steps.parquet")
    assert written.equals(both.steps)
    assert written.columns[-2:] == ["level", "top_duration_s"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [[name for name in policy if name in FIGURES] for policy in summary["policies"]] == [[], [*FIGURES]]


def test_a_sweep_a_gate_and_a_limit_take_the_figures(trace, tmp_path):
    assert FIGURES == OF_A_DEADLINE and {*FIGURES} <= OPTIONAL
    trace.write(tmp_path / "t.h5")
    levels = "[{frequency = 1, voltage = 1}, {frequency = 0.5, voltage = 0.7}]"
    grid = {"trace": str(tmp_path / "t.h5"), "policy": ["monde", "edge-ndp"], "slots": 48}
    changes = {"system.gpu.levels": levels, "policy.deadline_ms": [0.5, 2, 50]}
    cells = mt.sweep(grid | {"set": changes}, folder=tmp_path / "swept", slo="in_time>=90%").cells
    for row in cells.iter_rows(named=True):
        own = {"system.gpu.levels": levels, "policy.deadline_ms": row["policy.deadline_ms"]}
        alone = mt.replay(trace, policies=row["policy"], slots=48, overrides=own).summary.row(0, named=True)
        assert [row[name] for name in (*FIGURES, "total_s")] == [alone[name] for name in (*FIGURES, "total_s")]
    assert cells["mean_frequency"].min() == 0.5 and cells["mean_frequency"].max() == 1.0
    baseline = tmp_path / "baseline.json"
    mt.gate(tmp_path / "swept", baseline, metrics=[*FIGURES], update=True)
    assert mt.gate(tmp_path / "swept", baseline).passed
    mt.sweep(grid, folder=tmp_path / "plain")
    with pytest.raises(UsageError, match=r"no cell has in_time, as no policy has deadline_ms: set it in a policy"):
        mt.gate(tmp_path / "plain", tmp_path / "other.json", metrics=["in_time"], update=True)


def test_energy_on_a_terminal_names_the_levels(trace, capsys):
    from moetrace.cli.tables.account_table import print_accounts
    from moetrace.cli.tables.replay_table import print_comparison

    result = mt.replay(
        trace, system=machine(levels=LEVELS), policies="resident", overrides={"policy.deadline_ms": 1000}
    )
    print_comparison(result.to_dict(), "trace.h5")
    print_accounts(result.accounts, result.to_dict(), result.run.system)
    words = " ".join(capsys.readouterr().out.split())
    assert "In time: steps that end within deadline_ms (resident 1000 ms). Each step runs at the lowest" in words
    assert "frequency * voltage^2 of each step's level. Mean frequency: resident 25.0 % of the top." in words
