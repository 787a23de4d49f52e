"""Energy and price of a replay: the formula by hand, on a robot of a paper, and what a rate does and does not move."""

import json
import math

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moetrace as mt
from moetrace.results.accounts import Account, account_figures, accounts_of, unlisted
from moetrace.results.record import ACCOUNTS
from moetrace.spec import load_system

RATES = {
    "energy.gpu.idle_w": 20.0,
    "energy.gpu.active_w": 360.0,
    "energy.ndp.idle_w": 2.0,
    "energy.ndp.active_w": 9.0,
    "energy.link.joule_per_gb": 0.5,
    "price.usd_hour": 0.5,
    "price.gpu.usd_hour": 1.0,
    "price.gpu.usd_gb_hour": 0.25,
    "price.ndp.usd_gb_hour": 0.125,
}
BUSY_S = {"gpu": 30.0, "ndp0": 10.0, "ndp1": 20.0, "cpu": 0.0}


def machine(**changed):
    return load_system("edge-ndp", RATES | {"ndp.units": 2} | changed)


def test_the_formula_by_hand():
    accounts = accounts_of(machine(), 100.0, BUSY_S, 4e9)
    gpu, ndp, link, rest = accounts
    assert [one.part for one in accounts] == ["gpu", "ndp", "link", "machine"]
    assert (gpu.idle_j, gpu.active_j, gpu.link_j, gpu.energy_j) == (2000.0, 340.0 * 30.0, None, 12200.0)
    assert (ndp.idle_j, ndp.active_j) == (2 * 2.0 * 100.0, 7.0 * 30.0)
    assert (link.idle_j, link.active_j, link.link_j, link.usd) == (None, None, 2.0, None)
    hours = 100.0 / 3600.0
    assert gpu.usd == pytest.approx((1.0 + 0.25 * 16.0) * hours, rel=1e-12)
    assert ndp.usd == pytest.approx(2 * 0.125 * 32.0 * hours, rel=1e-12)
    assert (rest.energy_j, rest.usd) == (None, pytest.approx(0.5 * hours, rel=1e-12))
    figures = account_figures(accounts, 50)
    energy_j = 20.0 * 100 + 340.0 * 30 + 2 * 2.0 * 100 + 7.0 * (10 + 20) + 0.5 * 4
    assert figures["energy_j"] == pytest.approx(energy_j, rel=1e-12)
    assert figures["energy_per_token_j"] == pytest.approx(energy_j / 50, rel=1e-12)
    assert figures["price_usd"] == pytest.approx(13.5 * hours, rel=1e-12)
    assert figures["usd_per_million_tokens"] == pytest.approx(13.5 * hours / 50 * 1e6, rel=1e-12)


def test_without_decode_rows_nothing_is_a_token():
    figures = account_figures(accounts_of(machine(), 100.0, BUSY_S, 0.0), 0)
    assert (figures["energy_per_token_j"], figures["usd_per_million_tokens"]) == (None, None)
    assert figures["energy_j"] and figures["price_usd"]


def test_host_memory_and_cpu_have_their_price():
    system = load_system(
        "rtx3060-ddr4", {"host.memory_gb": 100, "price.host.usd_gb_hour": 0.01, "price.cpu.usd_hour": 0.25}
    )
    assert system.usd_hour_by_part == {"cpu": 0.25, "host": 1.0}
    assert [(one.part, one.usd) for one in accounts_of(system, 7200.0, {}, 0.0)] == [("cpu", 0.5), ("host", 2.0)]
    assert unlisted(machine()) == []
    assert unlisted(load_system("edge-ndp")) == ["gpu", "ndp", "link"]


def test_a_disk_is_a_device():
    rates = {"energy.gpu.idle_w": 20, "energy.gpu.active_w": 360, "energy.disk.idle_w": 0.5, "energy.disk.active_w": 6}
    system = load_system("rtx4090-nvme", rates)
    gpu, disk = accounts_of(system, 100.0, {"gpu": 30.0, "cpu": 1.0, "disk": 40.0}, 0.0)
    assert (gpu.part, gpu.energy_j) == ("gpu", 2000.0 + 340.0 * 30)
    assert (disk.part, disk.idle_j, disk.active_j, disk.link_j) == ("disk", 50.0, 5.5 * 40, None)
    assert unlisted(system) == ["cpu", "link"]
    assert unlisted(load_system("remoe", {"energy.cpu.idle_w": 1, "energy.cpu.active_w": 1})) == [
        "gpu",
        "link",
        "remote",
    ]


def test_energy_of_the_disk_in_a_replay():
    """What the disk draws beyond idle goes with its reads, and more host memory draws less."""
    trace = mt.generate_trace("tiny-olmoe", requests=1, prompt=4, output=8)
    joules = []
    for slots in (20, 150):
        rates = {"energy.disk.idle_w": 0.0, "energy.disk.active_w": 6.0, "host.slots": slots}
        system = load_system("rtx4090-nvme", rates)
        result = mt.replay(trace, system=system, policies="ktransformers", slots=0)
        row, account = result.summary.row(0, named=True), result.accounts.row(0, named=True)
        busy_s = result.units.filter(unit="disk")["busy_s"].sum()
        assert account["part"] == "disk" and account["energy_j"] == pytest.approx(6.0 * busy_s) == row["energy_j"]
        joules.append(row["energy_j"])
    assert joules[0] > joules[1] > 0


rates = st.floats(0, 1e6)


@given(st.lists(rates, min_size=5, max_size=5), st.floats(0, 1e3), st.floats(0, 1e6))
def test_a_price_is_linear_in_its_rates(found, factor, total_s):
    names = ["usd_hour", "gpu.usd_hour", "gpu.usd_gb_hour", "ndp.usd_hour", "ndp.usd_gb_hour"]
    priced = {f"price.{name}": rate for name, rate in zip(names, found, strict=True)}

    def usd(prices):
        accounts = accounts_of(load_system("edge-ndp", prices), total_s, {}, 0.0)
        return account_figures(accounts, 0)["price_usd"]

    whole = usd(priced)
    assert usd({name: factor * rate for name, rate in priced.items()}) == pytest.approx(factor * whole, rel=1e-12)
    alone = [usd({name: rate}) for name, rate in priced.items()]
    assert math.fsum(alone) == pytest.approx(whole, rel=1e-12)


@given(rates, rates, st.floats(0, 1e5), st.floats(0, 1), st.floats(0, 1e12))
def test_zero_rates_draw_nothing_and_energy_lies_between_idle_and_active(one_w, other_w, total_s, share, link_bytes):
    idle_w, active_w = sorted((one_w, other_w))
    busy_s = {"gpu": share * total_s}

    def energy_j(idle_w, active_w, joule_per_gb):
        rates = {"energy.gpu.idle_w": idle_w, "energy.gpu.active_w": active_w, "energy.link.joule_per_gb": joule_per_gb}
        return account_figures(accounts_of(load_system("edge-ndp", rates), total_s, busy_s, link_bytes), 1)["energy_j"]

    assert energy_j(0, 0, 0) == 0
    assert energy_j(0, 0, 2.0) == pytest.approx(2.0 * link_bytes / 1e9, rel=1e-12)
    assert energy_j(idle_w, idle_w, 0) == pytest.approx(idle_w * total_s, rel=1e-12)
    found = energy_j(idle_w, active_w, 0)
    assert idle_w * total_s * (1 - 1e-12) <= found <= active_w * total_s * (1 + 1e-12)


@pytest.fixture(scope="module")
def trace():
    return mt.generate_trace("tiny-olmoe", requests=3, prompt=4, output=6, batch=2)


@pytest.fixture(scope="module")
def replayed(trace):
    rates = {f"system.{name}": rate for name, rate in RATES.items()}
    return mt.replay(trace, policies=["monde", "edge-ndp"], slots=48, overrides=rates)


def test_a_replay_is_the_formula_of_its_own_frames(replayed):
    policies = {policy["name"]: policy for policy in replayed.to_dict()["policies"]}
    for name, policy in policies.items():
        units = {row["unit"]: row for row in replayed.units.filter(policy=name).iter_rows(named=True)}
        seconds = policy["total_s"]
        ndp_s = math.fsum(units[f"ndp{unit}"]["busy_s"] for unit in range(6))
        moved = units["link_in"]["bytes"] + units["link_out"]["bytes"]
        energy_j = 20 * seconds + 340 * units["gpu"]["busy_s"] + 6 * 2 * seconds + 7 * ndp_s + 0.5 * moved / 1e9
        assert policy["energy_j"] == pytest.approx(energy_j, rel=1e-12)
        assert policy["energy_per_token_j"] == pytest.approx(energy_j / 18, rel=1e-12)
        assert policy["price_usd"] == pytest.approx((0.5 + 1 + 0.25 * 16 + 6 * 0.125 * 32) * seconds / 3600, rel=1e-12)
        parts = replayed.accounts.filter(policy=name)
        assert parts["part"].to_list() == ["gpu", "ndp", "link", "machine"]
        assert parts["energy_j"].sum() == pytest.approx(policy["energy_j"], rel=1e-12)
        assert parts["price_usd"].sum() == pytest.approx(policy["price_usd"], rel=1e-12)


def test_resent_bytes_take_energy(trace):
    """2 J a GB of payload and of what was lost, both ways: a row of `accounts`, and the costs of a cell."""
    changed = {"system.energy.link.joule_per_gb": 2.0, "system.link.loss": 0.2}
    result = mt.replay(trace, policies="monde", slots=48, overrides=changed)
    (policy,) = result.to_dict()["policies"]
    links = result.units.filter(pl.col("unit").str.starts_with("link"))
    resent = links["resent_bytes"].sum()
    assert resent == pytest.approx(policy["resent_bytes"]) and resent > 0.1 * links["bytes"].sum()
    assert policy["energy_j"] == pytest.approx(2.0 * (links["bytes"].sum() + resent) / 1e9, rel=1e-12)
    assert result.accounts["link_j"].to_list() == [policy["energy_j"]]


def test_rates_move_no_other_figure(trace, replayed):
    """Without the tables a result has no word of them: it is that of a version that knew neither."""
    plain = mt.replay(trace, policies=["monde", "edge-ndp"], slots=48)
    summary, priced = plain.to_dict(), replayed.to_dict()
    assert not {*ACCOUNTS} & {*summary["policies"][0]}
    assert not {*ACCOUNTS} & {*plain.summary.columns}
    assert plain.accounts.is_empty()
    assert priced["system"].pop("energy") and priced["system"].pop("price")
    assert (summary["system"].pop("energy"), summary["system"].pop("price")) == (None, None)
    for policy in priced["policies"]:
        assert all(policy.pop(name) > 0 for name in ACCOUNTS)
    assert json.dumps(priced) == json.dumps(summary)
    assert replayed.units.equals(plain.units)
    assert replayed.summary.drop(list(ACCOUNTS)).equals(plain.summary)


def test_a_table_brings_its_own_figures_only(trace):
    result = mt.replay(trace, policies="monde", slots=48, overrides={"system.price.usd_hour": 2})
    assert [name for name in result.summary.columns if name in ACCOUNTS] == ["price_usd", "usd_per_million_tokens"]
    assert result.accounts.select("part", "energy_j").rows() == [("machine", None)]


ROBOT = """name = "robot"
[gpu]
name = "Jetson of the robot"
tflops = 1.0
bandwidth_gb_s = 10.0
memory_gb = 16.0
reserve_gb = 0.0
launch_us = 0.0
[cpu]
tflops = 1.0
bandwidth_gb_s = 10.0
command_us = 0.0
[link]
bandwidth_gb_s = 1.0
latency_us = 0.0
[energy]
gpu = { idle_w = 4.79, active_w = 15.07 }
"""


@pytest.mark.parametrize(
    ("dispatch", "seconds", "energy_j"),
    [("gpu", 0.397, 5.98), ("home", 0.255, 1.22)],
    ids=["local", "offloaded"],
)
def test_the_robot_of_intra_dp(tmp_path, dispatch, seconds, energy_j):
    """The robot is the GPU, and the server behind its radio the CPU, which is not in its account.

    Intra-DP's KAPAO indoors: 397 ms at 15.07 W on the robot, 255 ms at 4.79 W on the server. Without starts, all times
    go with 1 / rates, so a machine of the same kind takes exactly as long.
    """
    (tmp_path / "robot.toml").write_text(ROBOT)
    trace = mt.generate_trace("tiny-olmoe", requests=1, prompt=4, output=4)
    no_dense = dict.fromkeys(("dense_params_per_layer", "once_params", "kv_bytes_per_token_layer"), 0)
    policy = "resident" if dispatch == "gpu" else mt.PolicySpec(name="home", dispatch="home", residency="none")
    rates = {"gpu.tflops": 1.0, "gpu.bandwidth_gb_s": 10.0, "cpu.tflops": 1.0, "cpu.bandwidth_gb_s": 10.0}
    rates |= {"link.bandwidth_gb_s": 1.0}

    def replay(faster):
        system = load_system(tmp_path / "robot.toml", {name: faster * rate for name, rate in rates.items()})
        model = mt.load_model("tiny-olmoe", no_dense)
        return mt.replay(trace, model=model, system=system, policies=policy).summary.row(0, named=True)

    found = replay(replay(1.0)["total_s"] / seconds)
    assert found["total_s"] == pytest.approx(seconds, rel=1e-9)
    assert found["utilization_gpu"] == pytest.approx(1.0 if dispatch == "gpu" else 0.0, abs=1e-9)
    assert found["energy_j"] == pytest.approx((15.07 if dispatch == "gpu" else 4.79) * seconds, rel=1e-9)
    assert found["energy_j"] == pytest.approx(energy_j, abs=0.005)


def test_an_empty_account_is_undefined():
    assert Account("gpu").energy_j is None
    assert account_figures([], 5) == {}


def test_a_sweep_has_columns_fronts_and_an_objective(trace, tmp_path):
    trace.write(tmp_path / "t.h5")
    watts = {"system.energy.gpu.idle_w": 1.0, "system.energy.gpu.active_w": [10.0, 20.0], "system.price.usd_hour": 3}
    grid = {"trace": str(tmp_path / "t.h5"), "policy": ["monde", "edge-ndp"], "slots": 48, "set": watts}
    for front in ("energy_j", "price_usd"):
        cells = mt.sweep(grid, pareto=front).cells
        kept = cells.filter("pareto")
        for row in cells.iter_rows(named=True):
            beaten = cells.filter(pl.col("total_s") <= row["total_s"], pl.col(front) <= row[front])
            assert row["pareto"] == (beaten["name"].to_list()[0] == row["name"] and len(beaten.unique("total_s")) == 1)
        assert len(kept) >= 1
    assert cells["price"].to_list() == [3.0] * 4
    assert (cells["energy_per_token_j"] * 18).to_list() == pytest.approx(cells["energy_j"].to_list())
    plain = mt.sweep(grid | {"set": {}}, pareto="energy_j").cells
    assert not {*ACCOUNTS} & {*plain.columns} and not plain["pareto"].any()
