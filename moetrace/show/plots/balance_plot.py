"""The picture of `analyze balance`: for each plan its imbalance over time, and of each layer, as PNG or HTML page."""

from typing import TYPE_CHECKING, Any

import polars as pl

from moetrace.show.plots.picture import inline, picture
from moetrace.spec.errors import counted, printable

if TYPE_CHECKING:
    import altair as alt

    from moetrace.analyze.balance.units import Balance

_WIDTH, _TIME_WIDTH, _HEIGHT = 768, 480, 84
# Colours of plans, by order: distinct for colour-blind eyes, and legible on white and on black.
_COLOURS = ("#2f81d0", "#e0782f", "#8b8b8b", "#1f9e77", "#b05fc0", "#c9a227", "#d1495b", "#5c6f8f")
_MOST_MARKS = 200
_PLAN = ("placement", "plan", "interval")


def plot(balance: "Balance", form: str, name: str) -> bytes:
    """Return the picture as a file's bytes; `form` is one of picture.FORMS, `name` what the user calls the trace.

    The page loads nothing from anywhere. Raises MoetraceError if altair or vl-convert is missing.
    """
    title = f"Balance of {printable(name)}"
    return picture(form, title, _subtitle(balance.trace), _WIDTH + 220, lambda: _charts(balance))


def _charts(balance: "Balance") -> "alt.VConcatChart":
    """Draw a row for each plan: at batch 1, where imbalance jumps from step to step, lines would hide each other."""
    import altair as alt

    spread, layers = _over_time(balance), _by_layer(balance)
    domains = [[1.0, float(top) if top is not None and top > 1 else 2.0] for top in (_top(spread), _top(layers))]
    placements = layers["placement"].unique(maintain_order=True).to_list()
    drawn: list[Any] = []
    for placement, plan, interval in layers.select(_PLAN).unique(maintain_order=True).rows():
        colour = _COLOURS[placements.index(placement) % len(_COLOURS)]
        of = pl.col("placement") == placement, pl.col("plan") == plan, pl.col("interval").eq_missing(interval)
        marks, title = None, f"{placement}, {plan}"
        if interval is not None:
            marks = _rebalances(balance, interval)
            title += f" every {interval:,} steps" if len(balance.trace["intervals"]) > 1 else ""
        time = _time_panel(spread.filter(*of), colour, domains[0], marks).properties(title=title)
        drawn.append(alt.hconcat(time, _layer_panel(layers.filter(*of), colour, domains[1]), spacing=40))
    return alt.vconcat(*drawn, spacing=26)


def _top(rows: pl.DataFrame) -> Any:
    return rows.select(pl.max_horizontal(pl.selectors.float().max())).item() if len(rows) else None


def _over_time(balance: "Balance") -> pl.DataFrame:
    """Median and quartiles over the layers, at each step or part of the trace."""
    return (
        balance.over_time.drop_nulls("imbalance")
        .with_columns(_printable())
        .group_by(*_PLAN, "first_step", maintain_order=True)
        .agg(
            pl.col("imbalance").quantile(0.25, "linear").round(4).alias("lower quartile"),
            pl.col("imbalance").median().round(4).alias("median"),
            pl.col("imbalance").quantile(0.75, "linear").round(4).alias("upper quartile"),
        )
    )


def _by_layer(balance: "Balance") -> pl.DataFrame:
    """Mean imbalance of each layer under each plan, and the least possible."""
    rows = balance.layers.drop_nulls("imbalance").with_columns(_printable())
    return rows.select(*_PLAN, "layer", pl.col("imbalance", "least_imbalance").round(4))


def _time_panel(rows: pl.DataFrame, colour: str, domain: list[float], marks: pl.DataFrame | None) -> "alt.LayerChart":
    import altair as alt

    x = alt.X(
        "first_step:Q",
        title="step",
        axis=alt.Axis(grid=False, format="d", tickCount=6),
        scale=alt.Scale(nice=False, zero=False),
    )
    y = alt.Y(
        "median:Q",
        title="max / mean",
        axis=alt.Axis(tickCount=3),
        scale=alt.Scale(domain=domain, nice=False, zero=False),
    )
    figures = [alt.Tooltip(f"{name}:Q", format=".3f") for name in ("lower quartile", "median", "upper quartile")]
    base = alt.Chart(inline(rows))
    band = base.mark_area(opacity=0.2, color=colour).encode(
        x=x, y=alt.Y("lower quartile:Q", scale=y["scale"]), y2="upper quartile:Q"
    )
    line = base.mark_line(strokeWidth=1.4, color=colour).encode(x=x, y=y)
    points = base.mark_circle(size=14, color=colour).encode(
        x=x, y=y, tooltip=["placement:N", "plan:N", "first_step:Q", *figures]
    )
    layers: list[Any] = [band, line, points]
    if marks is not None and len(marks):
        rule = alt.Chart(inline(marks)).mark_rule(opacity=0.6, strokeDash=[2, 3], color="#8b8b8b")
        layers.insert(0, rule.encode(x="first_step:Q"))
    return alt.LayerChart(layer=layers, width=_TIME_WIDTH, height=_HEIGHT)


def _layer_panel(rows: pl.DataFrame, colour: str, domain: list[float]) -> "alt.LayerChart":
    import altair as alt

    base = alt.Chart(inline(rows))
    x = alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0, labelOverlap=True))
    y = alt.Y(
        "imbalance:Q", title=None, axis=alt.Axis(tickCount=3), scale=alt.Scale(domain=domain, nice=False, zero=False)
    )
    band = base.mark_bar(width={"band": 1}, opacity=0.25, color="#8b8b8b")
    names = ("imbalance", "least_imbalance")
    tooltip = ["placement:N", "plan:N", "layer:O", *(alt.Tooltip(f"{name}:Q", format=".3f") for name in names)]
    points = base.mark_circle(size=30, opacity=1, color=colour).encode(x=x, y=y, tooltip=tooltip)
    least = band.encode(x=x, y=alt.Y("least_imbalance:Q", scale=y["scale"]), y2=alt.datum(domain[0]))
    return alt.LayerChart(layer=[least, points], width=_WIDTH - _TIME_WIDTH, height=_HEIGHT)


def _rebalances(balance: "Balance", interval: int) -> pl.DataFrame:
    """Steps of the trace at which plans are recomputed; empty if they are too many to show."""
    first = balance.trace["rebalance_steps"][balance.trace["intervals"].index(interval)]
    return pl.DataFrame({"first_step": first if len(first) <= _MOST_MARKS else []}, schema={"first_step": pl.Int64})


def _printable() -> pl.Expr:
    return pl.col("placement").map_elements(printable, return_dtype=pl.String)


def _subtitle(facts: dict[str, Any]) -> str:
    step = "step" if facts["phase"] == "all" else f"{facts['phase']} step"
    made = f"made from {facts['window']:,}" if facts["window"] else "made from these"
    return (
        f"{printable(facts['model'])}: {counted(facts['layers'], 'layer')} of {counted(facts['experts'], 'expert')} on "
        f"{counted(facts['units'], 'unit')}; {counted(facts['judged_steps'], step)} judged, plans {made}\n"
        "Rows of the busiest unit over the mean. Left: median and quartiles of the layers; upright: a new plan.\n"
        "Right: mean of each layer; grey: what no plan of these slots can reach"
    )
