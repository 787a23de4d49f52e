"""The table of `moetrace analyze locality`: a row for each layer, in parts that fit the terminal's width."""

from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.table import Table

from moetrace.cli.tables.output import stdout_console, widest, width_of
from moetrace.spec.errors import counted, printable

if TYPE_CHECKING:
    from moetrace.analyze.locality.measure import Locality

_GAP, _LEAST = 2, 72
_SPREAD = ("mean", "median", "min", "max")


class _Statistic(NamedTuple):
    heading: str
    statistic: str
    percent: bool = False
    places: int = 2


def print_locality(found: "Locality", name: str) -> None:
    """Print the result as tables on stdout; `name` is the user's name of the trace."""
    console = stdout_console()
    width, console.width = console.width, max(console.width, _LEAST)
    spread = {row["statistic"]: row for row in found.summary.iter_rows(named=True)}
    layers = found.layers.rows(named=True)
    for part in _parts(spread, layers, _columns(found.trace), console.width):
        console.print(_table(part, len(layers)), crop=False, no_wrap=True)
        console.print()
    console.print(_overlap_table(found), crop=False, no_wrap=True)
    console.print()
    console.width = width
    for line in _legend(found.trace, name):
        console.print(line)


def _columns(facts: dict[str, Any]) -> list[list[_Statistic]]:
    """Columns that belong together: skew, then what time, layers, requests, phases and pairs add."""
    eighth, quarter = max(1, facts["experts"] // 8), max(1, facts["experts"] // 4)
    return [
        [
            _Statistic("\nZipf", "zipf"),
            _Statistic("mis-\nfit %", "zipf_misfit", True),
            _Statistic("slope\nln-ln", "zipf_least_squares"),
            _Statistic("\nGini", "gini"),
            _Statistic("top 10\n%", "top10_share", True),
            _Statistic("max /\nmean", "max_over_mean"),
            _Statistic("dis-\ntinct", "distinct", places=0),
            _Statistic("\ndead", "dead", places=0),
        ],
        [
            _Statistic("overlap\n%", "overlap", True),
            _Statistic("in req.\nshuffled", "overlap_shuffled_within_requests", True),
            _Statistic("all\nshuffled", "overlap_shuffled_globally", True),
            _Statistic("static\n%", "static_share", True),
        ],
        [
            _Statistic("reuse\nmedian", "reuse_p50", places=0),
            _Statistic("\nshuffled", "reuse_p50_shuffled", places=0),
            _Statistic(f"LRU {eighth}\nhit %", "lru_e8", True),
            _Statistic("\nshuffled", "lru_e8_shuffled", True),
            _Statistic(f"LRU {quarter}\nhit %", "lru_e4", True),
            _Statistic("\nshuffled", "lru_e4_shuffled", True),
        ],
        [
            _Statistic("next\nlayer %", "next_layer_recall", True),
            _Statistic("by pop-\nularity", "next_layer_popularity", True),
            _Statistic("next\ntoken %", "next_token_recall", True),
            _Statistic("by pop-\nularity", "next_token_popularity", True),
        ],
        [
            _Statistic("\nICC", "icc", places=3),
            _Statistic("sink\n%", "sink", True),
            _Statistic("phases\nbits", "phase_jsd", places=4),
            _Statistic("\nnull", "phase_jsd_null", places=4),
            _Statistic("lift\np99", "lift_p99", places=1),
            _Statistic("\nnull", "lift_p99_null", places=1),
        ],
    ]


def _parts(
    spread: dict[str, dict[str, Any]], layers: list[dict[str, Any]], groups: list[list[_Statistic]], width: int
) -> list[list[list[str]]]:
    """Put groups side by side as long as they fit the width; a column is its heading, then a cell for each row."""
    names = ["\nlayer", *(str(row["layer"]) for row in layers), *_SPREAD]
    parts: list[list[list[str]]] = []
    for group in groups:
        shown = [
            [column.heading, *_cells(column, [row[column.statistic] for row in layers], spread[column.statistic])]
            for column in group
            if spread.get(column.statistic, {}).get("mean") is not None
        ]
        if parts and width_of([*parts[-1], *shown], _GAP) <= width:
            parts[-1] += shown
        elif shown:
            parts.append([names, *shown])
    return parts


def _cells(column: _Statistic, values: list[float | None], spread: dict[str, Any]) -> list[str]:
    factor, places = (100, 1) if column.percent else (1, column.places)

    def cell(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{round(factor * value, digits) + 0.0:,.{digits}f}"

    # Figures that are whole numbers in every layer may have a fraction in the mean or the median.
    finer = {how: max(places, 1) if how in ("mean", "median") else places for how in _SPREAD}
    return [*(cell(value, places) for value in values), *(cell(spread[how], finer[how]) for how in _SPREAD)]


def _table(columns: list[list[str]], layers: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
    for column in columns:
        table.add_column(column[0], justify="right", vertical="bottom", no_wrap=True, min_width=widest(column))
    for number, cells in enumerate(zip(*(column[1:] for column in columns), strict=True), start=1):
        table.add_row(*cells, end_section=number == layers)
    return table


def _overlap_table(found: "Locality") -> Table:
    """The overlap at every lag: mean over the layers."""
    import polars as pl

    means = found.overlap.group_by("lag", maintain_order=True).agg(pl.exclude("layer").mean())
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
    names = {"overlap": "overlap %, mean of layers", "within": "shuffled in requests", "globally": "shuffled globally"}
    table.add_column("tokens later", no_wrap=True)
    for lag in means["lag"]:
        table.add_column(f"{lag}", justify="right", no_wrap=True)
    for column, label in zip(means.columns[1:], names.values(), strict=True):
        table.add_row(label, *("-" if value is None else f"{100 * value:.1f}" for value in means[column]))
    return table


def _legend(facts: dict[str, Any], name: str) -> list[str]:
    rows = "row" if facts["phase"] == "all" else f"{facts['phase']} row"
    lines = [
        f"{printable(name)}: {printable(facts['model'])}, {counted(facts['rows'], rows)} of "
        f"{counted(facts['requests'], 'request')}; {counted(facts['layers'], 'layer')} of "
        f"{counted(facts['experts'], 'expert')}, top {facts['top_k']}.",
        "Every figure is of one layer; docs/locality.md defines each. Shuffled, null and by popularity: what only "
        "chance or popularity would give.",
    ]
    if facts["sampled_rows"] < facts["rows"]:
        lines.append(
            f"Counts, reuse and LRU are of all rows; the rest, and shuffled figures, of a sample of "
            f"{counted(facts['sampled_rows'], 'row')} of {counted(facts['sampled_requests'], 'request')} "
            f"(--sample-rows)."
        )
    return lines
