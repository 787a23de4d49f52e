"""`moetrace gate`: the figures of a sweep or a replay against a committed baseline."""

import os
import sys
import textwrap
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moetrace.cli.options.paths import ANY_PATH
from moetrace.cli.tables.output import format_option, print_json, print_rows, print_text, say, stdout_console
from moetrace.spec.errors import MoetraceError, UsageError, printable

if TYPE_CHECKING:
    from moetrace.batch.gate import Gate
    from moetrace.batch.verdict import Judged

_SHOWN_CELLS = 50
_SUMMARY = "GITHUB_STEP_SUMMARY"


@click.command()
@click.argument("folder", type=ANY_PATH, metavar="DIR")
@click.option(
    "--baseline", type=ANY_PATH, required=True, metavar="FILE", help="The committed JSON of accepted figures."
)
@click.option(
    "--tolerance",
    "tolerances",
    multiple=True,
    metavar="T",
    help="How far metrics may move: 0.5%, total_s=0.1% or total_s=0.002 (in its unit); may be repeated. "
    "By default as far as rounding moves them.",
)
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="NAME",
    help="What to compare, as total_s or ttft_s.p99; may be repeated. By default what the baseline holds.",
)
@click.option(
    "--fail-on",
    default="worse,missing,changed",
    show_default=True,
    metavar="VERDICTS",
    help="Verdicts that end with exit code 3; any is all except same.",
)
@click.option("--update", is_flag=True, help="Accept: write the figures of DIR to the baseline.")
@click.option("--junit", type=ANY_PATH, metavar="FILE.xml", help="Also write JUnit XML.")
@click.option("--markdown", type=ANY_PATH, metavar="FILE.md", help="Also write Markdown, as for a job's summary.")
@click.option("--benchmark-json", type=ANY_PATH, metavar="FILE.json", help="Also write github-action-benchmark's JSON.")
@format_option
@click.pass_context
def command(
    context: click.Context,
    folder: Path,
    baseline: Path,
    tolerances: tuple[str, ...],
    metrics: tuple[str, ...],
    fail_on: str,
    update: bool,
    form: str,
    **files: Path | None,
) -> None:
    """Compare the figures of a sweep or a replay with a committed baseline.

    DIR is what moetrace sweep -o or moetrace replay -o wrote. Each of its cells is worse, missing, changed (other
    inputs, or a metric moved of which neither less nor more is better), better, new or the same; the table names the
    changes.

    Where GITHUB_STEP_SUMMARY is set, the Markdown is added to that file.

    Exit code 3 if a cell has one of the verdicts of --fail-on, else 0.
    """
    from moetrace.batch.gate import gate

    targets = {f"--{name.replace('_', '-')}": path for name, path in files.items() if path is not None}
    summary = os.environ.get(_SUMMARY) or None
    _check_targets(folder, baseline, targets, update, summary)
    found = gate(
        folder,
        baseline,
        tolerance=tolerances,
        metrics=metrics or None,
        fail_on="any" if fail_on == "any" else [name.strip() for name in fail_on.split(",") if name.strip()],
        update=update,
    )
    _write(found, files, summary)
    if form == "json":
        print_json(found.to_dict())
    elif form == "csv":
        print_rows({name: name for name in found.rows()[0]}, found.rows(), form)
    else:
        _print(found)
    _say(found, baseline)
    if not found.passed:
        sys.stdout.flush()  # a broken pipe shows here, and not while Python ends
        context.exit(3)


def _check_targets(folder: Path, baseline: Path, targets: dict[str, Path], update: bool, summary: str | None) -> None:
    """Raise now if a file could not be written, or would replace another one of this run."""
    from moetrace.trace.atomic import check_writable, keep_inputs, real_path

    for (one, first), (other, second) in combinations([("--baseline", baseline), *targets.items()], 2):
        if real_path(first) == real_path(second):
            raise UsageError(f"{one} and {other} are the same file, {second}: choose another name.")
    for path in targets.values():
        keep_inputs(path, [folder / "sweep.json", folder / "summary.json", folder / "cells.parquet"])
        check_writable(path)
    if update:
        check_writable(baseline)
    if summary is not None:
        try:
            with Path(summary).open("ab"):
                pass
        except (OSError, ValueError) as error:
            raise MoetraceError(f"{_SUMMARY} names {summary}, which cannot be written: {_why(error)}.") from None


def _write(found: "Gate", files: dict[str, Path | None], summary: str | None) -> None:
    from moetrace.batch.gate_files import benchmark_json, junit, markdown
    from moetrace.trace.atomic import whole_file

    texts = {
        "junit": lambda: junit(found),
        "markdown": lambda: markdown(found).encode(),
        "benchmark_json": lambda: benchmark_json(found).encode(),
    }
    for name, text in texts.items():
        path = files[name]
        if path is not None:
            with whole_file(path) as output:
                output.write(text())
    if summary is not None:
        try:
            with Path(summary).open("ab") as file:
                file.write(markdown(found).encode() + b"\n")
        except OSError as error:
            raise MoetraceError(f"{_SUMMARY} names {summary}, which cannot be written: {_why(error)}.") from None


def _print(found: "Gate") -> None:
    """Print the cells that are not the same, the gravest first."""
    moved = found.moved
    if moved:
        _print_cells(moved[:_SHOWN_CELLS])
        if len(moved) > _SHOWN_CELLS:
            print_text(f"{len(moved) - _SHOWN_CELLS:,} more cells are not shown; --format csv has all.")
        reasons: dict[str, list[str]] = {}
        for cell in moved:
            reasons.setdefault(cell.why, []).append(cell.name)
        print_text("")
        for why, names in [*reasons.items()][:_SHOWN_CELLS]:
            more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            print_text(_folded(printable(f"{names[0]}{more}: {why}.")))
    print_text(f"{found.counted()}.")


def _print_cells(cells: Sequence["Judged"]) -> None:
    """Print each cell's verdict and name, and under it a line for each metric that moved; all columns as one."""
    from moetrace.batch.gate_files import change, shown, worth_showing

    moved = [[(one, *shown(one), change(one)) for one in worth_showing(cell)] for cell in cells]
    texts = [
        (one.metric, before, now, unit, by, "" if one.verdict in (cell.verdict, "same") else one.verdict)
        for cell, several in zip(cells, moved, strict=True)
        for one, before, now, unit, by in several
    ]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = iter(texts)
    for cell, several in zip(cells, moved, strict=True):
        print_text(f"{cell.verdict:<7}  {printable(cell.name)}")
        for _ in several:
            metric, before, now, unit, by, verdict = (
                f"{text:{width}}" for text, width in zip(next(lines), widths, strict=True)
            )
            was = "" if before.strip() == "-" else f"{before.strip()} ->"
            figures = f"{was:>{widths[1] + 3}} {now.strip():>{widths[2]}} {unit}"
            print_text(f"         {metric}  {figures}  {by.strip():>{widths[4]}}  {verdict}".rstrip())


def _say(found: "Gate", baseline: Path) -> None:
    """Print notes that are not a verdict on a cell to stderr."""
    for note in found.notes:
        say(f"moetrace: note: {printable(note)}")
    if found.updated:
        failing = {cell.name for cell in found.cells if cell.failed}
        accepted = len(found.cells) - len({*found.dropped} | failing)
        also = f", and that {len(failing):,} fail" if failing else ""
        say(f"{baseline}: {accepted:,} cell{'' if accepted == 1 else 's'} accepted{also}.")
        for name in found.dropped:
            lost = "failed" if name in failing else "is no longer there"
            say(f"{baseline}: dropped {printable(name)}, which {lost}.")
    elif found.failed:
        say(
            f"moetrace: {len(found.failed):,} of {len(found.cells):,} cells fail the gate; if that is meant, accept it "
            "with --update and commit the baseline."
        )


def _folded(text: str) -> str:
    """The sentence in lines as wide as the terminal."""
    return textwrap.fill(text, stdout_console().width, break_long_words=False, break_on_hyphens=False)


def _why(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
