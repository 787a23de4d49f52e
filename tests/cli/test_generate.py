"""`moetrace generate`: what it writes, what it says and what it refuses."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from moetrace.cli import main
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
        (["--stick", "2"], "--stick is 2.0"),
        (["--zipf", "nan"], "--zipf is nan"),
        (["--batch", "0"], "--batch is 0"),
        (["--model", "mixtral-8x7"], "mixtral-8x7b"),
    ],
)
def test_wrong_values_are_one_sentence_and_no_file(tmp_path, capsys, options, words):
    assert run(tmp_path / "a.h5", *SMALL, *options) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.strip().count("\n") == 0
    assert not list(tmp_path.iterdir())


def test_unwritable_path_is_one_sentence(tmp_path, capsys):
    assert run(tmp_path / "missing" / "a.h5", *SMALL) == 1
    said = capsys.readouterr().err
    assert str(tmp_path / "missing" / "a.h5") in said
    assert said.strip().count("\n") == 0


def test_first_run_says_that_it_compiles(tmp_path):
    # However fast the machine: any compilation takes longer than no time.
    program = "import moetrace.cli.compiling as c; c._MOMENT_S = 0; from moetrace.cli import main; main()"
    for out, compiles in (("a.h5", True), ("b.h5", False)):
        ran = subprocess.run(
            [sys.executable, "-c", program, "generate", tmp_path / out, *SMALL],
            env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            check=True,
        )
        assert ran.stderr.count("compiling") == compiles
        assert ran.stdout == ""


def test_source_is_free_of_paths_and_clock(tmp_path):
    assert run(tmp_path / "a.h5", *SMALL) == 0
    with Trace.open(tmp_path / "a.h5") as trace:
        assert set(trace.source) == {"generator", "moetrace", "parameters"}
        assert str(tmp_path) not in json.dumps(trace.source)


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
