"""The picture of `analyze cache`: hit curves of all policies, Belady's on top, as PNG or as one HTML page."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import polars as pl

from moetrace.show.plots.picture import inline, picture
from moetrace.spec.errors import UsageError, printable

if TYPE_CHECKING:
    import altair as alt

_WIDTH, _GAP, _HEIGHT = 768, 48, 340
# Belady's is grey; the others are apart for colour-blind eyes, and legible on white and on black.
_COLOURS = ("#2f81d0", "#e0782f", "#1f9e77", "#b05fc0", "#c9a227", "#d1495b", "#5c6f8f", "#17becf", "#8c564b")
_COLOURS += ("#7fb800", "#ef7fc0")
_YARDSTICK, _GREY = "belady", "#8b8b8b"
_MOST_POINTS = 256  # of a curve of every capacity
_FIGURES = ("hit_rate", "hit_rate_low", "hit_rate_high")


def plot(
    frame: pl.DataFrame,
    curve: pl.DataFrame | None,
    form: str,
    name: str,
    subtitle: str,
    *,
    phase: str | None = None,
    marked: Sequence[str] = (),
) -> bytes:
    """Return the picture as a file's bytes; `form` is one of picture.FORMS, `name` what the user calls the trace.

    frame is that of `cache_hits`; curve that of `lru_curve`, or None. Only `phase` is drawn, by default prefill and
    decode side by side; the capacities `marked` get an upright line. The page loads nothing from anywhere. Raises
    UsageError if capacities are in experts and in bytes, MoetraceError if altair or vl-convert is missing.
    """
    if frame["capacity_experts"].null_count() not in (0, len(frame)):
        raise UsageError("--plot needs capacities of one kind: all in experts, or all in bytes.")
    title = f"Hit rate of caches: {printable(name)}"
    return picture(form, title, printable(subtitle), _WIDTH + 220, lambda: _charts(frame, curve, phase, marked))


def curves(frame: pl.DataFrame, curve: pl.DataFrame | None) -> pl.DataFrame:
    """Return the drawn points: policy, phase, capacity (experts or GB), hit_rate, its interval, and whether `replayed`.

    Points that were not requested are on LRU's curve, between the requested capacities.
    """
    in_bytes = frame["capacity_experts"].null_count() > 0
    capacity = pl.col("capacity_bytes") / 1e9 if in_bytes else pl.col("capacity_experts").cast(pl.Float64)
    points = frame.select("policy", "phase", capacity.alias("capacity"), *_FIGURES, pl.lit(True).alias("replayed"))
    if curve is not None and not in_bytes and "lru" in frame["policy"].to_list():
        every = max(1, -(-curve["capacity_experts"].n_unique() // _MOST_POINTS))
        more = curve.filter((pl.col("capacity_experts").rank("dense").over("phase") - 1) % every == 0)
        more = more.select(
            pl.lit("lru").alias("policy"),
            "phase",
            pl.col("capacity_experts").cast(pl.Float64).alias("capacity"),
            "hit_rate",
            *(pl.lit(None, pl.Float64).alias(bound) for bound in _FIGURES[1:]),
            pl.lit(False).alias("replayed"),
        )
        points = pl.concat([points, more.join(points, on=["policy", "phase", "capacity"], how="anti")])
    rounded = points.drop_nulls("hit_rate").with_columns(pl.col(*_FIGURES).round(4))
    return rounded.sort("policy", "phase", "capacity", maintain_order=True)


def _charts(
    frame: pl.DataFrame, curve: pl.DataFrame | None, phase: str | None, marked: Sequence[str]
) -> "alt.VConcatChart":
    import altair as alt

    points = curves(frame, curve)
    of_marked = curves(frame.filter(pl.col("capacity").is_in(list(marked))), None)["capacity"].unique().sort()
    unit = "GB" if frame["capacity_experts"].null_count() else "experts"
    phases = [phase for phase in frame["phase"].unique(maintain_order=True) if phase != "all"]
    phases = [phase] if phase is not None else phases if len(phases) > 1 else ["all"]
    policies = frame["policy"].unique(maintain_order=True).to_list()
    colour, width = _colour(policies), (_WIDTH - _GAP * (len(phases) - 1)) // len(phases)
    panels: list[Any] = []
    for shown in phases:
        rows = points.filter(phase=shown)
        axis = rows.filter("replayed").select("capacity").unique().with_columns(pl.lit(None).alias("policy"))
        layers = [*_marks(axis.filter(pl.col("capacity").is_in(of_marked.implode()))), *_curves(rows, colour, unit)]
        title = "All steps" if shown == "all" else f"{shown.capitalize()} steps"
        panels.append(alt.LayerChart(layer=layers, width=width, height=_HEIGHT, title=title))
    return alt.vconcat(alt.hconcat(*panels, spacing=_GAP))


def _marks(capacities: pl.DataFrame) -> list[Any]:
    """Draw an upright line at each capacity that was asked for."""
    import altair as alt

    if capacities.is_empty():
        return []
    base = alt.Chart(inline(capacities)).encode(x="capacity:Q")
    return [base.mark_rule(opacity=0.55, strokeDash=[2, 3], color=_GREY)]


def _colour(policies: list[str]) -> Any:
    import altair as alt

    others = [policy for policy in policies if policy != _YARDSTICK]
    names = [policy for policy in policies if policy == _YARDSTICK] + others
    colours = [_GREY] * (len(names) - len(others)) + [_COLOURS[i % len(_COLOURS)] for i in range(len(others))]
    return alt.Color(
        "policy:N",
        title=None,
        sort=names,
        scale=alt.Scale(domain=names, range=colours),
        legend=alt.Legend(orient="top", columns=6, symbolType="stroke", symbolStrokeWidth=3, symbolOpacity=1, offset=6),
    )


def _curves(points: pl.DataFrame, colour: Any, unit: str) -> list[Any]:
    """Draw the curves, a point where a capacity was replayed, and the bands of 95 % confidence over requests."""
    import altair as alt

    base = alt.Chart(inline(points))
    title = f"capacity of all layers, {unit}"
    x = alt.X("capacity:Q", title=title, axis=alt.Axis(grid=False), scale=alt.Scale(nice=False))
    y = alt.Y("hit_rate:Q", title=None, axis=alt.Axis(format="%", tickCount=6), scale=alt.Scale(domain=[0, 1]))
    figures = [alt.Tooltip(f"{name}:Q", format=".1%") for name in _FIGURES]
    line = base.mark_line(strokeWidth=2).encode(x=x, y=y, color=colour)
    hover = base.mark_circle(size=26).encode(
        x=x, y=y, color=colour, tooltip=["policy:N", alt.Tooltip("capacity:Q", title=unit), *figures]
    )
    known = hover.transform_filter("datum.replayed")
    # Where LRU's line turns between two replayed capacities, a band from one to the other would not.
    whole = points.filter(~pl.col("replayed"))["policy"].unique().to_list()
    bounded = points.drop_nulls("hit_rate_low").with_columns(pl.col("policy").is_in(whole).alias("bars"))
    bounds = alt.Chart(inline(bounded)).encode(x=x, y=alt.Y("hit_rate_low:Q"), y2="hit_rate_high:Q", color=colour)
    bands = bounds.mark_area(opacity=0.15).transform_filter("!datum.bars")
    bars = bounds.mark_rule(opacity=0.35, strokeWidth=5).transform_filter("datum.bars")
    return [bands, bars, line, known]
