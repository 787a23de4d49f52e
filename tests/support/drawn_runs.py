"""A drawn case through the engine."""

import csv
from pathlib import Path
from typing import Any

import msgspec

from moetrace.engine.run import Run
from moetrace.spec import PolicySpec, System, load_policy
from moetrace.trace import Trace
from support.drawn_machines import MachineCase
from support.one_run import run
from support.strategies import Case, as_arrays


def replay(case: Case, policies: list[PolicySpec], **options: Any) -> Run:
    experts = case.model.most_experts
    trace = Trace.from_arrays(num_experts=experts, **as_arrays(case.trace, experts))
    options = {"ignore_capacity": True} | options
    return run(trace, case.model, case.system, policies, slots=case.slots, **options)


def replay_machine(case: MachineCase, policy: dict[str, Any], folder: Path, **options: Any) -> Run:
    """Replay a case through a policy, with the files that its TOML would name."""
    fields, system = {"name": "drawn"} | policy, case.system | {}
    if "layout" in fields:
        fields["layout"] = str(written(folder / "layout.csv", [(*key, unit) for key, unit in fields["layout"].items()]))
    if "disk" in system:  # the oracle's host says both
        fields["host_residency"] = system["host"]["residency"]
        system["host"] = {"slots": system["host"]["slots"]}
    if system["link"].get("rates"):
        rates = written(folder / "rates.csv", system["link"]["rates"])
        system["link"] = system["link"] | {"rates": str(rates)}
    spec = load_policy(msgspec.convert(fields, PolicySpec))
    return replay(Case(case.trace, case.model, msgspec.convert(system, System), case.slots), [spec], **options)


def written(path: Path, rows: list) -> Path:
    """Write rows into a CSV file."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path
