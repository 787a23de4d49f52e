"""``moetrace generate``: a synthetic trace for a model."""

import sys
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path), metavar="OUT.h5")
@click.option("--model", required=True, metavar="M", help="Preset or TOML file; see `moetrace list models`.")
@click.option("--requests", required=True, type=int, help="Number of requests.")
@click.option("--prompt", required=True, type=int, help="Prompt tokens of each request; 0: no prefill steps.")
@click.option("--output", required=True, type=int, help="Output tokens of each request; 0: no decode steps.")
@click.option("--batch", default=1, show_default=True, help="Requests that decode together.")
@click.option(
    "--zipf", default=0.6, show_default=True, help="Popularity of the expert of rank r: (r + 1) ** -ZIPF; 0: uniform."
)
@click.option(
    "--stick", default=0.3, show_default=True, help="Share of experts kept from the request's previous token."
)
@click.option("--seed", default=0, show_default=True, help="Same seed, same bytes.")
def command(out: Path, model: str, **parameters: Any) -> None:
    """Write a synthetic routing trace to OUT.h5.

    Each layer ranks the experts by an own random permutation, and each token takes top-k distinct experts with the
    distribution of Gumbel top-k. --stick first keeps each expert of the request's previous token in that layer with
    this probability; the rest is drawn from the others.

    Each request's prompt is one prefill step. --batch requests then decode together, one token of each a step; as
    they are of equal length they end together, and the next group starts.
    """
    from rich.console import Console
    from rich.progress import Progress

    from moetrace.cli.compiling import announce_compiling
    from moetrace.trace.generate import Schedule, generate

    schedule = Schedule(*(parameters[name] for name in Schedule._fields))
    hidden = not sys.stderr.isatty()
    with announce_compiling(), Progress(console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task("rows", total=schedule.rows)
        generate(out, model, **parameters, progress=lambda count: bar.advance(task, count))
    size_mb = out.stat().st_size / 1e6
    click.echo(f"{out}: {schedule.rows:,} rows in {schedule.steps:,} steps, {size_mb:,.1f} MB.", err=True)
