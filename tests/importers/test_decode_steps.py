"""Which rows or passes decode, as the user says; passes that a source records stay steps."""

import json

import numpy as np
import pytest
from support.writers import routing, steps
from support.writers.megatron import records
from support.writers.trtllm import counted, save

from moetrace.importers.captured import Hints
from moetrace.importers.importing import import_traces
from moetrace.spec.errors import UsageError
from moetrace.trace import Trace


def imported(folder, sources, **options):
    notes = []
    hints = Hints(num_experts=16, note=notes.append)
    import_traces(sources, folder / "out.h5", hints=hints, **options)
    trace = Trace.open(folder / "out.h5")
    trace.verify()
    return trace, " ".join(notes)


def column(trace, name):
    return trace.read(name, 0, trace.rows).tolist()


def megatron(folder, sizes):
    """A pass a step, of so many tokens; ids of all rows."""
    ids = [routing(size, 2, 2, 16, n) for n, size in enumerate(sizes)]
    path = folder / "router_trace_rank0.jsonl"
    path.write_text(records(0, {(n, 0): array for n, array in enumerate(ids)}, [1, 2]))
    return path, np.concatenate(ids)


def npz(folder, request, phase, sizes):
    rows = len(request)
    arrays = {"expert_ids": routing(rows, 2, 2, 16).astype(np.uint8), "request_id": request, "phase": phase}
    arrays |= {"position": np.arange(rows), "layer_index": np.arange(2), "meta": json.dumps({"num_experts": 16})}
    np.savez(folder / "a.npz", **arrays, **({} if sizes is None else {"step_rows": sizes}))
    return folder / "a.npz"


def test_passes_that_decode_are_said(tmp_path):
    path, ids = megatron(tmp_path, [10] * 4 + [4] * 50)
    trace, _ = imported(tmp_path, path, decode_steps=[(4, None)])
    assert steps(trace) == [(10, 0)] * 4 + [(4, 1)] * 50
    assert np.array_equal(trace.read("experts", 0, 240), ids)
    assert column(trace, "request") == [n for n in range(4) for _ in range(10)] + [0, 1, 2, 3] * 50
    assert column(trace, "position") == [*range(10)] * 4 + [10 + n for n in range(50) for _ in range(4)]
    assert trace.source["requests"].startswith("not recorded: row j of a decode pass")
    assert trace.source["decode_steps"] == [[4, None]]


def test_a_note_names_a_prompt_that_no_request_exceeds(tmp_path):
    path, _ = megatron(tmp_path, [10] * 4 + [4] * 5)
    trace, notes = imported(tmp_path, path, decode_after=10)
    assert (trace.phase == 0).all()
    assert "no request has more than 10 rows, so none decodes: of passes that hold rows of several" in notes
    assert "say which decode, with --steps A:B instead of --prompt" in notes


def test_requests_come_and_go(tmp_path):
    path, _ = megatron(tmp_path, [5, 3, 2, 2, 6, 3, 1, 4])
    trace, _ = imported(tmp_path, path, decode_steps=[(2, 4), (5, 9)])
    assert steps(trace) == [(5, 0), (3, 0), (2, 1), (2, 1), (6, 0), (3, 1), (1, 1), (4, 1)]
    request = [0] * 5 + [1] * 3 + [0, 1] * 2 + [2] * 6 + [0, 1, 2] + [0] + [0, 3, 4, 5]
    assert column(trace, "request") == request
    position = [*range(5), *range(3), 5, 3, 6, 4, *range(6), 7, 5, 6, 8, 9, 0, 0, 0]
    assert column(trace, "position") == position


def test_requests_that_a_source_knows_stay(tmp_path):
    source = npz(tmp_path, [7, 7, 8, 7, 8, 8, 7], [0] * 7, [3, 2, 2])
    trace, _ = imported(tmp_path, source, decode_steps=[(1, None)])
    assert steps(trace) == [(3, 0), (2, 1), (2, 1)]
    assert column(trace, "request") == [0, 0, 1, 0, 1, 1, 0]
    assert column(trace, "position") == [*range(7)]
    assert "requests" not in trace.source


@pytest.mark.parametrize(
    ("request_ids", "phase", "sizes", "prompt", "expected"),
    [
        ([0, 0, 1, 1, 0, 1, 0, 1], [0] * 8, [4, 2, 2], 2, [(4, 0), (2, 1), (2, 1)]),
        ([0, 0, 1, 1, 0, 0, 1], [0] * 7, [2, 3, 2], 2, [(2, 0), (3, 2), (2, 1)]),
        ([0] * 6, [0] * 6, [6], 2, [(2, 0), (1, 1), (1, 1), (1, 1), (1, 1)]),  # a text fed in at once
        ([0] * 6, [0, 0, 1, 1, 1, 1], [2, 4], 2, [(2, 0), (4, 1)]),  # drafts: the source calls them decode
        ([0, 0, 0, 0, 1, 1], [0] * 6, [4, 2], 3, [(3, 0), (1, 1), (2, 0)]),
        ([0, 0, 0, 0, 1, 1], [0] * 6, None, 3, [(3, 0), (1, 1), (2, 0)]),
    ],
)
def test_recorded_passes_stay_steps(tmp_path, request_ids, phase, sizes, prompt, expected):
    trace, _ = imported(tmp_path, npz(tmp_path, request_ids, phase, sizes), decode_after=prompt)
    assert steps(trace) == expected


def test_iterations_of_counts_get_phases(tmp_path):
    pytest.importorskip("safetensors")
    ids = {(i, layer): routing(4, 1, 2, 16, 10 * i + layer)[:, 0] for i in range(4) for layer in (0, 1)}
    files = save(tmp_path / "run", 16, 2, [{cell: counted(array, 16) for cell, array in ids.items()}])
    trace, _ = imported(tmp_path, files, decode_steps=[(1, 3)])
    assert trace.phase.tolist() == [0, 1, 1, 0]


def test_steps_of_several_sources_follow_one_another(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    paths = [megatron(tmp_path / name, [5, 2, 2])[0] for name in ("a", "b")]
    trace, _ = imported(tmp_path, paths, decode_steps=[(1, 3), (4, 6)])
    assert steps(trace) == [(5, 0), (2, 1), (2, 1)] * 2
    with pytest.raises(UsageError, match="there are only 6 steps, so no steps from 6 on exist"):
        imported(tmp_path, paths, decode_steps=[(6, None)])


def test_steps_that_nobody_recorded_are_refused(tmp_path):
    source = npz(tmp_path, [0] * 4, [0] * 4, None)
    with pytest.raises(UsageError, match="does not record its passes: say --prompt P instead of --steps"):
        imported(tmp_path, source, decode_steps=[(1, None)])
    with pytest.raises(UsageError, match="not by both"):
        imported(tmp_path, source, decode_steps=[(1, None)], decode_after=1)
