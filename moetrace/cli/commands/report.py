"""`moetrace report`: what a replay or a sweep found, as one HTML page."""

from pathlib import Path

import click

from moetrace.cli.options.paths import ANY_PATH


@click.command()
@click.argument("folder", type=ANY_PATH, metavar="DIR")
@click.option("-o", "--output", type=ANY_PATH, required=True, metavar="FILE.html", help="Write the page here.")
@click.option("--cache", type=ANY_PATH, metavar="FILE", help="Output of `moetrace analyze cache --format json`.")
@click.option("--balance", type=ANY_PATH, metavar="FILE", help="Output of `moetrace analyze balance --format json`.")
def command(folder: Path, output: Path, cache: Path | None, balance: Path | None) -> None:
    """Make one HTML page of what `moetrace replay -o DIR` or `moetrace sweep -o DIR` wrote.

    The page loads nothing from anywhere: headline figures, charts with the table behind each, what the bounds mean, and
    how to run it again. --cache and --balance add charts of the same trace. Needs the extra `report`.
    """
    from moetrace.show.report import report

    report(folder, output, cache=cache, balance=balance)
