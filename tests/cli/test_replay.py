"""`moetrace replay`: what it prints and writes, and what it says when something is wrong."""

import csv
import gzip
import io
import json
import sys
from pathlib import Path

import pytest

from moetrace.cli import main

TRACES = Path(__file__).parents[2] / "traces"
TINY = str(TRACES / "tiny-olmoe.h5")
MIXTRAL = str(TRACES / "mixtral-8x7b-b16.h5")

MINE = """
import moetrace as mt

@mt.policy
def mine(state, view, layer, load, plan):
    for i in range(load.size):
        plan[i] = view.active[i].resident

def undecorated(state, view, layer, load, plan):
    pass

number = 3
"""


def run(*arguments):
    """Exit code of the command."""
    try:
        main(["replay", *map(str, arguments)])
    except SystemExit as stop:
        return stop.code
    return 0


def test_bare_replay_compares_monde_and_edge_ndp(capsys):
    assert run(TINY) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[3].startswith("monde ")
    assert "1.00x" in lines[3]
    assert lines[4].startswith("edge-ndp ")
    assert f"{TINY}: 16,414 rows in 6,981 steps of 64 requests. Model tiny-olmoe on edge-ndp with 6 NDP units" in out
    assert "all 192 experts fit the GPU of edge-ndp, and policy resident would keep them there" in err
    assert run(TINY, "--slots", 48) == 0
    assert capsys.readouterr()[1] == ""


def test_slots_that_the_gpu_has_no_room_for_are_said_in_gb(capsys):
    assert run(TINY, "--system", "edge-ndp", "--set", "system.gpu.memory_gb=4", "--slots", "100%") == 0
    err = capsys.readouterr()[1]
    assert (
        "note: 192 slots take 2.4 GB, 0.8 GB more than the GPU of edge-ndp has left for experts, and are priced" in err
    )
    assert "as if they fit: give slots = 126 at most, or raise system.gpu.memory_gb." in err


def test_a_message_about_a_users_file_does_not_blame_a_preset(capsys):
    for arguments, blamed in (
        (("--policy", "none.py:f"), "moetrace: policy none.py:f: dispatch names "),
        (
            ("--policy", "on-demand", "--set", "policy.residency=none.py:f"),
            "moetrace: an override of policy on-demand: residency names ",
        ),
    ):
        assert run(TINY, *arguments) == 1
        assert capsys.readouterr()[1].startswith(blamed)


def test_json_is_the_summary_and_csv_a_row_a_policy(tmp_path, capsys):
    assert run(TINY, "--slots", 48, "--format", "json", "-o", tmp_path) == 0
    out, _ = capsys.readouterr()
    assert json.loads(out) == json.loads((tmp_path / "summary.json").read_text())
    assert run(TINY, "--slots", 48, "--format", "csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr()[0])))
    for row, policy in zip(rows, json.loads(out)["policies"], strict=True):
        assert row["name"] == policy["name"]
        assert float(row["total_s"]) == policy["total_s"]
        assert float(row["ttft_s_p99"]) == policy["ttft_s"]["p99"]


def summary(capsys, *arguments):
    assert run(*arguments, "--format", "json") == 0
    return json.loads(capsys.readouterr()[0])


def test_options_reach_the_replay(tmp_path, capsys):
    (tmp_path / "own.toml").write_text('name = "own"\nplacement = "tp"\ndispatch = "balance"\nresidency = "lru"\n')
    found = summary(
        capsys, TINY, "--model", "tiny-olmoe", "--system", "h100-dimm-ndp", "--slots", 20, "--jobs", 2,
        "--policy", tmp_path / "own.toml", "--policy", "edge-ndp", "--set", "system.ndp.units=3",
        "--set", "model.weight_bits=4", "--set", "policy.scope=global", "--set", "policy.own.residency=lfu",
    )  # fmt: skip
    assert found["slots"] == 20
    assert (found["system"]["name"], found["system"]["ndp"]["units"]) == ("h100-dimm-ndp", 3)
    assert found["model"]["weight_bits"] == 4
    assert [policy["name"] for policy in found["policies"]] == ["own", "edge-ndp"]
    assert [policy["choices"]["residency"] for policy in found["policies"]] == ["lfu", "prefill"]
    assert [policy["choices"]["scope"] for policy in found["policies"]] == ["global", "global"]
    assert len(found["policies"][0]["utilization"]["ndp"]) == 3


def test_own_functions_are_policies(tmp_path, capsys):
    (tmp_path / "own.py").write_text(MINE)
    mine, undecorated, units = summary(
        capsys, TINY, "--slots", 48, "--policy", f"{tmp_path}/own.py:mine", "--policy",
        f"{tmp_path}/own.py:undecorated", "--policy", "ndp-ep",
    )["policies"]  # fmt: skip
    assert (mine["name"], mine["choices"]["dispatch"]) == ("mine", "own.py:mine")
    # Nothing is ever fetched, so nothing is resident: all three run everything on the units.
    assert mine["total_s"] == undecorated["total_s"] == units["total_s"]


def test_equal_names_get_a_number(tmp_path, capsys):
    assert run(TINY, "--format", "csv", "--policy", "monde", "--policy", "monde") == 0
    out, err = capsys.readouterr()
    assert [line.split(",")[0] for line in out.splitlines()] == ["name", "monde", "monde-2"]
    assert err == "moetrace: note: more than one policy is called monde; one of them appears as monde-2.\n"


def test_experts_that_do_not_fit_are_refused_by_default(capsys):
    assert run(MIXTRAL, "--set", "system.ndp.units=2") == 2
    assert "--ignore-capacity" in capsys.readouterr()[1]
    assert run(MIXTRAL, "--set", "system.ndp.units=2", "--ignore-capacity", "--policy", "ndp-tp") == 0


@pytest.mark.parametrize("columns", [80, 100, 140])
def test_table_fits_the_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    policies = [argument for name in ("monde", "edge-ndp-tp-lb", "on-demand") for argument in ("--policy", name)]
    assert run(TINY, "--slots", 48, *policies) == 0
    out, _ = capsys.readouterr()
    assert max(map(len, out.splitlines())) <= columns
    # Every part of a table that is cut names the policies again.
    assert out.count("edge-ndp-tp-lb") == out.count("─\n") == (4 if columns == 80 else 2)


@pytest.mark.parametrize(
    ("system", "policies", "field", "advice"),
    [
        ("rtx3090-ddr4", [], "gpu_layers", ["--set", "policy.n-cpu-moe.gpu_layers=VALUE"]),
        (
            "rtx3090-ddr4",
            ["hybrid"],
            "gpu_layers",
            ["--policy", "n-cpu-moe", "--set", "policy.n-cpu-moe.gpu_layers=VALUE"],
        ),
        ("edge-ndp", [], "gpu_rows", ["--policy", "n-cpu-moe", "--set", "policy.n-cpu-moe.gpu_rows=VALUE"]),
        # No CPU: n-cpu-moe would be refused there.
        (
            "strix-halo",
            ["on-demand"],
            "gpu_layers",
            ["--policy", "resident", "--set", "policy.resident.gpu_layers=VALUE"],
        ),
    ],
)
def test_a_parameter_that_a_policy_does_not_read_is_set_where_it_is_read(capsys, system, policies, field, advice):
    named = [argument for name in policies for argument in ("--policy", name)]
    assert run(TINY, "--system", system, *named, "--set", f"policy.{field}=1") == 2
    _, err = capsys.readouterr()
    assert f"set it in a policy that reads it, as with {' '.join(advice)}." in err
    # The settings that the sentence advises are accepted.
    assert run(TINY, "--system", system, *named, *(part.replace("VALUE", "1") for part in advice)) == 0


def test_a_parameter_that_no_preset_reads_keeps_the_plain_sentence(capsys):
    assert run(TINY, "--policy", "monde", "--set", "policy.p=0.5") == 2
    assert "remove it or choose that." in capsys.readouterr()[1]


@pytest.mark.parametrize(("system", "home"), [("mac-m4-max", ""), ("rtx4090-ddr5", " with a CPU")])
def test_the_legend_says_nothing_of_parts_that_a_machine_does_not_have(capsys, system, home):
    assert run(TINY, "--system", system, "--policy", "on-demand") == 0
    out = " ".join(capsys.readouterr()[0].split())
    assert f"Model tiny-olmoe on {system}{home}; the GPU keeps up to" in out
    assert "NDP" not in out


def test_slots_that_hold_not_one_expert_are_refused(capsys):
    assert run(TINY, "--slots", "1KB") == 2
    assert "slots = 1KB holds not one of the 192 experts, the largest of which takes" in capsys.readouterr()[1]


def test_table_without_units_or_link(capsys):
    assert run(TINY, "--system", "jetson-orin", "--policy", "on-demand", "--ignore-capacity") == 0
    out, _ = capsys.readouterr()
    assert "NDP" not in out
    assert "link" not in out


def test_the_legend_names_one_bound_or_the_range_of_them(capsys):
    one = (TINY, "--slots", 48, "--policy", "edge-ndp")
    (policy,) = summary(capsys, *one)["policies"]
    assert run(*one) == 0
    bound = f"time beyond the {1e3 * policy['lower_bound_s']:,.0f} ms that no policy beats"
    assert bound in " ".join(capsys.readouterr()[0].split())
    arguments = (TINY, "--system", "rtx4090-ddr5", "--slots", 48, "--policy", "n-cpu-moe", "--policy", "resident")
    policies = summary(capsys, *arguments)["policies"]
    low, high = sorted(1e3 * policy["lower_bound_s"] for policy in policies)
    assert low < high
    assert run(*arguments) == 0
    out = " ".join(capsys.readouterr()[0].split())
    assert (
        f"the least possible with a policy's placement, devices and first residents, {low:,.0f} to {high:,.0f} ms."
        in out
    )


def test_a_cache_that_begins_empty_is_not_compared_with_a_full_gpu_without_a_word(capsys):
    assert run(TINY, "--system", "rtx4090-offload") == 0
    note = "with resident they are there from the start, while on-demand-lfu first has to fetch each of them once."
    assert f"moetrace: note: all experts fit the GPU: {note}\n" in capsys.readouterr()[1]
    for more in (("--slots", 96), ("--policy", "on-demand", "--policy", "on-demand-lfu")):
        assert run(TINY, "--system", "rtx4090-offload", *more) == 0
        assert "all experts fit" not in capsys.readouterr()[1]


def test_table_says_how_often_optimal_fell_back(tmp_path, capsys):
    import moetrace as mt

    mt.generate_trace("tiny-olmoe", requests=1, prompt=40, output=3).write(tmp_path / "a.h5")
    policies = ["--policy", "ndp-ep", "--set", "policy.dispatch=optimal"]
    (found,) = summary(capsys, tmp_path / "a.h5", *policies)["policies"]
    fallbacks = found["optimal_fallbacks"]
    assert fallbacks > 0
    assert run(tmp_path / "a.h5", *policies) == 0
    told = "of 24 layers of all steps had more than 20 active experts and were dispatched by balance."
    assert f"ndp-ep: {fallbacks} {told}" in capsys.readouterr()[0]
    assert run(tmp_path / "a.h5", "--policy", "ndp-ep") == 0
    assert "by balance" not in capsys.readouterr()[0]


def test_bar_appears_on_a_terminal_when_it_takes_long(capsys, monkeypatch):
    assert run(TINY) == 0
    table = capsys.readouterr()[0]
    monkeypatch.setattr("moetrace.cli.progress._BAR_AFTER_S", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "160")
    assert run(TINY) == 0
    out, err = capsys.readouterr()
    assert out == table
    assert "rows" in err


@pytest.fixture
def bad(tmp_path):
    """Files that are wrong in one way each."""
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "text.h5").write_text("no HDF5")
    whole = Path(TINY).read_bytes()
    (folder / "cut.h5").write_bytes(whole[: len(whole) // 2])
    (folder / "p.py").write_text(
        MINE
        + "def two(state, view): pass\n"
        + "def returns(state, view, layer, load, plan): return 1\n"
        + "def typo(state, view, layer, load, plan): plan[0] = view.activ[0].resident\n"
        + "def also(state, view, layer, load, plan): plan[0] = view.active[0].residnt\n"
    )
    (folder / "broken.py").write_text("1 / 0\n")
    (folder / "p.toml").write_text('name = "p"\ndispatch = "balanced"\n')
    (folder / "folder.h5").mkdir()
    return folder


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{bad}/none.h5"], 1, "there is no file {bad}/none.h5"),
        (["{bad}/folder.h5"], 1, "{bad}/folder.h5 is not a file"),
        (["{bad}/text.h5"], 1, "not an HDF5 file"),
        (["{bad}/cut.h5"], 1, "truncated"),
        ([TINY, "--model", "mixtral-8x7b"], 2, "--model"),
        ([TINY, "--model", "mixtral-8x7"], 2, "the nearest is 'mixtral-8x7b'"),
        ([TINY, "--system", "edge-npd"], 2, "the nearest is 'edge-ndp'"),
        ([TINY, "--policy", "mond"], 2, "the nearest is 'monde'"),
        ([TINY, "--policy", "{bad}/none.toml"], 1, "Cannot read {bad}/none.toml"),
        ([TINY, "--policy", "{bad}/p.toml"], 2, "the nearest is 'balance'"),
        ([TINY, "--set", "system.ndp.units=0"], 2, "ndp.units wants"),
        ([TINY, "--set", "system.link.bandwidth_gb_s=-1"], 2, "link.bandwidth_gb_s wants"),
        ([TINY, "--set", "system.ndp.unit=4"], 2, "the nearest is 'units'"),
        ([TINY, "--set", "machine.units=4"], 2, "--set wants"),
        ([TINY, "--set", "policy.mond.scope=global"], 2, "the nearest is 'monde'"),
        ([TINY, "--set", "policy.half_life=4"], 2, "applies to residency lfu or file.py:function only"),
        ([TINY, "--set", "policy.seed=9223372036854775808"], 2, "seed wants a finite number below 2^63"),
        ([TINY, "--set", "system..x=3"], 2, "got 'system..x=3'"),
        ([TINY, "--set", "policy..x=3"], 2, "got 'policy..x=3'"),
        ([TINY, "--set", "policy.name=a\x1b[31mb"], 2, "name wants printable characters only, got 'a\\x1b[31mb'"),
        ([TINY, "--set", "model.weight_bits=/dev/zero"], 1, "Cannot read /dev/zero: it is not an ordinary file"),
        ([TINY, "--slots", "-1"], 2, "slots"),
        ([TINY, "--jobs", "0"], 2, "jobs is 0"),
        ([TINY, "--policy", "{bad}/none.py:mine"], 1, "no such file"),
        ([TINY, "--policy", "{bad}/broken.py:mine"], 1, "does not run: ZeroDivisionError"),
        ([TINY, "--policy", "{bad}/p.py:none"], 2, "defines no none"),
        ([TINY, "--policy", "{bad}/p.py:number"], 2, "number is not a function"),
        ([TINY, "--policy", "{bad}/p.py:two"], 2, "takes 2 arguments"),
        ([TINY, "--policy", "{bad}/p.py:returns"], 2, "a policy returns nothing"),
        ([TINY, "--policy", "{bad}/p.py:typo"], 2, "'activ'"),
        ([TINY, "--policy", "{bad}/p.py:also"], 2, "'residnt'"),
        ([TINY, "-o", TINY], 2, "is a file, but results are written into a folder"),
        ([TINY, "-o", "{bad}/text.h5/below"], 1, "could not be written: Not a directory"),
    ],
)
def test_bad_input_is_one_sentence(bad, capsys, arguments, code, words):
    before = sorted(bad.rglob("*.h5"))
    output = [] if "-o" in arguments else ["-o", bad / "new"]
    assert run(*(argument.format(bad=bad) for argument in arguments), *output) == code
    out, err = capsys.readouterr()
    assert words.format(bad=bad) in err
    assert err.count("\n") == 1, err
    assert out == ""
    assert not (bad / "new").exists()
    assert sorted(bad.rglob("*.h5")) == before


def test_model_that_is_no_preset_wants_the_option(tmp_path, capsys):
    import moetrace as mt

    with mt.Trace.open(TINY) as trace:
        trace.model = "../tiny-olmo"
        trace.write(tmp_path / "a.h5")
    assert run(tmp_path / "a.h5") == 2
    out, err = capsys.readouterr()
    assert "'../tiny-olmo', which is no preset (the nearest is 'tiny-olmoe')" in err
    assert "--model" in err
    assert out == ""
    assert run(tmp_path / "a.h5", "--model", "tiny-olmoe") == 0


def test_ctrl_c_leaves_nothing(tmp_path, capsys, monkeypatch):
    from moetrace.engine.run import Lane

    def interrupted(lane, batch):
        raise KeyboardInterrupt

    monkeypatch.setattr(Lane, "advance", interrupted)
    assert run(TINY, "-o", tmp_path / "new" / "er") == 130
    out, err = capsys.readouterr()
    assert err.strip() == "moetrace: interrupted; no file was left half-written."
    assert out == ""
    assert not list(tmp_path.iterdir())


def test_timeline_is_written_beside_the_tables(tmp_path, capsys):
    assert run(TINY, "--slots", 48, "--timeline", "--window", "100:103", "-o", tmp_path) == 0
    assert capsys.readouterr()[1] == ""
    document = json.loads(gzip.decompress((tmp_path / "timeline.json.gz").read_bytes()))
    steps = [event["args"]["step"] for event in document["traceEvents"] if event.get("cat") == "step"]
    assert steps == [100, 101, 102] * 2
    assert run(TINY, "--slots", 48, "--timeline", "-o", tmp_path) == 0
    note = "moetrace: note: the timeline covers the first 16 of 6,981 steps; --window A:B chooses others.\n"
    assert capsys.readouterr()[1] == note
    assert run(TINY, "--slots", 48, "-o", tmp_path) == 0
    assert not (tmp_path / "timeline.json.gz").exists()  # it would be another replay's


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--timeline"], "--timeline writes a file into the folder of the result: name one with -o DIR."),
        (["--window", "1:2"], "--window says which steps a timeline covers: add --timeline."),
        (["--timeline", "--window", "7000:"], "The window 7000: holds none of the trace's 6,981 steps: A:B is from"),
        (["--timeline", "--window", "20:10"], "The window 20:10 holds none of the trace's 6,981 steps: A:B is from"),
        (
            ["--timeline", "--window", "20"],
            "--window wants steps A:B, from A up to B without it, as in 100:116, got '20'.",
        ),
        (["--timeline", "--window", "a:b"], "--window wants steps A:B, from A up to B without it, as in 100:116, got"),
        (["--timeline", "--window", "1:2:3"], "--window wants steps A:B"),
    ],
)
def test_timeline_of_nothing(options, message, tmp_path, capsys):
    folder = [] if options == ["--timeline"] else ["-o", tmp_path / "out"]
    assert run(TINY, *options, *folder) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"moetrace: {message}")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
