"""The tables of `moetrace analyze cache`: every policy and capacity, and LRU's curve."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moetrace.cli.tables.output import figure, print_rows, stdout_console
from moetrace.cli.tables.parts import TextColumn, print_parts
from moetrace.spec.errors import counted, printable

if TYPE_CHECKING:
    import polars as pl

    from moetrace.trace import Trace

_KEYS = {"capacity": "capacity", "policy": "policy", "phase": "phase"}
# Columns that stay together; those without a figure are left out.
_GROUPS = (
    {"hit_percent": "hit\n%", "interval": "±", "step_misses": "misses a step\np50/95/99"},
    {"regret_points": "regret\npoints", "regret_ms_per_step": "regret\nms/step", "missed_gb": "missed\nGB"},
    {"rows_percent": "rows all\nhit, %"},
    {"recorded_percent": "recorded\nhit %", "agreement_percent": "as rec.\n%"},
)


_LEAST_WIDTH = 80
_MOST_ROWS = 32  # of a curve


def title_of(trace: "Trace", scope: str, sequential: bool, budget: object = None) -> str:
    """Return the demand and the caches that it meets, in a sentence."""
    demand = "one choice at a time" if sequential else "a layer's experts of a step together"
    caches = {
        "global": "one cache for all layers",
        "layer": f"one cache a layer, of {'an equal' if budget is None else 'its own'} part of the capacity",
        "request": "one cache for all layers, empty when no request is under way",
    }[scope]
    from moetrace.analyze.sizes import own_experts

    return f"{counted(int(own_experts(trace).sum()), 'expert')}; {caches}; {demand}."


def print_cache(found: "pl.DataFrame", title: str, phase: str | None) -> None:
    """Print the frame of `cache_hits` as a table, and the verdict on decode steps, if there are, or on `phase`."""
    from moetrace.analyze.cache.regret import verdict_lines

    rows = found.to_dicts()
    for row in rows:
        _add_figures(row)
    print_groups(rows, _KEYS, _GROUPS)
    shown = "decode" if phase is None and "decode" in found["phase"] else phase or "all"
    _print_below([title, *verdict_lines(found.filter(phase=shown))])


def print_groups(rows: list[dict], keys: dict[str, str], groups: Sequence[dict[str, str]]) -> None:
    """Print rows as a table, in parts where it is wide; keys and groups are columns and their headings."""

    def column(name: str, heading: str, right: bool) -> TextColumn:
        return TextColumn(heading, [figure(row[name]) for row in rows], right)

    known = [{name: text for name, text in of.items() if any(row[name] is not None for row in rows)} for of in groups]
    first = [column(name, heading, False) for name, heading in keys.items()]
    console = stdout_console()
    console.width = max(console.width, _LEAST_WIDTH)
    print_parts(console, first, [[column(*named, True) for named in of.items()] for of in known if of])


_EXPLAINED = (
    {"experts": "budget,\nexperts", "a_layer": "a\nlayer", "mib": "\nMiB", "share_percent": "of all\n%"},
    {"hit_percent": "hit\n%", "off_points": "off,\npoints"},
    {"agreement_percent": "as rec.\n%"},
    {"step_misses": "misses a step\np50/95/99", "rows_percent": "rows all\nhit, %"},
)


def print_explained(found: "pl.DataFrame", title: str, layers: int, recorded: bool) -> None:
    """Print the frame of `explain_hit_rate` as a table; `recorded`: the rate is that of the trace's record."""
    rows = found.to_dicts()
    for row in rows:
        _add_figures(row)
        experts = row["capacity_experts"]
        row |= {"experts": experts, "a_layer": None if experts is None else experts / layers}
        row |= {"share_percent": None if row["capacity_share"] is None else 100 * row["capacity_share"]}
        budget = row["budget_bytes"]
        row |= {
            "off_points": f"{round(row['off_points'], 2) + 0.0:+.2f}",
            "mib": None if budget is None else f"{budget / 2**20:,.0f}",
        }
    print_groups(rows, {"policy": "policy"}, _EXPLAINED)
    first = rows[0]
    best = "most like the record" if recorded else "nearest"
    _print_below(
        [
            title,
            f"Observed: {100 * first['observed_rate']:.2f} % of the accesses in {first['phase']} steps hit. "
            f"{first['policy']} with {first['capacity']} is {best}: {first['hit_percent']:.2f} %.",
        ]
    )


def print_curve(found: "pl.DataFrame", title: str) -> None:
    """Print the frame of `lru_curve` as a table, a column a phase, of some capacities if there are many."""
    phases = found["phase"].unique(maintain_order=True).to_list()
    wide = found.pivot("phase", index="capacity_experts", values="hit_rate").sort("capacity_experts")
    every = max(1, -(-len(wide) // _MOST_ROWS))
    headers = {"capacity_experts": "capacity"} | {name: f"{name}\nhit %" for name in phases}
    rows = [
        {name: value if name == "capacity_experts" or value is None else 100 * value for name, value in row.items()}
        for row in wide[(len(wide) - 1) % every :: every].iter_rows(named=True)
    ]
    print_rows(headers, rows, "table")
    left_out = "" if found["sequential"].any() else " Capacities that do not hold every event are left out."
    left_out += "" if every == 1 else f" Every {every}th capacity is shown; --format csv has all of them."
    _print_below([f"{title} LRU.{left_out}"])


def _add_figures(row: dict) -> None:
    rate, agreement, missed = row["hit_rate"], row["recorded_agreement"], row["missed_bytes"]
    low, high = row["hit_rate_low"], row["hit_rate_high"]
    row["hit_percent"] = None if rate is None else 100 * rate
    row["interval"] = None if low is None else f"{50 * (high - low):.2g}"
    row["step_misses"] = "/".join(str(row[f"step_misses_p{q}"]) for q in (50, 95, 99)) if row["steps"] else None
    row["missed_gb"] = None if missed is None else missed / 1e9
    row["agreement_percent"] = None if agreement is None else 100 * agreement
    for name, of in (("rows", "all_resident_rows"), ("recorded", "recorded_hit_rate")):
        row[f"{name}_percent"] = None if row[of] is None else 100 * row[of]


def _print_below(texts: list[str]) -> None:
    for text in texts:
        stdout_console().print(f"\n{printable(text)}")
