"""`moetrace rebatch`: requests of traces, recombined into steps of several requests."""

from pathlib import Path

import click

from moetrace.cli.options.paths import ANY_PATH
from moetrace.cli.options.targets import check_targets
from moetrace.cli.tables.output import said_of, say
from moetrace.spec.errors import UsageError, counted


@click.command()
@click.argument("traces", nargs=-1, required=True, type=ANY_PATH, metavar="TRACE.h5...")
@click.option("-o", "--output", "out", required=True, type=ANY_PATH, metavar="OUT.h5")
@click.option("--batch", required=True, type=click.IntRange(min=1), metavar="B", help="Requests that run together.")
@click.option(
    "--chunk",
    type=click.IntRange(min=1),
    metavar="N",
    help="Prompt rows that a step takes in beside the output rows; else a prompt is one step of its own.",
)
@click.option(
    "--verify",
    type=click.IntRange(min=1),
    metavar="K",
    help="Steps of speculative decoding, each with K successive output rows of a request; drafts that were rejected in "
    "the traces are left out first.",
)
@click.option(
    "--accept",
    type=click.FloatRange(min=1),
    metavar="A",
    help="With --verify: tokens that such a step keeps in the mean; the rows of the others come again.  [default: K]",
)
@click.option(
    "--order",
    type=click.Choice(["arrival", "shuffle"]),
    default="arrival",
    show_default=True,
    help="Take requests as they come in the traces, or in an order drawn from --seed.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), help="Seed of --order shuffle; same seed, same bytes.  [default: 0]"
)
@click.option("--compress", type=click.Choice(["zstd", "gzip"]), help="Smaller, but slower to read.")
def command(
    traces: tuple[Path, ...],
    out: Path,
    batch: int,
    chunk: int | None,
    verify: int | None,
    accept: float | None,
    order: str,
    seed: int | None,
    compress: str | None,
) -> None:
    """Recombine the requests of traces of one model into the trace OUT.h5, in which up to B of them run together.

    Batching is continuous: when a request ends, the next takes its place. Each step has one output row of every
    running request. A prompt is one step of its own, before its request joins; with --chunk N, steps instead take in up
    to N prompt rows beside the output rows.

    --verify K asks what speculation costs: every step has K rows of a request, of which it keeps --accept A, and
    `moetrace replay` says how many it must keep to pay.

    Ids, gates, tokens and positions stay as they are, and requests are renumbered; a recorded residency belongs to
    the old order and is left out.
    """
    if accept is not None and verify is None:
        raise UsageError("--accept says how many tokens a verified step keeps: give --verify K as well.")
    if seed is not None and order != "shuffle":
        raise UsageError("--seed goes with --order shuffle: the other order draws nothing.")
    from contextlib import ExitStack

    from moetrace.cli.progress import LateBar
    from moetrace.trace.format import Trace
    from moetrace.trace.rebatch import rebatch

    check_targets({"-o": out}, traces)
    with ExitStack() as stack:
        opened = [stack.enter_context(Trace.open(trace)) for trace in traces]
        bar = stack.enter_context(LateBar("rows", sum(trace.rows for trace in opened)))
        rebatch(
            opened,
            out,
            batch=batch,
            chunk=chunk,
            verify=verify,
            accept=accept,
            order=order,
            seed=seed or 0,
            compress=compress,
            progress=bar.advance,
        )
        dropped = any("recorded" in trace.has for trace in opened)
    with Trace.open(out) as trace:
        rejected = trace.source["parameters"].get("rejected_rows_left_out")
        notes = [f"{counted(rejected, 'row')} of rejected drafts were left out."] if rejected else []
        notes += ["The recorded residency was left out."] if dropped else []
        say(" ".join([said_of(out, trace), *notes]))
