"""What a tooltip of any chart says is there: each field is in the data of its layer, and of the mark that answers."""

import csv
import io
import json
import re

import pytest
from click.testing import CliRunner
from support.report_page import parsed
from support.sweeps import sweep_folder

import moetrace as mt
from moetrace.cli.commands.analyze import command as analyze

vl_convert = pytest.importorskip("vl_convert")
pytest.importorskip("altair")


def specs_of(page):
    """The charts of a page: JSON in script elements."""
    return [json.loads(script) for script in page.scripts[:-1] if script.startswith("{")]


@pytest.fixture(scope="module")
def charts(tmp_path_factory):
    """All charts of a replay's report, of a sweep's, and of the pictures of `analyze`, by name of the page."""
    folder = tmp_path_factory.mktemp("tooltips")
    trace = mt.generate_trace("tiny-olmoe", requests=6, prompt=8, output=12, batch=3)
    trace.write(folder / "t.h5")
    mt.replay(trace, policies=["monde", "edge-ndp"], slots=48, timeline=(0, None)).write(folder / "result")
    asked = {
        "cache": ["cache", "t.h5", "--capacity", "24", "--capacity", "96", "--policy", "lru", "--policy", "belady"],
        "balance": ["balance", "t.h5", "--units", "4", "--placement", "eplb", "--window", "4", "--interval", "4"],
        "locality": ["locality", "t.h5"],
    }
    found = {}
    for name, words in asked.items():
        words = [str(folder / word) if word == "t.h5" else word for word in words]
        said = CliRunner().invoke(analyze, [*words, "--format", "json", "--plot", str(folder / f"{name}.html")])
        assert said.exit_code == 0, said.stderr
        (folder / f"{name}.json").write_text(said.stdout)
        page = (folder / f"{name}.html").read_text(encoding="utf-8")
        found[name] = [json.loads(re.findall(r'<script type="application/json" id="spec">(.*?)</script>', page)[0])]
    both = {name: folder / f"{name}.json" for name in ("cache", "balance")}
    found["replay"] = specs_of(parsed(folder / "result", folder, **both))
    found["sweep"] = specs_of(parsed(sweep_folder(folder / "sweep", ["monde", "edge-ndp"]), folder))
    return found


def layers_of(spec, datasets, columns=None):
    """Yield each unit of a chart with the columns of the data that it draws."""
    if "data" in spec:
        columns = columns_of(spec["data"], datasets)
    parts = [part for kind in ("layer", "vconcat", "hconcat", "concat") for part in spec.get(kind, [])]
    parts += [spec["spec"]] if "spec" in spec else []
    for part in parts:
        yield from layers_of(part, datasets, columns)
    if not parts:
        yield spec, columns


def columns_of(data, datasets):
    values = data["values"] if "values" in data else datasets[data["name"]]
    if isinstance(values, str):
        return next(csv.reader(io.StringIO(values)))
    return list(values[0])


def tooltips(unit):
    said = unit.get("encoding", {}).get("tooltip", [])
    return said if isinstance(said, list) else [said]


def test_every_field_of_a_tooltip_is_in_the_data_of_its_layer(charts):
    assert {name: len(specs) for name, specs in charts.items()} == {
        "cache": 1,
        "balance": 1,
        "locality": 1,
        "replay": 21,
        "sweep": 5,
    }
    seen = 0
    for name, specs in charts.items():
        for spec in specs:
            for unit, columns in layers_of(spec, spec.get("datasets", {})):
                made = {each["as"] for each in unit.get("transform", []) if "as" in each}
                for tooltip in tooltips(unit):
                    assert tooltip["field"] in {*columns, *made}, (name, tooltip)
                    seen += 1
    assert seen > 80


def test_a_cell_that_stands_for_a_point_asks_the_point(charts):
    """The nearest point answers by a cell around it, whose own data has no field: `datum.datum` is the point's."""
    cells = 0
    for name, specs in charts.items():
        for spec in specs:
            marks = list(marks_of(vl_convert.vegalite_to_vega(spec)))
            names = {mark.get("name") for mark in marks}
            for mark in marks:
                if mark.get("from", {}).get("data") not in names:
                    continue
                cells += 1
                signal = mark["encode"]["update"]["tooltip"]["signal"]
                asked = re.findall(r"(?<![\w.])datum(?:\.datum)?\[", signal)
                assert asked and set(asked) == {"datum.datum["}, (name, signal)
    assert cells >= 10


def marks_of(group):
    for mark in group.get("marks", []):
        yield mark
        yield from marks_of(mark)
