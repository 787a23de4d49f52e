"""`moetrace analyze cache`: how often experts would have been in a cache of a given size."""

import sys
from pathlib import Path

import click

from moetrace.cli.output import format_option, print_json, print_rows, stdout_console
from moetrace.cli.paths import ANY_PATH
from moetrace.spec.errors import MoetraceError

# The policies and scopes of moetrace.analyze.cache, which takes too long to import for a mere --help.
POLICIES = ("lru", "lfu", "lfu-in-cache", "belady")
_HEADERS = {
    "capacity": "capacity",
    "policy": "policy",
    "phase": "phase",
    "accesses": "accesses",
    "hits": "hits",
    "hit_percent": "hit\n%",
    "compulsory_misses": "first\nuses",
    "missed_gb": "missed\nGB",
    "agreement_percent": "as rec.\n%",
}


@click.command("cache")
@click.argument("trace", type=ANY_PATH, metavar="TRACE.h5")
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
@format_option
def command(
    trace: Path,
    capacities: tuple[str, ...],
    policies: tuple[str, ...],
    scope: str,
    phase: str | None,
    sequential: bool,
    model: str | None,
    form: str,
) -> None:
    """Say how often experts would have been in a cache of a given size, under each policy.

    The experts of one layer in one step are demanded together, each one time, however many rows chose it; caches start
    empty. Belady's policy knows the future: at equal sizes no other keeps more of what is needed. If the trace holds
    what its engine recorded, the last column says how much of that each cache reproduces.
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
            progress=bar.advance,
        )
        title = _title(trace, everything, scope, sequential)
        layers = opened.layers
    if scope == "layer":
        _note_empty(found.select("capacity", "capacity_experts").unique(maintain_order=True).rows(), layers)
    if phase is not None:
        found = found.filter(phase=phase)
        if found.is_empty():
            raise MoetraceError(f"{trace} has no {phase} steps to look at.")
    if form == "json":
        print_json(found.to_dicts())
    elif form == "csv":
        sys.stdout.write(found.write_csv())
    else:
        _print_table(found.to_dicts(), title)


def _note_empty(capacities: list[tuple[str, int | None]], layers: int) -> None:
    for label, experts in capacities:
        if experts is not None and experts < layers:
            click.echo(
                f"moetrace: note: capacity {label} leaves each of the {layers} layers a cache of 0 experts.", err=True
            )


def _title(trace: Path, everything: int, scope: str, sequential: bool) -> str:
    demand = "one choice at a time" if sequential else "a layer's experts of a step together"
    caches = "one cache for all layers" if scope == "global" else "one cache a layer, of an equal part of the capacity"
    return f"{trace}: {everything} experts; {caches}; {demand}."


def _print_table(rows: list[dict], title: str) -> None:
    from moetrace.spec.errors import printable

    headers = dict(_HEADERS)
    for row in rows:
        rate, agreement, missed = row["hit_rate"], row["recorded_agreement"], row["missed_bytes"]
        row["hit_percent"] = None if rate is None else 100 * rate
        row["missed_gb"] = None if missed is None else missed / 1e9
        row["agreement_percent"] = None if agreement is None else 100 * agreement
    for column in ("missed_gb", "agreement_percent"):
        if all(row[column] is None for row in rows):
            del headers[column]
    print_rows(headers, rows, "table")
    stdout_console().print(f"\n{printable(title)}")
