"""The tables of `moetrace analyze cache`: every policy and capacity, and LRU's curve."""

from typing import TYPE_CHECKING

from moetrace.cli.tables.output import print_rows, stdout_console
from moetrace.spec.errors import counted, printable

if TYPE_CHECKING:
    import polars as pl

    from moetrace.trace import Trace

_HEADERS = {
    "capacity": "capacity",
    "policy": "policy",
    "phase": "phase",
    "hit_percent": "hit\n%",
    "interval": "±",
    "step_misses": "misses a step\np50/95/99",
    "regret_points": "regret\npoints",
    "regret_ms_per_step": "regret\nms/step",
    "missed_gb": "missed\nGB",
    "agreement_percent": "as rec.\n%",
}


_MOST_ROWS = 32  # of a curve


def title_of(trace: "Trace", scope: str, sequential: bool) -> str:
    """Return what is demanded of which caches, in a sentence."""
    demand = "one choice at a time" if sequential else "a layer's experts of a step together"
    caches = "one cache for all layers" if scope == "global" else "one cache a layer, of an equal part of the capacity"
    return f"{counted(trace.layers * trace.num_experts, 'expert')}; {caches}; {demand}."


def print_cache(found: "pl.DataFrame", title: str, phase: str | None) -> None:
    """Print the frame of `cache_hits` as a table, and the verdict on decode steps, if there are, or on `phase`."""
    from moetrace.analyze.cache.regret import verdict_lines

    headers, rows = dict(_HEADERS), found.to_dicts()
    for row in rows:
        _add_figures(row)
    for column in ("interval", "regret_points", "regret_ms_per_step", "missed_gb", "agreement_percent"):
        if all(row[column] is None for row in rows):
            del headers[column]
    print_rows(headers, rows, "table")
    shown = "decode" if phase is None and "decode" in found["phase"] else phase or "all"
    _print_below([title, *verdict_lines(found.filter(phase=shown))])


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


def _print_below(texts: list[str]) -> None:
    for text in texts:
        stdout_console().print(f"\n{printable(text)}")
