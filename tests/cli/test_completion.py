"""Completion in a shell: commands, options, presets, choices and files, asked for as bash asks."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BASH = shutil.which("bash")
SHELL = """
set -eu
PATH="$1:$PATH"
source <(_MOETRACE_COMPLETE=bash_source moetrace)
complete -p moetrace >&2
shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
compopt() { echo "compopt"; }
_moetrace_completion moetrace
printf '%s\\n' "${COMPREPLY[@]-}"
"""


def complete(folder: Path, *words: str) -> list[str]:
    """What bash offers for the last of the words."""
    command = folder / "moetrace"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m moetrace "$@"\n')
    command.chmod(0o755)
    done = subprocess.run(
        [str(BASH), "-c", SHELL, "bash", str(folder), *words], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0 and "-F _moetrace_completion" in done.stderr, done.stderr
    return done.stdout.split("\n")[:-1]


@pytest.mark.skipif(BASH is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["moetrace", "reb"], ["rebatch"]),
        (["moetrace", "analyze", "l"], ["locality"]),
        (["moetrace", "replay", "--igno"], ["--ignore-capacity"]),
        (["moetrace", "replay", "t.h5", "--system", "mac"], ["mac-m4-max", "mac-mini-m4"]),
        (["moetrace", "replay", "t.h5", "--policy", "n-"], ["n-cpu-moe"]),
        (["moetrace", "analyze", "cache", "t.h5", "--policy", "bela"], ["belady"]),
        (["moetrace", "show", "model", "mixtral-8x7"], ["mixtral-8x7b"]),
        (["moetrace", "generate", "o.h5", "--profile", "tiny"], ["tiny-olmoe"]),
        (["moetrace", "adv"], ["advise"]),
        (["moetrace", "advise", "t.h5", "--system", "phone"], ["phone-ufs"]),
        (["moetrace", "advise", "t.h5", "--slo", "tokens"], ["tokens_per_s>="]),
        (["moetrace", "advise", "reb"], ["rebalance"]),
        (["moetrace", "advise", "traces/"], ["compopt", ""]),
        (["moetrace", "advise", "rebalance", "t.h5", "--migrate", "as"], ["async"]),
        (["moetrace", "advise", "rebalance", "t.h5", "--system", "h20-"], ["h20-x32"]),
        (["moetrace", "sweep", "s.toml", "--sort", "total"], ["total_s"]),
        (
            ["moetrace", "sweep", "s.toml", "--columns", "total_s,tpot_s.p9"],
            ["total_s,tpot_s.p95", "total_s,tpot_s.p99"],
        ),
        (["moetrace", "replay", "traces/"], ["compopt", ""]),
        (["moetrace", "replay", "t.h5", "--system", "./mine"], ["compopt", ""]),
    ],
)
def test_bash_is_offered_what_may_stand_there(tmp_path, words, offered):
    assert complete(tmp_path, *words) == offered


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_lines_that_ask(tmp_path, shell):
    environment = os.environ | {"_MOETRACE_COMPLETE": f"{shell}_source"}
    command = [sys.executable, "-m", "moetrace"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"_MOETRACE_COMPLETE={shell}_complete" in done.stdout
    if found := shutil.which(shell):
        script = tmp_path / "lines"
        script.write_text(done.stdout)
        subprocess.run([found, "-n", str(script)], check=True)
