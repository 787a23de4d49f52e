"""`moetrace export`: a trace in a format of other tools."""

from pathlib import Path

import click

from moetrace.cli.options.paths import ANY_PATH
from moetrace.cli.options.targets import check_targets
from moetrace.cli.tables.output import say
from moetrace.spec.errors import counted

# The keys of moetrace.exports.FORMATS, which is not imported here so that `--help` stays instant.
FORMATS = ("npz", "parquet", "oracle-general", "eplb")


@click.command()
@click.argument("trace", type=ANY_PATH, metavar="TRACE.h5")
@click.option("-o", "--output", "out", required=True, type=ANY_PATH, metavar="OUT")
@click.option("--to", "form", type=click.Choice(FORMATS), help="Format of OUT; seen from its ending if not given.")
def command(trace: Path, out: Path, form: str | None) -> None:
    """Write a trace to OUT in a format of other tools.

    \b
    npz             .npz            NumPy arrays, as `moetrace import` reads them
    parquet         .parquet        a row for each choice of an expert
    oracle-general  .oracleGeneral  accesses to experts, for libCacheSim (or .bin)
    eplb            .json           counts of each expert, for SGLang and EPLB

    Of a trace that holds counts alone, only eplb can be written.
    """
    from moetrace.cli.progress import LateBar
    from moetrace.exports import export
    from moetrace.trace.format import Trace

    check_targets({"-o": out}, [trace])
    with Trace.open(trace) as opened, LateBar("rows", opened.rows) as bar:
        export(opened, out, to=form, progress=bar.advance)
        rows = opened.rows
    say(f"{out}: {counted(rows, 'row')}, {out.stat().st_size / 1e6:,.1f} MB.")
