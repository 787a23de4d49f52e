"""One bad record does not lose a log: it is left out and counted, with a note, or refused if the user is strict."""

import json
import re

import numpy as np
import pytest
from support.imports import imported, strict
from support.writers import routing
from support.writers.jsonl import write
from support.writers.lattice import records
from support.writers.sglang_request import generated
from support.writers.vllm import npy_base64, request, response

from moetrace.importers.captured import Hints
from moetrace.importers.importing import import_traces
from moetrace.spec.errors import MoetraceError
from moetrace.trace import Trace


def log(tmp_path, good, *bad):
    """A log of three good answers, the bad ones in their middle."""
    path = tmp_path / "log.jsonl"
    lines = [json.dumps(good | {"id": str(number)}) for number in range(3)]
    path.write_text(
        "\n".join([*lines[:2], *(one if isinstance(one, str) else json.dumps(one) for one in bad), lines[2]])
    )
    return path


GOOD = response([request(9, 2, 2, 16)], 7)


def changed(**choice):
    whole = json.loads(json.dumps(GOOD))
    whole["choices"][0] |= choice
    return whole | {"id": "bad"}


@pytest.mark.parametrize(
    ("bad", "why", "sentence"),
    [
        (changed(routed_experts=None), "without routing", "it was aborted, or the server must run with"),
        (
            changed(routed_experts=npy_base64(request(9, 2, 2, 16)[:0])),
            "without routing",
            "is empty: its shape is (0, 2, 2)",
        ),
        ({"choices": []}, "without routing", "has no choices"),
        ({"error": {"message": "overloaded"}}, "without routing", "has no choices"),
        (
            response([request(9, 3, 2, 16)], 7),
            "of another shape",
            "has (3, 2) (layers, top_k), but the earlier ones have (2, 2)",
        ),
        (changed(routed_experts="AAAA"), "that can't be read", "no NumPy array"),
        (changed(routed_experts="?"), "that can't be read", "no base64"),
        (json.dumps(GOOD)[:200], "that can't be read", "line 3 is not as expected"),
        ("Internal Server Error", "that can't be read", "line 3 is not as expected"),
        ({"choices": "none"}, "that can't be read", "line 3 is not as expected"),
    ],
)
def test_a_bad_answer_is_left_out_and_counted(tmp_path, bad, why, sentence):
    path = log(tmp_path, GOOD, bad)
    trace, notes = imported(path, num_experts=16)
    assert trace.rows == 27 and trace.read("request", 0, 27).tolist() == [0] * 9 + [1] * 9 + [2] * 9
    assert trace.source["left_out_answers"] == {why: 1}
    assert len(notes) == 1 and f"left out 1 answer {why}, the first because" in notes[0] and sentence in notes[0]
    assert sentence in strict(path, num_experts=16)


def test_bad_answers_of_sglang(tmp_path):
    good = generated(request(9, 2, 2, 16), 7)
    aborted = {"meta_info": {"finish_reason": {"type": "abort"}, "prompt_tokens": 7, "completion_tokens": 0}}
    odd = generated(request(9, 2, 2, 16), 7)
    odd["meta_info"]["routed_experts"] = odd["meta_info"]["routed_experts"][:-16]
    path = log(tmp_path, good, aborted, odd)
    for number, line in enumerate(lines := [json.loads(line) for line in path.read_text().splitlines()]):
        line["meta_info"]["id"] = str(number)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    trace, notes = imported(path, num_experts=16, top_k=2)
    assert trace.rows == 27 and trace.source["left_out_answers"] == {"without routing": 1, "of another shape": 1}
    assert "left out 1 answer without routing and 1 answer of another shape" in notes[0]
    assert "no routed_experts: it was aborted" in strict(path, num_experts=16, top_k=2)


def test_clean_logs_have_no_notes(tmp_path):
    trace, notes = imported(log(tmp_path, GOOD), num_experts=16)
    assert notes == [] and not [key for key in trace.source if "left_out" in key]


def test_more_answers_of_another_shape_than_of_the_first_are_refused(tmp_path):
    path = tmp_path / "log.jsonl"
    answers = [response([request(9, layers, 2, 16)], 7) | {"id": str(n)} for n, layers in enumerate((3, 2, 2))]
    path.write_text("\n".join(map(json.dumps, answers)))
    with pytest.raises(MoetraceError, match=r"has \(2, 2\) \(layers, top_k\), but the earlier ones have \(3, 2\)"):
        imported(path, num_experts=16)


def test_a_log_without_any_good_answer_says_why(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(json.dumps(changed(routed_experts=None)) for _ in range(3)))
    with pytest.raises(MoetraceError, match="response 1, choice 0 has no routed_experts: it was aborted"):
        import_traces(path, tmp_path / "o.h5", format="vllm", hints=Hints(num_experts=16))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "null"])
def test_a_weight_that_is_no_number_is_unknown(tmp_path, number):
    ids = routing(9, 3, 2, 8)
    path = write(tmp_path / "a.jsonl", ids, [4, 5])
    lines = path.read_text().splitlines(keepends=True)
    lines[6] = lines[6].replace("[0.5, 0.25]", f"[0.5, {number}]")
    path.write_text("".join(lines))
    trace, notes = imported(path, num_experts=8)
    gates = trace.read("gates", 0, 9)
    assert np.argwhere(np.isnan(gates)).tolist() == [[1, 1, 1]] and trace.source["unknown_weights"] == 1
    assert np.array_equal(trace.read("experts", 0, 9), ids) and "1 weight of NaN left unknown" in notes[0]
    assert "route 5 (from 0) has a weight that is no number" in strict(path, num_experts=8)


def test_nan_in_an_answer_or_a_record_is_no_matter(tmp_path):
    path = log(tmp_path, GOOD | {"logprobs": float("nan")})
    assert imported(path, num_experts=16)[0].rows == 27
    path.write_text(json.dumps(GOOD | {"logprobs": [float("-inf")]}, indent=1))
    assert imported(path, num_experts=16)[0].rows == 9
    path = tmp_path / "lattice.jsonl"
    text = records(routing(3, 3, 2, 8), np.full((3, 3, 2), 0.5), [0, 1, 2], [0, 2, 3])
    path.write_text(text.replace("0.5", "NaN", 1))
    trace, notes = imported(path, num_experts=8)
    assert np.isnan(trace.read("gates", 0, 3)).sum() == trace.source["unknown_weights"] == 1
    assert "1 weight of NaN left unknown" in notes[0]
    assert "record 1 has a weight that is no number" in strict(path, num_experts=8)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ('"topk_ids": [', '"topk_ids": [9, ', "has 3 ids and 2 weights, unlike others of its layer"),
        ('"topk_weights": [0.5, 0.25]', '"topk_weights": [0.5]', "has 2 ids and 1 weights, unlike others of its layer"),
        ('"topk_weights": [0.5, 0.25]', '"topk_weights": null', "has 2 ids and no weights, unlike others of its layer"),
    ],
)
def test_a_route_of_another_shape_is_absent(tmp_path, old, new, what):
    ids = routing(9, 3, 2, 8)
    path = write(tmp_path / "a.jsonl", ids, [4, 5])
    lines = path.read_text().splitlines(keepends=True)
    assert old in lines[6]
    lines[6] = lines[6].replace(old, new)
    path.write_text("".join(lines))
    trace, notes = imported(path, num_experts=8)
    found = trace.read("experts", 0, 9)
    assert (found[1, 1] == 255).all() and trace.source["absent_routes_of_another_shape"] == 1
    found[1, 1] = ids[1, 1]
    assert np.array_equal(found, ids) and f"route 5 (from 0) {what}" in notes[0]
    assert what in strict(path, num_experts=8)


@pytest.mark.parametrize("empty", ["[]", "null"])
@pytest.mark.parametrize("at", [0, 5])
def test_a_route_without_ids_is_absent_even_if_it_is_the_first(tmp_path, empty, at):
    ids = routing(9, 3, 2, 8)
    path = write(tmp_path / "a.jsonl", ids, [4, 5])
    lines = path.read_text().splitlines(keepends=True)
    lines[1 + at] = re.sub(r'_ids": \[.*?\]', f'_ids": {empty}', lines[1 + at])
    path.write_text("".join(lines))
    trace, notes = imported(path, num_experts=8)
    found = trace.read("experts", 0, 9)
    row, layer = (0, 0) if at == 0 else (1, 1)  # a pass of four comes layer by layer
    assert (found[row, layer] == 255).all() and trace.source["absent_routes_of_another_shape"] == 1
    found[row, layer] = ids[row, layer]
    assert np.array_equal(found, ids) and f"route {at} (from 0) has 0 ids and 2 weights" in notes[0]
    assert "has 0 ids" in strict(path, num_experts=8)


@pytest.mark.parametrize("old", ["selected_ids", "gate_weights"])
def test_null_in_a_record_of_lattice_is_absent(tmp_path, old):
    ids = routing(3, 3, 2, 8)
    path = tmp_path / "lattice.jsonl"
    lines = records(ids, np.full((3, 3, 2), 0.5), [0, 1, 2], [0, 2, 3]).splitlines(keepends=True)
    lines[0] = re.sub(rf'"{old}":\[.*?\]', f'"{old}":null', lines[0])
    path.write_text("".join(lines))
    trace, _ = imported(path, num_experts=8)
    assert (trace.read("experts", 0, 1)[0, 0] == 255).all() and trace.source["absent_routes_of_another_shape"] == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [('"selected_ids":[', '"selected_ids":[9,'), ('"gate_weights":[0.5,', '"gate_weights":['), ("[0.5,0.5]", "[]")],
)
@pytest.mark.parametrize("at", [0, 4])
def test_a_record_of_lattice_of_another_shape_is_absent(tmp_path, old, new, at):
    ids = routing(3, 3, 2, 8)
    path = tmp_path / "lattice.jsonl"
    lines = records(ids, np.full((3, 3, 2), 0.5), [0, 1, 2], [0, 2, 3]).splitlines(keepends=True)
    assert old in lines[at]
    lines[at] = lines[at].replace(old, new)
    path.write_text("".join(lines))
    trace, notes = imported(path, num_experts=8)
    found = trace.read("experts", 0, 3)
    assert (found[divmod(at, 3)] == 255).all() and trace.source["absent_routes_of_another_shape"] == 1
    found[divmod(at, 3)] = ids[divmod(at, 3)]
    assert np.array_equal(found, ids) and f"record {at + 1} holds not 2 experts and gates" in notes[0]
    assert f"record {at + 1} holds not 2 experts and gates" in strict(path, num_experts=8)


@pytest.mark.parametrize("form", ["jsonl", "lattice"])
def test_a_last_line_that_was_cut_is_left_out(tmp_path, form):
    ids = routing(3, 3, 2, 8)
    path = tmp_path / "a.jsonl"
    if form == "jsonl":
        write(path, ids, [2, 1])
    else:
        path.write_text(records(ids, np.full((3, 3, 2), 0.5), [0, 1, 2], [0, 2, 3]))
    path.write_text(path.read_text()[:-20])
    trace, notes = imported(path, num_experts=8)
    found = trace.read("experts", 0, 3)
    assert (
        np.array_equal(found[:2], ids[:2]) and np.array_equal(found[2, :2], ids[2, :2]) and (found[2, 2] == 255).all()
    )
    assert trace.source["left_out_cut_lines"] == 1 and "left out a last line that was cut" in notes[0]
    assert "is not as expected" in strict(path, num_experts=8)


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("bad", [None, {"id": "e", "choices": [{"routed_experts": 5}]}, "x", float("nan")])
def test_an_element_of_a_list_that_cannot_be_read_is_left_out(tmp_path, indent, bad):
    path = tmp_path / "list.json"
    path.write_text(json.dumps([GOOD | {"id": "a", "x": float("nan")}, bad, GOOD | {"id": "b"}], indent=indent))
    trace, notes = imported(path, num_experts=16)
    assert trace.rows == 18 and trace.source["left_out_answers"] == {"that can't be read": 1}
    assert "response 1 is not as expected" in notes[0] and "response 1 is" in strict(path, num_experts=16)
    path.write_text(path.read_text()[:-30])
    with pytest.raises(MoetraceError, match="is not as expected"):
        import_traces(path, tmp_path / "o.h5", format="vllm", hints=Hints(num_experts=16))


def test_an_answer_without_choices_that_ends_no_stream_is_counted(tmp_path):
    failed = {"id": "e", "choices": [], "usage": {"prompt_tokens": 6, "completion_tokens": 0}}
    for bad in (failed, failed | {"id": "1"}):
        path = log(tmp_path, GOOD, bad)
        trace, notes = imported(path, num_experts=16)
        assert trace.rows == 27 and trace.source["left_out_answers"] == {"without routing": 1}
        assert "has no choices" in notes[0] and "has no choices" in strict(path, num_experts=16)


def test_an_array_file_without_an_array_is_left_out(tmp_path):
    folder = tmp_path / "arrays"
    folder.mkdir()
    for number in range(3):
        np.save(folder / f"{number}.npy", request(9, 2, 2, 16, number))
    np.save(folder / "0.npy", np.array(None, object), allow_pickle=True)
    (folder / "3.npy").write_bytes((folder / "1.npy").read_bytes()[:-3])
    notes = []
    import_traces(folder, tmp_path / "o.h5", hints=Hints(num_experts=16, note=notes.append))
    trace = Trace.open(tmp_path / "o.h5")
    assert trace.rows == 18 and trace.source["left_out_answers"] == {"that can't be read": 2}
    assert "0.npy holds Python objects" in notes[0]
    with pytest.raises(MoetraceError, match="Python objects"):
        import_traces(folder, tmp_path / "s.h5", hints=Hints(num_experts=16, strict=True))


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_last_line_of_a_csv_that_was_cut_is_left_out(tmp_path, end):
    lines = ["# route_trace v1", "# model=m arch=a n_layer=2 n_expert=8 n_expert_used=2"]
    lines.append("turn,phase,step,layer,slot,expert,weight,residency,expert_bytes")
    ids = routing(3, 2, 2, 8)
    lines += [f"0,1,{t},{x},{s},{ids[t, x, s]},0.5,1,9" for t in range(3) for x in range(2) for s in range(2)]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(lines)[:-7] + end)
    trace, notes = imported(path)
    found = trace.read("experts", 0, 3)
    assert found[2, 1].tolist() == [ids[2, 1, 0], 255] and trace.source["left_out_cut_lines"] == 1
    found[2, 1, 1] = ids[2, 1, 1]
    assert np.array_equal(found, ids) and "left out a last line that was cut" in notes[0]
    assert "line 15 is incomplete" in strict(path)


@pytest.mark.parametrize("cut", [5, 1, 11])
@pytest.mark.parametrize("chunk", [16, 1 << 20])
def test_the_csv_of_llama_cpp_that_was_cut(tmp_path, monkeypatch, cut, chunk):
    monkeypatch.setattr("moetrace.importers.reading.text.CHUNK_BYTES", chunk)
    ids = routing(4, 3, 2, 8)
    path = tmp_path / "a.csv"
    text = "".join(f"{layer},{i}\n" for token in ids for layer in range(3) for i in token[layer])
    path.write_text(text[:-cut])
    trace, notes = imported(path, num_experts=8, top_k=2)
    found = trace.read("experts", 0, 4)
    kept = 2 if cut < 11 else 1
    if cut == 1:  # nothing but the end of the line
        assert np.array_equal(found, ids) and notes == []
        return
    assert np.array_equal(found[:3], ids[:3]) and np.array_equal(found[3, :kept], ids[3, :kept])
    assert (found[3, kept:] == 255).all()
    assert trace.source["left_out_cut_lines"] == (1 if cut == 5 else 2) and "last line" in notes[0]
    said = "layer 2 has 1 lines from 23 on" if cut == 5 else "line 22 is incomplete"
    assert said in strict(path, num_experts=8, top_k=2)


def test_empty_records_of_sglang_are_left_out(tmp_path):
    torch = pytest.importorskip("torch")

    def record(number, rows, **more):
        ids = torch.from_numpy(np.ascontiguousarray(routing(rows, 2, 2, 16, number).transpose(1, 0, 2), np.int32))
        own = {"input_ids": [1] * rows, "positions": list(range(number, number + rows)), "topk_ids_of_layer": ids}
        return {"forward_pass_id": number, "rank": 0, "forward_mode": 2, **own, **more}

    path = tmp_path / "a.pt"
    logical = torch.arange(16).repeat(2, 1)
    for empty in (None, record(1, 1, topk_ids_of_layer=None)):
        torch.save({"records": [record(0, 1), empty, record(2, 1)], "last_physical_to_logical_map": logical}, path)
        trace, notes = imported(path)
        assert trace.rows == 2 and trace.source["left_out_records"] == 1 and "record 1 is empty" in notes[0]
        assert "record 1 is empty" in strict(path)
        torch.save({"records": [empty, empty], "last_physical_to_logical_map": logical}, path)
        with pytest.raises(MoetraceError, match="record 0 is empty"):
            imported(path)
