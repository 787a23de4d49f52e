"""`moetrace sweep --search`: how a search runs and prints."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moetrace.cli.tables.output import figure, print_csv, print_json, print_rows, print_text, say
from moetrace.results.figure_text import digits
from moetrace.spec.errors import printable

if TYPE_CHECKING:
    from moetrace.batch.search import Search, Trial
    from moetrace.batch.search_space import SearchChoices

_SHOWN = 12  # sentences about failures
_BEST = 5


def search(
    source: Path,
    folder: Path,
    jobs: int,
    dask: str | None,
    pareto: str | None,
    slos: tuple[str, ...],
    code: bool,
    form: str,
) -> None:
    """Search, and print the best trials; `folder` keeps the replays."""
    from moetrace.batch.grid import load_space
    from moetrace.batch.search import run_search
    from moetrace.batch.search_space import check_choices
    from moetrace.batch.slo import parse_slos
    from moetrace.batch.sweep import farm_of
    from moetrace.batch.sweep_folder import SweepFolder
    from moetrace.cli.progress import LateBar

    space = load_space(source)
    choices = check_choices(space._replace(pareto=pareto or space.pareto, slos=parse_slos(slos) or space.slos))
    with farm_of(jobs, dask) as (farm, dashboard):
        if dashboard:
            say(f"moetrace: Dask's dashboard: {dashboard}")
        with LateBar("trials", _judged(choices)) as bar:
            found = run_search(choices, SweepFolder(folder), farm, bar.advance, code)
    _report(found)
    if form == "json":
        print_json(found.to_dict() | {"trials": found.frame.to_dicts()})
    elif form == "csv":
        print_csv(found.frame)
    else:
        _print(found)
    if found.best is None or found.best.miss > 0:
        sys.stdout.flush()
        raise click.exceptions.Exit(1 if found.best is None else 3)


def _judged(choices: "SearchChoices") -> int:
    """About how many trials will be judged, over all parts."""
    halving = choices.halving
    return 1 + sum(-(-halving.trials // halving.keep**part) for part in range(halving.parts))


def _report(found: "Search") -> None:
    halving = found.choices.halving
    states = found.to_dict()["states"]
    failed = [trial for trial in [found.reference, *found.trials] if trial.state == "failed"]
    for error in list(dict.fromkeys(trial.error for trial in failed))[:_SHOWN]:
        names = [trial.cell.name for trial in failed if trial.error == error]
        more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
        say(f"moetrace: {names[0]}{more} failed: {error}")
    fewer = "" if len(found.trials) == halving.trials else f" (of {halving.trials:,}; there was no other to try)"
    say(
        f"moetrace: {len(found.trials):,} trials{fewer}: {states['complete']:,} over the whole trace, "
        f"{states['stopped']:,} stopped before, {states['failed']:,} failed; {found.computed:,} replays of a part or "
        f"all were made, {found.reused:,} found finished."
    )


def _print(found: "Search") -> None:
    """Print the best trials over the whole trace, the reference, and how to replay the best."""
    from moetrace.batch.command import replay_command
    from moetrace.results.record import METRICS

    halving, best = found.choices.halving, found.best
    complete = [trial for trial in found.trials if trial.state == "complete"]
    shown = sorted(complete, key=lambda trial: (trial.order(halving.maximize), trial.number))[:_BEST]
    columns = [name for name in found.frame.columns[6:-1] if name != "slo_miss"]
    chosen = {row["trial"]: row for row in found.frame.iter_rows(named=True)}
    against = found.reference.value
    factor, sign = METRICS[halving.objective].shown
    rows = [
        {name: chosen[trial.number][name] for name in columns}
        | {"value": None if trial.value is None else factor * trial.value}
        | {"gain": _gain(trial.value, against, halving.maximize), "miss": _missed(trial)}
        | {"trial": trial.number or "first"}
        for trial in [*shown, found.reference]
    ]
    headers = {"trial": "trial"} | {name: name.removeprefix("policy.") for name in columns}
    headers |= {"value": f"{halving.objective} {sign}".rstrip(), "gain": "gain"}
    print_rows(headers | ({"miss": "misses %"} if found.choices.space.slos else {}), rows, "table")
    if best is None:
        return
    print_text("")
    for note in found.sweep.notes:
        print_text(printable(note))
    if best.miss > 0:
        least = f"trial {best.number}" if best.number else "the first of each list"
        print_text(f"No trial keeps the limits: {least} misses them least.")
    print_text(
        f"The best of {len(found.trials)} trials by {halving.objective}, {'more' if halving.maximize else 'less'} is "
        f"better: {figure(factor * (best.value or 0.0))} {sign}".rstrip()
        + ("" if best.number else ", of the first of each list")
        + ". Gains are over the first of each list, without ranges.\nReplay the best:"
    )
    print_text(f"  {replay_command(best.cell)}")


def _missed(trial: "Trial") -> str:
    return "-" if trial.value is None else digits([100 * trial.miss], 1)[0] if trial.miss else "kept"


def _gain(value: float | None, first: float | None, more: bool) -> str | None:
    """How many times better than the first."""
    if not value or not first:
        return None
    return f"{value / first if more else first / value:.2f}x"
