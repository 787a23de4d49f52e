"""The picture of `analyze prefetch`: what becomes of an LRU cache's misses, and of the bytes fetched, by predictor."""

from typing import TYPE_CHECKING, Any

import polars as pl

from moetrace.show.plots.picture import inline, picture
from moetrace.spec.errors import printable

if TYPE_CHECKING:
    import altair as alt

_WIDTH, _GAP, _ROW = 768, 56, 26
# Outcome of misses and of bytes -> its colour: distinct for colour-blind eyes, the worst in grey.
_MISSES = {"named, and there in time": "#2f81d0", "named too late": "#e0782f", "not named": "#c8c8c8"}
_UNTIMED = {"named": "#2f81d0", "not named": "#c8c8c8"}
_BYTES = {"demanded": "#2f81d0", "in vain": "#e0782f"}


def plot(frame: pl.DataFrame, form: str, name: str, subtitle: str) -> bytes:
    """Return the picture as a file's bytes; `form` is one of picture.FORMS, `name` what the user calls the trace.

    frame is that of `prefetch_value`. The page loads nothing from anywhere. Raises MoetraceError if altair or
    vl-convert is missing.
    """
    title = f"Value of prefetches: {printable(name)}"
    return picture(form, title, printable(subtitle), _WIDTH + 220, lambda: _charts(frame))


def parts(frame: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return what the misses, and what the gigabytes fetched of each predictor and phase come to: `what`, `value`.

    Shares of the misses sum to 1. There are no gigabytes where nothing says what arrives in time, or sizes are unknown.
    """
    misses = pl.col("misses")
    if frame["timely_hits"].null_count() == len(frame):
        shares = {"named": pl.col("covered_misses") / misses, "not named": 1 - pl.col("covered_misses") / misses}
    else:
        late = (pl.col("covered_misses") - pl.col("timely_hits")).clip(0) / misses
        shares = {"named, and there in time": pl.col("timely_hits") / misses, "named too late": late}
        shares["not named"] = 1 - sum(shares.values(), pl.lit(0.0))
    useful = (pl.col("prefetched_bytes") - pl.col("wasted_bytes")) / 1e9
    moved = {"demanded": useful, "in vain": pl.col("wasted_bytes") / 1e9}
    return _long(frame.filter(misses > 0), shares), _long(frame, moved).drop_nulls("value")


def _long(frame: pl.DataFrame, values: dict[str, pl.Expr]) -> pl.DataFrame:
    tables = [
        frame.select("predictor", "phase", pl.lit(what).alias("what"), value.cast(pl.Float64).round(6).alias("value"))
        for what, value in values.items()
    ]
    return pl.concat(tables)


def _charts(frame: pl.DataFrame) -> "alt.VConcatChart":
    import altair as alt

    shares, moved = parts(frame)
    colours = _MISSES if "named too late" in shares["what"].to_list() else _UNTIMED
    phases = frame["phase"].unique(maintain_order=True).to_list()
    phases = [phase for phase in phases if phase != "all"] if len(phases) > 2 else phases
    rows: list[Any] = []
    for phase in phases:
        when = "all steps" if phase == "all" else f"{phase} steps"
        panels: list[Any] = [_bars(shares.filter(phase=phase), colours, f"Misses of LRU, {when}", ".0%")]
        if len(moved):
            title = f"Fetched ahead, {when}, GB"
            panels.append(_bars(moved.filter(phase=phase), _BYTES, title, ".4~g"))
        rows.append(alt.hconcat(*panels, spacing=_GAP).resolve_scale(color="independent"))
    return alt.vconcat(*rows, spacing=36)


def _bars(rows: pl.DataFrame, colours: dict[str, str], title: str, form: str) -> "alt.Chart":
    import altair as alt

    names = rows["predictor"].unique(maintain_order=True).to_list()
    scale = alt.Scale(domain=list(colours), range=list(colours.values()))
    limits = alt.Scale(domain=[0, 1]) if "%" in form else alt.Scale()
    legend = alt.Legend(orient="bottom", columns=3, offset=4)
    order = pl.col("what").replace_strict(list(colours), list(range(len(colours))), return_dtype=pl.Int64)
    chart: Any = alt.Chart(inline(rows.with_columns(order.alias("order"))), title=title).mark_bar()
    return chart.encode(
        x=alt.X("sum(value):Q", title=None, axis=alt.Axis(format=form, tickCount=5), scale=limits),
        y=alt.Y("predictor:N", title=None, sort=names, axis=alt.Axis(ticks=False, domain=False)),
        color=alt.Color("what:N", title=None, sort=None, scale=scale, legend=legend),
        order="order:Q",
        tooltip=[
            "predictor:N",
            "what:N",
            alt.Tooltip("sum(value):Q", title="value", format=form.replace(".0%", ".2%")),
        ],
    ).properties(width=(_WIDTH - _GAP) // 2, height=_ROW * max(1, len(names)))
