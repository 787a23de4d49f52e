"""Rebatch: every row once, in the steps that a plain simulation of the server has, whatever the capture's own."""

import hashlib
import itertools
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.strategies import arrivals, routing

import moetrace as mt
from moetrace.importers.importing import import_traces
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace import rebatch as module
from moetrace.trace import speculation
from moetrace.trace.schema import row_dtype

SHIPPED = Path(__file__).parents[2] / "traces"
CAPTURES = Path(__file__).parents[3] / "shared" / "traces"
captured = pytest.mark.skipif(not CAPTURES.exists(), reason="needs the captures beside the repository")
COLUMNS = ("experts", "gates", "token", "position")


def capture(rng: np.random.Generator, rows_of: list[int], wild: bool, experts: int = 8, layers: int = 2, k: int = 2):
    """A trace whose requests are interleaved at random over steps of the given rows; tokens tell rows apart."""
    rows = sum(rows_of)
    request, position, phase = arrivals(rng, rows, wild)
    ids = routing(rng, rows, (layers, experts, k), 0.1)
    offset = np.cumsum([0, *rows_of])
    of_step = [set(phase[a:b].tolist()) for a, b in pairwise(offset.tolist())]
    return mt.Trace.from_arrays(
        np.where(ids < 0, np.iinfo(row_dtype("experts", experts)).max, ids),
        num_experts=experts,
        model="some model",
        source={"engine": "mine"},
        request=request,
        position=position,
        steps=np.array(rows_of),
        phase=np.array([phases.pop() if len(phases) == 1 else 2 for phases in of_step]),
        row_phase=phase,
        layer_index=np.arange(layers) + 1,
        expert_bytes=np.arange(layers) + 7,
        gates=rng.random((rows, layers, k)),
        token=rng.integers(0, 2**31 - 1, rows),
        recorded=np.where(ids < 0, 255, 1),
    )


@st.composite
def captures(draw) -> list[mt.Trace]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32), label="seed"))
    wild = draw(st.booleans(), label="wild phases")
    sizes = st.lists(st.integers(1, 5), min_size=1, max_size=15)
    return [capture(rng, draw(sizes, label="rows of each step"), wild) for _ in range(draw(st.integers(1, 3)))]


def columns_of(trace: mt.Trace) -> list[np.ndarray]:
    return [trace.read(name, 0, trace.rows) for name in COLUMNS if name in trace.has | {"experts", "position"}]


def requests_of(traces) -> list[list[tuple]]:
    """(phase, what the row holds) of each row of each request, in order of appearance, captures one after another."""
    requests: dict[tuple[int, int], list[tuple]] = {}
    for number, trace in enumerate(traces):
        columns = columns_of(trace)
        row_phase = np.concatenate([block.phase for block in trace.blocks()])
        for row, request in enumerate(trace.read("request", 0, trace.rows).tolist()):
            held = tuple(column[row].tobytes() for column in columns)
            requests.setdefault((number, request), []).append((int(row_phase[row]), held))
    return list(requests.values())


def simulate(requests: list[list[tuple]], batch: int, chunk: int | None) -> list[list[tuple]]:
    """Rows (request, phase, what it holds) of each step, by the words of the rule."""
    waiting, running, steps = list(enumerate(map(list, requests))), [], []
    while waiting or running:
        while waiting and len(running) < batch:
            running.append(waiting.pop(0))
        prompting = [(number, rows) for number, rows in running if rows[0][0] == 0]
        decoding = [(number, rows) for number, rows in running if rows[0][0] == 1]
        step = []
        if chunk is None and prompting:
            number, rows = prompting[0]
            while rows and rows[0][0] == 0:
                step.append((number, *rows.pop(0)))
        else:
            for number, rows in decoding:
                step.append((number, *rows.pop(0)))
            room = chunk or 0
            for number, rows in prompting:
                while room and rows and rows[0][0] == 0:
                    step.append((number, *rows.pop(0)))
                    room -= 1
        steps.append(step)
        running = [(number, rows) for number, rows in running if rows]
    return steps


def verified(requests: list[list[tuple]], verify: int, accept: float) -> list[list[list[tuple]]]:
    """Each request as the windows that its steps take: a prompt row alone, or output rows verified together."""
    windows_of = []
    for rows in requests:
        windows: list[list[tuple]] = []
        while rows:
            if rows[0][0] == 0:
                windows.append([rows[0]])
                rows = rows[1:]
                continue
            run = list(itertools.takewhile(lambda row: row[0] == 1, rows))
            kept = 0  # tokens of the windows so far, in thousandths
            while (start := (kept + 500) // 1000) < len(run):
                windows.append(run[start : start + verify])
                kept += round(1000 * accept)
            rows = rows[len(run) :]
        windows_of.append(windows)
    return windows_of


def simulate_verified(windows_of: list[list[list[tuple]]], batch: int, chunk: int | None) -> list[list[tuple]]:
    """`simulate`, of windows."""
    waiting, running, steps = list(enumerate(windows_of)), [], []
    while waiting or running:
        while waiting and len(running) < batch:
            running.append(waiting.pop(0))
        prompting = [(number, windows) for number, windows in running if windows[0][0][0] == 0]
        step: list[tuple] = []
        if chunk is not None or not prompting:
            for number, windows in running:
                if windows[0][0][0] == 1:
                    step += [(number, *row) for row in windows.pop(0)]
        room = 10**9 if chunk is None else chunk
        for number, windows in prompting[: 1 if chunk is None else None]:
            while room and windows and windows[0][0][0] == 0:
                step.append((number, *windows.pop(0)[0]))
                room -= 1
        steps.append(step)
        running = [(number, windows) for number, windows in running if windows]
    return steps


def steps_of(trace: mt.Trace) -> list[list[tuple]]:
    """What `simulate` returns, of a trace."""
    columns = columns_of(trace)
    request, steps = trace.read("request", 0, trace.rows), []
    for block in trace.blocks(rows=1):
        first = int(trace.offset[block.first_step])
        rows = range(first, first + len(block.request))
        phases = zip(rows, block.phase.tolist(), strict=True)
        steps.append([(int(request[row]), phase, tuple(c[row].tobytes() for c in columns)) for row, phase in phases])
    return steps


@settings(max_examples=60, deadline=None)
@given(captures(), st.integers(1, 6), st.none() | st.integers(1, 8), st.sampled_from([1, 7, 1 << 20]))
def test_steps_are_those_of_a_plain_simulation(tmp_path_factory, traces, batch, chunk, gather_bytes):
    path = tmp_path_factory.mktemp("rebatch") / "out.h5"
    requests = requests_of(traces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GATHER_BYTES", gather_bytes)
        patch.setattr(module, "CHUNK_ROWS", 1 + gather_bytes % 11)
        mt.rebatch(traces, path, batch=batch, chunk=chunk)
    with mt.Trace.open(path) as trace:
        trace.verify()
        steps = steps_of(trace)
        assert steps == simulate(requests, batch, chunk)
        assert all(len({request for request, *_ in step}) <= batch for step in steps)
        assert sorted(requests_of([trace])) == sorted(requests), "every row is there once, in its request's order"
        assert trace.phase.tolist() == [
            2 if len(phases := {phase for _, phase, _ in step}) == 2 else phases.pop() for step in steps
        ]
        assert (chunk is not None or "row_phase" not in trace.has) and "recorded" not in trace.has
        assert trace.layer_index.tolist() == [1, 2] and trace.expert_bytes.tolist() == [7, 8]


@st.composite
def plain_captures(draw) -> mt.Trace:
    """A capture whose requests decode one row after another, at positions that go up."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32), label="seed"))
    lengths = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 13)), min_size=1, max_size=5))
    rows = [(r, at, int(at >= prompt)) for r, (prompt, output) in enumerate(lengths) for at in range(prompt + output)]
    if not rows:
        rows = [(0, 0, 1)]
    request, position, phase = np.array(rows).T
    ids = routing(rng, len(rows), (2, 8, 2), 0.1)
    return mt.Trace.from_arrays(
        np.where(ids < 0, 255, ids),
        num_experts=8,
        request=request,
        position=position,
        steps=np.ones(len(rows), int),
        phase=phase,
        layer_index=np.arange(2) + 1,
        expert_bytes=np.arange(2) + 7,
        gates=rng.random((len(rows), 2, 2)),
        token=rng.integers(0, 2**31 - 1, len(rows)),
    )


@settings(max_examples=60, deadline=None)
@given(plain_captures(), st.integers(1, 4), st.none() | st.integers(1, 8), st.integers(1, 6), st.data())
def test_verified_steps_are_those_of_a_plain_simulation(tmp_path_factory, trace, batch, chunk, verify, data):
    accept = data.draw(st.none() | st.floats(1, verify), label="accept")
    folder = tmp_path_factory.mktemp("verify")
    requests = requests_of([trace])
    mt.rebatch(trace, folder / "out.h5", batch=batch, chunk=chunk, verify=verify, accept=accept)
    with mt.Trace.open(folder / "out.h5") as out:
        out.verify()
        wanted = simulate_verified(verified(requests, verify, accept or verify), batch, chunk)
        assert steps_of(out) == wanted
        assert out.source["parameters"]["accept"] == pytest.approx(accept or verify, abs=5e-4)
        # Tokens verified together are taken apart again, without the rejected ones.
        mt.rebatch(out, folder / "apart.h5", batch=batch, chunk=chunk, verify=1)
        mt.rebatch(trace, folder / "plain.h5", batch=batch, chunk=chunk)
        with mt.Trace.open(folder / "apart.h5") as apart, mt.Trace.open(folder / "plain.h5") as plain:
            assert sorted(requests_of([apart])) == sorted(requests)
            # In a batch of several, the request that appears first need not be the one that was admitted first.
            assert batch > 1 or steps_of(apart) == steps_of(plain)
            assert apart.source["parameters"].get("rejected_rows_left_out", 0) == out.rows - trace.rows


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12))
def test_rejected_drafts_are_those_that_a_later_step_takes_back(seed, steps):
    rng = np.random.default_rng(seed)
    step = np.repeat(np.arange(steps), rng.integers(1, 5, steps))
    request = np.sort(rng.integers(0, 3, step.size))
    position = rng.integers(0, 6, step.size)
    phase = rng.integers(0, 2, step.size) | rng.integers(0, 2, step.size)
    rows = list(zip(request.tolist(), phase.tolist(), step.tolist(), position.tolist(), strict=True))

    def is_rejected(at: int) -> bool:
        if rows[at][1] == 0:
            return False
        begin = end = at
        while begin and rows[begin - 1][:2] == rows[at][:2]:
            begin -= 1
        while end + 1 < len(rows) and rows[end + 1][:2] == rows[at][:2]:
            end += 1
        own = [row for row in rows[begin : end + 1] if row[2] == rows[at][2]]
        later = [row for row in rows[begin : end + 1] if row[2] > rows[at][2]]
        after = [row for row in later if row[2] == later[0][2]]
        twice = any(row[2] == rows[at][2] and row[3] == rows[at][3] for row in rows[begin:at])
        began, begins = min(row[3] for row in own), min((row[3] for row in after), default=-1)
        return twice or began < begins <= rows[at][3]

    found = speculation.is_rejected(request.astype(np.int32), phase.astype(np.uint8), step, position.astype(np.int32))
    assert found.tolist() == [is_rejected(at) for at in range(len(rows))]


@pytest.mark.parametrize(
    ("wish", "sentence"),
    [
        ({"accept": 2}, "give verify as well"),
        ({"verify": 2, "accept": 2.5}, "keeps 1 to 2 tokens"),
        ({"verify": 2, "accept": float("nan")}, "keeps 1 to 2 tokens"),
        ({"verify": 0}, "verify is 0"),
    ],
)
def test_verified_steps_that_make_no_sense_are_refused(tmp_path, wish, sentence):
    with pytest.raises(UsageError, match=sentence):
        mt.rebatch(SHIPPED / "tiny-olmoe.h5", tmp_path / "out.h5", batch=1, **wish)
    assert not list(tmp_path.iterdir())


def test_more_rows_than_can_be_put_in_order_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_ROWS", 20_000)
    with pytest.raises(MoetraceError, match="with the rows of rejected drafts"):
        mt.rebatch(SHIPPED / "tiny-olmoe.h5", tmp_path / "out.h5", batch=1, verify=8, accept=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "batch"), [("tiny-olmoe", 1), ("mixtral-8x7b-b16", 16), ("qwen3-30b-a3b-b1", 1)])
def test_the_batch_that_a_trace_has_gives_the_same_trace(tmp_path, name, batch):
    mt.rebatch(SHIPPED / f"{name}.h5", tmp_path / "out.h5", batch=batch)
    with mt.Trace.open(SHIPPED / f"{name}.h5") as one, mt.Trace.open(tmp_path / "out.h5") as two:
        assert one.has == two.has and np.array_equal(one.offset, two.offset) and np.array_equal(one.phase, two.phase)
        for column in ("experts", "request", "position", *one.has):
            assert np.array_equal(one.read(column, 0, one.rows), two.read(column, 0, two.rows)), column


@pytest.mark.parametrize("phase", [0, 1])
def test_only_prompts_and_only_output(tmp_path, phase):
    experts = np.zeros((12, 1, 1), np.uint8)
    trace = mt.Trace.from_arrays(
        experts, num_experts=4, request=np.repeat([9, 3, 5], 4), steps=np.ones(12, int), phase=np.full(12, phase)
    )
    mt.rebatch(trace, tmp_path / "out.h5", batch=2)
    with mt.Trace.open(tmp_path / "out.h5") as made:
        assert np.diff(made.offset).tolist() == [[4, 4, 4], [2] * 4 + [1] * 4][phase]
        assert made.read("request", 0, 12).tolist() == [[0] * 4 + [1] * 4 + [2] * 4, [0, 1] * 4 + [2] * 4][phase]


def test_compressed_traces_are_the_same(tmp_path):
    with mt.Trace.open(SHIPPED / "tiny-olmoe.h5") as trace:
        trace.write(tmp_path / "in.h5", compress="zstd")
    for source, out in ((SHIPPED / "tiny-olmoe.h5", "a.h5"), (tmp_path / "in.h5", "b.h5")):
        mt.rebatch([source], tmp_path / out, batch=8, chunk=64)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_a_shuffle_depends_only_on_its_seed(tmp_path):
    source = SHIPPED / "tiny-olmoe.h5"
    for out, options in (("a", {"seed": 1}), ("b", {"seed": 1}), ("c", {"seed": 2})):
        mt.rebatch([source, source], tmp_path / out, batch=8, order="shuffle", **options)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c
    with mt.Trace.open(source) as given, mt.Trace.open(tmp_path / "a") as made:
        assert sorted(requests_of([made])) == sorted(requests_of([given, given])) != requests_of([made])


@captured
def test_a_capture_of_single_requests_is_recombined(tmp_path):
    import_traces([CAPTURES / "real_gpt-oss-20b_decode_24req_weights.npz"], tmp_path / "in.h5")
    mt.rebatch(tmp_path / "in.h5", tmp_path / "out.h5", batch=8)
    with mt.Trace.open(tmp_path / "in.h5") as given, mt.Trace.open(tmp_path / "out.h5") as made:
        made.verify()
        rows = np.diff(made.offset)
        lengths = np.unique(given.read("request", 0, given.rows), return_counts=True)[1]
        assert rows.max() == 8 and made.rows == given.rows and made.steps >= lengths.max()
        assert np.all(rows[: np.sort(lengths)[0]] == 8), "until a place stays empty"
        assert requests_of([made]) == requests_of([given])


def test_source_names_inputs_and_parameters(tmp_path):
    traces = [capture(np.random.default_rng(seed), [3, 2], wild=False) for seed in (1, 2)]
    mt.rebatch(traces, tmp_path / "out.h5", batch=3, chunk=2)
    with mt.Trace.open(tmp_path / "out.h5") as trace:
        assert trace.model == "some model"
        assert trace.source["parameters"] == {
            "batch": 3,
            "chunk": 2,
            "order": "arrival",
        }
        hashes = [hashlib.sha256(one.read("experts", 0, one.rows).tobytes()).hexdigest() for one in traces]
        assert [given["experts_sha256"] for given in trace.source["inputs"]] == hashes
        assert [given["source"] for given in trace.source["inputs"]] == [{"engine": "mine"}] * 2
    mt.rebatch(traces * 200, tmp_path / "out.h5", batch=3)
    with mt.Trace.open(tmp_path / "out.h5") as trace:
        assert trace.source["inputs"] == 400 and len(json.dumps(trace.source)) < 1000


def test_captures_that_do_not_go_together_are_refused_in_one_sentence(tmp_path):
    rng = np.random.default_rng(0)
    one = capture(rng, [3], wild=False)
    ids = np.zeros((2, 2, 2), int) + np.arange(2)
    for other, what in (
        (capture(rng, [3], wild=False, experts=9), "num_experts"),
        (capture(rng, [3], wild=False, layers=3), "layer_index"),
        (
            mt.Trace.from_arrays(ids, num_experts=8, layer_index=np.arange(1, 3)),
            "expert_bytes",
        ),
    ):
        with pytest.raises(MoetraceError, match=f"differ in {what}, so they can't share a trace"):
            mt.rebatch([one, other], tmp_path / "out.h5", batch=2)
    wrong = mt.Trace.from_arrays(np.array([[[0]], [[8]]]), num_experts=8)
    with pytest.raises(MoetraceError, match="row 1, layer entry 0 holds the id 8, but the model has 8 experts"):
        mt.rebatch(wrong, tmp_path / "out.h5", batch=2)
    for options in ({"batch": 0}, {"batch": 1, "chunk": 0}, {"batch": 1, "order": "x"}, {"batch": 1, "seed": -1}):
        with pytest.raises(UsageError):
            mt.rebatch(one, tmp_path / "out.h5", **options)
    with pytest.raises(UsageError, match="there is no trace"):
        mt.rebatch([], tmp_path / "out.h5", batch=1)
    assert list(tmp_path.iterdir()) == []


def test_a_trace_is_not_replaced_by_its_own_batches(tmp_path):
    capture(np.random.default_rng(0), [3], wild=False).write(tmp_path / "in.h5")
    (tmp_path / "link.h5").symlink_to("in.h5")
    before = (tmp_path / "in.h5").read_bytes()
    with pytest.raises(UsageError, match=r"link\.h5 is also an input"):
        mt.rebatch([tmp_path / "in.h5"], tmp_path / "link.h5", batch=2)
    assert (tmp_path / "in.h5").read_bytes() == before
