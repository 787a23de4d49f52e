"""Lines that are no records, in logs of a line a record: they are left out, and the tokens of the others stay."""

import json

import numpy as np
import pytest
from support.imports import imported, strict
from support.writers import routing
from support.writers.jsonl import write
from support.writers.lattice import records
from support.writers.megatron import records as router_trace


@pytest.mark.parametrize("lost", [[6], [5, 6, 18], [8], [27]])
@pytest.mark.parametrize("chunk", [300, 1 << 20])
def test_a_line_that_is_no_json_is_left_out_and_its_token_stays(tmp_path, monkeypatch, lost, chunk):
    monkeypatch.setattr("moetrace.importers.jsonl.CHUNK_BYTES", chunk)
    ids = routing(9, 3, 2, 8)
    path = write(tmp_path / "a.jsonl", ids, [4, 5])
    lines = path.read_text().splitlines(keepends=True)
    for at in lost:
        lines[at] = "Killed worker " + lines[at]
    path.write_text("".join(lines))
    trace, notes = imported(path, num_experts=8)
    found = trace.read("experts", 0, 9)
    absent = (found == 255).all(axis=2)
    assert absent.sum() == len(lost) and not absent[:, 0].any()
    found[absent] = ids[absent]
    assert np.array_equal(found, ids)
    assert trace.source["left_out_broken_lines"] == len(lost) and f"line {lost[0] + 1} is not as expected" in notes[0]
    assert f"line {lost[0] + 1} is not as expected" in strict(path, num_experts=8)


@pytest.mark.parametrize("lost", [[1], [2, 9], [1, 3, 4], [4, 14, 20]])
@pytest.mark.parametrize("chunk", [300, 1 << 20])
def test_a_lost_line_of_the_first_layer_is_left_out_as_well(tmp_path, monkeypatch, lost, chunk):
    monkeypatch.setattr("moetrace.importers.jsonl.CHUNK_BYTES", chunk)
    ids = routing(9, 3, 2, 8)
    path = write(tmp_path / "a.jsonl", ids, [4, 5])  # the first layer is of lines 1 to 4 and 13 to 17, from 0
    lines = path.read_text().splitlines(keepends=True)
    for at in lost:
        lines[at] = "Killed worker\n"
    path.write_text("".join(lines))
    trace, notes = imported(path, num_experts=8)
    found = trace.read("experts", 0, trace.rows)
    absent = (found == 255).all(axis=2)
    found[absent] = ids[absent]
    assert np.array_equal(found, ids) and absent.sum() == len(lost)
    assert trace.source["left_out_broken_lines"] == len(lost) and trace.source["format"] == "jsonl"
    assert sum("left out" in note for note in notes) == 1
    assert f"line {lost[0] + 1} is not as expected" in strict(path, num_experts=8)


def test_a_line_that_every_layer_lost_leaves_no_token(tmp_path):
    path = write(tmp_path / "a.jsonl", routing(9, 3, 2, 8), [4, 5])
    lines = path.read_text().splitlines(keepends=True)
    for at in (2, 6, 10):  # of one token in all layers
        lines[at] = "Killed worker\n"
    path.write_text("".join(lines))
    trace, _ = imported(path, num_experts=8)
    assert trace.rows == 8 and trace.source["left_out_broken_lines"] == 3


WRONG = [("TOKEN", -1), ("TOKEN", "1"), ("TOKEN", None), ("LAYER", -2), ("LAYER", 70000), ("LAYER", 1.5), ("IDS", "x")]


@pytest.mark.parametrize(("field", "value"), [*WRONG, ("IDS", [None, 1]), ("IDS", {}), ("LINE", [1]), ("LINE", 5)])
@pytest.mark.parametrize("form", ["jsonl", "lattice", "megatron"])
def test_a_line_with_a_value_that_cannot_be_is_left_out(tmp_path, form, field, value):
    ids = routing(9, 3, 2, 8)
    if form == "jsonl":
        path, names = write(tmp_path / "a.jsonl", ids, [9]), ("token_idx", "layer", "topk_ids")
    elif form == "lattice":
        (path := tmp_path / "a.jsonl").write_text(records(ids, np.full((9, 3, 2), 0.5), list(range(9)), [0, 1, 2]))
        names = ("token_idx", "layer_idx", "selected_ids")
    else:
        text = router_trace(0, {(step, 0): ids[step : step + 1] for step in range(9)}, [0, 1, 2])
        (path := tmp_path / "router_trace_rank0.jsonl").write_text(text)
        names = ("step", "layer", "top_indices")
    lines = path.read_text().splitlines(keepends=True)
    at = 16  # not of the first layer
    record = json.loads(lines[at])
    name = dict(zip(("TOKEN", "LAYER", "IDS"), names, strict=True)).get(field)
    lines[at] = json.dumps(value if name is None else record | {name: value}) + "\n"
    path.write_text("".join(lines))
    trace, notes = imported(path, num_experts=8)
    found = trace.read("experts", 0, 9)
    absent = (found == 255).all(axis=2)
    assert absent.sum() == 1 and not absent[:, 0].any() and np.array_equal(found[~absent], ids[~absent])
    assert any("not as expected" in note or "shape" in note for note in notes)
    strict(path, num_experts=8)


def test_noise_between_the_lines_of_lattice_and_jsonl(tmp_path):
    ids = routing(3, 3, 2, 8)
    path = tmp_path / "lattice.jsonl"
    lines = records(ids, np.full((3, 3, 2), 0.5), [0, 1, 2], [0, 2, 3]).splitlines(keepends=True)
    noisy = [*lines[:4], "WARNING: slow\n", *lines[4:5], "Killed " + lines[5], *lines[6:]]
    path.write_text("".join(noisy))
    trace, notes = imported(path, num_experts=8)
    found = trace.read("experts", 0, 3)
    assert (found[1, 2] == 255).all() and trace.source["left_out_broken_lines"] == 2
    found[1, 2] = ids[1, 2]
    assert np.array_equal(found, ids) and "left out 2 lines that can't be read, the first because" in notes[0]
    assert "line 5 is not as expected" in strict(path, num_experts=8)
    path = write(tmp_path / "a.jsonl", ids, [2, 1])
    path.write_text(path.read_text().replace("\n", "\nWARNING: slow\n", 3))
    assert np.array_equal(imported(path, num_experts=8)[0].read("experts", 0, 3), ids)
