"""The report of a sweep."""

from typing import Any

import polars as pl

from moetrace.results.figure_text import amount
from moetrace.results.record import COLUMNS, FRONTS
from moetrace.results.swept import LATENCIES, PER_TOKEN, SOME_HAVE, Swept
from moetrace.show.charts.sweep_charts import axes, pareto_front
from moetrace.show.report import page


def _heading(name: str) -> str:
    part = " p50" if name.endswith("_p50") else ""
    return f"{COLUMNS[name].heading}{part}, {COLUMNS[name].sign}"


def _labelled(name: str) -> str:
    figure = COLUMNS[name]
    return figure.label if figure.unit == "share" else f"{figure.label}, {figure.sign}"


# Where a heading of the record is short for the terminal, or without a unit, the words stand here.
_COLUMNS = {
    "total_s": "seconds",
    "relative": "times the fastest",
    **{name: _heading(name) for name in LATENCIES},
    "hit_rate": "hit rate",
    "gpu_memory_bytes": f"GPU memory, {COLUMNS['gpu_memory_bytes'].sign}",
    "link_bytes": f"{COLUMNS['link_bytes'].heading}, {COLUMNS['link_bytes'].sign}",
    **{name: _labelled(name) for name in (*FRONTS[2:], *PER_TOKEN, *SOME_HAVE)},
    "pareto": "Pareto front",
    "error": "error",
}

_MOST_VALUES = 24  # of an axis


def sweep_page(swept: Swept) -> bytes:
    """Return the page."""
    sections = [("best", "The best cells", _best(swept))]
    for draw in (pareto_front, axes):
        found = draw(swept)
        if found is not None:
            sections.append(page.figure(found))
    shown = ["name", *(column for column in _COLUMNS if column in swept.cells.columns)]
    cells = swept.cells.select(shown)
    cells = cells.drop([name for name in shown if cells[name].null_count() == len(cells)]).rename(
        _COLUMNS, strict=False
    )
    sections.append(("cells", "All cells", page.table(cells, f"All {len(cells):,} cells, in the sweep's order")))
    if "error" in swept.cells.columns:
        failed = swept.cells.drop_nulls("error").select("name", "error")
        if len(failed):
            sections.insert(1, ("failed", "Cells that failed", page.table(failed, "Why cells have no result")))
    sections.append(("again", "How it was run, and how to run it again", _again(swept)))
    head = f'<p class="lede">{page.text(_lede(swept))}</p>'
    foot = (
        f"Made by moetrace {page.text(swept.moetrace)} from simulated replays: a model of machines, not a measurement. "
        "Everything is in this file; nothing is loaded from anywhere."
    )
    return page.page(f"Sweep of {len(swept.cells):,} cells", head, sections, foot)


def _lede(swept: Swept) -> str:
    done = len(swept.done)
    failed = len(swept.cells) - done
    told = f"{done:,} of {len(swept.cells):,} cells have a result{f', {failed:,} have none' if failed else ''}"
    return " ".join([f"{told}. Differences between them: {', '.join(swept.axes) or 'nothing'}.", *swept.notes])


def _best(swept: Swept) -> str:
    """A card for the fastest cell of each trace, one for the least time times the price of the machine, and energy."""
    done = swept.done.sort("total_s", maintain_order=True)
    if done.is_empty():
        return "<p>No cell has a result.</p>"
    several = "trace" in swept.axes
    best = done.unique("trace", keep="first", maintain_order=True) if several else done.head(1)
    titled = [(f"Fastest of {row['trace']}" if several else "Fastest", row) for row in best.head(6).to_dicts()]
    if "price" in done.columns and done["price"].drop_nulls().n_unique() > 1 and not several:
        worth = (pl.col("total_s") * pl.col("price")).alias("worth")
        titled.append(
            ("Most work for its price", done.drop_nulls("price").sort(worth, maintain_order=True).row(0, named=True))
        )
    if "energy_j" in done.columns and done["energy_j"].drop_nulls().n_unique() > 1 and not several:
        frugal = done.drop_nulls("energy_j").sort("energy_j", maintain_order=True).row(0, named=True)
        titled.append((f"Least energy: {page.number(frugal['energy_j'])} J", frugal))
    cards = []
    for title, row in titled:
        pairs = [(axis, page.number(row[axis])) for axis in swept.axes if axis != "trace"]
        pairs += [
            (COLUMNS[column].label, page.seconds(row[column]))
            for column in LATENCIES
            if row.get(column) is not None and COLUMNS[column].unit == "s"
        ]
        pairs += [(COLUMNS[name].label.capitalize(), _shown(name, row[name])) for name in SOME_HAVE if row.get(name)]
        cards.append(
            f'<article class="card"><h3>{page.text(title)}</h3>'
            f'<p class="big">{page.text(page.seconds(row["total_s"]))}</p>{page.facts(pairs)}</article>'
        )
    more = f"<p>The first 6 of {len(best)} traces.</p>" if len(best) > 6 else ""
    names = best.select("name", pl.col("total_s").alias("seconds"))
    return f'{more}<div class="cards">{"".join(cards)}</div>{page.details("Their names", page.table(names, "Fastest"))}'


def _shown(name: str, value: float) -> str:
    figure = COLUMNS[name]
    return page.seconds(value) if figure.unit == "s" else amount(value, figure)


def _again(swept: Swept) -> str:
    known = [(axis, _values(given)) for axis, given in swept.grid.items()]
    search = " --search" if swept.searched else ""
    return (
        f"{page.facts([*known, ('moetrace', swept.moetrace)], 'facts')}"
        "<p>The folder keeps every finished cell: the same command runs only the missing and "
        f"changed ones.</p><pre><code>moetrace sweep SWEEP.toml{search} -o DIR</code></pre>"
        "<p>A cell's own file, in <code>cells</code>, holds its model, system and policy as they were resolved.</p>"
    )


def _values(given: Any) -> str:
    """The values of an axis, or the first of them."""
    values = given if isinstance(given, list) else [given]
    shown = ", ".join(page.number(value) for value in values[:_MOST_VALUES])
    return f"{shown} and {len(values) - _MOST_VALUES:,} more" if len(values) > _MOST_VALUES else shown
