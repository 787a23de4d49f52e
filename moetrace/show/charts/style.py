"""Common to all charts: colours and dashes of policies, marks that answer to a pointer, the form of an answer."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from moetrace.spec.errors import MoetraceError, printable

if TYPE_CHECKING:
    import altair as alt

# Apart for colour-blind eyes, and at least 3.5 : 1 against white and against a page's dark.
COLOURS = ("#2f81d0", "#d56a1e", "#17916a", "#a860c4", "#9c7f14", "#d1495b", "#6f7f9c", "#c9589b")
# Colour is never the only sign: the next policy also has another dash and another shape.
DASHES = ([1, 0], [7, 3], [3, 2], [9, 3, 2, 3], [4, 2])
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross")
_LEGEND_WIDTH = 280  # pixels, of a phone


@dataclass(frozen=True)
class ChartGroup:
    """The answer to one question: panels, the table behind them, and what they show in plain words.

    Attributes:
        name: of the method of `result.plot`, and of the section in a report.
        panels: title and chart, which has no width yet.
        table: what is drawn, or quantiles of it, with headings for people.
    """

    name: str
    title: str
    words: str
    panels: list[tuple[str, Any]]
    table: pl.DataFrame


def check_can_draw() -> None:
    """Raise a MoetraceError unless what makes charts is installed."""
    try:
        import altair
    except ImportError:
        raise MoetraceError("Charts need altair: pip install '.[report]' in the clone of moetrace.") from None
    del altair


def data(frame: pl.DataFrame) -> Any:
    """Return the rows as CSV inside the chart itself: a third of the size that JSON has. Texts are made printable."""
    import altair as alt

    texts = [name for name, kind in frame.schema.items() if kind == pl.String]
    parse = {name: "string" if name in texts else "number" for name in frame.columns}
    shown = frame.with_columns(pl.col(name).map_elements(printable, return_dtype=pl.String) for name in texts)
    return alt.InlineData(values=shown.write_csv(), format={"type": "csv", "parse": parse})


def colour(field: str, names: Sequence[str], strokes: bool = False) -> Any:
    """Return the colour of each of `names`, with a legend that fits a phone."""
    import altair as alt

    return alt.Color(f"{field}:N", title=None, sort=None, scale=_scale(names, COLOURS), legend=_legend(names, strokes))


def dash(field: str, names: Sequence[str]) -> Any:
    """Return the dash of each of `names`."""
    import altair as alt

    scale = _scale(names, DASHES)
    return alt.StrokeDash(f"{field}:N", title=None, sort=None, scale=scale, legend=_legend(names, True))


def shape(field: str, names: Sequence[str]) -> Any:
    """Return the shape of each of `names`."""
    import altair as alt

    return alt.Shape(f"{field}:N", title=None, sort=None, scale=_scale(names, SHAPES), legend=_legend(names, False))


def lines(name: str, frame: pl.DataFrame, x: Any, y: Any, names: Sequence[str], tooltip: list[Any]) -> "alt.LayerChart":
    """Draw a line for each policy; the point nearest to the pointer answers, and a click on the legend singles out.

    name: of the panel, another for each of a picture; Altair would make one up, a new one each time.
    """
    import altair as alt

    chosen = alt.selection_point(fields=["policy"], bind="legend", name=f"{name}_legend")
    near = alt.selection_point(nearest=True, on="pointerover", clear="pointerout", empty=False, name=f"{name}_nearest")
    base = alt.Chart(data(frame)).encode(x=x, y=y, color=colour("policy", names, strokes=True))
    line = (
        base.mark_line(strokeWidth=2)
        .properties(name=f"{name}_line")
        .encode(strokeDash=dash("policy", names), opacity=alt.condition(chosen, alt.value(1), alt.value(0.15)))
    )
    point = (
        base.mark_point(size=60, filled=True)
        .properties(name=f"{name}_point")
        .encode(opacity=alt.condition(near, alt.value(1), alt.value(0)), tooltip=[_near(each) for each in tooltip])
    )
    whole: Any = alt.layer(line, point.add_params(chosen, near)).properties(height=240)
    return whole


def _near(tooltip: Any) -> Any:
    """Return what a tooltip says of a point that is the nearest, and not the one under the pointer.

    For that, Vega-Lite lays cells over the points, and of a text without a format Vega-Lite 6.4 then asks the cell
    and not its point: "undefined". An empty format changes nothing else.
    """
    import altair as alt

    said: Any = alt.Tooltip(tooltip) if isinstance(tooltip, str) else tooltip
    said = said.copy()
    if said.to_dict(context={})["type"] == "nominal":
        said["format"] = ""
    return said


def log_if_wide(values: pl.Series) -> Any:
    """Return a logarithmic scale for positive values that differ by more than 30 times, else a linear one."""
    import altair as alt

    known = values.drop_nulls()
    least, most = (float(known.min() or 0), float(known.max() or 0)) if len(known) else (0.0, 0.0)  # type: ignore
    wide = least > 0 and most > 30 * least
    return alt.Scale(type="log", nice=False) if wide else alt.Scale(zero=False, nice=True)


def by_policy(names: Sequence[str]) -> Any:
    """Return a y axis with a row for each policy, in order."""
    import altair as alt

    shown = [printable(name) for name in names]
    return alt.Y("policy:N", title=None, sort=shown, axis=alt.Axis(labelLimit=130, ticks=False, domain=False))


def in_order(frame: pl.DataFrame, names: Sequence[str], *by: str) -> pl.DataFrame:
    """Return the rows of these policies, in their order, then by `by`."""
    order = pl.col("policy").replace_strict({name: i for i, name in enumerate(names)}, default=None)
    return frame.with_columns(order.alias("#")).drop_nulls("#").sort("#", *by, maintain_order=True).drop("#")


# Parts of a cluster that have the name of their work.
_STAGES = ("network", "attention", "dispatch", "experts", "combine", "migration", "steps")


def part_label(part: str) -> str:
    """Return what people call a part of the machine: `ndp3` is NDP 3, `link_in` is link in, `experts0` is experts 0."""
    if part == "gpus":
        return "GPUs"
    device = re.fullmatch(r"([a-z]+)([0-9]*)", part)
    if device is not None and device[1] in _STAGES:
        return f"{device[1]} {device[2]}".rstrip()
    return f"{device[1].upper()} {device[2]}".rstrip() if device else part.replace("_", " ")


def _legend(names: Sequence[str], strokes: bool) -> Any:
    import altair as alt

    columns = max(1, _LEGEND_WIDTH // (44 + 7 * max(min(len(name), 40) for name in names)))
    return alt.Legend(
        orient="top",
        direction="vertical" if columns == 1 else "horizontal",
        columns=columns,
        symbolType="stroke" if strokes else alt.Undefined,
        symbolStrokeWidth=2.5,
        symbolSize=240,
        labelLimit=260,
        offset=8,
    )


def _scale(names: Sequence[str], values: Sequence[Any]) -> Any:
    import altair as alt

    shown = [printable(name) for name in names]
    return alt.Scale(domain=shown, range=[values[i % len(values)] for i in range(len(shown))])
