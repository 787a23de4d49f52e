"""The command as a process: pipes, signals, closed output."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moetrace.cli import COMMANDS, _group, main
from moetrace.cli.commands.analyze import QUESTIONS
from moetrace.trace import Trace

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "traces" / "qwen3-30b-a3b-b1.h5")
EVERY_COMMAND = [[name] for name in COMMANDS] + [["analyze", name] for name in QUESTIONS]
MOETRACE = [sys.executable, "-m", "moetrace"]


def test_a_reader_that_goes_away_is_no_error():
    for arguments in (["list", "models"], ["replay", TINY], ["show", "model", "mixtral-8x7b", "--format", "json"]):
        with subprocess.Popen([*MOETRACE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout
            process.stdout.close()
            assert process.stderr
            said = process.stderr.read().decode().splitlines()
            assert [line for line in said if "compiling" not in line] == []  # a first run says that it compiles
            assert process.wait() == 0


def test_a_reader_that_goes_away_changes_no_verdict(tmp_path):
    """A sweep of which a cell fails ends with 1, and a gate that is red with 3, into a pipe without a reader, too."""
    (tmp_path / "bad.toml").write_text('placement = "tp"\n')
    (tmp_path / "grid.toml").write_text(
        f'trace = "{TINY}"\nsystem = "edge-ndp"\npolicy = ["monde", "bad.toml"]\nslots = 48\n'
    )
    codes, environment = [], os.environ | {"PYTHONPATH": str(ROOT)}
    for arguments in (["sweep", "grid.toml", "-o", "out"], ["gate", "out", "--baseline", "new.json", "--update"]):
        subprocess.run([*MOETRACE, *arguments], cwd=tmp_path, capture_output=True, env=environment)
    (tmp_path / "grid.toml").write_text((tmp_path / "grid.toml").read_text().replace("48", "24"))
    for arguments in (["sweep", "grid.toml", "-o", "out"], ["gate", "out", "--baseline", "new.json"]):
        for errors in (None, subprocess.STDOUT):  # and with 2>&1
            command = [*MOETRACE, *arguments]
            with subprocess.Popen(
                command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=errors, env=environment
            ) as process:
                assert process.stdout
                process.stdout.close()
                codes.append(process.wait())
    assert codes == [1, 1, 3, 3]


def test_closed_output_is_no_error():
    process = subprocess.run(["bash", "-c", '"$@" >&-', "bash", *MOETRACE, "list", "models"], capture_output=True)
    assert (process.returncode, process.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("stop", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGHUP, 128 + signal.SIGHUP)],
)
def test_signals_while_it_writes_leave_nothing(tmp_path, stop, code):
    command = [*MOETRACE, "generate", "--model", "qwen3-30b-a3b", "--prompt", "512", "--output", "512"]
    subprocess.run(
        [*command, str(tmp_path / "small.h5"), "--requests", "1"], check=True, capture_output=True
    )  # compiles
    out = tmp_path / "out"
    out.mkdir()
    large = [*command, str(out / "large.h5"), "--requests", "100000"]
    process = subprocess.Popen(
        large,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(stop, signal.default_int_handler if stop == signal.SIGINT else signal.SIG_DFL),
    )  # where the tests themselves run under nohup or in the background, it would be ignored
    time.sleep(3)
    process.send_signal(stop)
    _, said = process.communicate()
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert list(out.iterdir()) == []


def test_ctrl_c_while_it_starts_is_one_sentence(tmp_path):
    """The signal comes while the first module is imported that takes time."""
    (tmp_path / "click.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [*MOETRACE, "list", "models"]
    process = subprocess.run(command, capture_output=True, text=True, env=env, timeout=8)
    said = "moetrace: interrupted; no file was left half-written.\n"
    assert (process.returncode, process.stdout, process.stderr) == (130, "", said)
    with pytest.raises(subprocess.TimeoutExpired):  # in the background of a shell it is ignored
        subprocess.run(command, env=env, timeout=2, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))


def test_nohup_is_respected():
    program = (
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); from moetrace.cli import main;"
        "main(['list', 'models']); assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_wrong_usage_is_one_sentence_with_a_hint():
    process = subprocess.run([*MOETRACE, "replay", TINY, "-o", ""], capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1
    assert process.stderr.endswith("an empty path names no folder. See `moetrace replay --help`.\n")


def test_debug_shows_the_traceback():
    process = subprocess.run([*MOETRACE, "--debug", "info", "none.h5"], capture_output=True, text=True)
    assert "Traceback" in process.stderr


def test_too_little_memory_is_one_sentence(monkeypatch, capsys):
    def run(_):
        raise MemoryError

    monkeypatch.setattr("moetrace.cli._run", run)
    with pytest.raises(SystemExit) as stop:
        main(["list", "models"])
    assert stop.value.code == 1
    assert capsys.readouterr().err == "moetrace: there is not enough memory for this.\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["import", "loop", "-o", "o.h5"],
        ["import", TINY, "-o", "loop"],
        ["import", TINY, "-o", "loop/o.h5"],
        ["lint", TINY, "--drop-warmup", "-o", "loop"],
        ["analyze", "locality", "loop"],
        ["analyze", "balance", "loop"],
        ["analyze", "cache", "loop"],
        ["capture", "loop", "--prompts", "loop", "-o", "o.h5"],
        ["capture", ".", "--prompts", "loop", "-o", "loop"],
        ["generate", "loop", "--model", "mixtral-8x7b", "--requests", "1", "--prompt", "1", "--output", "1"],
        ["generate", "o.h5", "--like", "loop", "--requests", "1", "--prompt", "1", "--output", "1"],
        ["rebatch", TINY, "-o", "loop", "--batch", "1"],
        ["record", "http://127.0.0.1:9", "--prompts", "loop", "-o", "o.h5"],
        ["record", "http://127.0.0.1:9", "--prompts", TINY, "-o", "loop"],
        ["select", TINY, "-o", "loop", "--rows", "0:9"],
        ["select", "loop", "-o", "o.h5", "--rows", "0:9"],
        ["export", TINY, "-o", "loop", "--to", "npz"],
        ["replay", TINY, "-o", "loop"],
    ],
    ids=" ".join,
)
def test_a_link_to_itself_is_one_sentence(run, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    code, out, err = run(*arguments)
    assert code in (1, 2) and out == "" and "loop" in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "loop"] and Path("loop").is_symlink()


@pytest.mark.parametrize("command", EVERY_COMMAND, ids=" ".join)
def test_help_fits_80_columns(run, command):
    code, out, _ = run(*command, "--help")
    assert code == 0 and max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("command", EVERY_COMMAND, ids=" ".join)
def test_an_unreadable_file_is_no_wrong_usage(command):
    """Exit code 1, as for what is not there: so that must be left to whatever opens it."""
    with _group.make_context("moetrace", command[:1], resilient_parsing=True) as context:
        found = _group
        for name in command:
            found = found.get_command(context, name)
    assert not [one for one in found.params if getattr(one.type, "readable", False)]


def test_one_of_something_is_not_a_plural(run, tmp_path):
    path = tmp_path / "a.h5"
    Trace.from_arrays(np.array([0, 1]).reshape(-1, 1, 1), num_experts=2, model="m").write(path)
    said = run("analyze", "balance", path, "--units", 1, "--placement", "ep")[1]
    said = " ".join(said.split())
    assert "1 layer of 2 experts on 1 unit. Plans are made from 1 step and judged on the 1 after" in said
    said = run("analyze", "locality", path)[1]
    assert "2 rows of 1 request; 1 layer of 2 experts, top 1." in " ".join(said.split())
    out = tmp_path / "b.h5"
    generated = ("--model", "mixtral-8x7b", "--requests", 1, "--prompt", 0, "--output", 1)
    assert run("generate", out, *generated)[2] == f"{out}: 1 row in 1 step, 0.1 MB.\n"
    said = run("replay", out, "--set", "system.ndp.units=1", "--policy", "monde", "--ignore-capacity")[1]
    assert "1 row in 1 step of 1 request. Model mixtral-8x7b on edge-ndp with 1 NDP unit;" in said
