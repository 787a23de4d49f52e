"""One record of figures: frames, files, gate, search, sweep and docs have what it says, and nothing else."""

import json
import subprocess
import sys
from types import SimpleNamespace

import figures
import msgspec
import polars as pl
import pytest
from support.sweeps import sweep_folder

import moetrace as mt
from moetrace.batch.metrics import DEFAULT_METRICS
from moetrace.cli.commands.sweep import command
from moetrace.results.common_figures import Utilization
from moetrace.results.folder import read_cells, read_summary, read_sweep
from moetrace.results.record import (
    ACCOUNTS,
    COLUMNS,
    COSTS,
    FIGURES,
    FRONTS,
    METRICS,
    OPTIONAL,
    CellCosts,
    PolicyFigures,
    SummaryFile,
    fields_of,
    value_in,
)
from moetrace.results.summary import _utilization
from moetrace.spec.system import Device

# The figures of what system and policies of `result` do not have.
OF_OTHERS = OPTIONAL - {*ACCOUNTS} | {"cluster"}


@pytest.fixture(scope="module")
def result():
    trace = mt.generate_trace("tiny-olmoe", requests=2, prompt=3, output=3)
    rates = {"system.energy.gpu.idle_w": 20, "system.energy.gpu.active_w": 360, "system.price.usd_hour": 0.5}
    return mt.replay(trace, policies=["monde", "edge-ndp"], slots=48, overrides=rates)


@pytest.fixture(scope="module")
def folder(result, tmp_path_factory):
    path = tmp_path_factory.mktemp("result")
    result.write(path)
    return path


def test_every_figure_is_a_column_and_a_value_of_the_summary(result):
    frame = result.summary
    plain = {path: figure for path, figure in FIGURES.items() if path not in OF_OTHERS}
    assert frame.columns == ["name", *(path.replace(".", "_") for path in plain)]
    assert {*COLUMNS} == {*COSTS, *(path.replace(".", "_") for path in FIGURES)}
    for path, figure in plain.items():
        column = frame[path.replace(".", "_")]
        assert column.dtype == (pl.Int64 if figure.unit == "count" else pl.Float64), path
        assert column.to_list() == [value_in(policy, path) for policy in result.to_dict()["policies"]], path


def test_a_files_fields_are_those_of_its_struct_in_their_order(result):
    summary = result.to_dict()
    assert list(summary) == list(SummaryFile.__struct_fields__)
    assert list(summary["policies"][0]) == [name for name in PolicyFigures.__struct_fields__ if name not in OF_OTHERS]
    assert msgspec.to_builtins(msgspec.convert(summary, SummaryFile[dict, PolicyFigures])) == summary


def test_every_field_is_explained():
    for struct in (PolicyFigures, CellCosts):
        names = [name.partition(".")[0] for name, _, _ in fields_of(struct)]
        assert list(dict.fromkeys(names)) == list(struct.__struct_fields__)
    for name, figure in {**FIGURES, **COSTS}.items():
        assert figure.meaning and "|" not in figure.meaning and "\n" not in figure.meaning, name
        in_seconds = any(part.endswith("_s") for part in name.split("."))
        assert (figure.unit == "s") == in_seconds or "tokens_per_s" in name


def test_gate_search_and_sweep_know_the_figures():
    assert {*FIGURES} - {*METRICS} == {"speedup", "break_even_tokens"}
    assert {*DEFAULT_METRICS} <= {*METRICS}
    assert all(METRICS[name].better for name in DEFAULT_METRICS)
    assert FRONTS[: len(COSTS)] == (*COSTS,)
    assert {*FRONTS} <= {*COLUMNS}
    assert all(COLUMNS[name].better == "lower" for name in FRONTS)
    assert {*ACCOUNTS} <= {*METRICS}
    (pareto,) = (option for option in command.params if option.name == "pareto")
    assert [*pareto.type.choices] == [*FRONTS]


def test_the_tables_of_the_docs_are_up_to_date():
    for path, page in figures.pages().items():
        assert path.read_text(encoding="utf-8") == page, "python bench/figures.py writes it"


def test_a_report_and_a_gate_read_the_same_replay(result, folder):
    (summary, _), cells = read_summary(folder), read_cells(folder)
    assert [policy.name for policy in summary.policies] == ["monde", "edge-ndp"]
    assert [cell.figures for cell in cells.cells] == msgspec.to_builtins(summary.policies)
    assert (cells.moetrace, cells.engine) == (summary.moetrace, summary.engine)


def test_a_report_and_a_gate_read_the_same_sweep(tmp_path):
    trace = mt.generate_trace("tiny-olmoe", requests=2, prompt=3, output=3)
    trace.write(tmp_path / "t.h5")
    swept = mt.sweep({"trace": str(tmp_path / "t.h5"), "policy": ["monde", "edge-ndp"], "slots": 48}, tmp_path / "s")
    (sweep, _), cells = read_sweep(tmp_path / "s"), read_cells(tmp_path / "s")
    assert (
        [cell["name"] for cell in sweep.cells] == [cell.name for cell in cells.cells] == swept.cells["name"].to_list()
    )
    assert [cell.figures["total_s"] for cell in cells.cells] == swept.cells["total_s"].to_list()


SCRIPT = """
import sys
from moetrace.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
replaying = {f"moetrace.engine.{name}" for name in ("run", "replay", "setup")} | {"moetrace.results.result"}
print([name for name in sys.modules if name.split(".")[0] in ("numba", "llvmlite") or name in replaying])
"""


@pytest.mark.parametrize("command", ["report", "gate"])
@pytest.mark.parametrize("kind", ["replay", "sweep"])
def test_a_finished_result_is_read_without_the_engine(folder, tmp_path, command, kind):
    """No kernel is compiled, nor Numba imported; what a policy's choices are is known without the replay."""
    source = folder
    if kind == "sweep":
        source = sweep_folder(tmp_path / "sweep", policies=["monde", "edge-ndp"])
        about = json.loads((source / "sweep.json").read_text())
        about["cells"] = [{"name": "a", "cell": None, "error": "it failed"}]
        (source / "sweep.json").write_text(json.dumps(about))
    if command == "report":
        pytest.importorskip("altair")
        pytest.importorskip("vl_convert")
        words = ["report", source, "-o", tmp_path / "page.html"]
    else:
        baseline = tmp_path / "baseline.json"
        mt.gate(folder, baseline, update=True)
        words = ["gate", source, "--baseline", baseline, "--fail-on", "worse"]
    run = [sys.executable, "-c", SCRIPT, *map(str, words)]
    done = subprocess.run(run, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("numbered", [True, False])
def test_a_part_without_a_field_is_no_figure(numbered):
    """A machine may have devices of kinds that the summary knows nothing of."""
    home = Device("dpu", 1, 1.0, 1.0, 0.0, is_numbered=numbered)
    shares = {"gpu": 0.5, home.names[0]: 0.25, "cpu": 0.0, "link_in": 0.0}
    found = _utilization(SimpleNamespace(home=home, cluster=None), shares)
    assert found == Utilization(gpu=0.5, ndp=[], link_in=0.0, link_out=None, cpu=0.0)


def test_a_folder_of_an_earlier_version_has_only_the_work_bound(tmp_path):
    trace = mt.generate_trace("tiny-olmoe", requests=1, prompt=2, output=2)
    policy = mt.replay(trace, policies="edge-ndp", slots=24).to_dict()["policies"][0]
    now = msgspec.convert(policy, PolicyFigures)
    assert now.bound_s == now.lower_bound_s >= now.work_bound_s
    before = msgspec.convert({name: value for name, value in policy.items() if name != "lower_bound_s"}, PolicyFigures)
    assert (before.lower_bound_s, before.bound_s) == (None, before.work_bound_s)
