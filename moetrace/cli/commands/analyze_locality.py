"""`moetrace analyze locality`: how skewed, repetitive and predictable the routing of a trace is."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moetrace.cli.options.paths import ANY_PATH
from moetrace.cli.options.targets import check_picture, check_targets
from moetrace.cli.tables.output import csv_of, print_csv, print_json, safe_csv_option
from moetrace.spec.errors import UsageError

if TYPE_CHECKING:
    from moetrace.analyze.locality.measure import Locality

# The frames of moetrace.analyze.locality.measure.Locality, which takes too long to import for a mere --help.
FRAMES = ("layers", "summary", "overlap", "hit_curve", "load")


@click.command("locality")
@click.argument("trace", type=ANY_PATH, metavar="TRACE.h5")
@click.option(
    "--phase",
    type=click.Choice(["all", "prefill", "decode"]),
    default="all",
    show_default=True,
    help="The rows to use, as if there were no others.",
)
@click.option("--skip-position-0", is_flag=True, help="Leave out the first row of each request, an attention sink.")
@click.option("--no-pairs", is_flag=True, help="Leave out co-activation, which takes longest.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of the shuffles.")
@click.option(
    "--sample-rows",
    type=click.IntRange(1, 2**31 - 1),
    metavar="N",
    help="Rows, of whole requests, that shuffles and predictors work on; by default up to 65536.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "csv", "parquet"]),
    default="table",
    show_default=True,
    help="A table to read; everything as JSON; or one frame as CSV or Parquet.",
)
@safe_csv_option
@click.option(
    "--frame", type=click.Choice(FRAMES), help="The table to print, with --format csv or parquet. [default: layers]"
)
@click.option(
    "-o",
    "--output",
    "out",
    type=ANY_PATH,
    metavar="FILE",
    help="Write JSON, CSV or Parquet there, not to stdout.",
)
@click.option("--plot", "picture", type=ANY_PATH, metavar="FILE", help="Draw it: FILE.png or .html.")
def command(
    trace: Path,
    phase: str,
    skip_position_0: bool,
    no_pairs: bool,
    seed: int,
    sample_rows: int | None,
    form: str,
    frame: str | None,
    out: Path | None,
    picture: Path | None,
) -> None:
    """Say how skewed, how repetitive and how predictable the routing of a trace is.

    Every figure is of one layer; a summary gives their mean, median, least and greatest. Beside it stands what the
    figure would be by chance: for the same rows shuffled within requests or globally, or for a simulated null.
    docs/locality.md defines each.
    """
    from moetrace.cli.progress import LateBar
    from moetrace.trace import Trace
    from moetrace.trace.atomic import write_whole

    _check_outputs(trace, form, frame, out, picture)
    with Trace.open(trace) as opened:
        from moetrace.analyze.locality.measure import locality
        from moetrace.analyze.locality.rows import SAMPLE_ROWS

        with LateBar("rows", opened.rows) as bar:
            found = locality(
                opened,
                phase=phase,
                skip_position_0=skip_position_0,
                pairs=not no_pairs,
                seed=seed,
                progress=bar.advance,
                sample_rows=sample_rows or SAMPLE_ROWS,
            )
    frame = frame or FRAMES[0]
    files = {} if out is None else {out: _as_bytes(found, form, getattr(found, frame))}
    if picture is not None:
        from moetrace.show.plots.locality_plot import plot

        files[picture] = plot(found, picture.suffix[1:].lower(), trace.name)
    write_whole(files)
    if out is None:
        _print(found, str(trace), form, frame)


def _check_outputs(trace: Path, form: str, frame: str | None, out: Path | None, picture: Path | None) -> None:
    """Refuse at once what would only fail after the work."""
    if form in ("table", "json") and frame is not None:
        raise UsageError("--frame goes with --format csv or parquet: a table and JSON hold what there is.")
    if form == "parquet" and out is None:
        raise UsageError("Parquet does not belong on a terminal: name a file with -o FILE.")
    if form == "table" and out is not None:
        raise UsageError("-o FILE goes with --format json, csv or parquet.")
    check_targets({"-o": out, "--plot": picture}, [trace])
    check_picture(picture)


def _print(found: "Locality", name: str, form: str, frame: str) -> None:
    if form == "table":
        from moetrace.cli.tables.locality_table import print_locality

        print_locality(found, name)
    elif form == "json":
        print_json(found.to_dict())
    else:
        print_csv(getattr(found, frame))


def _as_bytes(found: "Locality", form: str, frame: Any) -> bytes:
    import io
    import json

    if form == "json":
        return (json.dumps(found.to_dict(), indent=2, allow_nan=False) + "\n").encode()
    if form == "csv":
        return csv_of(frame).encode()
    buffer = io.BytesIO()
    frame.write_parquet(buffer, compression="zstd", compression_level=3)
    return buffer.getvalue()
