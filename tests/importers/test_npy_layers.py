"""A NumPy file a layer: side by side they are one trace, and never by mistake."""

import numpy as np
import pytest
from support.writers import routing, steps
from support.writers.check import column, imported, refused
from support.writers.npy_layers import write

from moetrace.importers.captured import Hints
from moetrace.importers.columns import says_layer
from moetrace.importers.formats import detect
from moetrace.importers.importing import import_traces
from moetrace.spec.errors import MoetraceError
from moetrace.trace import Trace


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("layer_0.npy", 0),
        ("layer12.npy", 12),
        ("moe_layer_012_ids.npy", 12),
        ("model.layers.3.mlp.npy", 3),
        ("blk.7.npy", 7),
        ("run3_Layer-5.npy", 5),
        ("request_0.npy", None),
        ("player.npy", None),
        ("layer.npy", None),
        ("layer_123456.npy", None),
        ("7.npy", None),
    ],
)
def test_a_name_says_its_layer_with_a_word(name, layer):
    assert says_layer(name) == layer


@pytest.mark.parametrize("layers", [[0, 1, 2], [9, 10, 2]])
def test_layers_stand_side_by_side_by_number(tmp_path, layers):
    ids = routing(11, 3, 2, 8)
    trace = imported(write(tmp_path, ids.astype(np.uint8), layers), "npy-layers", num_experts=8)
    order = np.argsort(layers)
    assert np.array_equal(column(trace, "experts"), ids[:, order]) and trace.layer_index.tolist() == sorted(layers)
    assert steps(trace) == [(11, 0)] and column(trace, "request").tolist() == [0] * 11
    assert trace.source["layers"] == "one a file, numbered by its name" and len(trace.source["sha256"]) == 3


@pytest.mark.parametrize("block", [1 << 4, 1 << 8])
def test_many_rows_are_read_in_parts(tmp_path, monkeypatch, block):
    monkeypatch.setattr("moetrace.importers.npy_layers.BLOCK_BYTES", block)
    ids = routing(100, 2, 2, 300)
    ids[3, 1] = 0  # nothing
    ids[5, 0] = -1
    ids[7, 0] = 300, 300  # padding
    notes = []
    paths = write(tmp_path, ids.astype(np.int16), [1, 3])
    import_traces(paths, tmp_path / "o.h5", hints=Hints(num_experts=300, note=notes.append), decode_after=90)
    trace, wanted = Trace.open(tmp_path / "o.h5"), ids.copy()
    wanted[[3, 5, 7], [1, 0, 0]] = 65535
    assert np.array_equal(column(trace, "experts"), wanted) and trace.source["padding_cells"] == 1
    assert steps(trace) == [(90, 0)] + [(1, 1)] * 10
    assert "took 2 files as layers 1 to 3, side by side: row n of each is token n of one request" in "".join(notes)


def test_one_slot_and_one_plane(tmp_path):
    ids = routing(6, 2, 1, 8)
    np.save(tmp_path / "layer_0.npy", ids[:, 0, 0])
    np.save(tmp_path / "layer_1.npy", ids[:, 1:])  # [rows, 1, top_k]: a request of one layer, if the name were another
    paths = [tmp_path / f"layer_{n}.npy" for n in range(2)]
    assert np.array_equal(column(imported(paths, "npy-layers", num_experts=8), "experts"), ids)
    np.save(tmp_path / "request_1.npy", ids[:, 1:])
    assert detect(tmp_path / "request_1.npy") == "vllm"


def test_each_folder_is_a_request(tmp_path):
    given = [routing(n, 2, 2, 8, n) for n in (4, 6)]
    paths = []
    for number, ids in enumerate(given):
        (tmp_path / str(number)).mkdir()
        paths += write(tmp_path / str(number), ids, [0, 1])
    import_traces(paths, tmp_path / "o.h5", hints=Hints(num_experts=8))
    trace = Trace.open(tmp_path / "o.h5")
    assert np.array_equal(column(trace, "experts"), np.concatenate(given))
    assert column(trace, "request").tolist() == [0] * 4 + [1] * 6


def test_files_that_do_not_fit_are_refused_in_one_sentence(tmp_path):
    ids = routing(6, 2, 2, 8)
    paths = write(tmp_path, ids, [0, 1])
    np.save(paths[1], ids[:5, 1])
    sentence = "has 6 rows, but .*layer_1.npy 5: files that hold a layer each need equally many"
    refused(paths, sentence, "npy-layers", num_experts=8)
    np.save(paths[1], ids[:, 1, :1])
    refused(paths, "has 2 experts a row, but .*layer_1.npy 1", "npy-layers", num_experts=8)
    np.save(tmp_path / "x_layer_0.npy", ids[:, 0])
    refused([paths[0], tmp_path / "x_layer_0.npy"], "are both of layer 0", "npy-layers", num_experts=8)
    np.save(paths[1], ids[:, 1] + 3)
    refused(paths, "layer_1.npy: row . holds the expert .*, but the model has 8 experts", "npy-layers", num_experts=8)
    refused(paths[:1], "does not say num_experts", "npy-layers")
    np.save(paths[1], ids[:0, 1])
    refused(paths, "layer_1.npy is empty", "npy-layers", num_experts=8)
    np.save(paths[1], ids[:, 1] / 2)
    refused(paths, "float64", "npy-layers", num_experts=8)
    paths[1].write_bytes(paths[0].read_bytes()[:-3])
    refused(paths, "its size differs", "npy-layers", num_experts=8)


def test_files_without_the_word_need_an_option(tmp_path):
    ids = routing(6, 2, 2, 8)
    paths = write(tmp_path, ids, [4, 11], "{}.npy")
    with pytest.raises(MoetraceError):
        import_traces(paths, tmp_path / "o.h5", hints=Hints(num_experts=8))
    import_traces(paths, tmp_path / "o.h5", format="npy-layers", hints=Hints(num_experts=8))
    assert Trace.open(tmp_path / "o.h5").layer_index.tolist() == [4, 11]
    np.save(tmp_path / "a.npy", ids[:, 0])
    refused(tmp_path / "a.npy", "does not say its layer: name it as in layer_12.npy", "npy-layers", num_experts=8)


def test_tables_of_a_layer_each_say_so(tmp_path):
    ids = routing(3, 2, 2, 8)
    for layer in range(2):
        rows = "".join(f'{token},"{ids[token, layer].tolist()}"\n' for token in range(3))
        (tmp_path / f"moe_layer_{layer}.csv").write_text(f"token,experts\n{rows}")
    notes = []
    paths = sorted(tmp_path.glob("*.csv"))
    assert {detect(path) for path in paths} == {"any-table"}
    import_traces(paths, tmp_path / "o.h5", hints=Hints(num_experts=8, note=notes.append))
    trace = Trace.open(tmp_path / "o.h5")
    assert np.array_equal(column(trace, "experts"), ids) and trace.source["layers"].startswith("one a file")
    assert notes == [f"{paths[0]}: took 2 files as layers 0 to 1, by their names."]
