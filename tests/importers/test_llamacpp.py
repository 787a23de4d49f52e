"""llama.cpp's CSV: passes are cut where the engine made them, and prompts that were read flat are told of."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.writers import steps
from support.writers.check import column, imported, refused
from support.writers.known import Pass, joined, passes
from support.writers.llamacpp import choices, read_flat, tokens

from moetrace.importers import llamacpp
from moetrace.importers.captured import Hints
from moetrace.importers.importing import import_traces
from moetrace.trace import Trace

LAYERS = [1, 2, 5]


def save(tmp_path, text: str):
    path = tmp_path / "moe_trace.csv"
    path.write_text(text)
    return path


@pytest.mark.parametrize("write", [choices, tokens])
@pytest.mark.parametrize("chunk", [7, 40, 1 << 20])
@pytest.mark.parametrize("num_experts", [8, 300])
def test_ids_come_back(tmp_path, monkeypatch, write, chunk, num_experts):
    monkeypatch.setattr("moetrace.importers.reading.text.CHUNK_BYTES", chunk)
    known = passes([4, 3, 1, 1, 5, 1], 3, 2, num_experts)
    trace = imported(save(tmp_path, write(known, LAYERS)), "llamacpp", num_experts=num_experts, top_k=2)
    assert np.array_equal(column(trace, "experts"), joined(known, num_experts))
    assert steps(trace) == [(4, 0), (3, 0), (1, 1), (1, 1), (5, 0), (1, 1)]
    assert column(trace, "request").tolist() == [0] * 9 + [1] * 6, "a prompt after decoding is another request"
    assert column(trace, "position").tolist() == [*range(9), *range(6)]
    assert trace.layer_index.tolist() == LAYERS and "flat_view" not in trace.source


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.integers(2, 4), st.integers(1, 3), st.integers(1, 60))
def test_any_passes_come_back(tmp_path_factory, rows, layers, top_k, chunk):
    known = passes(rows, layers, top_k, 8, seed=sum(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moetrace.importers.reading.text.CHUNK_BYTES", chunk)
        for write in (choices, tokens):
            path = save(tmp_path_factory.mktemp("llamacpp"), write(known, list(range(layers))))
            trace = imported(path, "llamacpp", num_experts=8, top_k=top_k)
            assert np.array_equal(column(trace, "experts"), joined(known, 8))
            assert steps(trace) == [(n, int(n == 1)) for n in rows]


def test_a_header_and_windows_lines_are_allowed(tmp_path):
    known = passes([2, 1], 3, 2, 8)
    for header, write in (("layer,expert\n", choices), ("pos,layer,id0,id1\n", tokens)):
        path = tmp_path / "a.csv"
        path.write_bytes((header + write(known, LAYERS)).replace("\n", "\r\n").encode())
        trace = imported(path, "llamacpp", num_experts=8, top_k=2)
        assert np.array_equal(column(trace, "experts"), joined(known, 8))


def test_a_single_decoded_request_begins_at_0(tmp_path):
    known = passes([1, 1, 1], 3, 2, 8)
    text = tokens(known, LAYERS) * 2
    trace = imported(save(tmp_path, text), "llamacpp", num_experts=8)
    assert column(trace, "request").tolist() == [0] * 3 + [1] * 3
    assert column(trace, "position").tolist() == [0, 1, 2] * 2


def test_prompts_that_were_read_flat_are_kept_with_a_note(tmp_path):
    known = read_flat(passes([5, 9, 1, 1], 3, 2, 8), 8)
    trace = imported(save(tmp_path, choices(known, LAYERS)), "llamacpp", num_experts=8, top_k=2)
    assert np.array_equal(column(trace, "experts"), joined(known, 8)), "they are not dropped"
    assert trace.source["flat_view"].startswith("in 6 of 6 layers of prompts, the ids are a permutation")


def test_a_flat_prompt_with_an_expert_twice_is_refused_for_it(tmp_path):
    known = read_flat(passes([7, 1], 3, 3, 8), 8)  # 8 is no multiple of 3: rows straddle
    assert any(len(set(ids)) < 3 for one in known for row in one.ids.tolist() for ids in row)
    refused(
        save(tmp_path, choices(known, LAYERS)), "was read flat from rows of all", "llamacpp", num_experts=8, top_k=3
    )


@pytest.mark.parametrize(
    ("write", "old", "new", "sentence"),
    [
        (choices, "\n1,", "\n1\n1,", "line 2 is incomplete"),
        (choices, "1,", "1,x", "line 1 can't be read as CSV of 2 columns: '1,x"),
        (choices, "1,", "70000,", "line 1: layer 70000 is impossible"),
        (choices, "1,", "1,9", "line 1 holds the expert 9\\d, but the model has 8 experts"),
        (choices, "1,", "2,", r"layer 2 has 1 lines from 1 on, which is no multiple of top_k \(2\)"),
        (tokens, "-2,1,", "-9,1,", "the pass from line 1 on lacks positions"),
        (tokens, "\n0,1,", "\n7,1,", "position 7 does not follow the one before"),
        (tokens, "-2,1,", "-2,1,-1", "holds the expert -1\\d"),
        (tokens, "-2,1,", "-2,-1,", "line 1: layer -1 is impossible"),
        (tokens, "-2,1,", "-2,1,99999999999", "line 1 can't be read as CSV of 4 columns"),
        (tokens, "\n", "\n\n", "line 2 is incomplete"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, write, old, new, sentence):
    text = write(passes([2, 1], 3, 2, 8), LAYERS)
    assert old in text
    refused(save(tmp_path, text.replace(old, new, 1)), sentence, "llamacpp", num_experts=8, top_k=2)


def test_sizes_come_from_the_user(tmp_path):
    path = save(tmp_path, choices(passes([2, 1], 3, 2, 8), LAYERS))
    refused(path, "does not say num_experts: give --model or --experts", "llamacpp", top_k=2)
    refused(path, "does not say top_k: give --model or --top-k", "llamacpp", num_experts=8)
    path.write_text(tokens(passes([2, 1], 3, 2, 8), LAYERS))
    refused(path, "has 2 experts a token, but --top-k says 3", "llamacpp", num_experts=8, top_k=3)
    path.write_text("1\n")
    refused(path, "line 1 is neither", "llamacpp", num_experts=8)
    path.write_text("3,0\n3,1\n")
    refused(path, "has one layer, of which", "llamacpp", num_experts=8, top_k=2)


def test_lines_that_name_many_layers_but_few_choices_are_refused(tmp_path):
    lines = [f"{layer},0" for layer in range(3000)] + ["0,1"] * 3000
    refused(save(tmp_path, "\n".join(lines)), "too few for", "llamacpp", num_experts=8, top_k=1)


def warm_up(tokens_of_it, layers, num_experts, seed=3):
    """Lines `layer,expert` of a pass that runs every expert; the last layer may only have the last token."""
    random = np.random.default_rng(seed)
    counts = dict.fromkeys(layers, tokens_of_it) | {layers[-1]: 1}
    return "".join(
        f"{layer},{i}\n" for layer, n in counts.items() for _ in range(n) for i in random.permutation(num_experts)
    )


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("rows", [[1, 1, 1], [6, 1, 1], [3, 1, 4, 1]])
@pytest.mark.parametrize("chunk", [64, 1 << 20])
def test_a_warm_up_is_left_out_with_a_note(tmp_path, monkeypatch, count, rows, chunk):
    monkeypatch.setattr("moetrace.importers.reading.text.CHUNK_BYTES", chunk)
    known, notes = passes(rows, 3, 3, 10), []  # 10 is no multiple of 3
    path = save(tmp_path, warm_up(count, LAYERS, 10) + choices(known, LAYERS))
    import_traces(path, tmp_path / "o.h5", hints=Hints(num_experts=10, top_k=3, note=notes.append))
    with Trace.open(tmp_path / "o.h5") as trace:
        assert np.array_equal(column(trace, "experts"), joined(known, 10))
        assert steps(trace) == [(n, int(n == 1)) for n in rows]
        lines = 10 * (2 * count + 1)
        assert trace.source["left_out_warm_up"] == f"the first pass, {lines} lines: every layer runs every expert"
    assert f"left out the first pass ({lines} lines), in which every layer runs each of its 10 experts" in notes[0]


@pytest.mark.parametrize("chunk", [64, 1 << 20])
def test_every_warm_up_of_a_file_is_left_out(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("moetrace.importers.reading.text.CHUNK_BYTES", chunk)
    known, notes = [passes(rows, 3, 2, 16, seed) for seed, rows in enumerate([[6, 1, 1], [8, 1], [1, 1]])], []
    parts = [choices(one, LAYERS) for one in known]
    warm = [warm_up(count, LAYERS, 16) for count in (1, 2)]
    path = save(tmp_path, warm[0] + warm[1] + parts[0] + warm[1] + parts[1] + warm[0] + parts[2] + warm[0])
    import_traces(path, tmp_path / "o.h5", hints=Hints(num_experts=16, top_k=2, note=notes.append))
    with Trace.open(tmp_path / "o.h5") as trace:
        assert np.array_equal(column(trace, "experts"), joined([step for one in known for step in one], 16))
        assert steps(trace) == [(6, 0), (1, 1), (1, 1), (8, 0), (1, 1), (1, 1), (1, 1)]
        lines = 16 * (3 * 3 + 2 * 5)
        assert trace.source["left_out_warm_up"] == f"5 passes, {lines} lines: every layer runs every expert"
    assert f"left out 5 passes ({lines} lines), in which every layer" in notes[0]


def test_a_later_pass_that_may_run_every_expert_by_chance_stays(tmp_path):
    known = passes([2, 1, 2, 1], 3, 2, 4)
    known[2].ids[:] = [[[0, 1]] * 3, [[2, 3]] * 3]
    trace = imported(save(tmp_path, choices(known, LAYERS)), "llamacpp", num_experts=4, top_k=2)
    assert np.array_equal(column(trace, "experts"), joined(known, 4))


def test_a_line_after_a_warm_up_has_its_number(tmp_path):
    text = warm_up(1, LAYERS, 16) + choices(passes([6, 1], 3, 2, 16), LAYERS)
    lines = text.splitlines(keepends=True)
    lines[50] = lines[50].split(",")[0] + ",77\n"
    refused(save(tmp_path, "".join(lines)), "line 51 holds the expert 77", "llamacpp", num_experts=16, top_k=2)


def test_a_warm_up_with_positions_is_left_out_with_a_note(tmp_path):
    known = passes([4, 1, 1], 3, 2, 8)
    ids = np.random.default_rng(1).permuted(np.tile(np.arange(8), (2, 3, 1)), axis=2)
    wide = tokens([Pass(ids, True)], LAYERS)
    trace = imported(save(tmp_path, wide + tokens(known, LAYERS)), "llamacpp", num_experts=8)
    assert np.array_equal(column(trace, "experts"), joined(known, 8))
    assert trace.top_k == 2
    assert trace.source["left_out_warm_up"].startswith("the first pass, 6 lines")


def test_a_first_pass_with_a_choice_too_many_is_no_warm_up(tmp_path):
    known = passes([4, 1, 1], 3, 2, 8)
    known[0].ids[:, 0] = [[0, 1], [2, 3], [4, 5], [6, 7]]
    trace = imported(save(tmp_path, choices(known, LAYERS)), "llamacpp", num_experts=8, top_k=2)
    assert np.array_equal(column(trace, "experts"), joined(known, 8)), "one layer lists every expert, others do not"
    alone = tmp_path / "alone"
    alone.mkdir()
    trace = imported(save(alone, warm_up(1, LAYERS, 8)), "llamacpp", num_experts=8, top_k=2)
    assert trace.rows == 4, "there is nothing else"


@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_another_matrix_of_numbers_is_no_trace_of_llamacpp(width):
    random = np.random.default_rng(width)
    for _ in range(50):
        rows = np.argsort(random.random((12, 64)), axis=1)[:, :width] + 1
        text = "".join(",".join(map(str, row)) + "\n" for row in rows.tolist())
        assert not llamacpp.recognize(text.encode(), "a.csv")


@pytest.mark.parametrize("parts", [2, 4])
def test_a_note_names_tokens_that_are_parts_of_one(tmp_path, parts):
    known = passes([1] * 30, 3, 8, 64)
    notes: list[str] = []
    path, out = save(tmp_path, choices(known, LAYERS)), tmp_path / "o.h5"
    import_traces(path, out, hints=Hints(num_experts=64, top_k=8 // parts, note=notes.append))
    assert f"every {parts} tokens" in notes[0] and f"top_k looks like 8, not {8 // parts}" in notes[0]
    with Trace.open(out) as trace:
        assert trace.rows == 30 * parts and trace.source["top_k"].startswith(f"every {parts} tokens")


@pytest.mark.parametrize("write", [choices, tokens])
@pytest.mark.parametrize("rows", [[4, 1, 1, 1], [2] * 40, [1] * 40, [2]])
def test_tokens_of_their_own_are_no_parts(tmp_path, write, rows):
    trace = imported(save(tmp_path, write(passes(rows, 3, 2, 16), LAYERS)), "llamacpp", num_experts=16, top_k=2)
    assert "top_k" not in trace.source
