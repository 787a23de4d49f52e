"""Baselines and folders of strangers: whatever stands in them, the gate answers or says why not in one sentence."""

import copy
import json
from xml.etree import ElementTree

from hypothesis import given, settings
from hypothesis import strategies as st
from support.gate_folders import summary, sweep

import moetrace as mt
from moetrace.batch.gate_files import benchmark_json, junit, markdown

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


def places(value, path=()):
    """Every place in a nested value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    value = copy.copy(value)
    value[path[0]] = replaced(value[path[0]], path[1:], new)
    return value


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_value_anywhere_is_judged_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "anywhere"
    one = sweep(folder, {"a": summary()})
    baseline = folder / "baseline.json"
    baseline.unlink(missing_ok=True)
    mt.gate(one, baseline, update=True)
    (cell,) = (one / "cells").iterdir()
    target = data.draw(st.sampled_from([baseline, one / "sweep.json", cell]))
    raw = json.loads(target.read_text())
    changed = replaced(raw, data.draw(st.sampled_from(list(places(raw)))), data.draw(JSON))
    target.write_text(json.dumps(changed), encoding="utf-8", errors="surrogatepass")
    try:
        found = mt.gate(one, baseline)
    except mt.MoetraceError as error:
        assert str(error).endswith(".")
        assert "\n" not in str(error)
    else:
        ElementTree.fromstring(junit(found))
        markdown(found).encode()
        json.loads(benchmark_json(found))
        json.dumps(found.to_dict(), allow_nan=False)


@settings(max_examples=30, deadline=None)
@given(st.text(min_size=1, max_size=20), st.text(max_size=20))
def test_any_name_is_written_and_read_back(tmp_path_factory, name, why):
    folder = tmp_path_factory.getbasetemp() / "names"
    folder.mkdir(exist_ok=True)
    baseline = folder / "baseline.json"
    baseline.unlink(missing_ok=True)
    mt.gate(sweep(folder / "s", {name: summary(), f"{name}/x": summary()}), baseline, update=True)
    found = mt.gate(sweep(folder / "s", {name: summary(), f"{name}/x": why or "?"}), baseline)
    assert [cell.verdict for cell in found.cells] == ["same", "missing"]
    ElementTree.fromstring(junit(found))
    lines = markdown(found).splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 3
    assert all(line.count("|") == 7 for line in lines if line.startswith("|"))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_damaged_file_is_refused_or_read(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "bytes"
    one = sweep(folder, {"a": summary()})
    baseline = folder / "baseline.json"
    baseline.unlink(missing_ok=True)
    mt.gate(one, baseline, update=True)
    text = bytearray(baseline.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=4))
    baseline.write_bytes(text)
    try:
        mt.gate(one, baseline)
    except mt.MoetraceError as error:
        assert str(error).endswith(".")
