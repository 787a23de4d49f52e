"""`moetrace analyze cache`: how often experts would have been in a cache of a given size."""

import sys
from pathlib import Path

import click

from moetrace.cli.output import format_option, print_json, print_rows, stdout_console

# The policies and scopes of moetrace.analyze.cache, which takes too long to import for a mere --help.
POLICIES = ("lru", "fifo", "lfu", "lfu-in-cache", "belady")
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


@click.command("cache")
@click.argument("trace", type=click.Path(path_type=Path), metavar="TRACE.h5")
@click.option(
    "--capacity",
    "capacities",
    multiple=True,
    metavar="C",
    help="Experts (400) or bytes (3000MiB, 3GB) that the cache of all layers holds; may be repeated. By default an "
    "eighth, a quarter and a half of all experts.",
)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    type=click.Choice(POLICIES),
    default=("lru", "lfu", "belady"),
    show_default=True,
    help="Who is evicted; may be repeated.",
)
@click.option(
    "--scope",
    type=click.Choice(["global", "layer"]),
    default="global",
    show_default=True,
    help="One cache that all layers share, or one of an equal part for each layer.",
)
@click.option(
    "--phase",
    type=click.Choice(["all", "prefill", "decode", "mixed"]),
    help="Print only this phase (all: all steps together); everything is replayed all the same.",
)
@click.option("--sequential", is_flag=True, help="Demand one choice at a time, as general cache simulators do.")
@click.option("--model", metavar="M", help="Preset or TOML file with the sizes of experts, if the trace has none.")
@click.option("--system", metavar="S", help="Preset or TOML file of the machine that fetches what is missed.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the bootstrap.")
@format_option
def command(
    trace: Path,
    capacities: tuple[str, ...],
    policies: tuple[str, ...],
    scope: str,
    phase: str | None,
    sequential: bool,
    model: str | None,
    system: str | None,
    seed: int,
    form: str,
) -> None:
    """Say how often experts would have been in a cache of a given size, under each policy.

    The experts of one layer in one step are demanded together, each one time, however many rows chose it; caches start
    empty. Belady's policy knows the future: at equal sizes no other keeps more of what is needed, and what it misses
    is more than fits. Hit rates come with half of their 95 % confidence interval over requests. If the trace holds what
    its engine recorded, the last column says how much of that each cache reproduces.
    """
    from moetrace.cli.bars import LateBar
    from moetrace.cli.compiling import announce_compiling
    from moetrace.trace import Trace

    with Trace.open(trace) as opened, announce_compiling(), LateBar("rows", opened.rows) as bar:
        from moetrace.analyze.cache import cache_hits

        everything = opened.layers * opened.num_experts
        given = capacities or dict.fromkeys(str(max(1, everything // part)) for part in (8, 4, 2))
        found = cache_hits(
            opened,
            list(dict.fromkeys(given)),
            list(dict.fromkeys(policies)),
            scope=scope,
            sequential=sequential,
            model=model,
            system=system,
            seed=seed,
            progress=bar.advance,
        )
        title = _title(trace, everything, scope, sequential)
    if phase is not None:
        found = found.filter(phase=phase)
    if form == "json":
        print_json(found.to_dicts())
    elif form == "csv":
        sys.stdout.write(found.write_csv())
    else:
        from moetrace.analyze.regret import verdict_lines

        shown = "decode" if phase is None and "decode" in found["phase"] else phase or "all"
        _print_table(found.to_dicts(), [title, *verdict_lines(found.filter(phase=shown))])


def _title(trace: Path, everything: int, scope: str, sequential: bool) -> str:
    demand = "one choice at a time" if sequential else "a layer's experts of a step together"
    caches = "one cache for all layers" if scope == "global" else "one cache a layer, of an equal part of the capacity"
    return f"{trace}: {everything} experts; {caches}; {demand}."


def _print_table(rows: list[dict], below: list[str]) -> None:
    from moetrace.spec.errors import printable

    headers = dict(_HEADERS)
    for row in rows:
        rate, agreement, missed = row["hit_rate"], row["recorded_agreement"], row["missed_bytes"]
        low, high = row["hit_rate_low"], row["hit_rate_high"]
        row["hit_percent"] = None if rate is None else 100 * rate
        row["interval"] = None if low is None else f"{50 * (high - low):.2g}"
        row["step_misses"] = "/".join(str(row[f"step_misses_p{q}"]) for q in (50, 95, 99)) if row["steps"] else None
        row["missed_gb"] = None if missed is None else missed / 1e9
        row["agreement_percent"] = None if agreement is None else 100 * agreement
    for column in ("interval", "regret_points", "regret_ms_per_step", "missed_gb", "agreement_percent"):
        if all(row[column] is None for row in rows):
            del headers[column]
    print_rows(headers, rows, "table")
    for text in below:
        stdout_console().print(f"\n{printable(text)}")
