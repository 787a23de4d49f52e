"""`moetrace info`: what a trace file holds."""

from pathlib import Path
from typing import Any

import click

from moetrace.cli.options.paths import ANY_PATH
from moetrace.cli.tables.output import figure, format_option, print_json, print_rows, stdout_console
from moetrace.spec.errors import printable


@click.command()
@click.argument("trace", type=ANY_PATH, metavar="TRACE.h5")
@click.option("--verify", is_flag=True, help="Also compare every dataset with its sha256 and check every id or count.")
@format_option
def command(trace: Path, verify: bool, form: str) -> None:
    """Say what a trace file holds: model, rows, steps, requests, and where it is from.

    With --verify, a file that was damaged or holds an impossible value is an error (exit code 1).
    """
    from moetrace.trace.describe import describe
    from moetrace.trace.format import Trace

    with Trace.open(trace) as opened:
        if verify:
            opened.verify()
        facts = describe(opened)
    if verify:
        facts["verified"] = True
    if form == "json":
        print_json(facts)
        return
    rows = _flat(facts) if form == "csv" else _for_people(facts)
    if form == "table":
        stdout_console().print(printable(str(trace)), soft_wrap=True)
    print_rows({"name": "name", "value": "value"}, [{"name": name, "value": value} for name, value in rows], form)


def _flat(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in facts.items():
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, " ".join(map(str, value)) if isinstance(value, list) else value))
    return rows


def _experts(facts: dict[str, Any]) -> str:
    least, most = facts["experts_min"], facts["experts"]
    return f"{most}" if least == most else f"{least} to {most}"


def _for_people(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("model", facts["model"]),
        ("layers", f"{facts['layers']} (index {facts['layer_first']} to {facts['layer_last']})"),
        ("experts", f"{_experts(facts)} a layer, top {facts['top_k']}"),
        ("steps", f"{facts['steps']:,}" + _phases(facts, "steps")),
        ("rows", f"{facts['rows']:,}" + _phases(facts, "rows")),
    ]
    if "counts" not in facts["also_holds"]:
        batch = facts["decode_batch"]
        rows += [
            ("requests", f"{facts['requests']:,}"),
            ("prompt rows", _spread(facts["prompt_rows"])),
            ("output rows", _spread(facts["output_rows"])),
            ("decode batch", f"median {batch['median']}, max {batch['max']}" if batch else "-"),
            ("absent choices", f"{facts['absent_share']:.3%}"),
        ]
    low, high = facts["expert_bytes_min"], facts["expert_bytes_max"]
    if low is not None:
        rows.append(("expert size", f"{low / 1e6:,.2f} MB" + (f" to {high / 1e6:,.2f} MB" if high > low else "")))
    rows += [
        ("also holds", ", ".join(facts["also_holds"]) or "-"),
        ("file", f"{facts['file_bytes'] / 1e6:,.1f} MB, {facts['storage']}, {facts['schema']}"),
        ("created by", facts["created_by"]),
        *((name.replace("_", " "), _short(value)) for name, value in _flat({"source": facts["source"]})),
    ]
    if facts.get("verified"):
        what = "count" if "counts" in facts["also_holds"] else "id"
        rows.append(("verified", f"every dataset has its sha256, every {what} is possible"))
    return [(_short(printable(name), 24), printable(value)) for name, value in rows]


def _phases(facts: dict[str, Any], what: str) -> str:
    parts = [
        f"{facts[f'{name}_{what}']:,} {name}" for name in ("prefill", "decode", "mixed") if facts.get(f"{name}_{what}")
    ]
    return f" ({', '.join(parts)})" if parts else ""


def _spread(spread: dict[str, float] | None) -> str:
    if spread is None:
        return "-"
    if spread["min"] == spread["max"]:
        return f"{spread['min']:,} each"
    return f"{spread['min']:,} to {spread['max']:,}, median {figure(spread['median'])}"


def _short(value: object, most: int = 54) -> str:
    """The figures that fit in 80 columns; --format json has all."""
    text = figure(value)
    return text if len(text) <= most else text[: most - 1] + "…"
