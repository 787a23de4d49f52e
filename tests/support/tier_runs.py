"""A drawn case with more tiers through the kernels."""

import csv
from pathlib import Path
from typing import Any

import msgspec

from moetrace.engine.run import Run
from moetrace.spec import PolicySpec, System, load_policy
from support.drawn_machines import MachineCase
from support.drawn_runs import replay
from support.drawn_tiers import OWN
from support.strategies import Case

OWN_DISPATCH = """
def dispatch(state, view, layer, load, plan):
    for i in range(load.size):
        plan[i] = (7 * view.active[i].expert + layer + load[i]) % {devices}
"""


def run_of(case: MachineCase, policy: dict[str, Any], folder: Path, **options: Any) -> Run:
    """Replay a case through the kernels, with the files that its TOML would name; `options` as of a setup."""
    fields = {"name": "drawn"} | with_own_dispatch(policy, folder)
    if "layout" in fields:
        fields["layout"] = str(written(folder / "layout.csv", [(*key, unit) for key, unit in fields["layout"].items()]))
    system = case.system | {}
    if system["link"].get("rates"):
        rates = written(folder / "rates.csv", system["link"]["rates"])
        system["link"] = system["link"] | {"rates": str(rates)}
    spec = load_policy(msgspec.convert(fields, PolicySpec))
    return replay(Case(case.trace, case.model, msgspec.convert(system, System), case.slots), [spec], **options)


def with_own_dispatch(policy: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the policy with its function in a file, if it has one."""
    if policy["dispatch"] != OWN:
        return policy
    path = folder / "own.py"
    path.write_text(OWN_DISPATCH.format(devices=3 if policy.get("with_cpu") else 2))
    return policy | {"dispatch": f"{path}:dispatch"}


def written(path: Path, rows: list) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def with_what_goes_together(case: MachineCase) -> None:
    """Take out what a system refuses: chunks above a disk."""
    if "disk" in case.system:
        case.system["cpu"].pop("chunks", None)
