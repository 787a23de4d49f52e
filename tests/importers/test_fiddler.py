"""Fiddler's popularity: counts come back, and must be conserved from layer to layer."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.writers import routing, steps
from support.writers.check import imported, refused
from support.writers.fiddler import counted, popularity

from moetrace.importers.importing import import_traces
from moetrace.lints import lint
from moetrace.spec.errors import UsageError
from moetrace.trace import Trace

CAPTURES = Path(__file__).parents[3] / "shared" / "traces" / "fiddler_popularity"


@pytest.mark.parametrize("top_k", [2, 3])
def test_counts_come_back(tmp_path, top_k):
    counts = counted(routing(30, 4, top_k, 8), 8)
    path = tmp_path / "expert_popularity_law.json"
    path.write_text(popularity(counts, 17))
    trace = imported(path, "fiddler", **({} if top_k == 2 else {"top_k": top_k}))
    assert np.array_equal(trace.read("counts", 0, 1)[0], counts) and steps(trace) == [(30, 2)]
    assert trace.top_k == top_k and trace.source["prompt_words"] == 17


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ([[1, 1], [1, 2]], "layer 1 counts 3 choices, but layer 0 2"),
        ([[1, 2], [1, 2]], "each layer counts 3 choices, which are no tokens of 2 choices"),
        ([[0, 0], [0, 0]], "each layer counts 0 choices"),
        ([[1, -1]], "holds a number that is not 0 to"),
        ([[1, 1], [2]], "have no experts, or not equally many"),
        ([], "have no experts"),
        ([[]], "have no experts"),
        ([[2]], "top_k is 2, but must be 1 to num_experts"),
        ([["1"]], "is not as expected: Expected `int`, got `str`"),
        ([[1.5]], "is not as expected"),
    ],
)
def test_bad_counts_are_one_sentence(tmp_path, counts, sentence):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"total_input_tokens": 3, "expert_popularity": counts}))
    refused(path, sentence, "fiddler")


def test_experts_that_differ_from_what_the_user_says_are_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(popularity(counted(routing(3, 2, 2, 8), 8), 1))
    refused(path, "has 8 experts a layer, but --experts says 16", "fiddler", num_experts=16)


def test_counts_have_no_prompt(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(popularity(counted(routing(3, 2, 2, 8), 8), 1))
    with pytest.raises(UsageError, match=r"a\.json holds only counts, which have no prompt"):
        import_traces([path], tmp_path / "t.h5", decode_after=4)
    import_traces([path], tmp_path / "t.h5")
    with Trace.open(tmp_path / "t.h5") as trace:
        assert [one.what for one in lint(trace)] == ["The trace holds counts of one step, but no ids."]


@pytest.mark.skipif(not CAPTURES.exists(), reason="needs the captures beside the repository")
def test_the_captured_counts_are_conserved(tmp_path):
    sources = sorted(CAPTURES.glob("*.json"))
    copies = [tmp_path / path.name for path in sources]
    for path, copy in zip(sources, copies, strict=True):
        copy.write_bytes(path.read_bytes())
    trace = imported(copies, "fiddler")
    assert (trace.model, trace.steps, trace.num_experts, trace.top_k) == ("mixtral-8x7b", 14, 8, 2)
    counts = trace.read("counts", 0, 14)
    assert (counts.sum(axis=2) == 2 * np.diff(trace.offset)[:, None]).all() and np.diff(trace.offset)[0] == 7199
    assert np.array_equal(counts[3], json.loads(sources[3].read_bytes())["expert_popularity"])
