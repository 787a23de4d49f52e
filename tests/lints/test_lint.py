"""Lint: every trap, made on purpose, is found where it is; what is clean, or admitted, is not called wrong."""

import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from support.findings import found, gates, only, where
from support.traps import (
    EXPERTS,
    LAYERS,
    ROWS,
    TOP_K,
    arrays,
    choose,
    trace,
)

from moetrace.generators import generate_trace
from moetrace.importers.importing import import_traces
from moetrace.lints import RULES, lint
from moetrace.spec import load_model
from moetrace.spec.errors import MoetraceError
from moetrace.trace import Trace
from moetrace.trace.writer import CountsWriter

SHIPPED = Path(__file__).parents[2] / "traces"
CAPTURES = Path(__file__).parents[3] / "shared" / "traces"
captured = pytest.mark.skipif(not CAPTURES.exists(), reason="needs the captures beside the repository")


def test_a_clean_trace_has_no_findings():
    assert found(arrays()) == {}


# Findings of lint in each file, in order. All of them are notes: PROVENANCE.md and the README of traces/ admit it.
OF_FILES = {
    "mixtral-8x7b-b16.h5": [],
    "qwen3-30b-a3b-b1.h5": ["single-request"],
    "qwen3-30b-a3b-phone.h5": ["absent-rows", "single-request", "short", "other-top-k"],
    "tiny-olmoe.h5": ["gates-sum", "position-0-sink"],
    "qwen3-30b_bigmoeonedge.route.csv": ["absent-rows", "single-request", "short", "other-top-k"],
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
# Favourites of 90 %, which are no fault.
@example(shape=(32, 4, 6), requests=1, prompt=44, output=60, batch=1, zipf=1.2, stick=0.3, seed=858)
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


def test_layers_of_counts_with_a_top_k_of_their_own(tmp_path):
    rows = np.full(20, 20)
    experts = choose(np.random.default_rng(0), 400)
    counts = count(experts, rows)
    for step in range(20):
        counts[step, 1] = np.bincount(experts[20 * step : 20 * step + 20, 1, :2].ravel(), minlength=EXPERTS)
    findings = found(counts_file(tmp_path / "t.h5", counts, rows))
    assert list(findings) == ["partial-cells", "counts-only"] and findings["partial-cells"].layers == [1]
    counts[7, 1, 3] += 1
    findings = found(counts_file(tmp_path / "t.h5", counts, rows))
    assert findings["unequal-counts"].layers == [1] and findings["unequal-counts"].count == 20
    assert "partial-cells" not in findings


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
    experts = np.zeros((1, 256, 1), np.uint16)
    findings = found(Trace.from_arrays(experts, num_experts=65535))
    assert "short" in findings and tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
