"""Import: what the source recorded is what the trace holds, cut into steps; a bad source is one sentence."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_sources import arrays, imported, route_trace, save, steps

import moetrace as mt
from moetrace.importers.formats import detect
from moetrace.importers.importing import import_traces
from moetrace.lints.leave_out import import_and_leave_out
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace import Trace

SHIPPED = Path(__file__).parents[2] / "traces"
CAPTURES = Path(__file__).parents[3] / "shared" / "traces"
captured = pytest.mark.skipif(not CAPTURES.exists(), reason="needs the captures beside the repository")


def test_npz_arrays_come_out_as_they_went_in(tmp_path):
    source = save(tmp_path / "a.npz", gate_weights=np.full((5, 3, 2), 0.5, np.float32), token_id=np.arange(5))
    trace, given = imported(tmp_path, source), np.load(source)
    assert np.array_equal(trace.read("experts", 0, 5), given["expert_ids"])
    assert np.array_equal(trace.read("gates", 0, 5), given["gate_weights"])
    assert np.array_equal(trace.read("token", 0, 5), given["token_id"])
    assert trace.layer_index.tolist() == [1, 2, 3] and trace.model == "x/Some-Model" and trace.num_experts == 8
    assert trace.read("request", 0, 5).tolist() == [0, 0, 0, 1, 1], "numbered in order of appearance"
    assert steps(trace) == [(2, 0), (1, 1), (1, 0), (1, 1)]


def test_source_says_where_it_is_from_but_no_path(tmp_path):
    source = imported(tmp_path, save(tmp_path / "a.npz")).source
    assert source["licence"] == "MIT" and source["format"] == "npz" and len(source["sha256"]) == 64
    assert str(tmp_path) not in json.dumps(source) and "n" not in source


@pytest.mark.parametrize(
    ("request_ids", "phase", "expected"),
    [
        ([0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [(3, 0), (2, 0)]),
        ([0, 1, 0, 1], [1, 1, 1, 1], [(1, 1)] * 4),
        ([0, 0, 1, 0, 0], [0, 0, 1, 0, 0], [(2, 0), (1, 1), (2, 0)]),
        ([0, 1, 0], [0, 0, 0], [(1, 0)] * 3),
        ([0, 0, 0, 0], [0, 1, 0, 0], [(1, 0), (1, 1), (2, 0)]),
    ],
)
def test_prefill_runs_are_steps_and_decode_rows_too(tmp_path, request_ids, phase, expected):
    np.savez(tmp_path / "a.npz", **arrays(request_ids, phase))
    assert steps(imported(tmp_path, tmp_path / "a.npz")) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [(0, [(1, 1)] * 5), (2, [(2, 0), (1, 1), (2, 0)]), (9, [(3, 0), (2, 0)])],
)
def test_as_decode_makes_decode_steps_after_the_prompt(tmp_path, prompt, expected):
    trace = imported(tmp_path, save(tmp_path / "a.npz"), decode_after=prompt)
    assert steps(trace) == expected and trace.source["decode_after"] == prompt


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1)), min_size=1, max_size=40), st.integers(0, 5))
def test_steps_by_the_words_of_the_rule(tmp_path_factory, rows, prompt):
    folder = tmp_path_factory.mktemp("steps")
    requests, phases = zip(*rows, strict=True)
    np.savez(folder / "a.npz", **arrays(requests, phases))
    for decode_after in (None, prompt):
        expected, before, seen = [], None, dict.fromkeys(requests, 0)
        for request, phase in rows:
            phase = phase if decode_after is None else int(seen[request] >= decode_after)
            seen[request] += 1
            if phase == 0 and before == (request, 0):
                expected[-1] = (expected[-1][0] + 1, 0)
            else:
                expected.append((1, phase))
            before = (request, phase)
        assert steps(imported(folder, folder / "a.npz", decode_after=decode_after)) == expected


def test_steps_that_an_archive_knows_are_kept(tmp_path):
    trace = imported(tmp_path, save(tmp_path / "a.npz", step_rows=np.array([2, 2, 1], np.uint8)))
    assert steps(trace) == [(2, 0), (2, 2), (1, 1)]


def test_parts_of_a_long_source_join(tmp_path, monkeypatch):
    monkeypatch.setattr("moetrace.importers.npz.BLOCK_BYTES", 40)
    np.savez(tmp_path / "a.npz", **arrays([0] * 50 + [1] * 3, [0] * 30 + [1] * 20 + [0] * 3))
    trace = imported(tmp_path, tmp_path / "a.npz")
    assert np.array_equal(trace.read("experts", 0, 53), np.load(tmp_path / "a.npz")["expert_ids"])
    assert steps(trace) == [(30, 0)] + [(1, 1)] * 20 + [(3, 0)]


def test_several_sources_follow_one_another(tmp_path):
    one, two = save(tmp_path / "1.npz"), save(tmp_path / "2.npz")
    trace = imported(tmp_path, one, two)
    assert trace.rows == 10 and trace.read("request", 0, 10).tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert [set(file) for file in trace.source.get("files", [])] == [set(), set()], "equal files share all they say"
    with pytest.raises(MoetraceError, match=r"3\.npz and .*1\.npz differ in layer_index"):
        imported(tmp_path, one, save(tmp_path / "3.npz", layer_index=np.array([4, 5, 6])))


def test_formats_are_seen_from_content(tmp_path):
    odd = save(tmp_path / "a.npz").rename(tmp_path / "odd.csv")
    assert detect(odd) == "npz" and detect(route_trace(tmp_path)) == "bigmoeonedge"
    with pytest.raises(
        MoetraceError,
        match=r"README.md is in no format that can be imported, being .*\(sglang, router-logits, npz",
    ):
        detect(SHIPPED / "README.md")
    (tmp_path / "none.csv").touch()
    with pytest.raises(MoetraceError, match=r"none.csv is empty"):
        detect(tmp_path / "none.csv")
    with pytest.raises(MoetraceError, match="is an HDF5 file: if it is a trace already"):
        detect(SHIPPED / "tiny-olmoe.h5")
    with pytest.raises(MoetraceError, match="does not begin with '# route_trace v1'"):
        imported(tmp_path, odd, format="bigmoeonedge")
    with pytest.raises(UsageError, match="no format 'ollama'"):
        imported(tmp_path, odd, format="ollama")
    with pytest.raises(MoetraceError, match="there is no file"):
        imported(tmp_path, tmp_path / "none.npz")


def test_sources_are_paths_of_any_kind_one_or_several(tmp_path):
    source, out = save(tmp_path / "a.npz"), tmp_path / "t.h5"
    for sources in (source, str(source), [str(source)], tmp_path):
        assert mt.import_traces(sources, str(out), hints=mt.Hints(num_experts=8)) == [source]
        out.unlink()


def test_a_folder_of_several_formats_is_refused_until_one_is_named(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    save(folder / "z.npz")
    (folder / "notes.md").write_text("of a run\n")
    (folder / "empty.csv").touch()
    assert imported(tmp_path, folder).source["format"] == "npz", "what is of no format is passed over"
    route_trace(folder)
    with pytest.raises(UsageError, match=r"run holds files of bigmoeonedge and npz \(z.npz\): give --from"):
        imported(tmp_path, folder)
    for name in ("npz", "bigmoeonedge"):
        assert imported(tmp_path, folder, format=name).source["format"] == name
    with pytest.raises(UsageError, match="run holds files of npz and bigmoeonedge"):
        imported(tmp_path, folder / "z.npz", folder)


def test_a_model_is_a_preset_that_fits(tmp_path):
    meta = {"model": "org/Mixtral_8x7B-Instruct (chat)", "num_experts": 8}
    changes = arrays([0], [1], layers=32, meta=np.array(json.dumps(meta)))
    np.savez(tmp_path / "a.npz", **changes)
    assert imported(tmp_path, tmp_path / "a.npz").model == "mixtral-8x7b"
    with pytest.raises(UsageError, match="has 32 MoE layers of 8 experts, but the model olmoe-1b-7b has 16 of 64"):
        imported(tmp_path, tmp_path / "a.npz", model="olmoe-1b-7b")
    np.savez(tmp_path / "b.npz", **arrays([0], [1], layers=31, meta=np.array(json.dumps(meta))))
    assert imported(tmp_path, tmp_path / "b.npz").model == meta["model"], "named alike, but does not fit"


@pytest.mark.parametrize("write", [import_traces, import_and_leave_out])
def test_a_file_of_a_folder_that_is_read_is_not_replaced(tmp_path, write):
    source = save(tmp_path / "a.npz")
    before = source.read_bytes()
    with pytest.raises(UsageError, match=r"a\.npz is also an input"):
        write([tmp_path], source)
    assert source.read_bytes() == before and list(tmp_path.iterdir()) == [source]


def test_same_source_same_bytes(tmp_path):
    source = save(tmp_path / "a.npz")
    import_traces([source], tmp_path / "1.h5")
    import_traces([source.rename(tmp_path / "b.npz")], tmp_path / "2.h5")
    assert (tmp_path / "1.h5").read_bytes() == (tmp_path / "2.h5").read_bytes()


@captured
@pytest.mark.parametrize(
    ("name", "model", "rows", "requests", "phases"),
    [
        ("real_deepseek-v2-lite_esft_law.npz", "deepseek-v2-lite", 8327, 33, {0: 33}),
        ("real_deepseek-v2-lite_esft_summary.npz", "deepseek-v2-lite", 8479, 13, {0: 13}),
        ("real_gpt-oss-20b_decode_24req_weights.npz", "gpt-oss-20b", 7270, 24, {1: 7270}),
        ("qwen3-30b_bigmoeonedge.route.csv", "qwen3-30b-a3b", 156, 1, {0: 1, 1: 128}),
        ("tiny-olmoe_aux.npz", "tiny-olmoe", 16414, 64, {0: 64, 1: 6917}),
    ],
)
def test_captures(tmp_path, name, model, rows, requests, phases):
    trace = imported(tmp_path, CAPTURES / name)
    assert (trace.model, trace.rows) == (model, rows)
    assert dict(zip(*np.unique(trace.phase, return_counts=True), strict=True)) == phases
    assert np.unique(trace.read("request", 0, rows)).tolist() == list(range(requests))
    if name.endswith(".npz"):
        given = np.load(CAPTURES / name)
        for ours, theirs in (("experts", "expert_ids"), ("gates", "gate_weights"), ("position", "position")):
            assert np.array_equal(trace.read(ours, 0, rows), given[theirs])


@captured
def test_the_last_layer_of_a_llama_cpp_prefill_routes_one_token(tmp_path):
    trace = imported(tmp_path, CAPTURES / "qwen3-30b_bigmoeonedge.route.csv")
    absent = trace.read("experts", 0, 156) == 255
    assert absent.sum() == 27 * 6 and absent[:27, 47].all()
    assert set(trace.expert_bytes.tolist()) == {2654208, 3059712} and trace.top_k == 6
    # The engine's own residency: 4000 MiB of cache in its author's findings, hit rate over all choices.
    recorded = trace.read("recorded", 0, 156)
    assert (recorded == 1).sum() == 29597 and (recorded == 0).sum() == 15169


@captured
def test_the_shipped_trace_is_the_import_of_its_capture(tmp_path):
    import_traces([CAPTURES / "tiny-olmoe_aux.npz"], tmp_path / "out.h5", model="tiny-olmoe")
    assert (tmp_path / "out.h5").read_bytes() == (SHIPPED / "tiny-olmoe.h5").read_bytes()


def test_the_shipped_traces_are_whole():
    for path in sorted(SHIPPED.glob("*.h5")):
        with Trace.open(path) as trace:
            trace.verify()
        assert f"## {path.name}" in (SHIPPED / "README.md").read_text()
    assert sum(path.stat().st_size for path in SHIPPED.glob("*.h5")) < 8e6
