"""One self-contained HTML page of a replay or a sweep: figures, charts with their tables, and how to run it again."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from moetrace.show.plots.picture import check_can_plot
from moetrace.spec.errors import UsageError
from moetrace.spec.forks import refuse_if_forked

if TYPE_CHECKING:
    from moetrace.results.result import Result

__all__ = ["render", "report"]


def report(
    source: "Result | str | os.PathLike[str]",
    output: str | os.PathLike[str],
    *,
    cache: str | os.PathLike[str] | None = None,
    balance: str | os.PathLike[str] | None = None,
) -> None:
    """Write an HTML page of a replay or a sweep that needs no network. The same input gives the same bytes.

    Args:
        source: A Result, or a folder that `moetrace replay -o` or `moetrace sweep -o` wrote.
        output: The page, FILE.html. It appears whole or not at all.
        cache: The output of `moetrace analyze cache --format json` for the same trace, for its hit curves.
        balance: The output of `moetrace analyze balance --format json` for the same trace.

    Raises:
        UsageError: The page would replace a file that is read, or its name does not end in .html.
        MoetraceError: A file is not what moetrace writes, the page cannot be written, or altair or vl-convert is not
            installed.

    Examples:
        >>> import moetrace as mt
        >>> trace = mt.generate_trace("tiny-olmoe", requests=2, prompt=8, output=8)
        >>> mt.report(mt.replay(trace, slots=48), "report.html")
    """
    refuse_if_forked()
    from moetrace.trace.atomic import check_writable, keep_inputs, whole_file

    if not isinstance(source, str | os.PathLike):
        from moetrace.results.result import Result  # who has one has loaded the engine

        if not isinstance(source, Result):
            raise UsageError(f"A report is of a Result or a folder, got {type(source).__name__}.")
    path = Path(output)
    others = [Path(file) for file in (cache, balance) if file is not None]
    keep_inputs(path, others)
    if isinstance(source, str | os.PathLike) and path.exists():
        folder = Path(source)
        keep_inputs(path, [*folder.glob("*.json"), *folder.glob("*.parquet"), *folder.glob("*.json.gz")])
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{path}: the name of a report must end with .html.")
    check_can_plot("A report")
    check_writable(path)
    content = render(source, cache=cache, balance=balance)
    with whole_file(path) as file:
        file.write(content)


def render(
    source: "Result | str | os.PathLike[str]",
    *,
    cache: str | os.PathLike[str] | None = None,
    balance: str | os.PathLike[str] | None = None,
) -> bytes:
    """Return the page's bytes; arguments and errors are those of `report`."""
    from moetrace.results.folder import existing_folder, has_file
    from moetrace.results.record import SUMMARY_FILE, SWEEP_FILE
    from moetrace.results.replayed import read_replayed, replayed_of
    from moetrace.results.swept import read_swept
    from moetrace.show.report.replay_page import replay_page
    from moetrace.show.report.sweep_page import sweep_page

    extra = [Path(file) if file is not None else None for file in (cache, balance)]
    if not isinstance(source, str | os.PathLike):
        return replay_page(replayed_of(source), None, *extra)
    folder = existing_folder(source)
    if has_file(folder, SUMMARY_FILE):
        return replay_page(read_replayed(folder), folder, *extra)
    if has_file(folder, SWEEP_FILE):
        if cache is not None or balance is not None:
            raise UsageError("The result of `moetrace analyze` goes into the report of one replay, not of a sweep.")
        return sweep_page(read_swept(folder))
    raise UsageError(
        f"{folder} has neither summary.json nor sweep.json: name a folder that `moetrace replay -o` or "
        "`moetrace sweep -o` wrote."
    )
