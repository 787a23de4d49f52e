"""``moetrace calibrate``: the constants of a real machine, from measured times."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moetrace.cli.options.paths import ANY_PATH
from moetrace.cli.options.presets import SYSTEM
from moetrace.cli.options.targets import check_targets
from moetrace.cli.tables.output import figure, format_option, print_json, print_rows, print_text, say, stdout_console
from moetrace.spec.errors import UsageError, counted

if TYPE_CHECKING:
    from moetrace.calibration import Calibrated, Measured

_FILE = click.Path(dir_okay=False, readable=False, path_type=Path)
# Groups of columns for layers of experts, and for copies; errors in percent.
_ERRORS = {"median_error": "error\nmedian %", "p90_error": "error\np90 %"}
_KERNELS = (
    {"start_us": "start\nus", "compute_efficiency": "compute\nefficiency", "memory_efficiency": "memory\nefficiency"},
    {"bandwidth_gb_s": "bandwidth\nGB/s", "points": "points", "shapes": "shapes"},
    _ERRORS,
    {"sheet_median_error": "data sheet\nmedian %", "sheet_p90_error": "data sheet\np90 %"},
)
_COPIES = (
    {"start_us": "latency\nus", "bandwidth_gb_s": "bandwidth\nGB/s"},
    {"points": "points", "shapes": "sizes"},
    _ERRORS,
)
_TRANSFERS = (
    {"dispatch_latency_us": "dispatch\nus", "combine_latency_us": "combine\nus", "row_ns": "row\nns"},
    {"bandwidth_gb_s": "bandwidth\nGB/s", "points": "points", "shapes": "shapes"},
    _ERRORS,
)


@click.command()
@click.argument("table", type=ANY_PATH, required=False)
@click.option(
    "--system", "base", type=SYSTEM, metavar="S", help="Preset or TOML file to begin with, with the data sheet's peaks."
)
@click.option("-o", "--output", type=_FILE, metavar="SYSTEM.toml", help="Write the calibrated system.")
@click.option("--gpu", metavar="NAME", help="Use the rows of this GPU (column gpu).")
@click.option("--dtype", metavar="NAME", help="Use the rows of this type of weights (column dtype or moe_dtype).")
@click.option("--framework", metavar="NAME", help="Use the rows of this framework (column framework).")
@click.option("--max-rows", type=click.IntRange(1), default=256, show_default=True, help="Leave out larger layers.")
@click.option(
    "--cache-mb",
    type=click.FloatRange(0, 1e6),
    default=0.0,
    show_default=True,
    help="The GPU's last cache: leave out layers whose weights fit it.",
)
@click.option(
    "--port-gb-s",
    type=click.FloatRange(0, 1e6, min_open=True),
    default=1800.0,
    show_default=True,
    help="For a network: rate of a GPU's port in each direction, the most that a fit may reach.",
)
@click.option("--measure", is_flag=True, help="Time this machine: CPU, disk, and a CUDA device if there is one.")
@click.option(
    "--only", "parts", multiple=True, metavar="PART", help="With --measure: cpu, disk or cuda; may be repeated."
)
@click.option("--folder", type=ANY_PATH, help="With --measure: where the disk is timed.  [default: temporary folder]")
@click.option("--save-table", type=_FILE, metavar="T.csv", help="With --measure: keep the times, for TABLE.")
@format_option
def command(
    table: Path | None,
    base: str | None,
    output: Path | None,
    gpu: str | None,
    dtype: str | None,
    framework: str | None,
    max_rows: int,
    cache_mb: float,
    port_gb_s: float,
    measure: bool,
    parts: tuple[str, ...],
    folder: Path | None,
    save_table: Path | None,
    form: str,
) -> None:
    """Fit the constants of a system to measured times.

    TABLE is a Parquet or CSV file of times of one layer's experts (columns hidden, intermediate, experts, top_k,
    rows, bits or dtype, seconds or latency_ms), of copies (part link or disk; bytes, seconds) and of a cluster's
    transfers (part network, network.decode or network.prefill; stage, hidden, experts, top_k, gpus, rows of each
    GPU, bits, seconds). --measure times this machine instead, which takes about a minute: run nothing else
    meanwhile. Shapes are halved, and each half is predicted from the other: these errors are printed, beside those
    of the data sheet's peaks with a start for each expert, and written into the TOML. A note tells of fits that
    look wrong, as from times in ms that are taken as s. -o replaces a file that is there, but no file that it
    reads.
    """
    wanted = {"gpu": gpu, "dtype": dtype, "framework": framework}
    choose = {column: value for column, value in wanted.items() if value is not None}
    _check(table, base, output, measure, parts, folder, save_table, bool(choose))
    from moetrace.calibration import calibrate, read_measured
    from moetrace.trace.atomic import write_whole

    check_targets({"--output": output, "--save-table": save_table}, (table, base))
    if measure:
        _check_parts(base, parts)
    measured = read_measured(table, choose) if table is not None else _measured(parts, folder, save_table)
    if base is None:
        _say_notes(measured.notes)
        return
    name = output.name.removesuffix(".toml") if output else None
    found = calibrate(measured, base, name=name, cache_mb=cache_mb, max_rows=max_rows, port_gb_s=port_gb_s)
    _say_notes(found.notes)
    _print(found, form)
    if output is not None:
        if not found.written:
            raise UsageError(f"--output {output} was not written: no fitted value has a place in it; leave out -o.")
        from moetrace.calibration.system_file import moved_beside

        write_whole({output: moved_beside(found.text, base, output.parent).encode()})
        say(f"{output}: system {found.system.name}, {found.system.how_known}.")


def _check(
    table: Path | None,
    base: str | None,
    output: Path | None,
    measure: bool,
    parts: tuple[str, ...],
    folder: Path | None,
    save_table: Path | None,
    chosen: bool,
) -> None:
    if (table is None) == (not measure):
        raise UsageError("Give either a TABLE of measured times or --measure.")
    if not measure and (parts or folder or save_table):
        raise UsageError("--only, --folder and --save-table go with --measure only.")
    if measure and chosen:
        raise UsageError("--gpu, --dtype and --framework choose rows of a TABLE: leave them out with --measure.")
    if base is None and (table is not None or output is not None or save_table is None):
        raise UsageError("--system is missing: name a preset or a TOML file that has the data sheet's peaks.")
    if output is not None and output.suffix != ".toml":
        raise UsageError(f"--output {output}: the name must end with .toml, so that --system takes it.")
    if save_table is not None and save_table.suffix != ".csv":
        raise UsageError(f"--save-table {save_table}: the name must end with .csv.")


def _check_parts(base: str | None, parts: tuple[str, ...]) -> None:
    """Raise UsageError before the work, which takes a minute, if the system lacks a part that is to be measured."""
    from moetrace.spec import load_system

    if base is not None and (not parts or "cpu" in parts) and (system := load_system(base)).cpu is None:
        raise UsageError(f"System {system.name} has no [cpu] to calibrate: add it, or measure others with --only.")


def _measured(parts: tuple[str, ...], folder: Path | None, save_table: Path | None) -> "Measured":
    from moetrace.calibration.this_machine import PARTS, measure, to_csv, to_frame
    from moetrace.trace.atomic import write_whole

    found: list[Measured] = []
    try:
        return measure(parts or PARTS, folder=folder, report=lambda line: say(f"moetrace: {line}"), keep=found.append)
    finally:  # also of what an interruption leaves
        if save_table is not None and found:
            write_whole({save_table: to_csv(found[-1])})
            say(f"{save_table}: {counted(len(to_frame(found[-1])), 'time')}.")


def _say_notes(notes: list[str]) -> None:
    for sentence in notes:
        say(f"moetrace: note: {sentence}")


def _print(found: "Calibrated", form: str) -> None:
    rows = found.frame.to_dicts()
    if form == "json":
        print_json({"system": found.system.name, "notes": found.notes, "parts": rows})
        return
    if form == "csv":
        print_rows({name: name for name in rows[0]}, rows, form)
        return
    kinds = {"link": _COPIES, "disk": _COPIES, "gpu": _KERNELS, "cpu": _KERNELS}
    first = True
    for columns in (_KERNELS, _COPIES, _TRANSFERS):
        some = [row for row in rows if kinds.get(row["part"], _TRANSFERS) is columns]
        if some and not first:
            print_text("")
        _print_table(some, columns)
        first = first and not some


def _print_table(rows: list[dict[str, Any]], columns: tuple[dict[str, str], ...]) -> None:
    if not rows:
        return
    from moetrace.cli.tables.parts import TextColumn, print_parts

    def cells(name: str) -> list[str]:
        factor = 100 if name.endswith("_error") else 1
        return [figure(None if row[name] is None else factor * row[name]) for row in rows]

    groups = [[TextColumn(heading, cells(name)) for name, heading in group.items()] for group in columns]
    print_parts(stdout_console(), [TextColumn("part", cells("part"), right=False)], groups)
