"""Select: what stays is what loops say, with everything that a trace holds; what leaves nothing is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace import Trace
from moetrace.trace.select import select
from moetrace.trace.writer import CountsWriter

ROWS, LAYERS, TOP_K, EXPERTS = 40, 3, 2, 8
INDEX = [1, 2, 5]


def whole() -> Trace:
    """Steps of four rows, prefill, decode and mixed; three requests; everything optional."""
    rng = np.random.default_rng(0)
    experts = np.argsort(rng.random((ROWS, LAYERS, EXPERTS)), -1)[..., :TOP_K]
    row_phase = np.repeat([0, 1, 0, 1, 1, 0, 1, 0, 1, 0], 4)
    row_phase[16:20] = [0, 1, 1, 0]
    return Trace.from_arrays(
        experts,
        num_experts=EXPERTS,
        model="some",
        request=np.arange(ROWS) % 4 * 3,
        position=np.arange(ROWS),
        steps=[4] * 10,
        phase=[0, 1, 0, 1, 2, 0, 1, 0, 1, 0],
        layer_index=np.array(INDEX),
        expert_bytes=np.array([10, 20, 30]),
        gates=rng.random((ROWS, LAYERS, TOP_K)).astype(np.float16),
        recorded=rng.integers(0, 3, (ROWS, LAYERS, TOP_K)),
        token=rng.integers(0, 99, ROWS),
        row_phase=row_phase,
        source={"engine": "x"},
    )


def said(ranges, number: int) -> bool:
    return ranges is None or any(start <= number < (1 << 60 if stop is None else stop) for start, stop in ranges)


RANGES = st.none() | st.lists(st.tuples(st.integers(0, 9), st.none() | st.integers(1, 12)), min_size=1, max_size=3)


@settings(max_examples=120, deadline=None)
@given(
    rows=RANGES,
    steps=RANGES,
    requests=RANGES,
    layers=RANGES,
    phase=st.sampled_from([None, "prefill", "decode"]),
    out=st.booleans(),
    renumber=st.booleans(),
    block=st.sampled_from([10, 100, 1 << 20]),
)
def test_any_wish_against_loops(tmp_path_factory, rows, steps, requests, layers, phase, out, renumber, block):
    path = tmp_path_factory.mktemp("select") / "t.h5"
    trace = whole()
    rows = None if rows is None else [(3 * start, None if stop is None else 3 * stop) for start, stop in rows]
    given = (rows, steps, requests, phase)
    phases = trace.read("row_phase", 0, ROWS)
    request = trace.read("request", 0, ROWS)
    fits = [
        said(rows, row)
        and said(steps, row // 4)
        and said(requests, int(request[row]))
        and (phase is None or phases[row] == ["prefill", "decode"].index(phase))
        for row in range(ROWS)
    ]
    any_row_wish = any(wish is not None for wish in given)
    kept = [row for row in range(ROWS) if not any_row_wish or fits[row] != out]
    entries = [at for at, layer in enumerate(INDEX) if layers is None or said(layers, layer) != out]
    wishes = {"rows": rows, "steps": steps, "requests": requests, "layers": layers, "phase": phase}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moetrace.trace.format.BLOCK_BYTES", block)
        try:
            select(trace, path, out=out, renumber=renumber, **wishes)
        except (UsageError, MoetraceError):
            assert not path.exists()
            bad = any(
                stop is not None and stop <= start
                for wish in (rows, steps, requests, layers)
                for start, stop in wish or []
            )
            outside = any(start >= ROWS for start, _ in rows or []) or any(
                not any(said([one], layer) for layer in INDEX) for one in layers or []
            )
            assert bad or outside or not kept or not entries or not (any_row_wish or layers)
            return
    with Trace.open(path) as copy:
        copy.verify()
        assert copy.rows == len(kept) and copy.layer_index.tolist() == [INDEX[at] for at in entries]
        assert copy.expert_bytes is not None and copy.expert_bytes.tolist() == [10 * (at + 1) for at in entries]
        for name in ("experts", "gates", "recorded"):
            np.testing.assert_array_equal(copy.read(name, 0, ROWS), trace.read(name, 0, ROWS)[kept][:, entries])
        np.testing.assert_array_equal(copy.read("token", 0, ROWS), trace.read("token", 0, ROWS)[kept])
        numbers, seen = [], {}
        for row in kept:
            number = seen.setdefault(int(request[row]), [len(seen), 0])
            numbers.append(tuple(number) if renumber else (int(request[row]), row))
            number[1] += 1
        found = list(zip(copy.read("request", 0, ROWS).tolist(), copy.read("position", 0, ROWS).tolist(), strict=True))
        assert found == numbers
        expected = [[phases[row] for row in kept if row // 4 == step] for step in range(10)]
        expected = [step for step in expected if step]
        assert np.diff(copy.offset).tolist() == [len(step) for step in expected]
        assert copy.phase.tolist() == [step[0] if len(set(step)) == 1 else 2 for step in expected]
        assert ("row_phase" in copy.has) == (2 in copy.phase.tolist())


def test_source_names_the_selection_and_bytes_repeat(tmp_path):
    whole().write(tmp_path / "t.h5")
    for name in ("a.h5", "b.h5"):
        select(tmp_path / "t.h5", tmp_path / name, rows=[(4, 9), (7, 12)], layers=[(2, None)])
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    select(tmp_path / "a.h5", tmp_path / "c.h5", phase="decode", out=True, compress="zstd")
    with Trace.open(tmp_path / "t.h5") as trace, Trace.open(tmp_path / "c.h5") as copy:
        first, second = copy.source["selected"]
        assert copy.source["engine"] == "x" and copy.storage == "compressed"
        assert first["rows"] == [[4, 9], [7, 12]] and first["layers"] == [[2, None]] and first["rows_before"] == ROWS
        assert first["content_sha256"] == trace.content_sha256
        assert second["phase"] == "decode" and second["out"] is True and second["rows_before"] == 8


def test_counts(tmp_path):
    counts = np.arange(4 * 2 * 3).reshape(4, 2, 3)
    facts = {"model": "m", "num_experts": 3, "top_k": 1, "layers": 2, "source": {}}
    with CountsWriter(tmp_path / "t.h5", rows=400, steps=4, **facts) as writer:
        writer.append_counts(counts, np.full(4, 100), np.array([0, 1, 1, 2]))
    select(tmp_path / "t.h5", tmp_path / "a.h5", steps=[(1, None)], layers=[(1, 2)])
    select(tmp_path / "t.h5", tmp_path / "b.h5", phase="decode", out=True)
    with Trace.open(tmp_path / "a.h5") as one, Trace.open(tmp_path / "b.h5") as other:
        np.testing.assert_array_equal(one.read("counts", 0, 9), counts[1:, 1:])
        np.testing.assert_array_equal(other.read("counts", 0, 9), counts[[0, 3]])
        assert other.phase.tolist() == [0, 2]
    for wish in ({"rows": [(0, 1)]}, {"requests": [(0, 1)]}, {"steps": [(0, 1)], "renumber": True}):
        with pytest.raises(UsageError, match="holds only counts"):
            select(tmp_path / "t.h5", tmp_path / "c.h5", **wish)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({}, "say which rows"),
        ({"rows": [(40, 50)]}, "there are only 40 rows"),
        ({"steps": [(3, 3)]}, "a range is START:STOP"),
        ({"layers": [(3, 5)]}, "has no layers from 3 on"),
        ({"layers": [(0, None)], "out": True}, "no layer would be left"),
        ({"requests": [(1, 3)]}, "nothing would be left"),
        ({"phase": "mixed"}, "must be prefill or decode"),
        ({"rows": []}, "no rows are said"),
    ],
)
def test_a_selection_that_leaves_nothing_is_refused(tmp_path, wish, message):
    with pytest.raises(MoetraceError, match=message):
        select(whole(), tmp_path / "t.h5", **wish)
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_lies_in_a_gap_is_said_to(tmp_path):
    assert whole().layer_index[-1] - whole().layer_index[0] >= whole().layers
    with pytest.raises(MoetraceError, match=r"has no layer 0, only 1 to 5 with gaps\.$"):
        select(whole(), tmp_path / "t.h5", layers=[(0, 1)])


def test_a_copy_never_takes_the_place_of_its_trace(tmp_path):
    whole().write(tmp_path / "t.h5")
    before = (tmp_path / "t.h5").read_bytes()
    (tmp_path / "link.h5").symlink_to("t.h5")
    for name in ("t.h5", "link.h5"):
        with pytest.raises(MoetraceError):
            select(tmp_path / "t.h5", tmp_path / name, rows=[(0, 1)])
    assert (tmp_path / "t.h5").read_bytes() == before


def test_layers_get_other_numbers(tmp_path):
    ids = np.random.default_rng(1).permuted(np.tile(np.arange(8, dtype=np.uint8), (5, 4, 1)), axis=2)[..., :2]
    trace = Trace.from_arrays(ids, num_experts=8, layer_index=[0, 2, 4, 6])
    select(trace, tmp_path / "a.h5", first_layer=3)
    select(trace, tmp_path / "b.h5", layers=[(4, None)], first_layer=0)
    with Trace.open(tmp_path / "a.h5") as moved, Trace.open(tmp_path / "b.h5") as part:
        assert moved.layer_index.tolist() == [3, 5, 7, 9]
        assert np.array_equal(moved.read("experts", 0, 5), ids)
        assert part.layer_index.tolist() == [0, 2]
        assert np.array_equal(part.read("experts", 0, 5), ids[:, 2:])
        assert part.source["selected"][0]["first_layer"] == 0
    for first in (-1, 65530):
        with pytest.raises(UsageError, match=r"layers would have the numbers .*; 0 to 65535 are possible"):
            select(trace, tmp_path / "c.h5", first_layer=first)
