"""What a user copies from bench/ci: a workflow that parses and calls commands and files that there are."""

import shlex
import tomllib
from pathlib import Path

import click
import pytest
import yaml

from moetrace.batch.baseline import read_baseline, to_text
from moetrace.cli import COMMANDS, _group

CI = Path(__file__).parents[2] / "bench" / "ci"


@pytest.fixture(scope="module")
def workflow():
    return yaml.safe_load((CI / "moetrace.yml").read_text(encoding="utf-8"))


def test_the_workflow_installs_sweeps_and_gates(workflow):
    assert workflow[True].keys() == {"pull_request", "push"}  # to YAML 1.1, `on` is true
    assert workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert [command.split()[0:2] for command in commands] == [
        ["python", "-m"],
        ["moetrace", "sweep"],
        ["moetrace", "gate"],
    ]
    for step in job["steps"]:
        assert step.keys() <= {"name", "uses", "with", "run", "if", "continue-on-error"}
        assert ("uses" in step) != ("run" in step)
    assert not any("${{" in command for command in commands)  # no text of a pull request reaches a shell


def test_the_workflow_uses_options_that_there_are(workflow):
    (job,) = workflow["jobs"].values()
    for command in (shlex.split(step["run"]) for step in job["steps"] if step.get("run", "").startswith("moetrace")):
        if command[1] not in COMMANDS:
            continue
        found = _group.get_command(click.Context(_group), command[1])
        assert found is not None
        known = {option for parameter in found.params for option in parameter.opts}
        assert {word for word in command if word.startswith("-")} <= known


def test_files_that_the_readme_copies_exist():
    readme = (CI / "README.md").read_text(encoding="utf-8")
    for name in ("moetrace.yml", "sweep.toml", "baseline.json"):
        assert name in readme
        assert (CI / name).is_file()


def test_the_shipped_baseline_is_as_the_gate_writes_it():
    baseline = read_baseline(CI / "baseline.json")
    assert to_text(baseline) == (CI / "baseline.json").read_text(encoding="utf-8")
    sweep = tomllib.loads((CI / "sweep.toml").read_text(encoding="utf-8"))
    assert len(baseline.cells) == len(sweep["policy"]) * len(sweep["zip"][0]["trace"])
