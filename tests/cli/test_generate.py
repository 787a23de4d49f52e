"""`moetrace generate`: what it writes, what it says and what it refuses."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import moetrace
from moetrace.cli import main
from moetrace.generators import list_profiles
from moetrace.trace import Trace

TRACES = Path(__file__).parents[2] / "traces"
SMALL = ["--model", "mixtral-8x7b", "--requests", "3", "--prompt", "5", "--output", "4"]


def run(*arguments):
    """Exit code of the command."""
    try:
        main(["generate", *map(str, arguments)])
    except SystemExit as stop:
        return stop.code
    return 0


def test_options_reach_the_file(tmp_path, capsys):
    options = ["--batch", "2", "--zipf", "0.5", "--stick", "0.25", "--seed", "9"]
    assert run(tmp_path / "a.h5", *SMALL, *options) == 0
    with Trace.open(tmp_path / "a.h5") as trace:
        assert trace.model == "mixtral-8x7b"
        assert (trace.layers, trace.top_k, trace.num_experts) == (32, 2, 8)
        expected = {"requests": 3, "prompt": 5, "output": 4, "batch": 2, "zipf": 0.5, "stick": 0.25, "seed": 9}
        assert trace.source["parameters"] == expected
    said = capsys.readouterr()
    assert said.out == ""
    assert "27 rows in 11 steps" in said.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--stick", "2"], "stick is 2.0"),
        (["--zipf", "nan"], "zipf is nan"),
        (["--batch", "0"], "batch is 0"),
        (["--model", "mixtral-8x7"], "mixtral-8x7b"),
    ],
)
def test_wrong_values_are_one_sentence_and_no_file(tmp_path, capsys, options, words):
    assert run(tmp_path / "a.h5", *SMALL, *options) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.strip().count("\n") == 0
    assert not list(tmp_path.iterdir())


def test_top_k_is_the_models_or_that_of_the_option(tmp_path, capsys):
    for options, top_k, note in (
        (["--profile", "qwen3-30b-a3b"], 8, "fitted to top 6; qwen3-30b-a3b takes the top 8"),
        (["--profile", "qwen3-30b-a3b", "--top-k", "6"], 6, ""),
        (["--profile", "tiny-olmoe"], 4, ""),
        (["--model", "tiny-olmoe", "--top-k", "3"], 3, ""),
    ):
        assert run(tmp_path / "a.h5", "--requests", 1, "--prompt", 2, "--output", 2, *options) == 0
        assert (note in capsys.readouterr().err) if note else ("Note" not in capsys.readouterr().err)
        with Trace.open(tmp_path / "a.h5") as trace:
            assert trace.top_k == top_k
    assert run(tmp_path / "b.h5", *SMALL, "--profile", "tiny-olmoe", "--top-k", "33") == 2


def test_a_note_names_a_trace_without_memory(tmp_path, capsys):
    assert run(tmp_path / "a.h5", *SMALL, "--stick", "0") == 0
    assert "each token is drawn independently" in capsys.readouterr().err
    main(["replay", str(tmp_path / "a.h5"), "--policy", "monde", "--system", "edge-ndp", "--ignore-capacity"])
    assert "by Zipf's law without memory" in capsys.readouterr().err


def test_unwritable_path_is_one_sentence(tmp_path, capsys):
    assert run(tmp_path / "missing" / "a.h5", *SMALL) == 1
    said = capsys.readouterr().err
    assert str(tmp_path / "missing" / "a.h5") in said
    assert said.strip().count("\n") == 0


def test_first_run_says_that_it_compiles(tmp_path):
    # However fast the machine: compiling takes longer than this, Numba's own start and loading less.
    program = (
        "import moetrace.jit.announce as a; a._MOMENT_S, a._LOOK_S = 0.4, 0.01; from moetrace.cli import main; main()"
    )
    for out, compiles in (("a.h5", True), ("b.h5", False)):
        ran = subprocess.run(
            [sys.executable, "-c", program, "generate", tmp_path / out, *SMALL],
            env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            check=True,
        )
        assert ran.stderr.count("compiling for this machine") == compiles
        assert ran.stdout == ""


def test_source_is_free_of_paths_and_clock(tmp_path):
    assert run(tmp_path / "a.h5", *SMALL) == 0
    with Trace.open(tmp_path / "a.h5") as trace:
        assert set(trace.source) == {"generator", "moetrace", "parameters"}
        assert str(tmp_path) not in json.dumps(trace.source)


def test_help_names_every_profile(capsys):
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert [name for name in list_profiles() if name not in shown] == []


PROFILED = ["--requests", "3", "--prompt", "5", "--output", "4"]


def test_profile_reaches_the_file(tmp_path, capsys):
    assert run(tmp_path / "a.h5", "--profile", "tiny-olmoe", *PROFILED, "--batch", "2", "--seed", "9") == 0
    with Trace.open(tmp_path / "a.h5") as trace:
        assert (trace.model, trace.layers, trace.num_experts, trace.top_k) == ("tiny-olmoe", 6, 32, 4)
        assert trace.source["generator"] == "profile"
        assert trace.source["profile"]["name"] == "tiny-olmoe"
        assert trace.source["parameters"] == {"requests": 3, "prompt": 5, "output": 4, "batch": 2, "seed": 9}
        trace.verify()
    said = capsys.readouterr()
    assert said.out == ""
    assert "27 rows in 11 steps" in said.err


def test_like_fits_and_its_profile_draws_the_same(tmp_path, capsys):
    captured = tmp_path / "captured.h5"
    assert run(captured, "--profile", "tiny-olmoe", "--requests", "4", "--prompt", "20", "--output", "30") == 0
    saved = tmp_path / "p.toml"
    assert run(tmp_path / "a.h5", "--like", captured, *PROFILED, "--save-profile", saved) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "fitting a profile" in said.err
    assert run(tmp_path / "b.h5", "--profile", saved, *PROFILED, "--model", "tiny-olmoe") == 0
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    assert str(tmp_path) not in saved.read_text()


def test_other_top_k_is_noted(tmp_path, capsys):
    toml = tmp_path / "m.toml"
    model = (Path(moetrace.__file__).parent / "spec/presets/models/tiny-olmoe.toml").read_text()
    toml.write_text(re.sub(r"(?m)^top_k = 4", "top_k = 3", model))
    assert run(tmp_path / "a.h5", "--profile", "tiny-olmoe", *PROFILED, "--model", toml) == 0
    assert "top 4" in capsys.readouterr().err
    with Trace.open(tmp_path / "a.h5") as trace:
        assert trace.top_k == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--model is missing"),
        (["--profile", "tiny-olmoe", "--zipf", "0.6"], "--profile and --zipf exclude each other"),
        (["--profile", "tiny-olmoe", "--stick", "0.3"], "--profile and --stick exclude each other"),
        (["--like", "x.h5", "--profile", "tiny-olmoe"], "--like and --profile exclude each other"),
        (["--like", "x.h5", "--zipf", "1"], "--like and --zipf exclude each other"),
        (["--model", "mixtral-8x7b", "--save-profile", "p.toml"], "--save-profile keeps what --like fits"),
        (["--like", "x.h5", "--save-profile", "p"], "--save-profile p: the name must end with .toml"),
        (["--profile", "tiny-olmo"], "the nearest is 'tiny-olmoe'"),
        (
            ["--profile", "tiny-olmoe", "--model", "mixtral-8x7b"],
            "6 MoE layers of 32 experts, but the model mixtral",
        ),
        (["--profile", "tiny-olmoe", "--seed", "-1"], "seed is -1"),
        (
            ["--like", str(TRACES / "tiny-olmoe.h5"), "--model", "mixtral-8x7b"],
            "but the model mixtral-8x7b has 32 of 8",
        ),
    ],
)
def test_options_that_do_not_go_together(tmp_path, capsys, options, words):
    assert run(tmp_path / "a.h5", *PROFILED, *options) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.strip().count("\n") == 0
    assert not list(tmp_path.iterdir())


def test_trace_to_imitate_is_not_overwritten(tmp_path, capsys):
    assert run(tmp_path / "a.h5", "--like", tmp_path / "a.h5", *PROFILED) == 2
    assert "is also an input" in capsys.readouterr().err
    assert run(tmp_path / "a.h5", "--like", tmp_path / "b.h5", *PROFILED) == 1
    assert "b.h5" in capsys.readouterr().err


@pytest.mark.parametrize(("out", "profile"), [("no/a.h5", "p.toml"), ("a.h5", "no/p.toml")])
def test_an_unwritable_path_is_refused_before_the_fit(tmp_path, monkeypatch, capsys, out, profile):
    def fit_profile(*_, **__):
        raise AssertionError("fitted")

    monkeypatch.setattr("moetrace.generators.fit.fit_profile", fit_profile)
    monkeypatch.chdir(tmp_path)
    assert run(out, "--like", TRACES / "tiny-olmoe.h5", *PROFILED, "--save-profile", profile) == 1
    bad = out if "/" in out else profile
    said = f"moetrace: {bad} could not be written: there is no folder no; nothing was changed.\n"
    assert capsys.readouterr().err == said
    assert not list(tmp_path.iterdir())


def shipped_commands():
    """The `moetrace generate` commands of traces/README.md, as lists of words."""
    lines = (TRACES / "README.md").read_text(encoding="utf-8").splitlines()
    return [shlex.split(line)[2:] for line in lines if line.strip().startswith("moetrace generate")]


def test_shipped_traces_are_what_their_commands_draw(tmp_path):
    commands = shipped_commands()
    assert len(commands) == 2
    for shipped, *options in commands:
        assert run(tmp_path / "again.h5", *options) == 0
        with Trace.open(TRACES.parent / shipped) as ours, Trace.open(tmp_path / "again.h5") as again:
            assert ours.source["parameters"] == again.source["parameters"]
            assert (ours.offset == again.offset).all()
            for block, other in zip(ours.blocks(), again.blocks(), strict=True):
                assert (block.experts == other.experts).all()
