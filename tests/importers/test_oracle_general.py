"""What `moetrace export --to oracle-general` wrote comes back, as far as the format holds it."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.writers import imported, refused, routing, steps
from support.writers.oracle_general import EXPERTS, TOP_K, trace

import moetrace as mt
from moetrace.importers import oracle_general
from moetrace.importers.formats import detect

SAID = {"num_experts": EXPERTS, "top_k": TOP_K}
RECORD = np.dtype([("clock_time", "<u4"), ("obj_id", "<u8"), ("obj_size", "<u4"), ("next_access_vtime", "<i8")])


def write(folder, made: mt.Trace):
    path = folder / "t.oracleGeneral"
    mt.export(made, path)
    return path


def by_loops(path, experts: int, top_k: int) -> list[list[list[int]]]:
    """Rows of the file by plain loops: deal the accesses of each layer of a step out, top_k a row."""
    accesses: dict[int, dict[int, list[int]]] = {}
    for clock, object_id, _, _ in np.fromfile(path, RECORD).tolist():
        layer, expert = divmod(object_id, experts)
        accesses.setdefault(clock, {}).setdefault(layer, []).append(expert)
    rows = []
    for layers in accesses.values():
        for start in range(0, len(layers[0]), top_k):
            rows.append([layers[layer][start : start + top_k] for layer in sorted(layers)])
    return rows


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_rows_and_steps_come_back_however_the_file_is_cut(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("oracle")
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    layers, top_k = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    ids = routing(sum(sizes), layers, top_k, 5, data.draw(st.integers(0, 99)))
    path = write(folder, mt.Trace.from_arrays(ids, num_experts=5, steps=np.array(sizes)))
    assert detect(path) == "oracle-general"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle_general, "_AT_ONCE", data.draw(st.integers(1, 40)))
        back = imported(folder, path, num_experts=5, top_k=top_k)
    assert np.array_equal(back.read("experts", 0, back.rows), ids) and by_loops(path, 5, top_k) == ids.tolist()
    assert np.diff(back.offset).tolist() == sizes and back.layer_index.tolist() == list(range(layers))


def test_missing_facts_are_named_or_come_from_options(tmp_path):
    path = write(tmp_path, trace())
    back = imported(tmp_path, path, **SAID)
    assert steps(back) == [(5, 0), (1, 0), (3, 0), (1, 0)] and "not recorded" in back.source["requests"]
    back = imported(tmp_path, path, **SAID, decode_steps=[(1, None)])
    assert steps(back) == [(5, 0), (1, 1), (3, 1), (1, 1)] and back.expert_bytes is None
    assert "--experts" in refused(tmp_path, path) and "--top-k" in refused(tmp_path, path, num_experts=8)


@pytest.mark.parametrize("sizes", [np.array([5, 6, 7]), np.arange(24).reshape(3, 8) + 1])
def test_sizes_of_experts_come_back(tmp_path, sizes):
    made = trace(sizes)
    chosen = len(np.unique(made.read("experts", 0, 10) + np.arange(3)[:, None] * 8))
    back = imported(tmp_path, write(tmp_path, made), **SAID)
    if sizes.ndim == 1 or chosen == 24:
        assert np.array_equal(back.expert_bytes, sizes)
    else:
        assert back.expert_bytes is None


def test_a_shipped_trace_comes_back(tmp_path):
    with mt.Trace.open(Path(__file__).parents[2] / "traces" / "mixtral-8x7b-b16.h5") as made:
        back = imported(tmp_path, write(tmp_path, made), model="mixtral-8x7b")
        assert np.array_equal(back.read("experts", 0, back.rows), made.read("experts", 0, made.rows))
        assert np.array_equal(back.offset, made.offset)


def test_records_that_do_not_make_rows_are_refused_in_one_sentence(tmp_path):
    path = write(tmp_path, trace())
    records = np.fromfile(path, RECORD)
    assert "do not make rows of 4 a layer" in refused(tmp_path, path, num_experts=8, top_k=4)
    assert "check --experts" in refused(tmp_path, path, layers=2, **SAID)
    ids = routing(10, 3, 2, 8)
    ids[4, 1, 1] = 255
    absent = write(tmp_path, mt.Trace.from_arrays(ids, num_experts=8, steps=np.array([10])))
    assert "export the trace as .npz or .parquet instead" in refused(tmp_path, absent, **SAID)
    for name, at, value, message in (
        ("clock_time", 30, 9, "earlier step"),
        ("obj_size", 3, 7, "another size"),
        ("obj_id", 5, 2**63, "1152921504606846977 layers"),
    ):
        changed = records.copy()
        changed[name][at] = value
        changed.tofile(path)
        assert message in refused(tmp_path, path, format="oracle-general", **SAID)
    path.write_bytes(records.tobytes()[:-1])
    assert "not records of 24" in refused(tmp_path, path, format="oracle-general", **SAID)


def test_records_of_other_kinds_are_not_recognized(tmp_path):
    records = np.fromfile(write(tmp_path, trace()), RECORD)
    assert oracle_general.recognize(records.tobytes(), "x")
    for name, at, value in (("clock_time", 0, 1), ("obj_size", 2, 0), ("next_access_vtime", 1, 2), ("obj_id", 4, 99)):
        changed = records.copy()
        changed[name][at] = value
        assert not oracle_general.recognize(changed.tobytes(), "x")
    assert not oracle_general.recognize(bytes(24), "x") and not oracle_general.recognize(records.tobytes()[:-1], "x")
