"""What a gate leaves for other tools: valid, escaped, and bounded."""

import json
import re
from xml.etree import ElementTree

import pytest
from support.gate_folders import replay, summary, sweep

import moetrace as mt
from moetrace.batch.gate_files import benchmark_json, junit, markdown

NASTY = "a|b`c<script>&\"'\x1b[31m\n| x |\u202e\ufffe @user #12 *b* _i_ [l](http://x) $y$ \\"
# Elements and attributes of Jenkins' schema (xunit-plugin, junit-10.xsd), as far as a gate writes them.
CHILDREN = {
    "testsuites": {"testsuite"},
    "testsuite": {"testcase"},
    "testcase": {"failure", "skipped", "system-out"},
    "failure": set(),
    "skipped": set(),
    "system-out": set(),
}
REQUIRED = {"testsuite": {"name", "tests", "failures", "errors"}, "testcase": {"name"}, "failure": {"type", "message"}}
ALLOWED = {
    "testsuites": {"name", "tests", "failures", "errors"},
    "testsuite": {"name", "tests", "failures", "errors", "skipped", "time"},
    "testcase": {"name", "classname", "time"},
    "failure": {"type", "message"},
    "skipped": {"message"},
}


@pytest.fixture
def gate(tmp_path):
    """A gate with a cell of every verdict, one of which has a nasty name."""
    path = tmp_path / "b.json"
    was = ["t/s/worse", "t/s/missing", "t/s/changed", "t/s/better", "t/s/same", f"t/s/{NASTY}"]
    mt.gate(sweep(tmp_path / "one", dict.fromkeys(was, summary())), path, update=True)
    now = {
        "t/s/same": summary(),
        "t/s/worse": summary({"total_s": 14.0}),
        "t/s/changed": summary(slots=40),
        "t/s/better": summary({"total_s": 12.0}),
        "t/s/new": summary(),
        f"t/s/{NASTY}": f"it says: {NASTY}",
    }
    return mt.gate(sweep(tmp_path / "two", now), path)


def check_schema(element):
    assert element.tag in CHILDREN
    assert REQUIRED.get(element.tag, set()) <= element.attrib.keys() <= ALLOWED.get(element.tag, set())
    assert {child.tag for child in element} <= CHILDREN[element.tag]
    for child in element:
        check_schema(child)


def test_junit_keeps_to_the_schema(gate):
    root = ElementTree.fromstring(junit(gate))
    check_schema(root)
    (suite,) = root
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("7", "4", "1")
    assert len(suite.findall("testcase/failure")) == 4
    assert len(suite.findall("testcase/skipped")) == 1
    cases = {case.get("name"): case for case in suite}
    assert cases["worse"].get("classname") == "t/s"
    assert cases["worse"].find("failure").get("type") == "worse"
    assert "total_s 12,957 -> 14,000 ms (+8.05 %)" in cases["worse"].find("failure").get("message")
    assert "slots changed: 48 -> 40" in cases["changed"].find("failure").text
    assert list(cases["same"]) == []
    assert "better: total_s" in cases["better"].find("system-out").text
    assert not re.search(r"[^\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", junit(gate).decode())
    assert junit(gate) == junit(gate)


def test_markdown_is_one_table_even_with_hostile_names(gate):
    text = markdown(gate)
    lines = text.splitlines()
    assert lines[0] == "### moetrace gate: failed"
    assert lines[2] == "7 cells: 1 worse, 2 missing, 1 changed, 1 better, 1 new, 1 same."
    table = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in table} == {7}
    for verdict in ("worse", "missing", "changed", "better", "new"):
        assert sum(f" {verdict} |" in line for line in table) >= 1
    assert "t/s/same" not in text
    # A stranger's text stands in code, and nothing in it is a mark of Markdown or HTML.
    (nasty,) = re.findall(r"<code>(t/s/.*?)</code>", text)
    assert re.fullmatch(r"(?:[A-Za-z0-9 /-]|&#\d+;)+", nasty)
    assert "<script" not in text and "@user" not in text and "\x1b" not in text


def test_markdown_stays_below_what_github_takes(tmp_path):
    path = tmp_path / "b.json"
    names = [f"{number}/{'x' * 300}" for number in range(250)]
    mt.gate(sweep(tmp_path / "one", dict.fromkeys(names, summary())), path, update=True)
    worse = summary({"total_s": 14.0, "step_s": {"p99": 1.0}, "demand_bytes": 1e12, "hit_rate": 0.1})
    found = mt.gate(sweep(tmp_path / "two", dict.fromkeys(names, worse)), path)
    text = markdown(found)
    assert len(text.encode()) < 1 << 17
    assert "150 more cells are not shown." in text


def test_benchmark_json_is_custom_smaller_is_better(gate):
    points = json.loads(benchmark_json(gate))
    assert all(set(point) == {"name", "unit", "value"} for point in points)
    assert all(isinstance(point["value"], float) and isinstance(point["unit"], str) for point in points)
    names = [point["name"] for point in points]
    assert len(names) == len(set(names)) == 5 * 7  # five cells have figures; of hit_rate more is better
    assert {"name": "t/s/worse total_s", "unit": "s", "value": 14.0} in points
    assert not any("hit_rate" in name for name in names)


def test_files_of_an_update_list_accepted_changes(tmp_path):
    path = tmp_path / "b.json"
    mt.gate(replay(tmp_path / "one", {}, {"name": "gone"}), path, update=True)
    found = mt.gate(replay(tmp_path / "two", {"total_s": 14.0}), path, update=True)
    assert markdown(found).startswith("### moetrace gate: accepted")
    assert "Dropped from the baseline: `tiny-olmoe/edge-ndp/gone`." in markdown(found)
    assert ElementTree.fromstring(junit(found)).get("failures") == "0"


def test_small_changes_show_as_changes():
    from moetrace.batch.gate_files import shown
    from moetrace.batch.verdict import Moved

    assert shown(Moved("total_s", 1.0, 1.0 + 1e-9, 0.0, "worse")) == ("1,000", "1,000.000001", "ms")
    assert shown(Moved("total_s", 0.0, 1e-9, 0.0, "worse")) == ("0", "1e-06", "ms")
    assert shown(Moved("hit_rate", 0.7102453815, 0.7102453816, 0.0, "better")) == ("71.02453815", "71.02453816", "%")
    assert shown(Moved("ttft_s.p50", None, 0.5, None, "changed")) == ("-", "500", "ms")
