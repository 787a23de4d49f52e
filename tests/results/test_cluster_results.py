"""What a replay on a cluster leaves: the usual files with more columns, tables, sweeps, gates and reports."""

import json
import re
from pathlib import Path

import polars as pl
import pytest

import moetrace as mt
from moetrace.cli import main
from moetrace.results.record import ACCOUNTS, FIGURES

ROOT = Path(__file__).parents[2]
MIXTRAL = str(ROOT / "traces" / "mixtral-8x7b-b16.h5")
POLICIES = ["ep-serial", "eplb", "bulk"]
LATENCY = ("--set", "system.disk.latency_us=5")


@pytest.fixture(scope="module")
def result():
    return mt.replay(MIXTRAL, system="h100-x8", policies=POLICIES)


def run(*arguments):
    try:
        main([*map(str, arguments)])
    except SystemExit as stop:
        return stop.code
    return 0


def test_figures_add_up(result):
    steps = result.steps.drop("phase").group_by("policy", maintain_order=True).sum()
    for policy, summed in zip(result.to_dict()["policies"], steps.iter_rows(named=True), strict=True):
        cluster = policy["cluster"]
        for name in ("exposed_s", "network_bytes", "moved_bytes", "pause_s"):
            assert cluster[name] == pytest.approx(summed[name], rel=1e-12)
        assert policy["total_s"] == pytest.approx(sum(summed[f"{part}_s"] for part in ("dense", "moe", "head", "wait")))
        shares = sum(cluster[f"{stage}_share"] for stage in ("attention", "dispatch", "experts", "combine"))
        taxes = sum(summed[f"{tax}_tax_s"] for tax in ("launch", "locality"))
        assert shares == pytest.approx(1 - (summed["pause_s"] + taxes) / policy["total_s"])
        assert policy["clairvoyant_s"] is None
        assert policy["lower_bound_s"] < policy["total_s"]
    taxes = dict(result.summary.select("name", "cluster_launch_tax_s").rows())
    assert taxes["bulk"] > taxes["ep-serial"] == 0


def test_energy_and_price_are_of_all_gpus(result):
    rates = {"system.energy.gpu.idle_w": 100, "system.energy.gpu.active_w": 700, "system.price.gpu.usd_hour": 3}
    rated = mt.replay(MIXTRAL, system="h100-x8", policies=POLICIES, overrides=rates)
    for policy, plain in zip(rated.to_dict()["policies"], result.to_dict()["policies"], strict=True):
        units = rated.units.filter((pl.col("policy") == policy["name"]) & pl.col("unit").str.starts_with("gpu"))
        busy_s = units["busy_s"].head(8).sum()
        assert policy["energy_j"] == pytest.approx(8 * 100 * policy["total_s"] + 600 * busy_s)
        assert policy["price_usd"] == pytest.approx(8 * 3 * policy["total_s"] / 3600)
        assert plain == {name: value for name, value in policy.items() if name not in ACCOUNTS}


def test_units_are_gpus_and_resources(result):
    units = result.units.filter(pl.col("policy") == "ep-serial")
    assert units["unit"].to_list() == [*(f"gpu{i}" for i in range(8)), "gpus", "network"]
    rows = units["rows"].head(8).sum()
    assert rows == result.experts["rows"].sum()
    assert result.summary["utilization_gpu"][0] == pytest.approx(units["utilization"].head(8).mean())


def test_columns_are_explained(result):
    page = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    plain = mt.replay(MIXTRAL, policies="ndp-ep", ignore_capacity=True)
    for table in ("steps", "layers"):
        more = [name for name in getattr(result, table).columns if name not in getattr(plain, table).columns]
        assert more
        assert [name for name in more if f"`{name}`" not in page] == []
    assert not [name for name in plain.summary.columns if name.startswith("cluster")]
    figures = {name.partition(".")[2] for name in FIGURES if name.startswith("cluster.")}
    assert figures == set(result.to_dict()["policies"][0]["cluster"]) - {"cuts"}


def test_files_are_read_again_and_reported(result, tmp_path):
    result.write(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert written == json.loads(json.dumps(result.to_dict()))
    assert pl.read_parquet(tmp_path / "out" / "steps.parquet").equals(result.steps)
    assert run("report", tmp_path / "out", "-o", tmp_path / "report.html") == 0
    text = (tmp_path / "report.html").read_text()
    assert "all work shared out evenly over the GPUs" in text
    for words in ("clairvoyant run", "Over clairvoyant", "waiting for prefetch", "the GPU keeps up to", "A hit is"):
        assert words not in text
    for words in ("Transfers exposed", "experts and transfers", "GPUs that differ are out of balance", '"GPUs"'):
        assert words in text


def test_the_table_and_its_legend(capsys):
    assert run("replay", MIXTRAL, "--system", "h100-x8", "--policy", "ep-serial", "--policy", "bulk") == 0
    out = " ".join(capsys.readouterr()[0].split())
    assert "Model mixtral-8x7b on h100-x8, 8 GPUs." in out
    assert "barrier" in out and "fan-" in out and "hits" not in out
    assert re.search(r"clairv|slots", out) is None


def test_cells_are_what_their_replays_are_and_can_be_gated(tmp_path, capsys):
    grid = tmp_path / "grid.toml"
    grid.write_text(
        f'trace = "{MIXTRAL}"\nignore_capacity = true\n'
        'system = ["h100-x8", "edge-ndp"]\npolicy = ["ep-serial", "eplb"]\n'
    )
    found = mt.sweep(grid, tmp_path / "out")
    trace = "mixtral-8x7b-b16"
    assert list(found.failed) == [f"{trace}/edge-ndp/ep-serial", f"{trace}/edge-ndp/eplb"]
    for policy in ("ep-serial", "eplb"):
        alone = mt.replay(MIXTRAL, system="h100-x8", policies=policy, ignore_capacity=True)
        assert found.results[f"{trace}/h100-x8/{policy}"] == json.loads(json.dumps(alone.to_dict()))
    row = found.cells.row(by_predicate=pl.col("name") == f"{trace}/h100-x8/eplb", named=True)
    assert row["cluster_network_bytes"] == row["link_bytes"]
    assert 0 < row["gpu_memory_bytes"] < 80e9
    folder, baseline = tmp_path / "one", tmp_path / "baseline.json"
    mt.replay(MIXTRAL, system="h100-x8", policies="eplb").write(folder)
    gate = ["gate", folder, "--baseline", baseline]
    assert run(*gate, "--update", "--metric", "cluster.exposed_s", "--metric", "total_s") == 0
    assert run(*gate) == 0
    slower = {"system.network.decode.combine_latency_us": 500}
    mt.replay(MIXTRAL, system="h100-x8", policies="eplb", overrides=slower).write(folder)
    assert run(*gate) == 3
    assert "cluster.exposed_s" in capsys.readouterr()[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["replay", MIXTRAL, "--system", "h100-x8", "--policy", "monde"], "Policy monde is one of a single GPU"),
        (["replay", MIXTRAL, "--policy", "eplb"], "Policy eplb has a schedule, so it is one of a cluster"),
        (["advise", MIXTRAL, "--system", "h100-x8"], "ask moetrace advise rebalance about plans"),
        (
            ["replay", MIXTRAL, "--system", "h100-x8", "--set", "policy.interval=5"],
            "set it in a policy that reads it, as with --set policy.eplb.interval=VALUE",
        ),
        (
            ["replay", MIXTRAL, "--system", "h100-x8", "--policy", "ep-serial", "--set", "policy.copies=row"],
            "copies applies to placement eplb, eplb-hierarchical or plan only; set it in a policy that reads it, as "
            "with --policy eplb",
        ),
        (["show", "system", "h100-x8", "--set", "system.host.memory_gb=5"], "takes no [host]; remove it"),
        (["show", "system", "h100-x8", "--set", "system.disk.bandwidth_gb_s=5", *LATENCY], "takes no [disk]; remove"),
        (["show", "system", "h100-x8", "--set", "system.cluster.experts=5"], "cluster wants gpus, or attention and"),
        (
            ["show", "system", "h100-sxm", "--set", "system.cluster.gpus=5"],
            "network is missing, and goes with [cluster]",
        ),
        (["show", "system", "h100-x8", "--set", "system.cluster.gpus_per_node=4"], "network.node_bandwidth_gb_s wants"),
    ],
)
def test_refusals_are_one_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) in (1, 2)
    err = capsys.readouterr()[1]
    assert message in err
    assert len(err.splitlines()) == 1


def test_tables_fit_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    policies = [part for policy in ("eplb", "two-batch-overlap", "bulk") for part in ("--policy", policy)]
    assert run("replay", MIXTRAL, "--system", "h100-x8", *policies) == 0
    lines = capsys.readouterr()[0].splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("two-batch-overlap") for line in lines) == 5


def test_settings_that_change_nothing_are_noted(result):
    def notes(system="h100-x8", policy="eplb", **overrides):
        changes = {key.replace("__", "."): value for key, value in overrides.items()}
        return list(mt.replay(MIXTRAL, system=system, policies=policy, overrides=changes).warnings)

    assert not result.warnings
    steps = result.to_dict()["trace"]["steps"]
    assert not notes(policy__window=steps - 1)
    (note,) = notes(policy__window=steps)
    assert note.startswith(f"policy eplb makes no plan: the first is made just before step {steps} (window)")
    (note,) = notes(policy="ep-serial", system__network__node_latency_us=5)
    assert note == (
        "network.node_latency_us of h100-x8 changes nothing: without cluster.gpus_per_node all GPUs are on one node."
    )
