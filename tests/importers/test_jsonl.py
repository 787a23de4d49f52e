"""Route logs in JSON lines: every route comes out where it was, and damage is one sentence."""

import gc
import json

import numpy as np
import pytest
from support.writers import imported, refused, routing, steps
from support.writers.jsonl import META, write

from moetrace.importers import jsonl
from moetrace.importers.captured import Hints
from moetrace.importers.formats import detect
from moetrace.importers.importing import import_traces
from moetrace.trace import Trace

IDS = routing(9, 3, 2, 8)


def test_forward_passes_and_layers_come_out_as_they_went_in(tmp_path):
    trace = imported(tmp_path, write(tmp_path / "a.jsonl", IDS, [4, 3, 1, 1]), num_experts=8)
    assert gc.isenabled()
    assert np.array_equal(trace.read("experts", 0, 9), IDS)
    assert np.array_equal(trace.read("gates", 0, 9), np.broadcast_to([0.5, 0.25], IDS.shape))
    assert steps(trace) == [(4, 0), (3, 0), (1, 0), (1, 0)], "token_idx begins anew with each pass"
    assert trace.read("position", 0, 9).tolist() == list(range(9)) and not trace.read("request", 0, 9).any()
    assert trace.model == "x/Some-Model" and trace.source["version"] == "0.15.1"
    assert trace.source["requests"].startswith("not recorded") and trace.source["phase"].startswith("unknown")


def test_a_counter_that_runs_on_is_the_position(tmp_path):
    path = write(tmp_path / "a.jsonl", IDS[:, :1], [4, 5], runs_on=True, weights=False, num_experts=8)
    trace = imported(tmp_path, path)
    assert np.array_equal(trace.read("experts", 0, 9), IDS[:, :1]) and "gates" not in trace.has
    assert steps(trace) == [(9, 0)] and "requests" not in trace.source
    assert steps(imported(tmp_path, path, decode_after=7)) == [(7, 0), (1, 1), (1, 1)]


def test_a_counter_that_runs_on_through_the_layers_matches_them_in_order(tmp_path):
    trace = imported(tmp_path, write(tmp_path / "a.jsonl", IDS, [4, 5], runs_on=True), num_experts=8)
    assert np.array_equal(trace.read("experts", 0, 9), IDS)


def test_a_log_cut_within_a_pass_leaves_the_later_layers_absent(tmp_path):
    path = write(tmp_path / "a.jsonl", IDS, [4, 3, 1, 1])
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    found = imported(tmp_path, path, num_experts=8).read("experts", 0, 9)
    assert np.array_equal(found[:8], IDS[:8]) and np.array_equal(found[8, 0], IDS[8, 0]) and (found[8, 1:] == 255).all()


def test_small_chunks_change_nothing(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", IDS, [4, 3, 1, 1])
    whole = imported(tmp_path, path, num_experts=8).read("experts", 0, 9)
    monkeypatch.setattr(jsonl, "CHUNK_BYTES", 200)
    assert np.array_equal(imported(tmp_path, path, num_experts=8).read("experts", 0, 9), whole)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            '"token_idx": 3, "layer": 2',
            '"token_idx": 2, "layer": 2',
            "route 11 (from 0) of layer 2 is of another token than that of layer 0",
        ),
        (
            '"req_id": "r1", "token_idx": 3, "layer": 2',
            '"req_id": "r2", "token_idx": 3, "layer": 2',
            "of another token",
        ),
        ("0.25]", "1e300]", "has a weight beyond 65504"),
        ("[0.5, 0.25]", "[1.7e308, 1.7e308]", "has a weight beyond 65504"),
    ],
)
def test_routes_that_do_not_fit_are_refused_in_one_sentence(tmp_path, old, new, message):
    path = write(tmp_path / "a.jsonl", IDS, [4, 3, 1, 1])
    path.write_text(path.read_text().replace(old, new, 2))
    assert message in refused(tmp_path, path, num_experts=8, format="jsonl")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"topk_ids": [', '"topk_ids": [9, ', "route 0 (from 0) has 2 weights for 3 ids"),
        ("0.25]", "0.25, 1]", "3 weights for 2 ids"),
        ("}\n", "\n", "line 1 is not as expected"),
    ],
)
def test_routes_that_are_wrong_in_all_lines_are_refused_in_one_sentence(tmp_path, old, new, message):
    path = write(tmp_path / "a.jsonl", IDS, [4, 3, 1, 1])
    path.write_text(path.read_text().replace(old, new))
    assert message in refused(tmp_path, path, num_experts=8, format="jsonl")


@pytest.mark.parametrize("header", [2, None, 5, "2"])
@pytest.mark.parametrize("chunk", [100, 700, 1 << 20])
def test_layers_may_choose_fewer_experts_than_others(tmp_path, monkeypatch, header, chunk):
    monkeypatch.setattr(jsonl, "CHUNK_BYTES", chunk)
    lines = ['{"type": "meta"}' if header is None else json.dumps({"type": "meta", "top_k": header})]
    for token in range(9):
        for layer, top_k in enumerate((1, 2, 1)):
            route = {
                "type": "route",
                "token_idx": token,
                "layer": layer,
                "topk_ids": IDS[token, layer, :top_k].tolist(),
            }
            lines.append(json.dumps(route | {"topk_weights": [0.5, 0.25][:top_k]}))
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    told = {"top_k": 2} if chunk == 100 and header in (None, "2") else {}  # the first piece is of one layer
    trace = imported(tmp_path, path, num_experts=8, **told)
    found, gates = (trace.read(name, 0, 9) for name in ("experts", "gates"))
    assert np.array_equal(found[:, 1], IDS[:, 1]) and (found[:, ::2, 1] == 255).all()
    assert np.array_equal(found[:, ::2, 0], IDS[:, ::2, 0]) and not gates[:, ::2, 1].any()
    assert trace.top_k == 2 and "absent_routes_of_another_shape" not in trace.source


def test_a_log_of_many_layers_but_few_routes_is_not_believed(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "SPARSEST", 1)
    path = write(tmp_path / "a.jsonl", IDS, [4, 3, 1, 1])
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    assert "25 routes are too few for 9 tokens in 3 layers" in refused(tmp_path, path, num_experts=8)


def test_sizes_that_are_not_recorded_are_asked_for(tmp_path):
    path = write(tmp_path / "a.jsonl", IDS, [9])
    assert "--experts" in refused(tmp_path, path)
    assert "the id 7, but there are 7 experts" in refused(tmp_path, path, num_experts=7)
    (tmp_path / "b.jsonl").write_text(path.read_text().splitlines()[0])
    assert "no lines of routing" in refused(tmp_path, tmp_path / "b.jsonl", num_experts=8)


def test_it_is_seen_from_the_content(tmp_path):
    assert detect(write(tmp_path / "a.jsonl", IDS, [9])) == "jsonl"
    for other in (b'{"type": "meta"}\n', b'{"type": "way"}\n', b"[]", b"", b'{"layer": 1}\n'):
        assert not jsonl.recognize(other, "a.jsonl")
    assert META["type"] == "meta"


@pytest.mark.parametrize("headers", [['{"type": "meta"}'], ['{"type":"meta","top_k":2}'] * 2, []])
def test_any_header_before_a_route_will_do(tmp_path, headers):
    path = write(tmp_path / "a.jsonl", IDS, [9])
    known = imported(tmp_path, path, num_experts=8)
    routes = path.read_text().splitlines()[1:]
    path.write_text("\n".join([*headers, *routes]))
    found = imported(tmp_path, path, num_experts=8)
    assert np.array_equal(found.read("experts", 0, 9), known.read("experts", 0, 9))


def notes_of(path, **options):
    notes = []
    hints = Hints(num_experts=8, note=notes.append)
    import_traces(path, path.parent / "noted.h5", hints=hints, **options)
    return Trace.open(path.parent / "noted.h5"), notes


def test_a_continuous_batch_says_what_it_does_not_know(tmp_path):
    path = write(tmp_path / "a.jsonl", IDS, [4, 3, 1, 1])
    trace, notes = notes_of(path)
    assert trace.source["requests"].startswith("not recorded") and "passes" not in trace.source
    assert len(notes) == 1 and "requests are not recorded, so the rows of all 4 passes are taken as one" in notes[0]
    trace, notes = notes_of(write(tmp_path / "b.jsonl", IDS, [4, 5], runs_on=True))
    assert trace.source["passes"] == "not recorded: token_idx only counts up" and "requests" not in trace.source
    assert len(notes) == 1 and "neither forward passes nor requests are recorded" in notes[0]


def test_passes_that_decode_stay_steps(tmp_path):
    path = write(tmp_path / "a.jsonl", IDS, [4, 3, 1, 1])
    trace, _ = notes_of(path, decode_steps=[(1, None)])
    assert steps(trace) == [(4, 0), (3, 1), (1, 1), (1, 1)]
    assert np.array_equal(trace.read("experts", 0, 9), IDS)
