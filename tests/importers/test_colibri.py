"""colibri: traces with gates come back, row by row; histories become one step of counts."""

import numpy as np
import pytest
from support.writers import routing, steps
from support.writers.check import column, imported, refused
from support.writers.colibri import route_trace, usage
from support.writers.known import Pass, joined

from moetrace.importers import colibri

LAYERS = [3, 4, 7]


def known(rows: list[int], num_experts: int = 8) -> list[Pass]:
    ids = routing(sum(rows), 3, 2, num_experts)
    return [Pass(part, len(part) > 1) for part in np.split(ids, np.cumsum(rows)[:-1])]


def gates_of(rows: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 10_000, (rows, 3, 2)) / 10_000


@pytest.mark.parametrize("chunk", [9, 70, 1 << 20])
@pytest.mark.parametrize("num_experts", [8, 300])
def test_a_trace_comes_back(tmp_path, monkeypatch, chunk, num_experts):
    monkeypatch.setattr("moetrace.importers.reading.text.CHUNK_BYTES", chunk)
    given, gates = known([4, 1, 1, 3, 1], num_experts), gates_of(10)
    path = tmp_path / "route.txt"
    path.write_text(route_trace(given, gates, LAYERS))
    trace = imported(path, "colibri", num_experts=num_experts)
    assert np.array_equal(column(trace, "experts"), joined(given, num_experts))
    assert np.array_equal(column(trace, "gates"), gates.astype(np.float32).astype(np.float16))
    assert steps(trace) == [(4, 0), (1, 1), (1, 1), (3, 0), (1, 1)]
    assert column(trace, "position").tolist() == list(range(10)) and trace.layer_index.tolist() == LAYERS
    assert not column(trace, "request").any()


def test_lines_with_fewer_experts_leave_the_rest_absent(tmp_path):
    given, gates = known([2, 1]), gates_of(3)
    given[0].ids[1, 2, 1] = given[1].ids[0, 0, 1] = -1
    gates[1, 2, 1] = gates[2, 0, 1] = 0
    path = tmp_path / "route.txt"
    path.write_text(route_trace(given, gates, LAYERS))
    trace = imported(path, "colibri", num_experts=8, top_k=2)
    assert np.array_equal(column(trace, "experts"), joined(given, 8))
    assert np.array_equal(column(trace, "gates"), gates.astype(np.float32).astype(np.float16))


def test_calls_that_restart_are_another_request(tmp_path):
    path = tmp_path / "route.txt"
    path.write_text(route_trace(known([2, 1]), gates_of(3), LAYERS) * 2)
    trace = imported(path, "colibri", num_experts=8)
    assert column(trace, "request").tolist() == [0] * 3 + [1] * 3
    assert column(trace, "position").tolist() == [0, 1, 2] * 2


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("0 1 3 ", "0 2 3 ", "line 2: row 2 of call 0 does not follow the row before it"),
        ("0 1 3 ", "0 1 4 ", "line 2: row 1 of call 0 does not follow"),
        ("0 0 3 ", "0 0 3 1:0.5000 2:0.5000 ", "has 4 experts in a line, but top_k should be 2"),
        ("0 0 3 ", "0 0 3 9", r"line 1 holds the expert 9\d, but the model has 8"),
        ("0 0 3 ", "0 0 99999 ", "line 1: layer 99999 is impossible"),
        ("0 0 3 ", "0 0 x ", "line 1 can't be read as CSV of 7 columns: '0 0 x "),
        ("0 0 3 ", "0 0 ", "line 1"),
        ("0.", "99999999.", "line 1: weight is beyond 65504"),
    ],
)
def test_a_bad_trace_is_one_sentence(tmp_path, old, new, sentence):
    text = route_trace(known([2, 1]), gates_of(3), LAYERS)
    path = tmp_path / "route.txt"
    path.write_text(text.replace(old, new, 1))
    refused(path, sentence, "colibri", num_experts=8, top_k=2)


def test_a_history_becomes_counts(tmp_path):
    ids = routing(50, 3, 2, 8)
    counts = {layer: np.bincount(ids[:, n].ravel(), minlength=8) for n, layer in enumerate(LAYERS)}
    path = tmp_path / ".coli_usage"
    path.write_text(usage(counts, 7, 8, "kimi_k3"))
    trace = imported(path, "colibri", top_k=2)
    assert trace.num_experts == 8 and trace.source["written_by"] == "kimi_k3"
    assert np.array_equal(trace.read("counts", 0, 1)[0], np.stack(list(counts.values())))
    assert steps(trace) == [(50, 2)] and trace.layer_index.tolist() == LAYERS
    path.write_text(usage(counts, 7, 8, None))
    refused(path, "does not say num_experts", "colibri", top_k=2)
    assert np.array_equal(imported(path, "colibri", top_k=2, num_experts=8).read("counts", 0, 1)[0, 2], counts[7])
    path.write_text(usage(counts, 7, 8, "of tomorrow"))
    assert type(imported(path, "colibri", top_k=2).source["written_by"]) is int


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("-1 3 8\n-2 1 5\n", "counts no choices"),
        ("-1 3 8\n-2 2 5\n1 1 1\n", "is of version 2, but only version 1 is known"),
        ("-1 3 8\n1 8 1\n", "counts expert 8, but the model has 8 experts"),
        ("-1 3 8\n1 1 -1\n", "line 2 holds a number that is impossible"),
        ("-1 3 8\n70000 1 1\n", "line 2 holds a number that is impossible"),
        ("-1 3 8\n1 1\n", "line 2 is incomplete"),
        ("-1 3 8\n1 1 1 1\n", "line 2 can't be read as CSV"),
        ("-1 3 99999\n1 1 1\n", "num_experts is 99999"),
        ("-1 3 65535\n" + "".join(f"{layer} 1 1\n" for layer in range(300)), "300 layers of 65535 experts are more"),
    ],
)
def test_a_bad_history_is_one_sentence(tmp_path, text, sentence):
    path = tmp_path / ".coli_usage"
    path.write_text(text)
    refused(path, sentence, "colibri", top_k=2)


@pytest.mark.parametrize("limit", ["LINES", "NUMBERS"])
def test_a_pass_that_does_not_end_is_refused(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(f"moetrace.importers.reading.passes.MAX_PASS_{limit}", 50)
    path = tmp_path / "route.txt"
    path.write_text("".join(f"0 {row} 3 1:0.5000 2:0.5000\n" for row in range(60)))
    refused(path, "no pass through the layers ends in 60 lines from 1 on", "colibri", num_experts=8)


def test_short_lines_beside_a_long_one_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("moetrace.importers.reading.table._RAGGED_CELLS", 0)
    sizes = []
    numbers = colibri.numbers
    monkeypatch.setattr("moetrace.importers.colibri.numbers", lambda t: (sizes.append(t.height), numbers(t))[1])
    path = tmp_path / "route.txt"
    long = " ".join(f"{expert}:0.0100" for expert in range(100))
    path.write_text(f"0 0 3 {long}\n" + "".join(f"{call} 0 3 1:0.5000\n" for call in range(1, 20_000)))
    assert imported(path, "colibri", num_experts=100).rows == 20_000 and max(sizes) < 5000
