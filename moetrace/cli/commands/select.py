"""`moetrace select`: a part of a trace, or a trace without that part."""

from pathlib import Path
from typing import Any

import click

from moetrace.cli.options.paths import ANY_PATH
from moetrace.cli.options.range_list import RangeList
from moetrace.cli.options.targets import check_targets
from moetrace.cli.tables.output import said_of, say
from moetrace.spec.errors import UsageError

_MEANT = ("rows", "steps", "requests", "layers", "phase")


def _option(name: str, text: str):
    return click.option(f"--{name}", type=RangeList(), metavar="A:B,...", help=text)


@click.command()
@click.argument("trace", type=ANY_PATH, metavar="TRACE.h5")
@click.option("-o", "--output", "out_path", required=True, type=ANY_PATH, metavar="OUT.h5")
@_option("rows", "Rows, as lint numbers them.")
@_option("steps", "Steps (forward passes).")
@_option("requests", "Requests, by their numbers in the trace.")
@_option("layers", "Layers, by their numbers in the model.")
@click.option("--phase", type=click.Choice(["prefill", "decode"]), help="Rows of one phase.")
@click.option("--out", is_flag=True, help="Leave out the selected part instead of keeping it.")
@click.option("--renumber", is_flag=True, help="Number requests from 0, and the positions of each from 0.")
@click.option("--first-layer", type=click.IntRange(0, 65535), metavar="N", help="Number of the first layer in OUT.h5.")
@click.option("--compress", type=click.Choice(["zstd", "gzip"]), help="Smaller, but slower to read.")
def command(trace: Path, out_path: Path, compress: str | None, **wishes: Any) -> None:
    """Copy a part of a trace to OUT.h5: the rows that fit all that is said, in the layers that are said.

    Ranges are A:B (A to B - 1), A:, :B or one number, several with commas between. With --out, the rows that fit all
    that is said are left out, and so are the layers that are said.

    Steps keep their other rows, and go if none is left. Requests, positions and layers keep their numbers, unless
    --renumber or --first-layer say otherwise.
    """
    if wishes["first_layer"] is None and not any(wishes[name] for name in _MEANT):
        raise UsageError("select something: --rows, --steps, --requests, --layers or --phase.")
    from moetrace.cli.progress import LateBar
    from moetrace.trace.format import Trace
    from moetrace.trace.select import select

    check_targets({"-o": out_path}, [trace])
    with Trace.open(trace) as opened, LateBar("rows", opened.rows) as bar:
        select(opened, out_path, compress=compress, progress=bar.advance, **wishes)
    with Trace.open(out_path) as copy:
        say(said_of(out_path, copy))
