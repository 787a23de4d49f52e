"""`moetrace sweep`: a grid of replays, resumable, on this machine or on a Dask cluster."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moetrace.cli.options.code import code_option
from moetrace.cli.options.figures import FIGURE, slo_option
from moetrace.cli.options.paths import ANY_PATH, FOLDER
from moetrace.cli.options.without_effect import refuse
from moetrace.cli.tables.output import format_option, print_csv, print_json, say
from moetrace.spec.cores import cores
from moetrace.spec.errors import UsageError, counted

if TYPE_CHECKING:
    from moetrace.batch.sweep import Sweep, SweepPlan

_SHOWN_ERRORS = 10


@click.command()
@click.argument("source", type=ANY_PATH, metavar="SWEEP.toml")
@click.option("-o", "--output", "folder", type=FOLDER, metavar="DIR", help="Where results are kept, and found again.")
@click.option("--jobs", type=click.IntRange(1), metavar="N", help="Processes; by default one a core.")
@click.option("--dask", metavar="ADDRESS", help="Run on the workers of this Dask scheduler, as tcp://host:8786.")
@click.option("--dry-run", is_flag=True, help="Print the cells, and an estimate of the time; replay no more than that.")
@click.option("--search", "searches", is_flag=True, help="Look for the best policy instead of replaying all.")
@click.option(
    "--pareto",
    type=click.Choice(["gpu_memory_bytes", "link_bytes", "price", "energy_j", "price_usd"]),
    help="The cost that the front sets against latency; by default the file's, else GPU memory.",
)
@slo_option
@click.option("--sort", type=FIGURE, metavar="FIGURE", help="Best cells by this figure first, as tpot_s.p99.")
@click.option("--top", type=click.IntRange(1), metavar="N", help="Print the first N cells.")
@click.option("--columns", type=FIGURE, metavar="A,B", help="Figures to print, as total_s,tpot_s.p99.")
@click.option(
    "--baseline", metavar="AXIS[=VALUE]", help="Reference of speed-ups, as slots=24; by default the first policy."
)
@code_option
@format_option
def command(
    source: Path,
    folder: Path | None,
    jobs: int | None,
    dask: str | None,
    dry_run: bool,
    searches: bool,
    pareto: str | None,
    slos: tuple[str, ...],
    sort: str | None,
    top: int | None,
    columns: str | None,
    baseline: str | None,
    code: bool,
    form: str,
) -> None:
    """Replay a grid of traces, models, systems, policies, slots and single fields.

    Every list in SWEEP.toml is an axis. -o DIR keeps each cell's result under the hash of all that it depends on: the
    same command goes on where it stopped, and a cell that did not change costs nothing. DIR also gets sweep.json and
    cells.parquet. A cell that fails is named and does not stop the others; the exit code is then 1.

    The table marks the Pareto front: cells that no other of the same trace beats in both latency and GPU memory
    (or link bytes, price or energy). Cells that know the future or do not fit the machine are marked, and never on the
    front; nor are cells that miss a limit of --slo.

    --sort, --top, --columns and --baseline choose the printed part; DIR gets everything.

    --search takes the lists of the file as choices, and ranges of numbers from its [search] table: Optuna proposes,
    and the best trials of a part of the trace go on to a longer one (extra `search`). If no trial keeps
    the limits, the exit code is 3.
    """

    if folder is None and not dry_run:
        raise UsageError("A sweep keeps its results in a folder: name one with -o DIR.")
    if jobs is not None and dask is not None:
        raise UsageError("--jobs is for this machine, --dask for a cluster: give one of them.")
    if searches:
        from moetrace.cli.commands.searching import search

        if dry_run:
            raise UsageError("A search decides as it goes what to replay, so it has no --dry-run.")
        refuse(("sort", "top", "columns", "baseline"), "is for a sweep, not for --search.")
        search(source, folder or Path(), jobs or cores(), dask, pareto, slos, code, form)
        return
    from moetrace.cli.tables.sweep_table import print_sweep, view_of

    view = view_of(columns, sort, top, baseline)
    if not dry_run and dask is None and (jobs or cores()) > 1:
        from moetrace.batch.processes import start_early

        start_early()
    from moetrace.batch.sweep import SweepPlan

    plan = SweepPlan(source, folder, pareto, reads=dry_run, code=code, slo=slos)
    axis, _, value = (baseline or "").partition("=")
    if baseline is not None:
        plan.grid.check_axis(axis, value or None)  # before the work, not after it
    if dry_run:
        _print_plan(plan, jobs or cores(), form)
        return
    sweep = _run(plan, jobs, dask)
    _report(sweep)
    cells = sweep.against(axis, value or None) if baseline is not None else sweep.cells
    if form == "json":
        print_json(sweep.to_dict() | {"cells": view.of(cells).to_dicts()})
    elif form == "csv":
        print_csv(view.of(cells))
    else:
        print_sweep(cells, plan.pareto, sweep.notes, view)
    if sweep.failed:
        sys.stdout.flush()
        raise click.exceptions.Exit(1)


def _run(plan: "SweepPlan", jobs: int | None, dask: str | None) -> "Sweep":
    from moetrace.batch.sweep import farm_of
    from moetrace.cli.progress import LateBar

    left = len(plan.missing)
    if jobs is None:
        jobs = min(cores(), max(left, 1))
    with farm_of(jobs, dask) if left else nullcontext((None, None)) as (farm, dashboard):
        if dashboard:
            say(f"moetrace: Dask's dashboard: {dashboard}")
        if farm is None:
            from moetrace.batch.executors import local_farm

            farm = local_farm(1)
        done = 0
        with LateBar("cells", left) as bar:

            def progress(count: int) -> None:
                nonlocal done
                done += count
                bar.advance(count)

            try:
                return plan.run(farm, progress)
            except (KeyboardInterrupt, SystemExit):
                say(f"moetrace: {done:,} of {counted(left, 'cell')} finished and kept; the same command goes on.")
                raise


def _report(sweep: "Sweep") -> None:
    """Say how many cells were replayed or reused, and why the rest failed."""
    for warning, times in sweep.warnings.items():
        say(f"moetrace: note: {warning}{f' ({times:,} cells)' if times > 1 else ''}")
    by_error: dict[str, list[str]] = {}
    for name, error in sweep.failed.items():
        by_error.setdefault(error, []).append(name)
    for error, names in list(by_error.items())[:_SHOWN_ERRORS]:
        more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
        say(f"moetrace: {names[0]}{more} failed: {error}")
    if len(by_error) > _SHOWN_ERRORS:
        say(f"moetrace: {len(by_error) - _SHOWN_ERRORS:,} more errors are in sweep.json.")
    same = len(sweep.results) - sweep.computed - sweep.reused
    parts = [
        f"{sweep.computed:,} replayed",
        f"{sweep.reused:,} found finished",
        *([f"{same:,} the same as another"] if same > 0 else []),
        *([f"{len(sweep.failed):,} failed"] if sweep.failed else []),
    ]
    say(f"moetrace: {counted(len(sweep.listed), 'cell')}: {', '.join(parts)}.")
    if sweep.unused and all(cell.key for cell in sweep.listed):  # what a cell without a key has found is not known
        say(
            f"moetrace: also there: {counted(sweep.unused, 'finished cell')} not of this sweep (changed inputs, or an "
            "earlier version), which nothing needs."
        )


def _print_plan(plan: "SweepPlan", jobs: int, form: str) -> None:
    """Print the cells, each with what would be done, and how long that takes."""
    from moetrace.cli.tables.output import print_rows

    missing = {id(cell) for cell in plan.missing}
    rows = []
    for cell in plan.cells:
        state = "replay" if id(cell) in missing else "failed" if cell.error else "same as another"
        state = "finished" if cell.key in plan.found else state
        rows.append({"name": cell.name, "state": state, "cell": cell.key, "error": cell.error})
    _say_estimate(plan, len(rows), jobs)
    headers = {"name": "cell", "state": "state"} if form == "table" else {key: key for key in rows[0]}
    if form == "table" and any(cell.error for cell in plan.cells):
        headers["error"] = "error"
    print_rows(headers, rows, form)


def _say_estimate(plan: "SweepPlan", cells: int, jobs: int) -> None:
    """Say how many cells are left, and how long they take."""
    if not plan.missing:
        say(f"moetrace: {counted(cells, 'cell')}, none of them left to replay.")
        return
    estimate = plan.estimate()
    if estimate.unmeasured:
        say(
            f"moetrace: {counted(estimate.unmeasured, 'cell')} of policies in Python files are not in the estimate: a "
            "dry run does not run them."
        )
    if not estimate.sampled:
        say(f"moetrace: {counted(cells, 'cell')}, {estimate.cells:,} to replay.")
        return
    say(
        f"moetrace: {counted(cells, 'cell')}, {estimate.cells:,} to replay: about "
        f"{_duration(estimate.seconds / jobs)} with {counted(jobs, 'job')}. Measured on the first steps of each trace "
        f"with {estimate.sampled} of the cells; starting the jobs comes on top."
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
