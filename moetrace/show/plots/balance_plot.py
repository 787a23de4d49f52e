"""The picture of `analyze balance`: imbalance over time with new plans marked, and each layer, as PNG or HTML page."""

from typing import TYPE_CHECKING, Any

import polars as pl

from moetrace.show.plots.picture import inline, picture
from moetrace.spec.errors import counted, printable

if TYPE_CHECKING:
    import altair as alt

    from moetrace.analyze.balance.units import Balance

_WIDTH = 768
# Of plans, by order; apart for colour-blind eyes, and legible on white and on black.
_COLOURS = ("#2f81d0", "#e0782f", "#8b8b8b", "#1f9e77", "#b05fc0", "#c9a227", "#d1495b", "#5c6f8f")
_DASHES = {"fixed": [1, 0], "given": [1, 0], "kept": [6, 3], "re-made": [1, 0], "clairvoyant": [2, 2]}
_MOST_MARKS = 200


def plot(balance: "Balance", form: str, name: str) -> bytes:
    """Return the picture as a file's bytes; `form` is one of picture.FORMS, `name` what the user calls the trace.

    The page loads nothing from anywhere. Raises MoetraceError if altair or vl-convert is missing.
    """
    title = f"Balance of {printable(name)}"
    return picture(form, title, _subtitle(balance.trace), _WIDTH + 220, lambda: _charts(balance))


def _charts(balance: "Balance") -> "alt.VConcatChart":
    import altair as alt

    return alt.vconcat(_over_time(balance), _by_layer(balance), spacing=40)


def _over_time(balance: "Balance") -> "alt.LayerChart":
    """Draw the median over the layers; bands would hide each other, so quartiles are in the tooltip."""
    import altair as alt

    spread = (
        balance.over_time.drop_nulls("imbalance")
        .with_columns(_printable())
        .group_by("placement", "plan", "first_step", maintain_order=True)
        .agg(
            pl.col("imbalance").quantile(0.25, "linear").round(4).alias("lower quartile"),
            pl.col("imbalance").median().round(4).alias("median"),
            pl.col("imbalance").quantile(0.75, "linear").round(4).alias("upper quartile"),
        )
    )
    x = alt.X(
        "first_step:Q", title="step", axis=alt.Axis(grid=False, format="d"), scale=alt.Scale(nice=False, zero=False)
    )
    figures = [alt.Tooltip(f"{name}:Q", format=".3f") for name in ("lower quartile", "median", "upper quartile")]
    base = alt.Chart(
        inline(spread),
        title="Busiest unit over the mean, in rows: median of the layers; upright: plans made anew",
    )
    colour = _colour(spread["placement"].unique(maintain_order=True).to_list())
    y = alt.Y("median:Q", title="max / mean", scale=alt.Scale(zero=False))
    line = base.mark_line(strokeWidth=1.6).encode(
        x=x, y=y, color=colour, strokeDash=_dash(spread), tooltip=["placement:N", "plan:N", "first_step:Q", *figures]
    )
    marks = alt.Chart(inline(_rebalances(balance))).mark_rule(opacity=0.45, strokeDash=[2, 3], color="#8b8b8b")
    layers = [marks.encode(x="first_step:Q"), line]
    return alt.LayerChart(layer=layers, width=_WIDTH, height=300)


def _by_layer(balance: "Balance") -> "alt.LayerChart":
    """Draw each layer's mean imbalance under each plan, and the least possible."""
    import altair as alt

    rows = balance.layers.drop_nulls("imbalance").with_columns(_printable(), pl.col("imbalance").round(4))
    rows = rows.with_columns(pl.col("least_imbalance").round(4))
    columns = ["placement", "plan", "layer", "imbalance", "least_imbalance", "imbalance_p99"]
    base = alt.Chart(inline(rows.select(columns)), title="Each layer, mean over the steps; ticks: the least possible")
    x = alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0, labelOverlap=True))
    colour = _colour(rows["placement"].unique(maintain_order=True).to_list())
    line = base.mark_line(strokeWidth=1.6).encode(
        x=x,
        y=alt.Y("imbalance:Q", title="max / mean", scale=alt.Scale(zero=False)),
        color=colour,
        strokeDash=_dash(rows),
        tooltip=["placement:N", "plan:N", "layer:O", *(alt.Tooltip(f"{name}:Q", format=".3f") for name in columns[3:])],
    )
    tick = base.mark_tick(thickness=2, size=9).encode(x=x, y="least_imbalance:Q", color=colour)
    return alt.LayerChart(layer=[tick, line], width=_WIDTH, height=220)


def _rebalances(balance: "Balance") -> pl.DataFrame:
    """Steps of the trace at which plans are made anew; none if they are too many to tell apart."""
    first = balance.trace["rebalance_steps"]
    return pl.DataFrame({"first_step": first if len(first) <= _MOST_MARKS else []}, schema={"first_step": pl.Int64})


def _colour(placements: list[str]) -> Any:
    import altair as alt

    scale = alt.Scale(domain=placements, range=[_COLOURS[i % len(_COLOURS)] for i in range(len(placements))])
    return alt.Color("placement:N", title="placement", scale=scale, legend=alt.Legend(symbolStrokeWidth=3))


def _dash(rows: pl.DataFrame) -> Any:
    import altair as alt

    shown = [plan for plan in _DASHES if plan in rows["plan"].unique().to_list()]
    scale = alt.Scale(domain=shown, range=[_DASHES[plan] for plan in shown])
    legend = alt.Legend(symbolStrokeColor="#8b8b8b", symbolStrokeWidth=2, symbolSize=400)
    return alt.StrokeDash("plan:N", title="plan", scale=scale, legend=legend)


def _printable() -> pl.Expr:
    return pl.col("placement").map_elements(printable, return_dtype=pl.String)


def _subtitle(facts: dict[str, Any]) -> str:
    step = "step" if facts["phase"] == "all" else f"{facts['phase']} step"
    made = f"made from {facts['window']:,}" if facts["window"] else "made from these"
    return (
        f"{printable(facts['model'])}: {counted(facts['layers'], 'layer')} of {counted(facts['experts'], 'expert')} on "
        f"{counted(facts['units'], 'unit')}; {counted(facts['judged_steps'], step)} judged, plans {made}"
    )
