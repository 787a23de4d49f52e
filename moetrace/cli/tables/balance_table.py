"""The tables of `moetrace analyze balance`: every plan, and what keeping one loses."""

from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from moetrace.cli.tables.output import stdout_console, widen
from moetrace.spec.errors import counted, printable

if TYPE_CHECKING:
    from moetrace.analyze.balance.units import Balance

_GAP = 2
_ROWS = {
    "placement": "placement",
    "plan": "plan",
    "every": "every\nsteps",
    "slots": "slots",
    "imbalance": "max /\nmean",
    "worst": "worst\nlayer",
    "p99": "p99",
    "least": "least\npossible",
    "jain": "Jain",
    "fan_out": "fan-\nout",
    "fan_out_nodes": "of\nnodes",
    "moved_gb": "moved\nGB",
}
_LOGGED = {
    "placement": "placement",
    "plan": "plan",
    "every": "every\nsteps",
    "vllm": "vLLM",
    "sglang": "SGLang",
}
_TIME = {
    "placement": "placement",
    "plan": "plan",
    "every": "every\nsteps",
    "time": "max / mean\nin time",
    "busy_ms": "busy\nms",
    "least_ms": "least pos-\nsible ms",
    "over": "over\n%",
    "pause_ms": "pauses\nms",
}
_STALE = {
    "placement": "placement",
    "every": "every\nsteps",
    "remade": "max / mean %\nto re-made",
    "clairvoyant": "to clair-\nvoyant",
    "layers": "layers better\nre-made",
}
_STALE_TIME = {
    "placement": "placement",
    "every": "every\nsteps",
    "busy_remade": "busy ms %\nto re-made",
    "busy_clairvoyant": "to clair-\nvoyant",
    "saved_us": "saved a\nstep µs",
    "pause_ms": "pause a\nplan ms",
    "even": "break-even\nsteps",
}


def print_balance(found: "Balance", name: str) -> None:
    """Print the result as tables on stdout; `name` is the user's name of the trace."""
    console = stdout_console()
    rows = [_plan(row, found.trace) for row in found.summary.iter_rows(named=True)]
    stale = _stale(found)
    tables = [
        ("", _ROWS, rows),
        ("Balancedness as engines log it:", _LOGGED, rows),
        ("Losses of a kept plan:", _STALE, stale),
    ]
    if found.trace["system"]:
        tables += [(f"In seconds on {printable(found.trace['system'])}:", _TIME, rows), ("", _STALE_TIME, stale)]
    for title, headers, cells in tables:
        if cells:
            if title:
                console.print(f"{title}\n")
            table, wide = _table(headers, cells), stdout_console()
            widen(wide, table)
            wide.print(table)
            console.print()
    for line in _legend(found, name):
        console.print(line)


def _table(headers: dict[str, str], rows: list[dict[str, str]]) -> Table:
    """Make a table without the columns that no row has anything for."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
    shown = [key for key in headers if any(row[key] != "-" for row in rows)]
    for key in shown:
        justify = "left" if key in ("placement", "plan") else "right"
        width = max(len(text) for text in (*(row[key] for row in rows), *headers[key].split("\n")))
        table.add_column(headers[key], justify=justify, vertical="bottom", no_wrap=True, min_width=width)
    for row in rows:
        table.add_row(*(row[key] for key in shown))
    return table


def _plan(row: dict[str, Any], facts: dict[str, Any]) -> dict[str, str]:
    moves = row["plan"] == "re-made"
    busy, least = row["busy_s"], row["least_busy_s"]
    return {
        "placement": printable(row["placement"]),
        "plan": row["plan"],
        "every": _every(row, facts),
        "slots": f"{row['slots']:,}",
        "imbalance": _figure(row["imbalance"], 3),
        "worst": _figure(row["imbalance_worst_layer"], 3),
        "p99": _figure(row["imbalance_p99"], 3),
        "least": _figure(row["least_imbalance"], 3),
        "jain": _figure(row["jain"], 3),
        "vllm": _figure(row["balancedness_vllm"], 3),
        "sglang": _figure(row["balancedness_sglang"], 3),
        "fan_out": _figure(row["fan_out"], 3),
        "fan_out_nodes": _figure(row["fan_out_nodes"] if facts["nodes"] > 1 else None, 3),
        "moved_gb": _figure(row["migration_bytes"] / 1e9, 2) if moves and row["migration_bytes"] else "-",
        "time": _figure(row["time_imbalance"], 3),
        "busy_ms": _figure(busy, 1, 1e3),
        "least_ms": _figure(least, 1, 1e3),
        "over": _figure(busy / least - 1 if busy and least else None, 1, 100),
        "pause_ms": _figure(row["pause_s"], 1, 1e3) if moves else "-",
    }


def _stale(found: "Balance") -> list[dict[str, str]]:
    """A row for each placement and interval: all layers, and in how many of them a re-made plan is better."""
    rows = []
    for row in found.staleness.filter(found.staleness["layer"].is_null()).iter_rows(named=True):
        own = found.staleness.filter(placement=row["placement"], interval=row["interval"]).drop_nulls("layer")
        better = int((own["imbalance_loss_to_remade"].fill_null(0) > 0).sum())
        known = row["imbalance_remade"] is not None
        rows.append(
            {
                "placement": row["placement"],
                "every": _every(row, found.trace),
                "remade": _figure(row["imbalance_loss_to_remade"], 2, 100),
                "clairvoyant": _figure(row["imbalance_loss_to_clairvoyant"], 2, 100),
                "layers": f"{better} of {len(own)}" if known else "-",
                "busy_remade": _figure(row["busy_loss_to_remade"], 2, 100),
                "busy_clairvoyant": _figure(row["busy_loss_to_clairvoyant"], 2, 100),
                "saved_us": _figure(row["saved_s_per_step"], 2, 1e6),
                "pause_ms": _figure(row["pause_s_per_rebalance"] if known else None, 2, 1e3),
                "even": _even(row),
            }
        )
    return rows


def _every(row: dict[str, Any], facts: dict[str, Any]) -> str:
    """Return after how many steps a row's plan is re-made, where there are several such numbers."""
    return f"{row['interval']:,}" if row["interval"] is not None and len(facts["intervals"]) > 1 else "-"


def _even(row: dict[str, Any]) -> str:
    if row["saved_s_per_step"] is None or row["pause_s_per_rebalance"] is None:
        return "-"
    return "never" if row["break_even_steps"] is None else f"{row['break_even_steps']:,.0f}"


def _legend(found: "Balance", name: str) -> list[str]:
    facts = found.trace
    step = "step" if facts["phase"] == "all" else f"{facts['phase']} step"
    times = zip(facts["intervals"], facts["rebalances"], strict=True)
    each = [f"{interval:,} ({counted(number, 'time')})" for interval, number in times if number]
    anew = f"; re-made ones every {', '.join(each)}" if each else ""
    made = (
        f"made from {counted(facts['window'], step)} and judged on the {facts['judged_steps']:,} after the first such"
    )
    if not facts["window"]:
        made = f"judged on {counted(facts['judged_steps'], step)}, clairvoyant ones are made from the same"
    fewest = f"{facts['experts_min']:,} to " if facts["experts_min"] < facts["experts"] else ""
    shared = {"even": "", "row": " Copies are chosen by the row's place in the step.", "random": " Copies are drawn."}
    lines = [
        f"{printable(name)}: {printable(facts['model']) or 'a model without a name'}, "
        f"{counted(facts['layers'], 'layer')} of {fewest}{counted(facts['experts'], 'expert')} on "
        f"{counted(facts['units'], 'unit')}. Plans are {made}{anew}.{shared[facts['copies']]}",
        "Max / mean: the busiest unit's rows over the mean unit's, mean over the steps, then over the layers (worst: "
        "the worst layer's). Least possible: no plan with these slots beats it, even if re-made for every step.",
    ]
    if facts["fan_out"]:
        nodes = f" (and those of the {facts['nodes']:,} nodes)" if facts["nodes"] > 1 else ""
        lines.append(f"Fan-out: units{nodes} on which the experts of one row are, mean over rows and layers.")
    if facts["system"]:
        lines.append(
            "Busy: seconds of the busiest unit, summed over layers and steps. Pauses: moves for re-made plans, "
            "over the link."
        )
    return lines


def _figure(value: float | None, places: int, factor: float = 1.0) -> str:
    return "-" if value is None else f"{round(factor * value, places) + 0.0:,.{places}f}"
