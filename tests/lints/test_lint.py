"""Lint: every trap, made on purpose, is found where it is; what is clean, or admitted, is not called wrong."""

import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from support.traps import (
    EXPERTS,
    LAYERS,
    OUTPUT,
    PROMPT,
    REQUESTS,
    ROWS,
    TOP_K,
    arrays,
    choose,
    flat_view,
    prepend,
    trace,
)

from moetrace.generators import generate_trace
from moetrace.importers.importing import import_traces
from moetrace.lints import LEVELS, RULES, Finding, lint
from moetrace.spec import load_model
from moetrace.spec.errors import MoetraceError
from moetrace.trace import Trace
from moetrace.trace.writer import CountsWriter

SHIPPED = Path(__file__).parents[2] / "traces"
CAPTURES = Path(__file__).parents[3] / "shared" / "traces"
captured = pytest.mark.skipif(not CAPTURES.exists(), reason="needs the captures beside the repository")


def found(made: Trace | dict) -> dict[str, Finding]:
    """The findings by code, after what holds for any: each code once, levels of the rules, sorted by level."""
    with made if isinstance(made, Trace) else trace(made) as opened:
        findings = lint(opened)
    levels = [LEVELS.index(one.level) for one in findings]
    assert levels == sorted(levels) and len({one.code for one in findings}) == len(findings)
    for one in findings:
        assert one.level == RULES[one.code].level and one.what.endswith(".") and one.effect.endswith(".")
        assert one.count > 0 and len(one.rows) <= 16 and all(start < stop for start, stop in one.rows)
    return {one.code: one for one in findings}


def only(made: Trace | dict) -> Finding:
    findings = found(made)
    assert len(findings) == 1, findings
    return next(iter(findings.values()))


def where(one: Finding) -> tuple[list[int] | None, list[tuple[int, int]], int]:
    return one.layers, one.rows, one.count


def test_a_clean_trace_has_no_findings():
    assert found(arrays()) == {}


# What lint says of each file, in order. All of it is a note: PROVENANCE.md and the README of traces/ admit it.
OF_FILES = {
    "mixtral-8x7b-b16.h5": [],
    "qwen3-30b-a3b-b1.h5": ["single-request"],
    "tiny-olmoe.h5": ["gates-sum", "position-0-sink"],
    "qwen3-30b_bigmoeonedge.route.csv": ["absent-rows", "single-request", "short"],
    "real_deepseek-v2-lite_esft_law.npz": [
        "gates-sum",
        "gate-order",
        "position-0-sink",
        "first-layer-not-0",
        "prefill-only",
    ],
    "real_deepseek-v2-lite_esft_summary.npz": [
        "gates-sum",
        "gate-order",
        "position-0-sink",
        "first-layer-not-0",
        "prefill-only",
    ],
    "real_gpt-oss-20b_decode_24req_weights.npz": ["decode-only"],
    "tiny-olmoe_aux.npz": ["gates-sum", "position-0-sink"],
}


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.h5")), ids=lambda path: path.name)
def test_shipped_traces_have_exactly_these_findings(path):
    findings = found(Trace.open(path))
    assert list(findings) == OF_FILES[path.name] and {one.level for one in findings.values()} <= {"note"}


@captured
@pytest.mark.parametrize("name", [name for name in OF_FILES if not name.endswith(".h5")])
def test_captures_have_exactly_these_findings(tmp_path, name):
    import_traces([CAPTURES / name], tmp_path / "t.h5")
    findings = found(Trace.open(tmp_path / "t.h5"))
    assert list(findings) == OF_FILES[name] and {one.level for one in findings.values()} <= {"note"}
    if name.startswith("qwen3"):
        assert where(findings["absent-rows"]) == ([47], [(0, 27)], 27)
    if name.startswith("real_deepseek"):
        sink = findings["position-0-sink"].layers
        assert sink is not None and {17, 18}.isdisjoint(sink) and len(sink) >= 23
        assert findings["first-layer-not-0"].layers == [1] and findings["gate-order"].layers == list(range(1, 27))
    if name.endswith("law.npz"):
        assert findings["gate-order"].what.startswith("In 170,658 cells (78.8%)")
        assert findings["position-0-sink"].count == 33


SHAPES = [(64, 6, 5), (128, 8, 3), (32, 4, 6), (8, 2, 8), (16, 1, 6), (4, 2, 20)]


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    requests=st.integers(1, 6),
    prompt=st.integers(0, 120),
    output=st.integers(1, 60),
    batch=st.integers(1, 6),
    zipf=st.sampled_from([0.0, 0.3, 0.6, 1.2]),
    stick=st.sampled_from([0.0, 0.3, 0.6]),
    seed=st.integers(0, 1 << 40),
)
def test_clean_random_traces_raise_no_warning(shape, requests, prompt, output, batch, zipf, stick, seed):
    experts, top_k, layers = shape
    model = replace(load_model("tiny-olmoe"), moe_layers=layers, experts=experts, top_k=top_k)
    made = generate_trace(
        model, requests=requests, prompt=prompt, output=output, batch=batch, zipf=zipf, stick=stick, seed=seed
    )
    assert {one.level for one in found(made).values()} <= {"note"}


def test_errors_are_counted_and_do_not_stop_lint(tmp_path):
    made = arrays()
    made["experts"] = made["experts"].astype(np.uint8)
    made["experts"][3:5, 1, 2] = 16
    made["experts"][90, 2, 0] = 254
    made["experts"][7, 0, :2] = 5
    made["experts"][8, 0] = 0  # zeros, as padding: all four the same
    made["experts"][399, 2, 1:3] = 9
    findings = found(made)
    assert list(findings) == ["impossible-id", "duplicate-ids"]
    assert where(findings["impossible-id"]) == ([1, 2], [(3, 5), (90, 91)], 3)
    assert where(findings["duplicate-ids"]) == ([0, 2], [(7, 9), (399, 400)], 3)
    assert "1 of them zeros only" in findings["duplicate-ids"].what


def test_duplicates_of_many_slots_and_wide_ids():
    rng = np.random.default_rng(0)
    experts = np.argsort(rng.random((60, 2, 300)), -1)[..., :40]
    experts[5, 1, 39] = experts[5, 1, 0]
    experts[9, 0] = 65535
    experts[9, 0, 0] = 3
    made = Trace.from_arrays(experts, num_experts=300, request=np.arange(60) // 20)
    assert where(found(made)["duplicate-ids"]) == ([1], [(5, 6)], 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from([2, 3, 5, 40]), st.sampled_from([50, 300]))
def test_impossible_ids_against_loops(seed, k, experts):
    rng = np.random.default_rng(seed)
    absent = 255 if experts == 50 else 65535
    ids = rng.integers(0, experts + 2, (30, 2, k))
    ids[rng.random(ids.shape) < 0.2] = absent
    findings = found(Trace.from_arrays(ids, num_experts=experts))
    twice = impossible = 0
    for cell in ids.reshape(-1, k).tolist():
        made = [i for i in cell if i != absent]
        twice += len(set(made)) < len(made)
        impossible += any(i >= experts for i in made)
    assert (findings["impossible-id"].count if impossible else 0) == impossible
    assert (findings["duplicate-ids"].count if twice else 0) == twice


def test_impossible_rows(tmp_path):
    trace(
        arrays()
        | {
            "recorded": np.zeros((ROWS, LAYERS, TOP_K), int),
            "row_phase": np.repeat(arrays()["phase"], arrays()["steps"]),
        }
    ).write(tmp_path / "t.h5")
    with h5py.File(tmp_path / "t.h5", "r+") as raw:
        raw["/rows/request"][5] = -1
        raw["/rows/position"][6] = -3
        raw["/rows/phase"][50] = 0
        raw["/recorded/resident"][60, 1, 2] = 7
    findings = found(Trace.open(tmp_path / "t.h5"))
    assert where(findings["impossible-row"]) == (None, [(5, 7), (50, 51), (60, 61)], 4)
    assert "negative positions in 1 row," in findings["impossible-row"].what
    assert findings["sha256"].count == 4 and "/rows/phase" in findings["sha256"].what


def test_damage_is_a_finding(tmp_path):
    trace(arrays() | {"gates": np.full((ROWS, LAYERS, TOP_K), 0.25)}).write(tmp_path / "t.h5")
    data = bytearray((tmp_path / "t.h5").read_bytes())
    with h5py.File(tmp_path / "t.h5") as raw:
        data[raw["/gates"].id.get_offset()] ^= 1
        data[raw["/layers/index"].id.get_offset() + 4] ^= 4
    (tmp_path / "t.h5").write_bytes(data)
    findings = found(Trace.open(tmp_path / "t.h5"))
    assert list(findings) == ["sha256", "layer-gap"]
    assert findings["sha256"].what == "The sha256 of /layers/index, /gates is not the one that the file states."
    assert findings["sha256"].count == 2


def test_a_missing_sha256_is_a_note(tmp_path):
    trace(arrays()).write(tmp_path / "t.h5", compress="zstd")
    with h5py.File(tmp_path / "t.h5", "r+") as raw:
        del raw["/rows/request"].attrs["sha256"]
    assert only(Trace.open(tmp_path / "t.h5")).what == "There is no sha256 to compare /rows/request with."


@pytest.mark.parametrize("rows", [32, 2048, 16640])
def test_warm_up(rows):
    cell = choose(np.random.default_rng(1), 1)
    findings = found(prepend(arrays(), np.repeat(cell, rows, axis=0)))
    assert where(findings["warm-up"]) == (None, [(0, rows)], rows)
    assert findings["warm-up"].fix == "--drop-warmup" and list(findings) == ["warm-up"]


def test_a_short_run_at_the_begin_is_no_warm_up():
    cell = choose(np.random.default_rng(1), 1)
    assert found(prepend(arrays(), np.repeat(cell, 31, axis=0))) == {}


def test_warm_up_in_several_stages_and_of_several_sources():
    one, two = choose(np.random.default_rng(1), 2)
    first = np.r_[[one] * 300, [two] * 40]
    made = prepend(arrays(), first)
    later = slice(340 + 200, 340 + 250)
    made["experts"][later] = one
    assert where(found(made)["warm-up"]) == (None, [(0, 340), (540, 590)], 390)


@pytest.mark.parametrize("sources", [2, 9, 10, 40])
def test_warm_up_of_however_many_sources(sources):
    rng = np.random.default_rng(1)
    warm, text = np.repeat(choose(rng, 1), 400, axis=0), choose(rng, 600)
    made = arrays(1000 * sources)
    made["experts"] = np.concatenate([warm, text] * sources)
    made |= {"request": np.repeat(np.arange(sources), 1000), "steps": [1000] * sources, "phase": [0] * sources}
    ranges = [(1000 * source, 1000 * source + 400) for source in range(sources)]
    assert where(found(made)["warm-up"]) == (None, ranges[:16], 400 * sources)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("runs", [1, 12, 40])
def test_runs_of_other_choices_each_are_repetitions_however_many(runs, layers):
    rng = np.random.default_rng(5)
    cells, text = choose(rng, runs, layers), choose(rng, 300 * runs, layers)
    between = np.split(text, runs)
    parts = [
        part for cell, rest in zip(cells, between, strict=True) for part in (rest, np.repeat([cell], 2048, axis=0))
    ]
    one = found({"experts": np.concatenate(parts), "num_experts": EXPERTS})["repeated-rows"]
    assert one.count == 2048 * runs and one.rows[0] == (300, 2348)


def test_short_runs_of_one_length_hide_no_warm_up():
    rng = np.random.default_rng(5)
    text = np.concatenate([np.repeat(choose(rng, 1), 24 if at % 40 == 0 else 1, axis=0) for at in range(480)])
    experts = np.concatenate([np.repeat(choose(rng, 1), 4096, axis=0), text])
    assert found({"experts": experts, "num_experts": EXPERTS})["warm-up"].rows == [(0, 4096)]


@pytest.mark.parametrize("seed", range(5))
def test_parts_that_repeat_more_than_others_by_chance_are_no_repetition(seed):
    rng, rows = np.random.default_rng(seed), 20_000
    stays = (rng.random(rows) < 0.92) & (np.arange(rows) >= rows // 2)
    latest = np.maximum.accumulate(np.where(stays, 0, np.arange(rows)))
    assert np.bincount(latest).max() >= 48
    found_codes = found({"experts": choose(rng, rows)[latest], "num_experts": EXPERTS}).keys()
    assert not {"warm-up", "repeated-rows"} & found_codes


def test_repeated_rows_elsewhere():
    made = arrays()
    made["experts"][210:260] = made["experts"][210]
    one = only(made)
    assert one.code == "repeated-rows" and where(one) == (None, [(210, 260)], 50) and one.fix


def test_runs_cross_pieces(monkeypatch):
    cell = choose(np.random.default_rng(1), 1)
    made = prepend(arrays(), np.repeat(cell, 500, axis=0))
    made["experts"][710:760] = made["experts"][710]
    whole = found(made)
    for size in (100, 1000, 4321):
        monkeypatch.setattr("moetrace.lints.piece.BLOCK_BYTES", size)
        assert found(made) == whole


def test_rows_that_are_equal_by_chance_are_no_repetition():
    rng = np.random.default_rng(0)
    experts = np.where(rng.random((4000, 1, 1)) < 0.8, 0, 1)  # runs of 32 and more are expected
    assert found({"experts": experts, "num_experts": 2}).keys() == {"single-request", "decode-only"}


@pytest.mark.parametrize("k", [1, 4])
def test_a_zero_plane_is_a_dense_layer(k):
    made = arrays(k=k)
    made["experts"][:, 1] = 0
    one = only(made | {"layer_index": [0, 1, 2]})
    assert one.code == "dense-layer" and where(one) == ([1], [], 1) and one.fix == "--drop-dense"
    assert one.what == "1 of 3 layers did not route: 1 of zeros only."
    assert ("refuses" in one.effect) == (k > 1)


def test_dense_layers_of_all_kinds():
    made = arrays(layers=5)
    made["experts"][:, 0] = 255
    made["experts"][:, 2] = [3, 9, 1, 0]
    made["experts"][:, 4] = 0
    one = found(made)["dense-layer"]
    assert where(one) == ([0, 2, 4], [], 3)
    assert one.what.endswith("1 without any choice, 1 of zeros only, 1 with the same choice in every row.")
    assert list(found(made)) == ["dense-layer"]


def test_a_layer_that_begins_with_zeros_is_not_dense(monkeypatch):
    monkeypatch.setattr("moetrace.lints.piece.BLOCK_BYTES", 12 * 100)
    made = arrays()
    made["experts"][:150, 1] = 0
    one = only(made)
    assert one.code == "duplicate-ids" and one.layers == [1] and one.count == 150
    assert one.rows[0][0] == 0 and one.rows[-1][1] == 150


def test_the_last_layer_of_a_llama_cpp_prompt():
    made = arrays()
    rows = np.flatnonzero(np.arange(ROWS) % (PROMPT + OUTPUT) < PROMPT - 1)
    made["experts"][rows, -1] = 255
    one = only(made)
    expected = [(100 * request, 100 * request + PROMPT - 1) for request in range(REQUESTS)]
    assert one.code == "absent-rows" and where(one) == ([LAYERS - 1], expected, 4 * (PROMPT - 1))


@pytest.mark.parametrize(("row", "layer"), [(0, 0), (50, LAYERS - 1)], ids=["another layer", "decode"])
def test_unequal_layers(row, layer):
    made = arrays()
    made["experts"][row : row + 30, layer] = 255
    one = only(made)
    assert one.code == "unequal-layers" and where(one) == ([layer], [(row, row + 30)], 30)
    assert one.what == "Layers differ in length: they routed 370 to 400 of 400 rows."


def test_padding_rows():
    made = arrays()
    made["experts"][20:35] = 255
    made["experts"][390:] = 255
    one = only(made)
    assert one.code == "empty-rows" and where(one) == (None, [(20, 35), (390, 400)], 25)


def test_a_run_of_padding_is_not_a_run_of_repeated_rows():
    made = arrays()
    made["experts"][20:80] = 255
    assert only(made).code == "empty-rows"


def test_slots_that_no_cell_uses_and_cells_that_lack_some():
    made = arrays()
    made["experts"] = np.concatenate([made["experts"], np.full((ROWS, LAYERS, 2), 255)], axis=2)
    one = only(made)
    assert one.code == "unused-slots" and one.count == 2 and one.what == "No cell holds more than 4 of 6 ids."
    made = arrays()
    made["experts"][40:44, 1, 3] = 255
    one = only(made)
    assert one.code == "partial-cells" and where(one) == ([1], [(40, 44)], 4)


@pytest.mark.parametrize(("experts", "k", "window"), [(16, 4, 4), (128, 8, 16), (64, 6, 32), (60, 4, 15), (8, 2, 4)])
def test_a_flat_read_of_a_strided_view(experts, k, window):
    made = arrays(experts=experts, k=k, layers=4)
    prompt = flat_view(np.random.default_rng(3), 200, experts, k)
    cells = choose(np.random.default_rng(4), 200, 4, experts, k)
    cells[:, 2] = prompt
    findings = found(prepend(made, cells) | {"layer_index": [0, 1, 2, 3]})
    one = findings["flat-view"]
    assert where(one) == ([2], [(0, 200 // window * window)], 200 // window * window) and one.level == "warning"
    assert [other.code for other in findings.values() if other.level == "warning"] == ["flat-view"]
    assert ("duplicate-ids" in findings) == (experts % k > 0), "a row may end one permutation and begin the next"


def test_a_flat_read_of_every_layer_is_not_called_uniform_as_well():
    made = arrays()
    for start in range(0, ROWS, PROMPT + OUTPUT):
        for layer in range(LAYERS):
            made["experts"][start : start + 40, layer] = flat_view(
                np.random.default_rng(start + layer), 40, EXPERTS, TOP_K
            )
    one = only(made)
    assert one.code == "flat-view" and one.layers == [0, 1, 2] and one.count == 160
    assert one.rows == [(0, 40), (100, 140), (200, 240), (300, 340)]


@pytest.mark.parametrize(("experts", "k"), [(4, 2), (8, 2), (3, 2), (2, 1), (16, 4), (128, 8)])
def test_uniform_random_routing_is_no_flat_view(experts, k):
    rng = np.random.default_rng(5)
    ids = np.argsort(rng.random((20000, 4, experts), dtype=np.float32), axis=-1)[..., :k]
    findings = found({"experts": ids, "num_experts": experts})
    assert {one.level for one in findings.values()} == {"note"}
    assert ("random-routing" in findings) == (experts >= 4)


def test_counts_that_are_equal_by_construction():
    made = arrays()
    turn = (np.arange(ROWS)[:, None] * 5 + np.arange(TOP_K) * 3) % EXPERTS  # round robin, but no partition
    made["experts"][:, 1] = turn
    one = found(made)["uniform"]
    assert one.layers == [1] and "100 to 100 times" in one.what


def gates(rows: int = ROWS) -> np.ndarray:
    return np.broadcast_to(np.array([0.4, 0.3, 0.2, 0.1], np.float16), (rows, LAYERS, TOP_K)).copy()


def test_gates():
    assert found(arrays() | {"gates": gates()}) == {}
    made = gates()
    made[10:20, 1] *= 0.5
    made[30, 2] = made[30, 2, ::-1]
    made[40, 0, 1] = np.nan
    made[41, 0, 2] = -0.2
    made[42, 0, 3] = np.inf
    made[43, 0] = [1.0, -0.0, 0.0, 0.0]
    findings = found(arrays() | {"gates": made})
    assert list(findings) == ["impossible-gates", "gates-sum", "gate-order"]
    assert where(findings["impossible-gates"]) == ([0], [(40, 43)], 3)
    assert where(findings["gates-sum"]) == ([1], [(10, 20)], 10) and "to 0.5 to 1" in findings["gates-sum"].what
    assert where(findings["gate-order"]) == ([2], [(30, 31)], 1)


def test_gates_of_absent_choices_do_not_count():
    made = arrays() | {"gates": gates()}
    made["experts"][40:44, 1, 3] = 255
    made["experts"][50:60, 2] = 255
    made["gates"][50:60, 2] = 0
    assert not {"gates-sum", "gate-order", "impossible-gates"} & found(made).keys()


def many_requests(requests: int, rows: int, seed: int = 0) -> dict:
    experts = choose(np.random.default_rng(seed), requests * rows)
    phase = np.tile([0, *[1] * (rows // 2)], requests)
    steps = np.tile([rows - rows // 2, *[1] * (rows // 2)], requests)
    request = np.repeat(np.arange(requests), rows)
    return {"experts": experts, "num_experts": EXPERTS, "request": request, "steps": steps, "phase": phase}


def test_a_sink_at_position_0():
    made = many_requests(20, 80)
    assert found(made) == {}
    made["experts"][::80, 1:] = [3, 4, 8, 1]
    made["experts"][0, 2] = [1, 8, 3, 4]  # the order of slots does not matter
    made["experts"][80, 2] = [5, 8, 3, 4]
    one = only(made)
    assert one.code == "position-0-sink" and one.layers == [1, 2] and one.count == 20
    assert one.rows[:2] == [(0, 1), (80, 81)] and len(one.rows) == 16 and "95% or more of 20 requests" in one.what


def test_few_requests_show_no_sink():
    made = many_requests(7, 80)
    made["experts"][::80] = [3, 4, 8, 1]
    assert found(made) == {}


def test_requests_that_are_the_same():
    made = many_requests(10, 80)
    made["experts"][4 * 80 : 5 * 80] = made["experts"][80 : 2 * 80]
    made["experts"][9 * 80 :] = made["experts"][80 : 2 * 80]
    one = only(made)
    assert one.code == "identical-requests" and where(one) == (None, [(320, 321), (720, 721)], 2)
    assert "2 of 10 requests (160 rows)" in one.what


def test_requests_that_decode_together_are_followed(monkeypatch):
    made = many_requests(10, 80)
    made["experts"][4 * 80 : 5 * 80] = made["experts"][80 : 2 * 80]
    order = np.lexsort([made["request"], np.tile(np.arange(80), 10)])  # row after row, each of another request
    woven = {"experts": made["experts"][order], "num_experts": EXPERTS, "request": made["request"][order]}
    for size in (1 << 20, 1000):
        monkeypatch.setattr("moetrace.lints.piece.BLOCK_BYTES", size)
        findings = found(woven)
        assert list(findings) == ["identical-requests", "decode-only"]
        assert where(findings["identical-requests"]) == (None, [(4, 5)], 1)


def test_templates_that_requests_share():
    made = many_requests(10, 80)
    for request in range(1, 10):
        made["experts"][request * 80 + request : request * 80 + request + 20] = made["experts"][:20]
    one = only(made)
    assert one.code == "repeated-template" and one.level == "note" and one.count == 10 * 13
    assert one.rows == [(81 * i, 20 + 81 * i) for i in range(10)] and "18% of the stretches of 8 rows" in one.what


def test_many_stretches_are_sampled(monkeypatch):
    monkeypatch.setattr("moetrace.lints.templates.MAX_WINDOWS", 64)
    made = many_requests(10, 80)
    for request in range(1, 10):
        made["experts"][request * 80 : request * 80 + 40] = made["experts"][:40]
    one = found(made)["repeated-template"]
    assert 0.1 < float(one.what.split("%")[0]) / 100 < 0.7


def test_overlap_that_is_periodic():
    rng = np.random.default_rng(0)
    made = many_requests(4, 200)
    for row in range(800):
        if row % 200 >= 16:
            same = rng.random(LAYERS) < 0.2
            made["experts"][row, same] = made["experts"][row - 16, same]
    one = only(made)
    assert one.code == "periodic-overlap" and one.count == 16 and one.layers == [0, 1, 2]


def test_requests_rows_and_phases():
    made = arrays()
    assert found(made | {"request": np.zeros(ROWS, int)}).keys() == {"single-request"}
    assert found(made | {"phase": made["phase"] * 0}).keys() == {"prefill-only"}
    assert found(made | {"phase": made["phase"] * 0 + 1}).keys() == {"decode-only"}
    position = np.tile(np.arange(100), 4)
    position[250:] += 7
    assert where(only(made | {"position": position})) == (None, [(250, 251)], 1)
    few = {name: value for name, value in made.items() if name != "steps" and name != "phase"}
    few |= {"experts": made["experts"][:60], "request": np.arange(60) // 30, "steps": [30, 30], "phase": [0, 1]}
    assert only(few).what == "In 60 rows an expert is chosen 15.0 times a layer on average."


def test_layer_numbers():
    findings = found(arrays() | {"layer_index": [1, 3, 4]})
    assert list(findings) == ["layer-gap", "first-layer-not-0"]
    assert findings["layer-gap"].layers == [1] and findings["layer-gap"].count == 1
    assert findings["first-layer-not-0"].layers == [1]


def test_every_expert():
    experts = np.broadcast_to(np.arange(4), (400, 3, 4))
    given = arrays() | {"experts": experts, "num_experts": 4}
    assert only(given).code == "every-expert"


def counts_file(path: Path, counts: np.ndarray, rows: np.ndarray) -> Trace:
    steps, layers, experts = counts.shape
    with CountsWriter(
        path, model="m", num_experts=experts, top_k=4, layers=layers, rows=int(rows.sum()), steps=steps, source={}
    ) as writer:
        writer.append_counts(counts, rows, np.full(steps, 1))
    return Trace.open(path)


def count(experts: np.ndarray, rows: np.ndarray) -> np.ndarray:
    parts = np.split(experts, np.cumsum(rows)[:-1])
    return np.array(
        [[np.bincount(part[:, layer].ravel(), minlength=EXPERTS) for layer in range(LAYERS)] for part in parts]
    )


def test_counts(tmp_path):
    rows = np.full(20, 20)
    good = count(choose(np.random.default_rng(0), 400), rows)
    assert only(counts_file(tmp_path / "t.h5", good, rows)).code == "counts-only"
    bad = good.copy()
    bad[4:6] = 0
    bad[9, 1, 3] += 2
    findings = found(counts_file(tmp_path / "t.h5", bad, rows))
    assert list(findings) == ["unequal-counts", "empty-steps", "counts-only"]
    assert where(findings["empty-steps"]) == (None, [(80, 120)], 2)
    assert where(findings["unequal-counts"]) == ([1], [(180, 200)], 1)
    bad = good.copy()
    bad[:, 2] = 0
    findings = found(counts_file(tmp_path / "t.h5", bad, rows))
    assert list(findings) == ["dense-layer", "counts-only"] and findings["dense-layer"].layers == [2]
    even = np.full((20, LAYERS, EXPERTS), 5)
    findings = found(counts_file(tmp_path / "t.h5", even, rows))
    assert list(findings) == ["uniform", "counts-only"] and findings["uniform"].layers == [0, 1, 2]


def test_negative_counts(tmp_path):
    rows = np.full(20, 20)
    counts_file(tmp_path / "t.h5", count(choose(np.random.default_rng(0), 400), rows), rows).close()
    with h5py.File(tmp_path / "t.h5", "r+") as raw:
        raw["/counts"][7, 1, 3] = -5
    findings = found(Trace.open(tmp_path / "t.h5"))
    assert where(findings["impossible-count"]) == ([1], [(140, 160)], 1) and findings["sha256"].count == 1


@captured
def test_popularity_of_mixtral_is_counts_without_fault(tmp_path):
    """The experts of each layer sum to the same, tokens x 2; and no layer is uniform."""
    import json

    for path in sorted((CAPTURES / "fiddler_popularity").glob("*.json")):
        said = json.loads(path.read_text())
        counts = np.array(said["expert_popularity"])[None]
        steps, layers, experts = counts.shape
        rows = np.array([counts[0, 0].sum() // 2])
        with CountsWriter(
            tmp_path / "t.h5",
            model="mixtral-8x7b",
            num_experts=experts,
            top_k=2,
            layers=layers,
            rows=int(rows[0]),
            steps=steps,
            source={},
        ) as writer:
            writer.append_counts(counts, rows, np.full(1, 2))
        assert only(Trace.open(tmp_path / "t.h5")).code == "counts-only"


def test_memory_stays_the_same_however_long_the_trace(tmp_path, monkeypatch):
    """The largest pieces that are read do not grow with steps: one step of all rows is read in parts."""
    monkeypatch.setattr("moetrace.lints.piece.BLOCK_BYTES", 1200)
    made = arrays() | {"steps": [ROWS], "phase": [0]}
    sizes, opened = [], trace(made)
    read = opened.read
    monkeypatch.setattr(opened, "read", lambda name, start, stop: sizes.append(stop - start) or read(name, start, stop))
    assert [one.code for one in lint(opened)] == ["prefill-only"] and max(sizes) == 100


def test_docs_name_every_code_with_its_level_and_fix():
    page = (Path(__file__).parents[2] / "docs/lint.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|\n").split("|")] for line in page.splitlines() if line.startswith("| `")
    ]
    said = {cells[0].strip("`"): cells for cells in rows}
    assert list(said) == list(RULES)
    for code, rule in RULES.items():
        assert said[code][1] == rule.level
        if rule.level != "note":
            assert said[code][4].strip("`") == rule.fix


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 40), st.sampled_from([None, "zstd"]))
def test_whatever_a_stranger_wrote_is_found_or_one_sentence(tmp_path_factory, seed, compress):
    """Random values in random places of random datasets: findings, never another error than a sentence."""
    rng, path = np.random.default_rng(seed), tmp_path_factory.mktemp("strange") / "t.h5"
    made = arrays() | {"gates": gates(), "recorded": np.zeros((ROWS, LAYERS, TOP_K), int), "token": np.zeros(ROWS, int)}
    trace(made | {"row_phase": np.repeat(made["phase"], made["steps"])}).write(path, compress)
    with h5py.File(path, "r+") as raw:
        paths = ["experts", "gates", "rows/request", "rows/position", "rows/phase", "recorded/resident"]
        for name in rng.choice(paths, rng.integers(1, 4), replace=False):
            data = raw[name][:]
            view = data.reshape(-1).view(np.uint8)
            begin, end = sorted(rng.integers(0, view.size + 1, 2).tolist())
            kind = rng.integers(3)
            view[begin:end] = (0, 255, rng.integers(0, 256, end - begin))[kind]
            raw[name][:] = data
    try:
        found(Trace.open(path))
    except MoetraceError as error:
        assert str(error).endswith(".")


def test_sizes_that_a_file_only_claims_take_no_memory():
    tracemalloc.start()
    experts = np.zeros((1, 65535, 1), np.uint16)
    findings = found(Trace.from_arrays(experts, num_experts=65535))
    assert "short" in findings and tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
