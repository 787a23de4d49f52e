"""`moetrace info` and `moetrace import`: what they print, write and refuse."""

import csv
import io
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from support.writers import routing
from support.writers.vllm import npy_base64, request

from moetrace.cli import progress as bars
from moetrace.cli.commands.import_ import FORMATS
from moetrace.importers import formats as engines
from moetrace.trace import Trace

TRACES = Path(__file__).parents[2] / "traces"


@pytest.fixture
def archive(tmp_path) -> Path:
    path = tmp_path / "a.npz"
    np.savez(
        path,
        expert_ids=np.broadcast_to(np.array([3, 1], np.uint8), (6, 2, 2)),
        request_id=[0, 0, 0, 1, 1, 1],
        position=[0, 1, 2] * 2,
        phase=[0] * 6,
        layer_index=[0, 1],
        meta=json.dumps({"num_experts": 8, "model": "[red]x[/red]\x1b[2J", "licence": "MIT"}),
    )
    return path


@pytest.mark.parametrize("folder", [False, True])
def test_progress_goes_to_the_end(run, archive, monkeypatch, folder):
    told = []

    class Bar(bars.LateBar):
        def __init__(self, what, total):
            super().__init__(what, total)
            told.append([what, total, 0])

        def advance(self, count):
            told[-1][2] += count

    monkeypatch.setattr(bars, "LateBar", Bar)
    assert run("import", archive.parent if folder else archive, "-o", archive.with_suffix(".h5"))[0] == 0
    assert told == [["bytes read", told[0][1], told[0][1]], ["rows judged", 6, 6]] and told[0][1] > 0


def test_info_says_what_a_trace_holds(run):
    code, out, err = run("info", TRACES / "tiny-olmoe.h5", "--verify", "--format", "json")
    facts = json.loads(out)
    assert code == 0 and err == "" and facts["verified"] is True
    assert (facts["model"], facts["layers"], facts["experts"], facts["top_k"]) == ("tiny-olmoe", 6, 32, 4)
    assert (facts["rows"], facts["prefill_rows"], facts["decode_rows"]) == (16414, 9497, 6917)
    assert (facts["steps"], facts["prefill_steps"], facts["decode_steps"]) == (6981, 64, 6917)
    assert facts["requests"] == 64 and facts["prompt_rows"] == {"min": 48, "median": 144.5, "max": 254}
    assert facts["decode_batch"] == {"median": 1, "max": 1} and facts["absent_share"] == 0
    assert facts["also_holds"] == ["gates", "token"] and facts["source"]["format"] == "npz"
    with Trace.open(TRACES / "tiny-olmoe.h5") as trace:
        assert facts["content_sha256"] == trace.content_sha256 is not None


def test_info_counts_batches_and_absent_choices(run, tmp_path):
    experts = np.broadcast_to(np.array([3, 1], np.uint8), (10, 2, 2)).copy()
    experts[0, 1] = 255
    Trace.from_arrays(
        experts,
        num_experts=8,
        request=[7, 7, 7, 9, 9, 7, 9, 7, 9, 9],
        steps=[3, 2, 2, 2, 1],
        phase=[0, 0, 1, 2, 1],
        row_phase=[0, 0, 0, 0, 0, 1, 1, 1, 0, 1],
        expert_bytes=[1_000_000, 2_500_000],
    ).write(tmp_path / "t.h5")
    facts = json.loads(run("info", tmp_path / "t.h5", "--format", "json")[1])
    assert facts["absent_share"] == 2 / 40 and facts["requests"] == 2
    assert facts["prompt_rows"] == {"min": 3, "median": 3, "max": 3} and facts["output_rows"]["max"] == 2
    assert facts["decode_batch"] == {"median": 1, "max": 2} and facts["mixed_steps"] == 1
    assert (facts["expert_bytes_min"], facts["expert_bytes_max"]) == (1_000_000, 2_500_000)


@pytest.mark.parametrize("name", sorted(path.name for path in TRACES.glob("*.h5")))
def test_info_fits_80_columns(run, monkeypatch, name):
    monkeypatch.chdir(TRACES)
    out = run("info", name)[1]
    assert name in out and max(len(line.rstrip()) for line in out.splitlines()) <= 80


def test_info_as_csv_has_the_same_figures(run):
    table = dict(csv.reader(io.StringIO(run("info", TRACES / "tiny-olmoe.h5", "--format", "csv")[1])))
    assert table["rows"] == "16414" and table["prompt_rows.median"] == "144.5" and table["source.format"] == "npz"


def test_info_of_counts(run, tmp_path):
    path = tmp_path / "t.h5"
    Trace.from_arrays(np.zeros((4, 1, 1), np.uint8), num_experts=2).write(path)
    with h5py.File(path, "r+") as raw:
        del raw["/experts"]
        raw["/counts"] = np.ones((4, 1, 2), np.int64)
    code, out, _ = run("info", path)
    assert code == 0 and "counts" in out and "absent" not in out


def test_info_verify_finds_damage(run, tmp_path):
    data = bytearray((TRACES / "tiny-olmoe.h5").read_bytes())
    with h5py.File(TRACES / "tiny-olmoe.h5") as raw:
        data[raw["/gates"].id.get_offset() + 1000] ^= 1
    path = tmp_path / "t.h5"
    path.write_bytes(data)
    assert run("info", path)[0] == 0
    code, out, err = run("info", path, "--verify")
    assert (
        code == 1
        and out == ""
        and err == f"moetrace: {path}: /gates differs from its sha256, so the file was damaged.\n"
    )


def test_replay_of_counts_is_refused(run, tmp_path):
    path = tmp_path / "t.h5"
    Trace.from_arrays(np.zeros((4, 16, 1), np.uint8), num_experts=64, model="olmoe-1b-7b").write(path)
    with h5py.File(path, "r+") as raw:
        del raw["/experts"], raw["/rows"]
        raw["/counts"] = np.ones((4, 16, 64), np.int64)
    code, out, err = run("replay", path)
    assert code == 1 and out == ""
    assert err.endswith(f"moetrace: {path} holds only counts of ids (/counts), but this needs the ids themselves.\n")


def test_replay_writes_a_strangers_source(run, tmp_path):
    path = tmp_path / "t.h5"
    Trace.from_arrays(np.zeros((4, 16, 1), np.uint8), num_experts=64, model="olmoe-1b-7b").write(path)
    with h5py.File(path, "r+") as raw:
        raw.attrs["source"] = r'{"a": "\ud800", "b": NaN}'
    assert run("replay", path, "-o", tmp_path / "out")[0] == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["trace"]["source"] == {"a": "?", "b": None}


@pytest.mark.parametrize("form", ["table", "json", "csv"])
def test_info_of_a_strangers_source(run, tmp_path, form):
    path = tmp_path / "t.h5"
    Trace.from_arrays(np.zeros((4, 1, 1), np.uint8), num_experts=2).write(path)
    with h5py.File(path, "r+") as raw:
        raw.attrs["source"] = r'{"a": "\ud800", "b": NaN, "c": [Infinity]}'
    code, out, err = run("info", path, "--format", form)
    assert code == 0 and err == "" and out.encode()
    if form == "json":

        def refuse(name: str) -> None:
            pytest.fail(f"{name} is not JSON")

        assert json.loads(out, parse_constant=refuse)["source"] == {"a": "?", "b": None, "c": [None]}
    with h5py.File(path, "r+") as raw:
        raw.attrs["source"] = '{"a":' * 900 + "0" + "}" * 900
    code, out, err = run("info", path, "--format", form)
    assert code == 1 and out == "" and err == f"moetrace: {path}: source is nested deeper than 64 levels.\n"


def test_info_of_no_trace(run, tmp_path):
    (tmp_path / "t.h5").write_text("no")
    for path, said in ((tmp_path / "t.h5", "is not a trace file"), (tmp_path / "none.h5", "there is no file")):
        code, out, err = run("info", path)
        assert code == 1 and out == "" and said in err and len(err.splitlines()) == 1


def test_import_writes_and_says_so(run, tmp_path, archive):
    code, out, err = run(
        "import", archive, "-o", tmp_path / "t.h5", "--as", "decode", "--prompt", 2, "--compress", "zstd"
    )
    assert code == 0 and out == "" and "6 rows in 4 steps" in err
    with Trace.open(tmp_path / "t.h5") as trace:
        assert trace.storage == "compressed" and trace.phase.tolist() == [0, 1, 0, 1]


def test_import_says_what_it_left_out_and_takes_what_the_user_wishes(run, tmp_path):
    from support.writers.vllm import request, response

    ids = request(11, 2, 2, 16)
    details = {"prompt_tokens_details": {"cached_tokens": 8}}
    cached = response([ids], 10) | {"usage": {"prompt_tokens": 10, "completion_tokens": 2} | details}
    aborted = {"id": "x", "choices": [{"routed_experts": None}]}
    log, out = tmp_path / "a.jsonl", tmp_path / "t.h5"
    log.write_text("\n".join(map(json.dumps, [cached, aborted])))

    code, _, err = run("import", log, "-o", out, "--experts", 16)
    assert code == 0 and "3 rows in 2 steps" in err
    assert "  note: " in err and "left out 8 rows of cached or repeated prompts" in err
    assert "left out 1 answer without routing, the first because" in err
    assert (
        run("import", log, "-o", out, "--experts", 16, "--drop-warmup", "--as", "decode", "--prompt", 1)[2].count(
            "left out 8 rows"
        )
        == 1
    ), "once, even if it is read twice"
    assert "11 rows in 2 steps" in run("import", log, "-o", out, "--experts", 16, "--keep-cached")[2]
    code, _, err = run("import", log, "-o", tmp_path / "s.h5", "--experts", 16, "--strict")
    assert code == 1 and "response 2, choice 0 has no routed_experts" in err and len(err.splitlines()) == 1

    assert "give --absent-from 12" in run("import", log, "-o", tmp_path / "s.h5", "--experts", 12)[2]
    assert run("import", log, "-o", out, "--experts", 12, "--absent-from", 12, "--absent", 3, "--absent", 4)[0] == 0
    with Trace.open(out) as trace:
        left = np.where((ids >= 12) | (ids == 3) | (ids == 4), 255, ids)[8:]
        assert np.array_equal(trace.read("experts", 0, 3), left)


def test_texts_of_a_file_do_not_command_the_terminal(run, tmp_path, archive):
    run("import", archive, "-o", tmp_path / "t.h5")
    out = run("info", tmp_path / "t.h5")[1]
    assert "[red]x[/red]" in out and "\x1b" not in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--as", "decode"], "--as decode and --prompt P need each other"),
        (["--prompt", "3"], "--as decode and --prompt P need each other"),
        (["--as", "decode", "--prompt", "-1"], "-1"),
        (["--from", "gguf"], "gguf"),
        (["--model", "mixtral-8x7b"], "has 2 MoE layers of 8 experts, but the model mixtral-8x7b has 32 of 8"),
        (["--model", "mixtrl-8x7b"], "mixtral-8x7b"),
    ],
)
def test_import_refuses_wrong_usage(run, tmp_path, archive, options, said):
    code, out, err = run("import", archive, "-o", tmp_path / "t.h5", *options)
    assert code == 2 and out == "" and said in err and not (tmp_path / "t.h5").exists()


def test_import_takes_passes_that_decode(run, tmp_path):
    from support.writers.megatron import records

    log = tmp_path / "router_trace_rank0.jsonl"
    ids = {(n, 0): routing(size, 2, 2, 8, n) for n, size in enumerate([5, 2, 2])}
    log.write_text(records(0, ids, [1, 2]))
    asked = ("import", log, "-o", tmp_path / "t.h5", "--experts", 8)
    assert run(*asked, "--as", "decode", "--steps", "1:")[0] == 0
    with Trace.open(tmp_path / "t.h5") as trace:
        assert (np.diff(trace.offset).tolist(), trace.phase.tolist()) == ([5, 2, 2], [0, 1, 1])
    assert "with --steps A:B instead of --prompt" in run(*asked, "--as", "decode", "--prompt", 5)[2]
    for wrong in (("--steps", "1:"), ("--as", "decode", "--steps", "1:", "--prompt", 5), ("--as", "decode")):
        assert run(*asked, *wrong)[0] == 2


def test_import_takes_and_numbers_layers(run, tmp_path, archive):
    code, _, err = run("import", archive, "-o", tmp_path / "t.h5", "--layers", "1,0", "--first-layer", "5")
    assert code == 0
    assert "is layers 5, 6 of the model" in err
    code, _, err = run("import", archive, "-o", tmp_path / "t.h5", "--layers", "1:", "--model", "mixtral-8x7b")
    assert code == 0
    assert "a replay needs --set model.moe_layers=1" in err
    assert run("replay", tmp_path / "t.h5", "--set", "model.moe_layers=1")[0] == 0
    code, _, err = run("import", archive, "-o", tmp_path / "t.h5", "--layers", "7")
    assert code == 2
    assert "has no layer 7, only " in err


def test_import_never_overwrites_its_source(run, archive):
    before = archive.read_bytes()
    code, _, err = run("import", archive, "-o", archive)
    assert code == 2 and "is also an input" in err and archive.read_bytes() == before


def test_import_offers_every_format():
    assert tuple(engines.FORMATS) == FORMATS


def test_counts_are_imported_and_shown_as_counts(run, tmp_path):
    path = tmp_path / "popularity.json"
    path.write_text(json.dumps({"total_input_tokens": 3, "expert_popularity": [[2, 1, 3], [3, 2, 1]]}))
    code, _, err = run("import", path, "-o", tmp_path / "t.h5")
    assert code == 0 and "3 rows in 1 step," in err
    code, out, _ = run("info", tmp_path / "t.h5", "--format", "json")
    assert json.loads(out)["source"]["prompt_words"] == 3


def test_sizes_that_a_format_lacks_come_from_options(run, tmp_path):
    path = tmp_path / "moe_trace.csv"
    path.write_text("0,1\n0,2\n1,0\n1,3\n")
    code, _, err = run("import", path, "-o", tmp_path / "t.h5", "--top-k", 2)
    assert code == 2 and "does not say num_experts: give --model or --experts." in err
    assert run("import", path, "-o", tmp_path / "t.h5", "--top-k", 2, "--experts", 4)[0] == 0
    with Trace.open(tmp_path / "t.h5") as trace:
        assert trace.read("experts", 0, 1).tolist() == [[[1, 2], [0, 3]]]


def test_info_of_a_long_name_fits_80_columns(run, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / ("long-" * 20 + ".h5")
    source = {
        "a name that goes on " * 3: "x" * 90,
        "files": [{"sha256": "0" * 64}, {"sha256": "1" * 64}],
        "ids": [1, 2],
    }
    Trace.from_arrays(np.zeros((1, 1, 1), np.uint8), num_experts=4, source=source).write(path)
    name, *lines = run("info", path)[1].splitlines()
    assert name == str(path)
    assert max(map(len, lines)) <= 80
    shown = dict(line.split(maxsplit=1) for line in lines if line.startswith("source."))
    assert shown["source.files.1.sha256"].strip().startswith("1111") and "{" not in "".join(lines)
    out = run("info", path, "--format", "csv")[1]
    assert f"source.files.0.sha256,{'0' * 64}\n" in out and "source.ids,1 2\n" in out


@pytest.mark.parametrize("end", ["-BF16", "-AWQ", ""])
def test_import_and_analysis_say_why_a_name_means_no_preset(run, tmp_path, end):
    choices = [{"index": 0, "routed_experts": npy_base64(request(3, 24, 4, 32))}]
    answer = {"id": "a", "model": f"gpt-oss-20b{end}", "choices": choices}
    source, path = tmp_path / "a.json", tmp_path / "o.h5"
    source.write_text(json.dumps(answer | {"usage": {"prompt_tokens": 3, "completion_tokens": 1}}))
    imported = run("import", source, "-o", path, "--experts", 32)
    for code, _, err in (imported, run("analyze", "cache", path, "--capacity", 400)):
        assert code == 0, err
        assert ("the preset gpt-oss-20b is of 4.25 bits" in " ".join(err.split())) == bool(end)
