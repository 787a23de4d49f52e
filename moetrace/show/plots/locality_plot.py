"""The picture of `analyze locality`: load of each expert, overlap by lag and hit curve, as PNG or as one HTML page."""

import math
from typing import TYPE_CHECKING, Any

import polars as pl

from moetrace.show.plots.picture import inline, picture
from moetrace.spec.errors import counted, printable

if TYPE_CHECKING:
    import altair as alt

    from moetrace.analyze.locality.measure import Locality

_WIDTH, _GAP = 768, 64  # a whole number of pixels for each of 2 ** n experts: no seams
# Blue, orange and grey: apart for colour-blind eyes, and legible on white and on black.
_COLOURS = {"as it is": "#2f81d0", "shuffled within requests": "#e0782f", "shuffled globally": "#8b8b8b"}


def plot(locality: "Locality", form: str, name: str) -> bytes:
    """Return the picture as a file's bytes; `form` is one of FORMS, `name` what the user calls the trace.

    The page loads nothing from anywhere. Raises MoetraceError if altair or vl-convert is missing.
    """
    title = f"Locality of {printable(name)}"
    return picture(form, title, _subtitle(locality.trace), _WIDTH + 120, lambda: _charts(locality))


def _charts(locality: "Locality") -> "alt.VConcatChart":
    import altair as alt

    shuffles = ["overlap", "overlap_shuffled_within_requests", "overlap_shuffled_globally"]
    overlap = _over_layers(locality.overlap, "lag", dict(zip(shuffles, _COLOURS, strict=True)))
    hits = {"hit_rate": "as it is", "hit_rate_shuffled": "shuffled globally"}
    hit_curve = _over_layers(locality.hit_curve, "capacity", hits)
    below = []
    if not overlap.is_empty():
        below.append(_curves(overlap, "lag", "tokens later", "Experts chosen again", "log"))
    if not hit_curve.is_empty():
        title = "experts that each layer's LRU cache holds"
        below.append(_curves(hit_curve, "capacity", title, "Hit rate", "linear"))
    return alt.vconcat(
        _load(locality), *([alt.hconcat(*below, spacing=_GAP)] if below else []), spacing=40
    ).resolve_scale(color="independent")


def _load(locality: "Locality") -> "alt.Chart":
    """Draw a cell for each layer and expert: how often it is chosen, in units of the mean of its layer."""
    import altair as alt

    total = pl.col("prefill") + pl.col("decode")
    times = locality.load.with_columns(total.alias("choices")).with_columns(
        (pl.col("choices") / pl.col("choices").mean().over("layer")).fill_nan(0).round(3).alias("times")
    )
    layers, experts = times["layer"].n_unique(), times["expert"].n_unique()
    top = max(2, math.ceil(times["times"].quantile(0.995) or 0))
    shown = [*range(0, top, max(1, top // 4)), top]
    return (
        alt.Chart(inline(times), title="Load of each expert, in times the mean of its layer")
        .mark_rect()
        .encode(
            x=alt.X("expert:O", title="expert", axis=alt.Axis(values=_ticks(experts), labelAngle=0, ticks=False)),
            y=alt.Y("layer:O", title="layer", axis=alt.Axis(values=_some(times["layer"].unique().sort()), ticks=False)),
            color=alt.Color(
                "times:Q",
                title="× mean",
                scale=alt.Scale(scheme="viridis", type="sqrt", domain=[0, top], clamp=True),
                legend=alt.Legend(values=shown, labelExpr=_labels(times["times"], top)),
            ),
            tooltip=["layer:O", "expert:O", "choices:Q", alt.Tooltip("times:Q", title="× mean of layer")],
        )
        .properties(width=_WIDTH, height=layers * max(4, min(24, 400 // layers)))
    )


def _labels(times: pl.Series, top: int) -> str:
    """Return Vega's expression for the legend's labels: colours end at `top`, so its label says if there is more."""
    above = "≥ " if (times > top).any() else ""
    return f"datum.value < {top} ? datum.label : '{above}' + datum.label"


def _over_layers(frame: pl.DataFrame, by: str, names: dict[str, str]) -> pl.DataFrame:
    """Return quartiles, least and greatest over the layers, a row for each curve and value of `by`."""
    long = frame.select("layer", by, *names).unpivot(index=["layer", by], variable_name="curve", value_name="share")
    return (
        long.drop_nulls()
        .group_by("curve", by)
        .agg(
            pl.col("share").min().alias("least"),
            pl.col("share").quantile(0.25, "linear").alias("lower quartile"),
            pl.col("share").median().alias("median"),
            pl.col("share").quantile(0.75, "linear").alias("upper quartile"),
            pl.col("share").max().alias("greatest"),
        )
        .with_columns(pl.col("curve").replace_strict(names, return_dtype=pl.String), pl.col(pl.Float64).round(4))
        .sort("curve", by)
    )


def _curves(curves: pl.DataFrame, by: str, title: str, what: str, scale: str) -> "alt.LayerChart":
    """Draw the median over the layers as lines, and the middle half of them as bands."""
    import altair as alt

    shown = [name for name in _COLOURS if name in curves["curve"].to_list()]
    colours = alt.Scale(domain=shown, range=[_COLOURS[name] for name in shown])
    axis: dict[str, Any] = {"grid": False, "format": "d"}
    if scale == "log":
        axis["values"] = curves[by].unique().sort().to_list()
        x = alt.X(f"{by}:Q", title=title, scale=alt.Scale(type="log", base=2, nice=False), axis=alt.Axis(**axis))
    else:
        x = alt.X(f"{by}:Q", title=title, scale=alt.Scale(nice=False), axis=alt.Axis(**axis))
    share = alt.Axis(format="%", tickCount=6)
    spread = ["least", "lower quartile", "median", "upper quartile", "greatest"]
    figures = [alt.Tooltip(f"{name}:Q", format=".1%") for name in spread]
    legend = alt.Legend(orient="top", direction="horizontal", symbolType="stroke", symbolStrokeWidth=3, offset=4)
    base = alt.Chart(inline(curves), title=f"{what}: median and middle half of the layers")
    band = base.mark_area(opacity=0.18).encode(
        x=x,
        y=alt.Y("lower quartile:Q", title=None, axis=share),
        y2="upper quartile:Q",
        color=alt.Color("curve:N", scale=colours, legend=None),
    )
    line = base.mark_line(strokeWidth=2, point=scale == "log").encode(
        x=x,
        y=alt.Y("median:Q", title=None, axis=share),
        color=alt.Color("curve:N", title=None, scale=colours, legend=legend),
        tooltip=["curve:N", f"{by}:Q", *figures],
    )
    layered = alt.LayerChart(layer=[band, line], width=(_WIDTH - _GAP) // 2, height=250)
    return layered.resolve_scale(color="independent")


def _ticks(count: int) -> list[int]:
    return list(range(0, count, max(1, 2 ** (count - 1).bit_length() // 16)))


def _some(values: pl.Series) -> list[int]:
    return values.gather_every(max(1, -(-len(values) // 16))).to_list()


def _subtitle(facts: dict[str, Any]) -> str:
    row = "row" if facts["phase"] == "all" else f"{facts['phase']} row"
    return (
        f"{printable(facts['model'])}: {counted(facts['layers'], 'layer')} of {counted(facts['experts'], 'expert')}, "
        f"top {facts['top_k']}; {counted(facts['rows'], row)} of {counted(facts['requests'], 'request')}"
    )
