"""Tables of counts come out as they went in, one step each, and what is none is one sentence."""

import json

import numpy as np
import pytest
from support.writers import imported, refused, steps
from support.writers.counts_table import eplb_json, load_view
from support.writers.sglang import stat

from moetrace.exports import export
from moetrace.importers.captured import Hints
from moetrace.importers.formats import detect
from moetrace.importers.importing import import_traces
from moetrace.trace import Trace

COUNTS = np.random.default_rng(4).integers(1, 90, (3, 4, 8))


def least_rows(counts):
    """No layer and no expert has more rows than the step; by plain Python."""
    return [max(*(-(-sum(layer) // 2) for layer in step), *map(max, step)) for step in counts.tolist()]


@pytest.mark.parametrize("counts", [COUNTS[:1], COUNTS])
def test_json_of_eplb(tmp_path, counts):
    path = eplb_json(tmp_path / "a.json", counts[0] if len(counts) == 1 else counts)
    assert detect(path) == "counts-table"
    trace = imported(tmp_path, path, top_k=2)
    assert np.array_equal(trace.read("counts", 0, 9), counts)
    assert steps(trace) == [(rows, 2) for rows in least_rows(counts)]


@pytest.mark.parametrize("dtype", ["i4", "i8", "f4", "f8"])
def test_load_views(tmp_path, dtype):
    pytest.importorskip("torch")
    path = load_view(tmp_path / "expert_load_view.pt", COUNTS[0].astype(dtype))
    assert detect(path) == "counts-table"
    trace = imported(tmp_path, path, top_k=2)
    assert np.array_equal(trace.read("counts", 0, 9), COUNTS[:1]) and trace.source["format"] == "counts-table"


def test_plain_lists_of_counts(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(COUNTS[0].tolist()))
    assert detect(path) == "counts-table"
    assert np.array_equal(imported(tmp_path, path, top_k=2).read("counts", 0, 9), COUNTS[:1])
    path.write_text("[[1, 2], [3]]")
    assert "have not equally many experts" in refused(tmp_path, path, top_k=1)


@pytest.mark.parametrize("first", [0, 3, 300])
def test_dicts_of_tensors(tmp_path, first):
    torch = pytest.importorskip("torch")
    path = tmp_path / "a.pt"
    torch.save({"expert_load_view": torch.from_numpy(COUNTS[0])}, path)
    assert detect(path) == "counts-table"
    assert np.array_equal(imported(tmp_path, path, top_k=2).read("counts", 0, 9), COUNTS[:1])
    (tmp_path / "out.h5").unlink()
    torch.save({layer + first: torch.from_numpy(COUNTS[0, layer]) for layer in (2, 0, 1, 3)}, path)
    assert detect(path) == "counts-table"
    trace = imported(tmp_path, path, top_k=2)
    assert np.array_equal(trace.read("counts", 0, 9), COUNTS[:1])
    assert trace.layer_index.tolist() == list(range(first, first + 4))


def test_an_array_of_two_axes_says_what_it_may_be(tmp_path):
    np.save(tmp_path / "w.npy", COUNTS[0])
    assert "save counts [layers, experts] as JSON" in refused(tmp_path, tmp_path / "w.npy", top_k=2)


@pytest.mark.parametrize("dtype", ["i4", "f4"])
@pytest.mark.parametrize("counts", [COUNTS[0], COUNTS[:1], COUNTS])
def test_tables_of_ktransformers_are_those_of_the_recorder(tmp_path, counts, dtype):
    pytest.importorskip("torch")
    path = stat(tmp_path / "a.pt", counts.astype(dtype))
    assert detect(path) == "sglang"
    trace = imported(tmp_path, path, top_k=2)
    whole = counts.reshape(-1, 4, 8)
    assert np.array_equal(trace.read("counts", 0, 9), whole)
    assert trace.source["mode"] == ("stat" if len(whole) > 1 else "one table")


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ([[0.5, 0.5]], "holds numbers that are not whole"),
        ([[1e300, 1]], "holds numbers that are not whole"),
        ([[1, -1]], "holds an impossible count, -1"),
        ([[2**41, 1]], "holds an impossible count"),
        ([[0, 0]], "counts nothing"),
        ([[1, 2], [3]], "have not equally many experts"),
        ([], "is empty"),
        ([[]], "is empty"),
        ([1, 2], "is not as expected: Expected `array`, got `int`"),
        ([["1", "2"]], "is not as expected: Expected `float`, got `str`"),
        ([[True, False]], "is not as expected: Expected `float`, got `bool`"),
        ([[[[1]]]], "is not as expected: Expected `float`, got `array`"),
        ([[None]], "is not as expected"),
    ],
)
def test_bad_json_is_one_sentence(tmp_path, counts, sentence):
    (tmp_path / "a.json").write_text(json.dumps({"logical_count": counts}))
    assert sentence in refused(tmp_path, tmp_path / "a.json", top_k=1)


def test_bad_tensors_are_one_sentence(tmp_path):
    torch = pytest.importorskip("torch")
    for value, sentence in (
        (
            torch.ones(2, 3, 4, dtype=torch.int32),
            "a tensor of 3 axes, not counts [layers, experts]: save {",
        ),
        (torch.ones(4), "a tensor of 1 axes"),
        ([torch.ones(2, 2, dtype=torch.int32)], "holds a list, not counts"),
        (torch.ones(2, 2, dtype=torch.bfloat16), "is torch.bfloat16, which rounds counts"),
        ({0: torch.ones(2), 1: torch.ones(3)}, "have not equally many experts"),
        ({0: torch.ones(2), "a": torch.ones(2)}, "keys are not numbers of layers"),
        ({0: torch.ones(2, 2)}, "layer 0 is torch.float32 (2, 2), not numbers of 1 axes"),
        ({0: torch.ones(1).expand(100)}, "is no contiguous tensor"),
        (dict.fromkeys(range(2000), torch.ones(500)), "its layers claim 4000000 bytes"),
        (torch.ones(2, 2) * 0.5, "are not whole"),
        (torch.ones(2, 2) * float("nan"), "are not whole"),
        (torch.ones(2, 2, dtype=torch.bool), "is torch.bool (2, 2), not numbers of 2 axes"),
        (torch.ones(1, 1).expand(2000, 2000), "is no contiguous tensor"),
        (torch.ones(1, 1, dtype=torch.int32).expand(2000, 2000), "is no contiguous tensor"),
    ):
        torch.save(value, tmp_path / "a.pt")
        assert sentence in refused(tmp_path, tmp_path / "a.pt", top_k=1)


def test_an_export_for_eplb_is_read_back(tmp_path):
    path = eplb_json(tmp_path / "a.json", COUNTS)
    with imported(tmp_path, path, top_k=2) as trace:
        export(trace, tmp_path / "b.json")
    (tmp_path / "out.h5").unlink()
    with imported(tmp_path, tmp_path / "b.json", top_k=2) as trace:
        assert isinstance(trace, Trace) and np.array_equal(trace.read("counts", 0, 9)[0], COUNTS.sum(0))


def test_a_table_of_experts_by_layers_is_asked_about(tmp_path):
    counts = np.random.default_rng(0).multinomial(600, np.arange(1, 17) / 136, 4)
    for table, asked in ((counts.T, True), (counts, False), (np.full((4, 16), 9), False), (COUNTS[0], False)):
        notes: list[str] = []
        path = tmp_path / "a.json"
        path.write_text(json.dumps(table.tolist()))
        import_traces(path, tmp_path / "o.h5", hints=Hints(top_k=2, note=notes.append))
        assert ["transpose the table" in note for note in notes] == [True] * asked
