"""Regret from Python and from the command: figures where it is asked for, every decision in a file."""

import json
import re
import subprocess
import sys

import learned_dispatch
import polars as pl
import pytest

import moetrace as mt
from moetrace.engine.dispatch import OPTIMAL_UP_TO
from moetrace.results.record import OF_REGRET
from moetrace.spec import PolicySpec
from moetrace.spec.errors import UsageError

NAMES = ["optimal", "balance", "hot", "gpu"]


def policy(dispatch):
    residency = "none" if dispatch == "hot" else "lru"
    return PolicySpec(name=dispatch, placement="ep", dispatch=dispatch, residency=residency)


@pytest.fixture(scope="module")
def trace():
    return mt.generate_trace("tiny-olmoe", requests=6, prompt=12, output=40, seed=3)


@pytest.fixture(scope="module")
def result(trace):
    return mt.replay(trace, policies=[policy(name) for name in NAMES], slots=48, decisions=True)


def test_regret_of_each_dispatch(result):
    found = dict(zip(NAMES, result.to_dict()["policies"], strict=True))
    assert found["optimal"]["regret"] == pytest.approx(0.0, abs=1e-12)
    assert found["optimal"]["regret_equal_share"] == 1.0
    assert 0.0 <= found["balance"]["regret"] < found["gpu"]["regret"]
    assert found["hot"]["regret"] > 0.0
    layers = {row["regret_layers"] + row["regret_left_out"] for row in found.values()}
    assert layers == {len(result.run.schedule.rows) * 6}
    assert found["optimal"]["regret_left_out"] == found["optimal"]["optimal_fallbacks"] > 0


def test_decisions_are_what_the_figures_are_of(result, tmp_path):
    decisions = result.decisions
    result.write_decisions(tmp_path / "d.parquet")
    assert decisions.equals(pl.read_parquet(tmp_path / "d.parquet"))
    assert [*tmp_path.iterdir()] == [tmp_path / "d.parquet"]
    for row in result.to_dict()["policies"]:
        own = decisions.filter(policy=row["name"])
        assert own.height == row["hits"] + row["misses"]
        assert own["resident"].sum() == row["hits"]
        searched = own.drop_nulls("optimal")
        assert (searched["device"] == searched["optimal"]).mean() == row["regret_equal_share"]
        sizes = own.group_by("step", "layer").agg(pl.len(), pl.col("optimal").null_count().alias("not"))
        assert sizes.filter(pl.col("not") > 0).select((pl.col("len") > OPTIMAL_UP_TO).all()).item()
        assert sizes.filter(pl.col("not") == 0).select((pl.col("len") <= OPTIMAL_UP_TO).all()).item()
    assert decisions.filter(policy="gpu")["device"].unique().to_list() == ["gpu"]
    assert decisions["cpu_s"].is_null().all() and not decisions["ndp_s"].has_nulls()
    fetched = decisions.filter(~pl.col("resident"))
    assert (fetched["fetch_s"] > 0).all() and (decisions.filter("resident")["fetch_s"] == 0).all()
    steps = decisions.select("step", "layer").unique(maintain_order=True)
    assert decisions.filter(policy="hot").select("step", "layer").unique(maintain_order=True).equals(steps)


def test_columns_are_explained(result):
    page = (learned_dispatch.ROOT / "docs/results.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\|([^|]+)", page.partition("\n## Decisions")[2], re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", "".join(cells))) == sorted(result.decisions.columns)


def test_nothing_of_it_where_it_is_not_asked_for(trace, result):
    plain = mt.replay(trace, policies=[policy(name) for name in NAMES], slots=48)
    assert not {*OF_REGRET} & {*plain.summary.columns}
    asked = result.to_dict()["policies"]
    assert plain.to_dict()["policies"] == [
        {name: value for name, value in row.items() if name not in OF_REGRET} for row in asked
    ]
    for name in ("steps", "units", "layers", "requests"):
        assert getattr(plain, name).equals(getattr(result, name)), name
    with pytest.raises(UsageError, match="Decisions were not kept: replay with decisions=True"):
        _ = plain.decisions


def test_split_is_refused(trace):
    split = PolicySpec(name="halves", placement="tp", dispatch="split", residency="lru")
    with pytest.raises(
        UsageError, match=r"^Policy halves: regret compares where whole experts run, .* \"balance\""
    ) as told:
        mt.replay(trace, policies=split, slots=48, regret=True)
    assert str(told.value).count(".") == 1


def test_a_machine_with_one_device_has_no_regret(trace):
    found = mt.replay(trace, system="rtx4090-ddr5", policies="on-demand-lfu", slots=48, decisions=True)
    (row,) = found.to_dict()["policies"]
    assert (row["regret"], row["regret_equal_share"], row["regret_left_out"]) == (0.0, 1.0, 0)
    assert found.decisions["ndp_s"].is_null().all()


def test_a_tree_as_a_file_is_between_hot_and_optimal_on_what_it_did_not_see(tmp_path):
    """The tree is written by hand: with scikit-learn, the next test learns one."""
    trace = tmp_path / "t.h5"
    mt.generate_trace("tiny-olmoe", requests=4, prompt=6, output=60, seed=5).write(trace)
    Split = learned_dispatch.Split
    fetched = Split("gpu_so_far_s", 0.06, Split("others_left_s", 1.25, True, False), False)
    resident = Split("unit_left_s", 0.55, Split("gpu_so_far_s", 0.06, False, True), True)
    tree = Split("resident", 0.5, fetched, resident)
    (tmp_path / "learned.py").write_text(learned_dispatch.source(tree))
    first, second = learned_dispatch.halves(trace, tmp_path)
    found = learned_dispatch.regrets(second, tmp_path / "learned.py").select("name", "regret").rows()
    regret = dict(found)
    assert regret["hot"] >= regret["learned"] >= 0.0
    assert regret["learned"] >= regret["balance"] >= regret["optimal"] == pytest.approx(0.0, abs=1e-12)
    assert mt.Trace.open(first).rows + mt.Trace.open(second).rows == mt.Trace.open(trace).rows


def test_a_tree_is_learned(tmp_path):
    pytest.importorskip("sklearn")
    first, second = learned_dispatch.halves(learned_dispatch.TRACE, tmp_path)
    tree = learned_dispatch.learn(learned_dispatch.decisions_of(first))
    (tmp_path / "learned.py").write_text(learned_dispatch.source(tree))
    found = dict(learned_dispatch.regrets(second, tmp_path / "learned.py").select("name", "regret").rows())
    assert found["hot"] >= found["learned"] >= 0.0


def test_features_include_earlier_decisions():
    decisions = pl.DataFrame(
        {
            "step": [0] * 3,
            "layer": [0] * 3,
            "group": [0, 1, 0],
            "resident": [False, False, True],
            "gpu_s": [1.0, 1.0, 1.0],
            "fetch_s": [4.0, 4.0, 0.0],
            "ndp_s": [3.0, 2.0, 1.0],
            "optimal": ["gpu", "home", "gpu"],
        }
    )
    table = learned_dispatch.features(decisions)  # the resident one first; the busiest unit would take 4 s
    assert table["resident"].to_list() == [1.0, 0.0, 0.0]
    assert table["gpu_so_far_s"].to_list() == [0.0, 0.25, 1.5]
    assert table["unit_left_s"].to_list() == [1.0, 0.75, 0.5]
    assert table["others_left_s"].to_list() == [0.5, 0.5, 0.0]
    assert table["on_gpu"].to_list() == [True, True, False]


def command(*arguments, code=0):
    run = subprocess.run([sys.executable, "-m", "moetrace", "replay", *arguments], capture_output=True, text=True)
    assert run.returncode == code, run.stderr
    return run


def test_the_command(trace, tmp_path):
    trace.write(tmp_path / "t.h5")
    shown = ["--policy", "monde", "--slots", "48", "--regret"]
    said = command(str(tmp_path / "t.h5"), *shown).stdout
    assert "regret" in said and "Regret: time of the experts beyond the best assignment's" in said
    assert "monde: regret leaves out" in said
    file = tmp_path / "d.parquet"
    out = command(str(tmp_path / "t.h5"), *shown, "--export-decisions", str(file), "--format", "json").stdout
    (row,) = json.loads(out)["policies"]
    assert row["regret"] > 0 and pl.read_parquet(file).height == row["hits"] + row["misses"]
    refused = command(str(tmp_path / "t.h5"), "--export-decisions", "d.csv", code=2).stderr
    assert "--export-decisions d.csv: the name must end with .parquet." in refused
    again = command(str(tmp_path / "t.h5"), "--export-decisions", str(tmp_path / "no/d.parquet"), code=1).stderr
    assert "could not be written" in again
