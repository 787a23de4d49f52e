"""`moetrace lint`: what is wrong or suspicious in a trace file, and a copy without it."""

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moetrace.cli.options.paths import ANY_PATH
from moetrace.cli.options.targets import check_targets
from moetrace.cli.tables.output import format_option, print_json, print_rows, say, stdout_console
from moetrace.spec.errors import UsageError, counted, printable

if TYPE_CHECKING:
    from moetrace.lints import Finding
    from moetrace.lints.leave_out import LeftOut
    from moetrace.trace.format import Trace

_WIDTH = 100  # of the text for people, at most
_SHOWN_RANGES = 4
_COLUMNS = ("code", "level", "what", "effect", "fix", "layers", "rows", "count")
_STYLES = {"error": "bold red", "warning": "bold yellow", "note": "bold"}


def drop_options(command):
    """`--drop-warmup` and `--drop-dense`, for the commands that write a trace."""
    dense = click.option("--drop-dense", is_flag=True, help="Leave out layers that did not route.")
    warmup = click.option("--drop-warmup", is_flag=True, help="Leave out the rows of the engine's warm-up.")
    return warmup(dense(command))


@click.command()
@click.argument("trace", type=ANY_PATH, metavar="TRACE.h5")
@drop_options
@click.option("-o", "--output", "out", type=ANY_PATH, metavar="FIXED.h5", help="With --drop-...: the copy.")
@format_option
@click.pass_context
def command(
    context: click.Context, trace: Path, drop_warmup: bool, drop_dense: bool, out: Path | None, form: str
) -> None:
    """Say what is wrong or suspicious in a trace file, what that does to results, and how to mend it.

    With --drop-warmup or --drop-dense, FIXED.h5 becomes a copy without those rows or layers, and it is FIXED.h5 that is
    judged.

    Exit code 3 if there is an error or a warning, else 0: notes are legitimate, but should be known.
    """
    from moetrace.cli.progress import LateBar
    from moetrace.lints import lint
    from moetrace.lints.leave_out import leave_out
    from moetrace.trace.format import Trace

    if (out is None) == (drop_warmup or drop_dense):
        raise UsageError("-o FIXED.h5 and --drop-warmup or --drop-dense need each other.")
    check_targets({"-o": out}, [trace])
    if out is not None:
        with Trace.open(trace) as opened:
            left_out = leave_out(opened, out, warmup=drop_warmup, dense=drop_dense)
        say(f"{out}: {say_left_out(left_out)}.")
        trace = out
    with Trace.open(trace) as opened:
        rows = opened.rows
        with LateBar("rows", rows) as bar:
            found = lint(opened, bar.advance)
    if not found:
        say(f"{trace}: {counted(rows, 'row')}, nothing found.")
    if form == "json":
        levels = {f"{level}s": sum(one.level == level for one in found) for level in _STYLES}
        print_json({"schema": "moetrace.lint/1", **levels, "findings": [one.to_dict() for one in found]})
    elif form == "csv":
        cells = [one.to_dict() | {"layers": _layers(one, " "), "rows": _rows(one, " ", len(one.rows))} for one in found]
        print_rows({name: name for name in _COLUMNS}, cells, form)
    elif found:
        _print(trace, found)
    if any(one.level != "note" for one in found):
        sys.stdout.flush()  # a broken pipe shows here, and not while Python ends
        context.exit(3)


def say_left_out(left_out: "LeftOut") -> str:
    """The rows and layers left out, for people."""
    parts = []
    if left_out.rows:
        parts.append(f"{counted(left_out.rows, 'row')} of warm-up")
    if left_out.layers:
        parts.append(f"{counted(len(left_out.layers), 'dense layer')} ({_numbers(left_out.layers)})")
    return f"left out {' and '.join(parts)}" if parts else "there was nothing to leave out"


def say_found(trace: "Trace") -> None:
    """Check a trace that was just written, and print the findings to stderr, a line each."""
    from moetrace.cli.progress import LateBar
    from moetrace.lints import lint

    with LateBar("rows judged", trace.rows) as bar:
        found = lint(trace, bar.advance)
    for one in found:
        say(f"  {one.level}: {printable(one.what)}" + (f" Fix: {one.fix}." if one.fix else ""))


def _print(trace: Path, found: Sequence["Finding"]) -> None:
    from rich.text import Text

    console = stdout_console()
    width = min(console.width, _WIDTH)
    counts = [(sum(one.level == level for one in found), level) for level in _STYLES]
    said = [counted(count, level) for count, level in counts if count]
    console.print(f"{printable(str(trace))}: {', '.join(said)}", soft_wrap=True)
    for one in found:
        console.print()
        console.print(Text.assemble((one.level, _STYLES[one.level]), f"  {one.code}"), soft_wrap=True)
        where = [_named("layer", _layers(one, ", ")), _named("row", _rows(one, ", ", _SHOWN_RANGES))]
        lines = [printable(one.what), ", ".join(part for part in where if part), one.effect]
        for line in (*lines, f"Fix: {one.fix}." if one.fix else ""):
            if line:
                console.print(
                    textwrap.fill(line, width - 2, initial_indent="  ", subsequent_indent="  "), soft_wrap=True
                )


def _named(what: str, numbers: str) -> str:
    return f"{what}{'' if numbers.isdecimal() else 's'} {numbers}" if numbers else ""


def _layers(one: "Finding", between: str) -> str:
    return "" if one.layers is None else _numbers(one.layers, between)


def _numbers(numbers: Sequence[int], between: str = ", ") -> str:
    """Increasing numbers, runs of them as `first-last`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return between.join(f"{first}" if first == last else f"{first}-{last}" for first, last in parts)


def _rows(one: "Finding", between: str, shown: int) -> str:
    parts = [f"{start}" if stop == start + 1 else f"{start}-{stop - 1}" for start, stop in one.rows[:shown]]
    return between.join([*parts, *(["…"] if len(one.rows) > shown else [])])
