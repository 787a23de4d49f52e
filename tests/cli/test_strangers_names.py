"""Names that strangers chose reach a terminal, a CI log or a spreadsheet as text, and as nothing else."""

import ast
import csv
import gzip
import io
import json
from pathlib import Path

import click
import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

import moetrace as mt
from moetrace.cli import COMMANDS, _group
from moetrace.cli.tables.output import format_option, print_csv, print_json, print_rows, print_text, say, stdout_console
from moetrace.spec.errors import MoetraceError, harmless
from moetrace.trace import Trace

NASTY = "\x1b]0;owned\x07\r\n::error::x\u202e\u2028\x9b2J##vso[task.setvariable variable=x]y##[group]z"
ROOM = Path(mt.__file__).parent / "cli"


def check_text(said):
    """Nothing steers a terminal, and no line is a command of GitHub's or Azure's log."""
    assert all(letter.isprintable() for line in said.split("\n") for letter in line), repr(said)
    assert not any(line.strip().startswith("::") for line in said.split("\n")), said
    assert "##vso[" not in said and "##[" not in said


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("nasty") / "t.h5"
    source = {NASTY: NASTY, "::error::key": "=1+1", "##[error]": ["::x"], "nested": {"::error::x": 3}}
    ids = np.array([[[3, 1]], [[1, 2]]], np.uint8)
    Trace.from_arrays(ids, num_experts=4, model=NASTY, source=source).write(path)
    return path


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_hostile_names_in_a_trace_are_escaped(run, trace, form):
    code, out, err = run("info", trace, "--format", form)
    assert (code, err) == (0, "")
    check_text(out)
    assert "\\x1b]0;owned" in out if form != "json" else json.loads(out)["model"] == NASTY


@pytest.mark.parametrize("name", ["::error::gone.h5", "a\n::error::b\x1b[2J.h5", "##vso[task.complete]x.h5"])
def test_names_of_files_in_errors(run, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for arguments in (["info", name], ["lint", name], ["replay", "tiny.h5", "--model", f"{name}.toml"], [name]):
        code, out, err = run(*arguments)
        assert code in (1, 2) and out == "" and err.count("\n") == 1
        check_text(err)
    with pytest.raises(MoetraceError) as caught:
        mt.load_model(name + "/x.toml")
    check_text(str(caught.value))
    check_text(str(MoetraceError(f"{name}: cannot read.")))


def test_a_harmless_line_is_left_as_it_is():
    for line in ("a::b", "std::vector", "# heading", "a ## b", "##", "C:\\x", "12:30", "ß 日本 \u00a0x", "#1 [x]"):
        assert harmless(line) == line
    assert harmless(" \u00a0::x") == " \u00a0\\x3a:x"
    assert harmless("a ##teamcity[x]") == "a \\x23#teamcity[x]"


@click.command()
@format_option
def printing(form):
    cells = [NASTY, "=1+1", "+1", "-1", "@x", "\t=1", "＝1", "plain", "::error::x", ""]
    if form == "csv":
        print_csv(pl.DataFrame({"a\x1b": cells, "n": [-1.5] * len(cells), "t": cells}))
    print_rows({"t": "text", "n": "n"}, [{"t": cell, "n": -1} for cell in cells], form)
    say(f"note: {NASTY}")
    say(NASTY[7:])


@pytest.mark.parametrize("arguments", [["--format", "csv"], ["--format", "csv", "--safe-csv"], ["--format", "table"]])
def test_csv_and_tables(arguments):
    said = CliRunner().invoke(printing, arguments)
    assert said.exit_code == 0, said.exception
    check_text(said.stdout)
    check_text(said.stderr)
    assert said.stderr.count("\n") == 2
    if arguments[-1] == "table":
        return
    safe = "'" if arguments[-1] == "--safe-csv" else ""
    rows = list(csv.reader(io.StringIO(said.stdout)))
    assert rows[0] == ["a\\x1b", "n", "t"] and rows[11] == ["t", "n"]
    for frame, row in zip(rows[1:11], rows[12:], strict=True):
        assert float(frame[1]) == -1.5 and row[1] == "-1", "a number stays one"
        assert row[0].removeprefix("\\x3a:") == frame[2].removeprefix("::")  # which is no start of a line there
    texts = [row[0] for row in rows[12:]]
    assert texts[1:8] == [*(f"{safe}{text}" for text in ("=1+1", "+1", "-1", "@x", "\\t=1", "＝1")), "plain"]


def test_a_line_that_a_table_or_a_console_folds(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "24")
    print_rows({"n": "n", "t": "text"}, [{"n": 1, "t": "some words ::error::here ##[x]"}], "table")
    stdout_console().print("some words, and then ::error::x")
    stdout_console().print("two\n::error::lines\x1b[2J")
    print_text("a\n  ::error::b")
    print_json({"::error::a": "##vso[x]", "b": NASTY})
    out = capsys.readouterr().out
    check_text(out)
    assert out.count("\\x3a:error::") == 4
    assert json.loads(out[out.index("{") :])["b"] == NASTY


def test_safe_csv_goes_with_csv_only(run):
    code, out, err = run("list", "models", "--safe-csv")
    assert (code, out, err) == (2, "", "moetrace: --safe-csv goes with --format csv.\n")
    assert run("list", "models", "--safe-csv", "--format", "csv") == run("list", "models", "--format", "csv")


def commands(group=_group, context=None):
    context = context or click.Context(_group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield from commands(command, context) if isinstance(command, click.Group) else [command]


def test_every_command_with_csv_has_safe_csv():
    found = 0
    for command in commands():
        forms = [option.type.choices for option in command.params if option.name == "form"]
        if forms and "csv" in forms[0]:
            found += 1
            assert any(option.name == "safe_csv" for option in command.params), command.name
    assert found >= 9 and COMMANDS


def test_commands_print_by_what_makes_names_harmless():
    """`say`, `print_text`, `print_csv` and the console of `output.py`: what is printed past them is words of ours."""
    for path in ROOM.rglob("*.py"):
        if path.name == "output.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert not called.endswith((".write_csv", "sys.stdout.write", "sys.stderr.write")), path
            if called in ("click.echo", "print") and node.args:
                text = node.args[0]
                ours = isinstance(text, ast.Constant) or ast.unparse(text).startswith("harmless(")
                assert ours, f"{path.name}, line {node.lineno}: print names by `say` or `print_text`"


def test_a_timeline_holds_names_as_strings(tmp_path):
    name = '"},{"ph":"X","name":"x"}],</script>::error::$\\'
    policy = mt.load_policy("ndp-tp", {"name": name})
    trace = mt.generate_trace("tiny-olmoe", requests=1, prompt=1, output=2)
    mt.replay(trace, policies=[policy], timeline=(0, 1)).write_timeline(tmp_path / "t.json.gz")
    events = json.loads(gzip.decompress((tmp_path / "t.json.gz").read_bytes()))["traceEvents"]
    assert [event["args"]["name"] for event in events if event["name"] == "process_name"] == [f"{name} on edge-ndp"]
    assert {event["ph"] for event in events} <= {"M", "X", "C"} and not any(event["name"] == "x" for event in events)
