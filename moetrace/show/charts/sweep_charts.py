"""Charts of a sweep: time against what it costs, and what each axis does."""

from typing import Any

import polars as pl

from moetrace.results.record import COLUMNS, FRONTS
from moetrace.results.swept import Swept
from moetrace.show.charts.style import ChartGroup, colour, data, log_if_wide, shape

# Titles of axes.
_COSTS = {name: f"{COLUMNS[name].label}, {COLUMNS[name].shown[1]}" for name in FRONTS}
_MOST_PANELS = 6
_MOST_VALUES = 24


def pareto_front(swept: Swept) -> ChartGroup | None:
    """Draw time against each cost of `FRONTS`, the Pareto front marked; a panel for each trace."""
    import altair as alt

    costs = [cost for cost in _COSTS if cost in swept.cells.columns and swept.done[cost].count()]
    done = swept.done
    if done.is_empty() or not costs:
        return None
    done = done.with_columns(
        *((pl.col(cost) / (1e9 if cost.endswith("bytes") else 1)).round_sig_figs(5) for cost in costs),
        (pl.col("pareto").fill_null(False) if "pareto" in done.columns else pl.lit(False)).alias("pareto"),
    )
    kinds = "policy" if "policy" in done.columns else "kind"
    done = done if kinds in done.columns else done.with_columns(pl.lit("cell").alias("kind"))
    names = done[kinds].unique(maintain_order=True).to_list()
    traces = done["trace"].unique(maintain_order=True).to_list() if "trace" in done.columns else [None]
    panels: list[tuple[str, Any]] = []
    marked = False
    for trace in traces:
        part = done if trace is None else done.filter(trace=trace)
        for cost in costs:
            if part[cost].n_unique() < 2:
                continue
            shown = data(part.select("name", kinds, cost, "total_s", pl.col("pareto").cast(pl.Int8)))
            x = alt.X(f"{cost}:Q", title=_COSTS[cost], scale=log_if_wide(part[cost]), axis=alt.Axis(tickCount=5))
            y = alt.Y("total_s:Q", title="seconds of all steps", scale=log_if_wide(part["total_s"]))
            tooltip = ["name:N", alt.Tooltip("total_s:Q", format=",.4~g", title="seconds")]
            tooltip.append(alt.Tooltip(f"{cost}:Q", format=",.4~g", title=_COSTS[cost]))
            base = alt.Chart(shown).encode(x=x, y=y)
            points = base.mark_point(size=60, filled=True, opacity=0.85).encode(
                color=colour(kinds, names), shape=shape(kinds, names), tooltip=tooltip
            )
            layers = [points]
            if cost == swept.pareto:
                marked = True
                best = base.transform_filter("datum.pareto")
                ring = best.mark_point(size=190, color="#808080", strokeWidth=2)
                layers = [best.mark_line(interpolate="step-after", color="#808080", strokeWidth=2), ring, points]
            title = f"{_COSTS[cost][0].upper()}{_COSTS[cost][1:]}" + (f": {trace}" if len(traces) > 1 else "")
            panels.append((title, alt.LayerChart(layer=layers, height=300)))
    words = "Each mark is a cell. Towards the lower left is better: faster, and with less."
    if marked:
        cost = COLUMNS[swept.pareto].label
        words += (
            f" Ringed: the Pareto front, cells that no other beats in both time and {cost}; the steps are the least "
            "time for that cost."
        )
    columns = ["name", "total_s", *costs, "pareto"]
    table = done.filter("pareto").sort("total_s").select(columns) if done["pareto"].any() else done.select(columns)
    table = table.rename({"total_s": "seconds", **{cost: _COSTS[cost] for cost in costs}})
    shown = panels[: max(_MOST_PANELS, 2 * len(costs))]
    return ChartGroup("front", "Time against what it costs", words, shown, table) if panels else None


def axes(swept: Swept) -> ChartGroup | None:
    """Draw the cells by the value of each axis; time is relative to the fastest cell of its trace."""
    import altair as alt

    done = swept.done.drop_nulls("relative")
    # Values that follow from the trace, such as its model, differ between cells and are no axes.
    names = [axis for axis in swept.axes if axis != "trace" and axis in swept.grid]
    if done.is_empty() or not names:
        return None
    panels: list[tuple[str, Any]] = []
    rows = []
    for axis in names:
        valued = done.with_columns(
            pl.col(axis).map_elements(_label, return_dtype=pl.String).fill_null("–").alias("value")
        )
        order = valued.sort(axis)["value"].unique(maintain_order=True).to_list()
        for value in order:
            of = valued.filter(value=value).sort("relative", maintain_order=True)
            median = of["relative"].median()
            best = of.row(0, named=True)
            rows.append(
                {
                    "axis": axis,
                    "value": value,
                    "cells": len(of),
                    "best, times the fastest": best["relative"],
                    "median, times the fastest": median,
                    "best cell": best["name"],
                }
            )
        shown = valued.filter(pl.col("value").is_in(order[:_MOST_VALUES])).select(
            "name", "value", pl.col("relative").round_sig_figs(5), "total_s"
        )
        base = alt.Chart(data(shown)).encode(y=alt.Y("value:N", title=None, sort=order, axis=_labels()))
        x = alt.X("relative:Q", title="times the fastest cell", scale=log_if_wide(shown["relative"]), axis=_few())
        tooltip = ["name:N", alt.Tooltip("relative:Q", format=".3f", title="times the fastest")]
        tooltip.append(alt.Tooltip("total_s:Q", format=",.4~g", title="seconds"))
        ticks = base.mark_tick(thickness=2, size=14, opacity=0.6, color="#2f81d0").encode(x=x, tooltip=tooltip)
        middle = base.mark_point(shape="diamond", size=110, color="#d56a1e", strokeWidth=2).encode(
            x=alt.X("median(relative):Q", title="times the fastest cell"),
            tooltip=["value:N", alt.Tooltip("median(relative):Q", format=".3f", title="median")],
        )
        panels.append((axis, alt.LayerChart(layer=[ticks, middle], height=28 * min(len(order), _MOST_VALUES))))
    words = (
        "Each tick is a cell, by the value that it has on an axis; the diamond is the median of that value. Time is in "
        "times that of the fastest cell of the same trace: 1 is the fastest."
    )
    return ChartGroup("axes", "Effect of each axis", words, panels, pl.DataFrame(rows))


def _few() -> Any:
    import altair as alt

    return alt.Axis(tickCount=5)


def _label(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _labels() -> Any:
    import altair as alt

    return alt.Axis(labelLimit=140, ticks=False, domain=False, labelPadding=6)
