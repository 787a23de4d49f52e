"""Copies without warm-up rows and dense layers: exactly those go, and nothing else changes."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.traps import EXPERTS, LAYERS, ROWS, TOP_K, arrays, choose, prepend, trace

from moetrace.importers.importing import import_traces
from moetrace.lints import lint
from moetrace.lints.leave_out import import_and_leave_out, leave_out
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace import Trace
from moetrace.trace.writer import CountsWriter

CELLS = (ROWS, LAYERS, TOP_K)


def full() -> dict:
    """A clean trace with everything optional."""
    rng = np.random.default_rng(3)
    made = arrays()
    return made | {
        "gates": np.broadcast_to(np.array([0.4, 0.3, 0.2, 0.1], np.float16), CELLS),
        "recorded": rng.integers(0, 3, CELLS),
        "token": rng.integers(0, 5000, ROWS),
        "row_phase": np.repeat(made["phase"], made["steps"]),
        "position": np.tile(np.arange(100), 4),
        "expert_bytes": rng.integers(1, 1 << 40, (LAYERS, EXPERTS)),
        "layer_index": [2, 3, 7],
        "source": {"engine": "none"},
        "model": "m",
    }


def with_warm_up(given: dict, rows: int) -> dict:
    cell = choose(np.random.default_rng(1), 1)
    made = prepend(given, np.repeat(cell, rows, axis=0))
    for name, value in (("gates", 0.25), ("recorded", 1), ("token", 9), ("row_phase", 0)):
        made[name] = np.concatenate([np.full((rows, *np.shape(given[name])[1:]), value), given[name]])
    return made | {"position": np.r_[:rows, given["position"]]}


def same(one: Trace, two: Trace, shift: int = 0, layers: slice | list[int] = slice(None)) -> None:
    """`one` is `two` with only these layers, its requests numbered `shift` higher."""
    assert (one.rows, one.steps, one.has, one.num_experts) == (two.rows, two.steps, two.has, two.num_experts)
    for name in ("offset", "phase"):
        assert np.array_equal(getattr(one, name), getattr(two, name))
    assert np.array_equal(one.layer_index, two.layer_index[layers])
    if two.expert_bytes is not None:
        assert np.array_equal(one.expert_bytes, two.expert_bytes[layers])
    for name in ("experts", "request", "position", *one.has):
        ours, theirs = (opened.read(name, 0, two.rows) for opened in (one, two))
        theirs = theirs[:, layers] if theirs.ndim == 3 else theirs
        assert np.array_equal(ours, theirs + shift if name == "request" else theirs), name


@pytest.mark.parametrize("compress", [None, "zstd"])
def test_dropping_warm_up_leaves_the_rest_as_it_is(tmp_path, compress):
    made = trace(with_warm_up(full(), 100))
    assert [one.code for one in lint(made)] == ["warm-up", "layer-gap", "first-layer-not-0"]
    assert leave_out(made, tmp_path / "t.h5", warmup=True, compress=compress) == (100, [])
    with Trace.open(tmp_path / "t.h5") as copy:
        copy.verify()
        same(copy, trace(full()), shift=1)
        assert [one.code for one in lint(copy)] == ["layer-gap", "first-layer-not-0"]
        assert copy.source == {"engine": "none", "left_out": {"warm_up_rows": 100}} and copy.model == "m"
        assert copy.storage == ("mapped" if compress is None else "compressed")


def test_steps_are_cut_again(tmp_path):
    """Warm-up that ends within a step, a later run of it within others, and steps that go as a whole."""
    cell = choose(np.random.default_rng(1), 1)
    made = arrays()
    made["experts"][:35] = cell
    made["experts"][230:280] = cell
    leave_out(trace(made), tmp_path / "t.h5", warmup=True)
    kept = np.r_[35:230, 280:400]
    with Trace.open(tmp_path / "t.h5") as copy:
        assert np.array_equal(copy.read("experts", 0, 400), made["experts"][kept])
        assert np.array_equal(copy.read("position", 0, 400), np.tile(np.arange(100), 4)[kept])
        steps = list(zip(np.diff(copy.offset).tolist(), copy.phase.tolist(), strict=True))
        assert (
            steps
            == [(5, 0)]
            + [(1, 1)] * 60
            + [(40, 0)]
            + [(1, 1)] * 60
            + [(30, 0)]
            + [(1, 1)] * 20
            + [(40, 0)]
            + [(1, 1)] * 60
        )


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    runs=st.lists(st.tuples(st.integers(0, 80), st.integers(32, 90)), max_size=4),
    block=st.sampled_from([200, 3000, 1 << 22]),
)
def test_any_runs_against_loops(tmp_path_factory, seed, runs, block):
    """Whatever the cuts of steps and blocks: what is left are the rows that lint did not name."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(seed)
    cell = choose(rng, 1)
    parts = [np.repeat(cell, 40, axis=0)]
    for gap, length in runs:
        parts += [choose(rng, gap + 1), np.repeat(cell, length, axis=0)]
    parts.append(choose(rng, 3))
    experts = np.concatenate(parts)
    rows = len(experts)
    cuts = np.unique(rng.integers(1, rows, rows // 4))
    steps = np.diff(np.r_[0, cuts, rows])
    phase = rng.integers(0, 2, steps.size)
    made = Trace.from_arrays(
        experts, num_experts=EXPERTS, steps=steps, phase=phase, position=np.arange(rows), token=np.arange(rows)
    )
    gone = np.zeros(rows, bool)
    for one in lint(made):
        if one.code == "warm-up":
            for start, stop in one.rows:
                gone[start:stop] = True
    step = np.repeat(np.arange(steps.size), steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moetrace.trace.format.BLOCK_BYTES", block)
        leave_out(made, folder / "t.h5", warmup=True)
    with Trace.open(folder / "t.h5") as copy:
        assert copy.read("token", 0, rows).tolist() == np.arange(rows)[~gone].tolist()
        assert np.array_equal(copy.read("experts", 0, rows), experts[~gone])
        expected = [(int(np.sum(step[~gone] == s)), int(phase[s])) for s in range(steps.size)]
        expected = [(count, of) for count, of in expected if count]
        assert list(zip(np.diff(copy.offset).tolist(), copy.phase.tolist(), strict=True)) == expected


@pytest.mark.parametrize("filling", ["absent", "zeros", "constant"])
def test_dropping_dense_layers_leaves_the_rest_as_it_is(tmp_path, filling):
    made = full()
    made["experts"][:, 1] = {"absent": 255, "zeros": 0, "constant": [7, 1, 2, 3]}[filling]
    if filling == "absent":
        made["recorded"][:, 1] = 255
    opened = trace(made)
    assert "dense-layer" in [one.code for one in lint(opened)]
    assert leave_out(opened, tmp_path / "t.h5", dense=True) == (0, [3])
    with Trace.open(tmp_path / "t.h5") as copy:
        copy.verify()
        same(copy, trace(made), layers=[0, 2])
        assert [one.code for one in lint(copy)] == ["layer-gap", "first-layer-not-0"]
        assert copy.source["left_out"] == {"dense_layers": [3]}


def test_both_at_once_and_one_after_the_other(tmp_path):
    made = with_warm_up(full(), 64)
    made["experts"][:64, 1] = [1, 2, 3, 4]  # what warm-up chose there hides that the layer stands still
    made["experts"][64:, 1] = [5, 6, 7, 8]
    opened = trace(made)
    assert "dense-layer" not in [one.code for one in lint(opened)]
    assert leave_out(opened, tmp_path / "both.h5", warmup=True, dense=True) == (64, [3])
    assert leave_out(opened, tmp_path / "one.h5", warmup=True) == (64, [])
    with Trace.open(tmp_path / "one.h5") as one:
        assert leave_out(one, tmp_path / "two.h5", dense=True) == (0, [3])
    assert (tmp_path / "both.h5").read_bytes() == (tmp_path / "two.h5").read_bytes()
    with Trace.open(tmp_path / "two.h5") as two:
        assert two.source["left_out"] == {"warm_up_rows": 64, "dense_layers": [3]}


def test_the_remaining_layers_may_be_those_of_a_preset(tmp_path):
    """With its dense layer, OLMoE's capture would have 17 layers and fit no preset."""
    made = arrays(layers=17, experts=64, k=8)
    made["experts"][:, 0] = 255
    opened = trace(made | {"model": "org/OLMoE-1B-7B-0924"})
    leave_out(opened, tmp_path / "t.h5", dense=True)
    with Trace.open(tmp_path / "t.h5") as copy:
        assert copy.model == "olmoe-1b-7b"
    leave_out(opened, tmp_path / "t.h5", dense=True, model="olmoe-1b-7b")
    with pytest.raises(UsageError, match="has 16 MoE layers of 64 experts, but the model mixtral-8x7b has 32 of 8"):
        leave_out(opened, tmp_path / "t.h5", dense=True, model="mixtral-8x7b")


def test_nothing_would_be_left(tmp_path):
    cell = choose(np.random.default_rng(1), 1)
    all_warm_up = trace({"experts": np.repeat(cell, 100, axis=0), "num_experts": EXPERTS})
    with pytest.raises(MoetraceError, match="every row is warm-up"):
        leave_out(all_warm_up, tmp_path / "t.h5", warmup=True, dense=True)
    with pytest.raises(MoetraceError, match="no layer routes"):
        leave_out(trace(arrays() | {"experts": np.full(CELLS, 255)}), tmp_path / "t.h5", dense=True)
    assert list(tmp_path.iterdir()) == []


def test_impossible_ids_that_stay_are_refused(tmp_path):
    made = arrays()
    made["experts"][9, 2, 1] = 77
    made["experts"][:, 0] = 255
    with pytest.raises(MoetraceError, match="/experts row 9, layer entry 1 holds the id 77"):
        leave_out(trace(made), tmp_path / "t.h5", dense=True)
    assert list(tmp_path.iterdir()) == []


def test_a_link_that_leads_to_itself_is_an_error(tmp_path):
    source, loop = capture(tmp_path / "c.npz"), tmp_path / "loop"
    loop.symlink_to("loop")
    for path in (loop, loop / "t.h5"):
        with pytest.raises(MoetraceError, match="could not be written"):
            import_traces(source, path)
        with pytest.raises(MoetraceError, match="could not be written"):
            import_and_leave_out([source], path, dense=True)
    assert sorted(tmp_path.iterdir()) == [source, loop] and loop.is_symlink()


def test_layers_of_counts(tmp_path):
    counts = np.random.default_rng(0).multinomial(80, np.full(8, 1 / 8), (5, 3))
    counts[:, 1] = 0
    facts = {"model": "m", "num_experts": 8, "top_k": 4, "layers": 3, "rows": 100, "steps": 5, "source": {}}
    with CountsWriter(tmp_path / "t.h5", **facts) as writer:
        writer.append_counts(counts, np.full(5, 20), np.full(5, 1))
    with Trace.open(tmp_path / "t.h5") as opened:
        assert leave_out(opened, tmp_path / "u.h5", warmup=True, dense=True) == (0, [1])
    with Trace.open(tmp_path / "u.h5") as copy:
        copy.verify()
        assert np.array_equal(copy.read("counts", 0, 5), counts[:, [0, 2]]) and copy.layer_index.tolist() == [0, 2]


def capture(path: Path, layers: int = 16, warm_up: int = 50) -> Path:
    """An npz of OLMoE's size, with a dense layer before its 16 and a warm-up before its rows."""
    ids = choose(np.random.default_rng(0), 200, layers + 1, 64, 8).astype(np.uint8)
    ids[:warm_up] = ids[0]
    ids[:, 0] = 255
    np.savez(
        path,
        expert_ids=ids,
        request_id=np.repeat([0, 1], [warm_up, 200 - warm_up]),
        position=np.arange(200),
        phase=np.repeat([0, 1], [120, 80]),
        layer_index=np.arange(layers + 1),
        meta=json.dumps({"model": "olmoe-1b-7b", "num_experts": 64}),
    )
    return path


@pytest.mark.parametrize("model", [None, "olmoe-1b-7b"])
def test_import_without_what_lint_finds(tmp_path, model):
    source = capture(tmp_path / "a.npz")
    left_out = import_and_leave_out([source], tmp_path / "t.h5", warmup=True, dense=True, model=model, format="npz")
    assert left_out == (50, [0])
    with Trace.open(tmp_path / "t.h5") as copy:
        assert copy.model == "olmoe-1b-7b" and copy.layers == 16 and copy.rows == 150
        assert np.array_equal(copy.read("experts", 0, 150), np.load(source)["expert_ids"][50:, 1:])
        assert copy.source["format"] == "npz" and copy.source["left_out"] == {"warm_up_rows": 50, "dense_layers": [0]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "t.h5"]


def log(path: Path, rows: list[int]) -> Path:
    """Route logs of requests, each this many rows of warm-up and 100 others, as an npz without a dense layer."""
    ids = choose(np.random.default_rng(4), sum(rows) + 100 * len(rows), 2, 64, 8).astype(np.uint8)
    request = np.repeat(np.arange(len(rows)), np.array(rows) + 100)
    for number, leading in enumerate(rows):
        start = int(np.argmax(request == number))
        ids[start : start + leading] = ids[0]
    np.savez(
        path,
        expert_ids=ids,
        request_id=request,
        position=np.concatenate([np.arange(leading + 100) for leading in rows]),
        phase=np.zeros(request.size, np.uint8),
        layer_index=np.arange(2),
        meta=json.dumps({"model": "m", "num_experts": 64}),
    )
    return path


@pytest.mark.parametrize("warm_up", [[400], [400, 0], [400, 300], [40, 0, 64]])
def test_a_prompt_begins_after_the_warm_up(tmp_path, warm_up):
    sources = [log(tmp_path / "a.npz", warm_up), log(tmp_path / "b.npz", [0])]
    options = {"warmup": True, "decode_after": 30}
    assert import_and_leave_out(sources, tmp_path / "t.h5", **options) == (sum(warm_up), [])
    requests = len(warm_up) + 1
    with Trace.open(tmp_path / "t.h5") as copy:
        copy.verify()
        assert copy.rows == 100 * requests
        assert np.diff(copy.offset).tolist() == [30, *[1] * 70] * requests
        assert copy.phase.tolist() == [0, *[1] * 70] * requests
        assert copy.source["decode_after"] == 30 and copy.source["left_out"] == {"warm_up_rows": sum(warm_up)}
        first, second = (np.load(source)["expert_ids"] for source in sources)
        ends = np.cumsum(np.array(warm_up) + 100)
        text = [first[end - 100 : end] for end in ends.tolist()]
        assert np.array_equal(copy.read("experts", 0, copy.rows), np.concatenate([*text, second]))


def test_an_import_that_fails_leaves_nothing_and_names_no_temporary_file(tmp_path):
    source = capture(tmp_path / "a.npz", warm_up=200)
    with pytest.raises(MoetraceError, match=r"/t\.h5: every row is warm-up") as raised:
        import_and_leave_out([source], tmp_path / "t.h5", warmup=True, dense=True)
    assert ".tmp" not in str(raised.value)
    with pytest.raises(UsageError, match="16 MoE layers of 64 experts, but the model mixtral-8x7b"):
        import_and_leave_out([capture(tmp_path / "a.npz")], tmp_path / "t.h5", dense=True, model="mixtral-8x7b")
    with pytest.raises(MoetraceError, match="no such folder"):
        import_and_leave_out([source], tmp_path / "none" / "t.h5", dense=True)
    assert list(tmp_path.iterdir()) == [source]
