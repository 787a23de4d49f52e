"""The table of `moetrace replay --energy`: what each part of the machine drew and cost, a row a policy and part."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from moetrace.cli.tables.output import stdout_console
from moetrace.cli.tables.parts import TextColumn, print_parts
from moetrace.results.accounts import unlisted
from moetrace.results.figure_text import digits
from moetrace.spec import System
from moetrace.spec.errors import UsageError, counted

_ALL = "all"
_ENERGY = {"idle_j": "idle\nJ", "active_j": "active\nJ", "link_j": "link\nJ", "energy_j": "energy\nJ"}
_NAMES = {"gpu": "GPU", "ndp": "NDP", "cpu": "CPU", "host": "host memory"}
_DIGITS = 4  # of the largest value of a column


def check_rates(system: System) -> None:
    """Raise UsageError if a system has nothing that an account could be made of."""
    if system.energy is None and system.price is None:
        raise UsageError(
            f"--energy needs the watts or prices of {system.name}, which has neither [energy] nor [price]: add one "
            "(docs/energy.md), as with --set system.price.usd_hour=USD, or name another --system."
        )


def print_accounts(accounts: pl.DataFrame, summary: Mapping[str, Any], system: System) -> None:
    """Print `Result.accounts`: a table of energy, one of price, and what their columns mean; `summary` is its dict."""
    console, tokens = stdout_console(), summary["trace"]["decode_rows"]
    if system.energy is not None:
        rows = _rows(accounts, [*_ENERGY])
        listed = {name: [row[name] for row in rows] for name in _ENERGY}
        columns = [
            _column(_ENERGY[name], values) for name, values in listed.items() if values.count(None) < len(values)
        ]
        print_parts(console, _keys(rows), [columns + _relative(rows, "energy_j", tokens, 1.0, "J a\ntoken")])
        console.print()
    if system.price is not None:
        rows = _rows(accounts, ["price_usd"])
        columns = [_column("price\nUSD", [row["price_usd"] for row in rows])]
        columns += _relative(rows, "price_usd", tokens, 1e6, "USD a mil-\nlion tokens")
        print_parts(console, _keys(rows), [columns])
        console.print()
    for line in [*_legend(system, tokens), *_levels(summary)]:
        console.print(line)


def _keys(rows: Sequence[Mapping[str, Any]]) -> list[TextColumn]:
    """The columns that name policy and part."""
    return [
        TextColumn("policy", [row["policy"] if row["first"] else "" for row in rows], right=False),
        TextColumn("part", [_named(row["part"]) for row in rows], right=False),
    ]


def _rows(accounts: pl.DataFrame, names: Sequence[str]) -> list[dict[str, Any]]:
    """The parts of each policy that have one of these figures, and their sum where there are several."""
    found = []
    known = accounts.filter(pl.any_horizontal(pl.col(names).is_not_null()))
    for policy in known["policy"].unique(maintain_order=True):
        parts = known.filter(policy=policy).to_dicts()
        whole = {name: _sum([part[name] for part in parts]) for name in names}
        shown = [*parts, {"policy": policy, "part": _ALL} | whole] if len(parts) > 1 else parts
        found += [row | {"first": place == 0, "whole": whole} for place, row in enumerate(shown)]
    return found


def _named(part: str) -> str:
    return _NAMES.get(part, part)


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) if known else None


def _relative(
    rows: Sequence[Mapping[str, Any]], name: str, tokens: int, factor: float, heading: str
) -> list[TextColumn]:
    """The share of the policy's sum that a part has, and its part of each token."""
    shares = [None if row[name] is None or not row["whole"][name] else row[name] / row["whole"][name] for row in rows]
    percents = [None if share is None else 100 * share for share in shares]
    columns = [TextColumn("\n%", digits(percents, 1))]
    if tokens:
        each = [None if row[name] is None else factor * row[name] / tokens for row in rows]
        columns.append(_column(heading, each))
    return columns


def _column(heading: str, values: Sequence[float | None]) -> TextColumn:
    return TextColumn(heading, digits(values, significant=_DIGITS))


def _legend(system: System, tokens: int) -> list[str]:
    lines = []
    if system.energy is not None:
        lines.append(
            "Energy: idle is what a part draws at rest, over the whole time; active is what it draws beyond that "
            "while it works"
            + ("." if system.energy.link is None else "; link is what the link draws for what it carries.")
        )
        if missing := unlisted(system):
            listed = ", ".join(map(_named, (part for part in missing if part != "remote")))
            if listed:
                lines.append(
                    f"Not in the account and its sum, as [energy] of {system.name} does not list it: {listed}."
                )
            if "remote" in missing:
                lines.append("Remote functions are not in it: their power is not known to those who pay by use.")
    if system.price is not None:
        lines.append(
            f"Price: {system.usd_hour:g} USD an hour, for the whole time; machine is all without a price of its own."
        )
    if tokens:
        lines.append(f"Tokens are the {counted(tokens, 'decode row')} of the trace.")
    return lines


def _levels(summary: Mapping[str, Any]) -> list[str]:
    """Say at which frequencies the policies ran that have a deadline and levels."""
    means = {policy["name"]: policy.get("mean_frequency") for policy in summary["policies"]}
    told = [f"{name} {100 * mean:.1f} %" for name, mean in means.items() if mean is not None]
    if not told:
        return []
    words = "what the GPU draws beyond idle goes with frequency * voltage^2 of each step's level"
    return [f"Levels: {words}. Mean frequency: {', '.join(told)} of the top."]
