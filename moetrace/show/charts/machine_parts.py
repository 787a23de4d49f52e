"""Charts of the machine and of the experts: how busy each part is, how layers differ, which experts are wanted."""

import math
from typing import Any

import polars as pl

from moetrace.results.replayed import Replayed
from moetrace.show.charts.style import ChartGroup, colour, data, in_order, lines, part_label, shape

_MOST_UNITS = 16  # that get a row of their own
_MOST_CELLS = 1 << 15  # of a map of experts
_UNIT = r"^(gpu|ndp[0-9]+|cpu|link_in|link_out|disk|remote)$"  # a stranger's file may name more
_CLUSTER_UNIT = r"^(gpu[0-9]+|attention[0-9]*|experts[0-9]*|gpus|network|dispatch|combine)$"


def utilization(replayed: Replayed) -> ChartGroup | None:
    """Draw the busy share of each part of the machine, a mark for each policy."""
    import altair as alt

    if replayed.units is None:
        return None
    used = in_order(replayed.units, replayed.names).drop_nulls("utilization")
    known = _CLUSTER_UNIT if replayed.summary.of_cluster else _UNIT
    used = used.filter(pl.col("unit").str.contains(known) & (pl.col("utilization").max().over("unit") > 0))
    used, units = _rows(used)
    if used.is_empty():
        return None
    chart = (
        alt.Chart(data(used))
        .mark_point(size=90, filled=True, opacity=0.9)
        .encode(
            x=alt.X(
                "utilization:Q",
                title="busy share of the total time",
                axis=alt.Axis(format="%", tickCount=5),
                scale=alt.Scale(domain=[0, 1]),
            ),
            y=alt.Y("unit:N", title=None, sort=units, axis=alt.Axis(ticks=False, domain=False, labelPadding=8)),
            color=colour("policy", replayed.names),
            shape=shape("policy", replayed.names),
            tooltip=[
                "policy:N",
                "unit:N",
                alt.Tooltip("utilization:Q", format=".1%"),
                alt.Tooltip("busy_s:Q", format=",.4~g", title="busy, s"),
            ],
        )
        .properties(height=24 * len(units))
    )
    words = (
        "Busy time over total time. The busiest part limits the policy; units that differ are out of balance. Link in "
        "is the direction towards the GPU."
    )
    if replayed.summary.of_cluster:
        words = (
            "Busy time over total time: of each GPU for itself, and of what serves one stage at a time, which is busy "
            "until the slowest GPU is done. What is busiest limits the policy; GPUs that differ are out of balance."
        )
    table = used.pivot("policy", index="unit", values="utilization", maintain_order=True)
    return ChartGroup("utilization", "How busy each part of the machine is", words, [("Busy share", chart)], table)


def _rows(used: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    """Return the rows with the units' names for people, and these in order; of too many equal units, the extremes."""
    kind = pl.col("unit").str.strip_chars_end("0123456789")
    parts, units = [], []
    for (name,), equal in used.group_by(kind, maintain_order=True):
        names = equal["unit"].unique(maintain_order=True).to_list()
        if len(names) <= _MOST_UNITS:
            units += map(part_label, names)
            continue
        used = used.filter(kind != name)
        for word, how in (("least", pl.min), ("mean", pl.mean), ("most", pl.max)):
            units.append(f"{part_label(str(name))}, {word}")
            by_policy = equal.group_by("policy", maintain_order=True).agg(how("utilization"), how("busy_s"))
            parts.append(by_policy.with_columns(pl.lit(units[-1]).alias("unit")).select(used.columns))
    labels = {unit: part_label(unit) for unit in used["unit"].unique()}
    return pl.concat([used.with_columns(pl.col("unit").replace(labels)), *parts]), units


def layers(replayed: Replayed) -> ChartGroup | None:
    """Draw imbalance, hit rate and time of each layer, a line for each policy."""
    import altair as alt

    if replayed.layers is None or replayed.layers.is_empty():
        return None
    steps = max(1, replayed.summary.trace.steps)
    rows = in_order(replayed.layers, replayed.names, "layer").select(
        "policy",
        "layer",
        pl.col("imbalance").fill_nan(None),
        (pl.col("hits") / (pl.col("hits") + pl.col("misses"))).fill_nan(None).alias("hit_rate"),
        (1e3 * pl.col("moe_s") / steps).alias("ms"),
    )
    x = alt.X("layer:Q", title="MoE layer", axis=alt.Axis(grid=False, format="d", tickMinStep=1), scale=_exact())
    tooltip = [
        "policy:N",
        "layer:Q",
        alt.Tooltip("imbalance:Q", format=".3f"),
        alt.Tooltip("hit_rate:Q", format=".1%", title="hit rate"),
        alt.Tooltip("ms:Q", format=",.4~g", title="ms a step"),
    ]
    percent = alt.Axis(format="%", tickCount=5)
    wanted = [
        ("ms", "Time of experts, mean of the steps", alt.Y("ms:Q", title="ms", axis=alt.Axis(tickCount=5))),
        ("imbalance", "Imbalance of units", alt.Y("imbalance:Q", title="max / mean", scale=alt.Scale(zero=False))),
        ("hit_rate", "Hit rate", alt.Y("hit_rate:Q", title=None, axis=percent, scale=alt.Scale(domain=[0, 1]))),
    ]
    panels: list[tuple[str, Any]] = []
    for name, title, y in wanted:
        shown = rows.drop_nulls(name)
        if (shown[name].sum() or 0) > 0:
            panels.append((title, lines(name, shown, x, y, replayed.names, tooltip)))
    if not panels:
        return None
    words = (
        "Imbalance is the busiest unit's time over the mean of all units, 1 at best, averaged over the steps in which "
        "units had work."
    )
    if not replayed.summary.of_cluster:
        words += " A hit is an active expert that was on the GPU when the router spoke."
    table = rows.rename({"hit_rate": "hit rate", "ms": "ms a step"})
    return ChartGroup("layers", "How layers differ", words, panels, table)


def load(replayed: Replayed) -> ChartGroup | None:
    """Draw a cell for each layer and expert: how often it is chosen, in times the mean of its layer."""
    import altair as alt

    experts = replayed.experts
    if experts is None or experts.is_empty() or not experts["rows"].sum():
        return None
    times = experts.with_columns(
        (pl.col("rows") / pl.col("rows").mean().over("layer")).fill_nan(0).round(3).alias("times"),
        (pl.col("steps") / max(1, replayed.summary.trace.steps)).round(4).alias("active"),
    )
    grouped = -(-len(times) // _MOST_CELLS)
    if grouped > 1:
        times = (
            times.with_columns(pl.col("expert") // grouped * grouped)
            .group_by("layer", "expert", maintain_order=True)
            .agg(pl.col("rows").sum(), pl.col("times", "active").mean().round(4))
        )
    layer_count, first = times["layer"].n_unique(), times["expert"].unique().sort().to_list()
    top = max(2, math.ceil(float(times["times"].quantile(0.995) or 0)))
    above = "≥ " if (times["times"] > top).any() else ""
    chart = (
        alt.Chart(data(times.select("layer", "expert", "rows", "times", "active")))
        .mark_rect(aria=False)
        .encode(
            x=alt.X(
                "expert:O",
                title="expert",
                axis=alt.Axis(values=first[:: max(1, len(first) // 8)], labelAngle=0, ticks=False),
            ),
            y=alt.Y(
                "layer:O",
                title="layer",
                axis=alt.Axis(values=list(range(0, layer_count, max(1, -(-layer_count // 16)))), ticks=False),
            ),
            color=alt.Color(
                "times:Q",
                title="times the mean of its layer",
                scale=alt.Scale(scheme="viridis", type="sqrt", domain=[0, top], clamp=True),
                legend=alt.Legend(
                    orient="top",
                    gradientLength=220,
                    values=[*range(0, top, max(1, top // 4)), top],
                    labelExpr=f"datum.value < {top} ? datum.label : '{above}' + datum.label",
                ),
            ),
            tooltip=[
                "layer:O",
                "expert:O",
                alt.Tooltip("rows:Q", format=",", title="rows that chose it"),
                alt.Tooltip("times:Q", format=".2f", title="times the mean of its layer"),
                alt.Tooltip("active:Q", format=".1%", title="of the steps wanted it"),
            ],
        )
        .properties(height=layer_count * max(6, min(24, 360 // layer_count)))
    )
    words = (
        "How many rows chose each expert, in times the mean of its layer; the same for all policies. Bright cells are "
        "experts worth keeping on the GPU; a layer of one colour leaves a cache nothing to learn."
        + (f" A cell is {grouped} neighbouring experts." if grouped > 1 else "")
    )
    return ChartGroup("load", "Demand for experts", words, [("Load of each expert", chart)], _load_table(experts))


def _load_table(experts: pl.DataFrame) -> pl.DataFrame:
    """Return a row for each layer: how its rows spread over its experts."""
    share = pl.col("rows").sort(descending=True) / pl.col("rows").sum()
    count = experts["expert"].n_unique()
    return (
        experts.group_by("layer")
        .agg(
            pl.col("rows").sum().alias("choices"),
            pl.col("expert").sort_by("rows", descending=True, maintain_order=True).head(4).alias("most wanted experts"),
            share.head(1).sum().alias("most wanted, share"),
            share.head(max(1, count // 4)).sum().alias("most wanted quarter, share"),
            (pl.col("rows") == 0).sum().alias("never wanted"),
        )
        .sort("layer")
        .with_columns(pl.col("most wanted experts").list.eval(pl.element().cast(pl.String)).list.join(", "))
    )


def _exact() -> Any:
    import altair as alt

    return alt.Scale(nice=False, zero=False)
