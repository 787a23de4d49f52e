"""`moetrace analyze prefetch`: what predictors of the next layer's experts are worth."""

from pathlib import Path
from typing import Any

import click

from moetrace.cli.options.paths import ANY_PATH
from moetrace.cli.options.phases import check_phase, scope_option
from moetrace.cli.options.presets import MODEL, SYSTEM
from moetrace.cli.options.targets import check_picture, check_targets
from moetrace.cli.options.without_effect import refuse
from moetrace.cli.tables.output import format_option, print_csv, print_json, print_rows, stdout_console
from moetrace.spec.errors import counted, printable

# The predictors of moetrace.analyze.prefetch.value, which takes too long to import for a mere --help.
PREDICTORS = ("last-token", "frequency", "ewma", "transition", "recorded", "oracle")
DEFAULT_PREDICTORS = ("last-token", "frequency", "ewma", "transition", "oracle")
_HEADERS = {
    "predictor": "predictor",
    "phase": "phase",
    "recall_percent": "recall\n%",
    "precision_percent": "precision\n%",
    "misses": "misses",
    "covered_misses": "covered",
    "timely_hits": "in time",
    "displaced_percent": "displaced\n%",
    "prefetched_gb": "fetched\nGB",
    "wasted_gb": "wasted\nGB",
}


@click.command("prefetch")
@click.argument("trace", type=ANY_PATH, metavar="TRACE.h5")
@click.option(
    "--capacity",
    metavar="C",
    help="Capacity of the LRU cache, as in analyze cache; by default a quarter of all experts.",
)
@click.option(
    "--predictor",
    "predictors",
    multiple=True,
    type=click.Choice(PREDICTORS),
    default=DEFAULT_PREDICTORS,
    show_default=True,
    help="May be repeated.",
)
@click.option("--most", type=click.IntRange(1), metavar="M", help="Experts to name a layer; by default the top-k.")
@click.option("--ahead", type=int, default=1, show_default=True, metavar="D", help="Layers that they are named ahead.")
@click.option("--recall", type=click.FloatRange(0, 1), default=0.9, show_default=True, help="Recall of the oracle.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of the oracle.")
@scope_option
@click.option("--phase", type=click.Choice(["all", "prefill", "decode", "mixed"]), help="Print only this phase.")
@click.option(
    "--system", type=SYSTEM, metavar="S", help="Preset or TOML file of the machine, to tell what arrives in time."
)
@click.option(
    "--model",
    type=MODEL,
    metavar="M",
    help="Preset or model file of the model, if not the one that the trace names.",
)
@click.option("--plot", "picture", type=ANY_PATH, metavar="FILE", help="Draw it: FILE.png or .html.")
@format_option
def command(
    trace: Path, capacity: str | None, phase: str | None, form: str, picture: Path | None, **asked: Any
) -> None:
    """Say what predictors of the next layer's experts are worth to an LRU cache.

    While layers compute, what a predictor names of a layer to come, and is not resident, is fetched. Covered are misses
    that were named; in time, those that had arrived on the machine of --system; wasted, what arrived in vain.
    docs/prefetch.md defines all of it.
    """
    from moetrace.cli.progress import LateBar
    from moetrace.trace import Trace

    _check_options(asked["predictors"], asked["system"])
    check_targets({"--plot": picture}, [trace, asked["system"], asked["model"]])
    check_picture(picture)
    with Trace.open(trace) as opened, LateBar("rows", opened.rows) as bar:
        from moetrace.analyze.prefetch.value import prefetch_value

        check_phase(opened, phase)
        everything = opened.layers * opened.num_experts
        capacity = capacity or str(max(1, everything // 4))
        names = list(dict.fromkeys(asked.pop("predictors")))
        found = prefetch_value(opened, capacity, names, progress=bar.advance, **asked)
    if phase is not None:
        found = found.filter(phase=phase)
    below = f"{trace}: {counted(everything, 'expert')}; an LRU cache of {capacity}."
    if picture is not None:
        from moetrace.show.plots.prefetch_plot import plot
        from moetrace.trace.atomic import write_whole

        write_whole({picture: plot(found, picture.suffix[1:].lower(), trace.name, below.partition(": ")[2])})
    if form == "json":
        print_json(found.to_dicts())
    elif form == "csv":
        print_csv(found)
    else:
        _print_table(found.to_dicts(), below)


def _check_options(predictors: tuple[str, ...], system: str | None) -> None:
    """Refuse what would have no effect."""
    if "oracle" not in predictors:
        refuse(("recall", "seed"), "is for --predictor oracle.")
    if set(predictors) <= {"oracle", "recorded"}:
        refuse(("most",), "is for predictors other than oracle and recorded, which name any number.")
    if system is None and "transition" not in predictors:
        refuse(("ahead",), "is for --predictor transition, or for --system, on which it gives a fetch more time.")


def _print_table(rows: list[dict], below: str) -> None:
    headers = dict(_HEADERS)
    for row in rows:
        for name in ("recall", "precision", "displaced"):
            row[f"{name}_percent"] = None if row[name] is None else 100 * row[name]
        for name in ("prefetched", "wasted"):
            row[f"{name}_gb"] = None if row[f"{name}_bytes"] is None else row[f"{name}_bytes"] / 1e9
    for column in ("timely_hits", "prefetched_gb", "wasted_gb"):
        if all(row[column] is None for row in rows):
            del headers[column]
    print_rows(headers, rows, "table")
    stdout_console().print(f"\n{printable(below)}")
