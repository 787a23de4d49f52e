"""Ids that carry no expert: what is surely padding goes by itself, the rest when the user says so."""

import json

import numpy as np
import polars as pl
import pytest
from support.writers import Sample, routing
from support.writers.jsonl import write
from support.writers.megatron import records
from support.writers.vllm import npy_base64, request, response

from moetrace.importers.captured import Hints
from moetrace.importers.importing import import_traces
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace import Trace


def imported(path, **hints):
    notes = []
    import_traces(path, path.parent / "out.h5", hints=Hints(**{"num_experts": 8} | hints, note=notes.append))
    trace = Trace.open(path.parent / "out.h5")
    trace.verify()
    return trace, notes


def refused(path, **hints):
    with pytest.raises(MoetraceError) as raised:
        imported(path, **hints)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def npz(path, ids):
    rows = np.arange(len(ids))
    meta = np.array(json.dumps({"num_experts": 8}))
    zeros = np.zeros(len(ids), np.uint8)
    layers = np.arange(ids.shape[1])
    np.savez(path, expert_ids=ids, request_id=zeros, position=rows, phase=zeros, layer_index=layers, meta=meta)


def lattice(path, ids):
    from support.writers.lattice import records as lines

    path.write_text(lines(ids, np.full(ids.shape, 0.5), list(range(len(ids))), list(range(ids.shape[1]))))


def table(path, ids, one_a_row=False):
    rows, layers, top_k = ids.shape
    cells = {"token": np.repeat(np.arange(rows), layers), "layer_id": np.tile(np.arange(layers), rows)}
    if one_a_row:
        cells = {name: np.repeat(column, top_k) for name, column in cells.items()}
    flat = ids.ravel() if one_a_row else ids.reshape(-1, top_k).tolist()
    columns = {**cells, "expert" if one_a_row else "topk_ids": flat}
    pl.DataFrame(columns).write_parquet(path)


def route_trace(path, ids):
    lines = ["# route_trace v1", f"# model=m arch=a n_layer={ids.shape[1]} n_expert=8 n_expert_used={ids.shape[2]}"]
    lines.append("turn,phase,step,layer,slot,expert,weight,residency,expert_bytes")
    lines += [f"0,1,{row},{layer},{slot},{expert},0.5,1,9" for (row, layer, slot), expert in np.ndenumerate(ids)]
    path.write_text("\n".join(lines) + "\n")


# Format -> writes ids [rows, layers, top_k] to a path of this ending.
WRITERS = {
    "vllm": (".npy", lambda path, ids: np.save(path, ids)),
    "npz": (".npz", npz),
    "jsonl": (".jsonl", lambda path, ids: write(path, ids, [len(ids)])),
    "lattice": (".jsonl", lattice),
    "megatron": (".jsonl", lambda path, ids: path.write_text(records(0, {(0, 0): ids}, list(range(ids.shape[1]))))),
    "any-table": (".parquet", table),
    "any-table, a choice a row": (".parquet", lambda path, ids: table(path, ids, True)),
    "bigmoeonedge": (".csv", route_trace),
}


@pytest.mark.parametrize("form", WRITERS)
def test_ids_beyond_the_experts_are_absent_if_the_user_says_so(tmp_path, form):
    ending, save = WRITERS[form]
    ids = routing(50, 3, 4, 12)
    save(path := tmp_path / f"a{ending}", ids.astype(np.int16))
    assert "give --absent-from 8" in refused(path)
    trace, _ = imported(path, absent_from=8)
    assert np.array_equal(trace.read("experts", 0, 50), np.where(ids >= 8, 255, ids))
    assert trace.source["absent_from"] == 8
    trace, _ = imported(path, absent_ids=(8, 9, 10, 11))
    assert np.array_equal(trace.read("experts", 0, 50), np.where(ids >= 8, 255, ids))
    trace, _ = imported(path, absent_from=6, absent_ids=(2,))
    assert np.array_equal(trace.read("experts", 0, 50), np.where((ids >= 6) | (ids == 2), 255, ids))


@pytest.mark.parametrize("form", ["any-table", "any-table, a choice a row", "bigmoeonedge"])
def test_minus_1_is_absent_and_other_ids_are_refused(tmp_path, form):
    ending, save = WRITERS[form]
    ids = routing(50, 3, 4, 12).astype(np.int32)
    save(path := tmp_path / f"a{ending}", np.where(ids >= 8, -1, ids))
    trace, _ = imported(path)
    assert np.array_equal(trace.read("experts", 0, 50), np.where(ids >= 8, 255, ids))
    ids[ids >= 8] = -1
    ids[7, 1, 2] = -2
    save(path, ids)
    assert "is not 0 to 7" in refused(path) and "is not 0 to 7" in refused(path, absent_from=6, absent_ids=(2**40,))


def test_lines_of_route_traces_keep_their_numbers_where_ids_are_absent(tmp_path):
    ids = routing(5, 3, 4, 12)
    route_trace(path := tmp_path / "a.csv", ids)
    lines = path.read_text().splitlines(keepends=True)
    at = next(at for at in range(30, 60) if int(lines[at].split(",")[5]) < 8)
    path.write_text("".join([*lines, lines[at]]))
    assert f"line {at + 1}: another line has the same" in refused(path, absent_from=8)


def test_a_null_list_of_a_table_is_no_choice(tmp_path):
    ids = routing(9, 3, 2, 8)
    table(path := tmp_path / "a.parquet", ids)
    rows = pl.read_parquet(path)
    for at in ([0], [5, 26], [1, 2, 3]):
        null = pl.Series([number in at for number in range(27)])
        rows.with_columns(pl.when(null).then(None).otherwise(pl.col("topk_ids")).alias("topk_ids")).write_parquet(path)
        expected = ids.reshape(27, 2).copy()
        expected[at] = 255
        assert np.array_equal(imported(path)[0].read("experts", 0, 9), expected.reshape(9, 3, 2))


@pytest.mark.parametrize("form", ["vllm", "npz", "jsonl", "megatron"])
def test_an_expert_that_stands_for_none_as_well_is_absent_if_the_user_says_so(tmp_path, form):
    ending, save = WRITERS[form]
    ids = routing(50, 3, 4, 12)
    ids[ids >= 8] = 0
    ids[(ids == 0).all(axis=2)] = [0, 0, 1, 2]  # not all in a cell, which is a dense layer's
    save(path := tmp_path / f"a{ending}", ids.astype(np.int16))
    said = refused(path)
    assert "chooses expert 0 more than once: the same choice stands there twice, so look for records" in said
    assert "only if that id stands for no expert there, give --absent 0" in said
    trace, _ = imported(path, absent_ids=(0,))
    assert np.array_equal(trace.read("experts", 0, 50), np.where(ids == 0, 255, ids))


@pytest.mark.parametrize("form", [form for form in WRITERS if form != "any-table, a choice a row"])
def test_choices_of_experts_that_are_made_absent_are_counted(tmp_path, form):
    ending, save = WRITERS[form]
    ids = routing(50, 3, 4, 8)
    save(path := tmp_path / f"a{ending}", ids.astype(np.int16))
    for absent, gone in ({"absent_ids": (3,)}, ids == 3), ({"absent_ids": (3, 90), "absent_from": 8}, ids == 3):
        trace, notes = imported(path, **absent)
        said = f"--absent makes {gone.sum()} cells lose an expert that stands there once, as a true choice does"
        assert sum(said in note for note in notes) == 1
        assert np.array_equal(trace.read("experts", 0, 50), np.where(gone, 255, ids))
    for absent in ({"absent_from": 8}, {"absent_ids": (9, 200)}):
        assert not any("--absent" in note for note in imported(path, **absent)[1]), "nothing is lost"


@pytest.mark.parametrize("mark", [-1, 8, 255, 5, 0])
def test_rows_of_one_placeholder_are_left_out(tmp_path, mark):
    ids = routing(9, 3, 2, 8).astype(np.int16)
    padded = np.concatenate([ids[:4], np.full((2, 3, 2), mark), ids[4:], np.full((3, 3, 2), mark)]).astype(np.int16)
    np.save(path := tmp_path / "a.npy", padded)
    trace, notes = imported(path)
    assert np.array_equal(trace.read("experts", 0, trace.rows), ids)
    assert trace.read("position", 0, 9).tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 10]
    assert trace.source["left_out_padding_rows"] == 5 and any("left out 5 rows of padding" in note for note in notes)


def test_cells_of_one_id_beyond_the_experts_are_absent(tmp_path):
    ids = routing(9, 3, 2, 8)
    odd = ids.copy()
    odd[2, 1] = odd[7, 0] = 8
    for form in ("vllm", "jsonl", "lattice", "megatron", "any-table"):
        ending, save = WRITERS[form]
        save(path := tmp_path / f"{form}{ending}", odd)
        trace, notes = imported(path)
        assert np.array_equal(trace.read("experts", 0, 9), np.where(odd == 8, 255, odd))
        assert trace.source["padding_cells"] == 2 and any("2 cells hold one id" in note for note in notes)
    odd[2, 1] = [8, 3]
    np.save(path := tmp_path / "b.npy", odd)
    assert "token 2, layer 1 holds the id 8, but there are 8 experts: if ids from 8 on" in refused(path)


def test_a_row_of_one_expert_with_one_layer_is_no_padding(tmp_path):
    np.save(path := tmp_path / "a.npy", np.array([[[3, 1]], [[3, 3]]], np.uint8))
    assert "chooses expert 3 more than once" in refused(path)
    ones = np.arange(8, dtype=np.uint8).reshape(8, 1, 1).repeat(3, 1)  # top 1: a row may choose alike
    np.save(path, ones)
    assert np.array_equal(imported(path)[0].read("experts", 0, 8), ones)
    np.save(path, np.full((4, 3, 2), -1, np.int8))
    assert "every id is 0 or -1" in refused(path)


def test_padding_in_an_answer_does_not_move_its_rows(tmp_path):
    ids = request(11, 3, 2, 8).astype(np.int16)
    ids[8:10] = -1
    whole = response([ids], 8)
    whole["choices"][0]["routed_experts"] = npy_base64(ids)
    (path := tmp_path / "a.json").write_text(json.dumps(whole))
    trace, _ = imported(path)
    assert trace.read("position", 0, 9).tolist() == [*range(8), 10] and trace.phase.tolist() == [0, 1]


def padded(ids, rows):
    return np.concatenate([ids, np.full((rows - len(ids), *ids.shape[1:]), -1)])


def test_the_padding_of_a_cuda_graph_is_left_out(tmp_path):
    batches = [routing(5, 2, 2, 16, 1), routing(1, 2, 2, 16, 2), routing(8, 2, 2, 16, 3)]
    text = records(0, {(step, 0): padded(ids, 8) for step, ids in enumerate(batches)}, [1, 2])
    (path := tmp_path / "router_trace_rank0.jsonl").write_text(text)
    trace, notes = imported(path, num_experts=16)
    assert np.array_equal(trace.read("experts", 0, 14), np.concatenate(batches))
    assert np.diff(trace.offset).tolist() == [5, 1, 8] and trace.phase.tolist() == [0, 1, 0]
    assert trace.read("request", 0, 14).tolist() == [0] * 6 + [1] * 8, "one real token goes on with the request"
    assert trace.source["left_out_padding_rows"] == 10 and "left out 10 rows of padding" in notes[0]


def test_a_token_that_one_layer_drops_is_no_padding(tmp_path):
    ids = routing(6, 2, 2, 16)
    ids[5, 0] = ids[2, 1] = -1
    (path := tmp_path / "router_trace_rank0.jsonl").write_text(records(0, {(0, 0): padded(ids, 8)}, [1, 2]))
    trace, _ = imported(path, num_experts=16)
    assert np.array_equal(trace.read("experts", 0, 6), np.where(ids < 0, 255, ids))
    assert trace.source["left_out_padding_rows"] == 2


def test_ranks_pad_by_themselves(tmp_path):
    one, other = routing(5, 2, 2, 16, 1), routing(3, 2, 2, 16, 2)
    paths = [tmp_path / f"router_trace_rank{rank}.jsonl" for rank in range(2)]
    for rank, (path, ids) in enumerate(zip(paths, (one, other), strict=True)):
        path.write_text(records(rank, {(0, 0): padded(ids, 8)}, [1, 2]))
    notes = []
    import_traces(paths, tmp_path / "o.h5", hints=Hints(num_experts=16, note=notes.append))
    trace = Trace.open(tmp_path / "o.h5")
    assert np.array_equal(trace.read("experts", 0, 8), np.concatenate([one, other]))


def test_counts_have_no_ids_to_make_absent(tmp_path):
    from support.writers.colibri import samples

    counts = next(sample for sample in samples(tmp_path) if "usage" in sample.files[0].name)
    assert isinstance(counts, Sample)
    with pytest.raises(UsageError, match="holds only counts, without ids that could be absent"):
        import_traces(counts.files, tmp_path / "o.h5", hints=Hints(**counts.hints, absent_from=2))


@pytest.mark.parametrize("experts", [384, 512])
def test_wrapped_ids_get_a_note_and_are_no_placeholders(tmp_path, experts):
    ids = request(300, 4, 8, experts)
    path, wide = tmp_path / "a.npy", tmp_path / "b.npy"
    np.save(path, ids.astype(np.uint8))
    np.save(wide, ids.astype(np.uint8).astype(np.uint16))
    said = refused(path, num_experts=experts)
    assert f"holds ids of uint8, but there are {experts} experts, so that ids from 256 on have wrapped" in said
    said = refused(wide, num_experts=experts)
    assert "different ids, so these are no choices" in said and "--absent" not in said
    np.save(path, (ids % 256).astype(np.uint8)[:, :1, :1])
    imported(path, num_experts=256)


@pytest.mark.parametrize("shape", [(300, 4, 6), (300, 2, 12)], ids=["swapped axes", "joined layers"])
def test_axes_that_are_not_those_of_a_trace_get_no_placeholder(tmp_path, shape):
    ids = request(300, 6 if shape[1] == 4 else 4, 4 if shape[1] == 4 else 6, 64)
    path = tmp_path / "a.npy"
    np.save(path, np.ascontiguousarray(np.swapaxes(ids, 1, 2)) if shape[1] == 4 else ids.reshape(shape))
    said = refused(path, num_experts=64)
    assert "must be [rows, layers, top_k]" in said and "--absent" not in said


def test_counts_are_taken_for_no_ids(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.random.default_rng(0).integers(20, 200, (4, 2, 12)))
    said = refused(path, num_experts=12)
    assert "look like counts of 12 experts" in said and "--absent" not in said


def test_ids_that_may_count_from_1_are_asked_about(tmp_path):
    ids = routing(50, 3, 4, 8)
    table(path := tmp_path / "a.parquet", (ids + 1).astype(np.int16))
    assert refused(path).endswith("give --absent-from 8; if ids count from 1, take 1 from each.")
    table(path, np.where(ids == 7, 9, ids).astype(np.int16))
    assert refused(path).endswith("give --absent-from 8.")
