"""Charts of time: how it is distributed, where it goes, how it runs, and how far from the yardsticks it is."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl

from moetrace.results.replayed import Replayed
from moetrace.show.charts.style import ChartGroup, by_policy, colour, data, lines, log_if_wide

# Shares of steps or requests at which a distribution is drawn, closer together towards its slow end.
_SHARES = np.unique(np.concatenate([np.linspace(0, 0.9, 46), np.linspace(0.9, 0.99, 19), [0.995, 0.999, 1.0]]))
_TABLE_SHARES = {"least": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "most": 1.0}
_STEPS = ("prefill step", "decode step", "mixed step")
# Times of requests: column and title.
_LATENCIES = {
    "TTFT": ("ttft_s", "Time to first token"),
    "TPOT": ("tpot_s", "Time per output token"),
    "ITL p99": ("itl_s_p99", "Time between tokens, p99 of a request"),
}
_OF_STEPS = ("dense_s", "moe_s", "head_s", "wait_s")
_COLD = "cold_s"
_NAMES = ("dense layers", "experts", "head", "waiting for prefetch", "cold start")
_NAMES_OF_A_CLUSTER = ("attention", "experts and transfers", "head", "pauses", "cold start")
PARTS: dict[str, str] = dict(zip((*_OF_STEPS, _COLD), _NAMES, strict=True))
_CLUSTER_PARTS: dict[str, str] = dict(zip(PARTS, _NAMES_OF_A_CLUSTER, strict=True))
_PERIODS = 160  # of a chart over time


def latency(replayed: Replayed) -> ChartGroup | None:
    """Draw which share of steps and of requests was done within which time."""
    import altair as alt

    samples = list(_samples(replayed))
    if not samples:
        return None
    drawn = pl.concat([_quantiles(*sample) for sample in samples])
    panels = []
    for measure in drawn["measure"].unique(maintain_order=True):
        part = drawn.filter(measure=measure).drop("measure")
        x = alt.X("ms:Q", title="at most this time, ms", scale=log_if_wide(part["ms"]), axis=alt.Axis(grid=False))
        y = alt.Y("share:Q", title=None, axis=alt.Axis(format="%", tickCount=5), scale=alt.Scale(domain=[0, 1]))
        tooltip = ["policy:N", alt.Tooltip("share:Q", format=".1%"), alt.Tooltip("ms:Q", format=",.4~g")]
        panels.append((_title(measure), lines(measure.replace(" ", "_"), part, x, y, replayed.names, tooltip)))
    words = (
        "Each curve says which share of the steps (or requests) took at most so long: further left is faster, and a "
        "long flat end is a slow tail. TTFT: from the start of a request's first step to the end of its prompt. TPOT: "
        "from there on, per output token. ITL p99: of a hundred gaps between a request's tokens, the longest but one."
    )
    table = pl.DataFrame([_table_row(*sample) for sample in samples])
    return ChartGroup("latency", "How long steps and requests take", words, panels, table)


def parts(replayed: Replayed) -> ChartGroup | None:
    """Draw the time of each policy, split into what it was spent on."""
    import altair as alt

    if replayed.steps is None:
        return None
    cold = {policy.name: policy.cold_s or 0.0 for policy in replayed.summary.policies}
    sums = pl.DataFrame(
        [
            {"policy": name} | {part: float(steps[part].sum()) for part in _OF_STEPS} | {_COLD: cold[name]}
            for name, steps in _each(replayed, *_OF_STEPS)
        ],
        schema={"policy": pl.String} | dict.fromkeys(PARTS, pl.Float64),
    )
    shown = [name for name in PARTS if sums[name].sum() > 0]
    if not shown:
        return None
    called = _CLUSTER_PARTS if replayed.summary.of_cluster else PARTS
    long = (
        sums.rename(called, strict=False)
        .unpivot([called[name] for name in shown], index="policy", variable_name="part", value_name="seconds")
        .with_columns((pl.col("seconds") / pl.col("seconds").sum().over("policy")).fill_nan(0).alias("share"))
        .with_columns(pl.col("part").replace_strict({called[n]: i for i, n in enumerate(shown)}).alias("order"))
    )
    chart = (
        alt.Chart(data(long))
        .mark_bar(stroke="#80808080", strokeWidth=1, height={"band": 0.75})
        .encode(
            x=alt.X("seconds:Q", title="seconds of all steps", axis=alt.Axis(tickCount=5)),
            y=by_policy(replayed.names),
            color=colour("part", [called[name] for name in shown]),
            order="order:Q",
            tooltip=[
                "policy:N",
                "part:N",
                alt.Tooltip("seconds:Q", format=",.4~g"),
                alt.Tooltip("share:Q", format=".1%", title="of the policy's time"),
            ],
        )
        .properties(height=34 * len(replayed.names))
    )
    words = (
        "Time of all steps, by what the GPU waits for: attention and other dense layers, the experts (on the GPU or on "
        "units, with the transfers that they wait for), the head of the model, and prompts that wait for a prefetch."
    )
    if replayed.summary.of_cluster:
        words = (
            "Time of all steps: attention; what experts and transfers take beyond it, so that what overlaps counts "
            "once; the head of the model; and pauses in which experts move for a new plan."
        )
    if _COLD in shown:
        words += " The cold start of machine and functions comes once, before the first step's work."
    table = sums.select(
        pl.col("policy"),
        *(pl.col(name).alias(f"{called[name]}, s") for name in shown),
        pl.sum_horizontal(*PARTS).alias("all, s"),
    )
    return ChartGroup("parts", "Where the time goes", words, [("Time by part", chart)], table)


def bounds(replayed: Replayed) -> ChartGroup | None:
    """Draw the total of each policy beside its two yardsticks."""
    import altair as alt

    if any(policy.clairvoyant_s is None for policy in replayed.summary.policies):  # of a cluster
        return None
    figures = pl.DataFrame(
        {
            "policy": replayed.names,
            "total": [policy.total_s for policy in replayed.summary.policies],
            "clairvoyant": [policy.clairvoyant_s for policy in replayed.summary.policies],
            "bound": [policy.bound_s for policy in replayed.summary.policies],
        }
    )
    y = by_policy(replayed.names)
    yardsticks = ["bound", "clairvoyant"]
    seconds = [alt.Tooltip(f"{name}:Q", format=",.4~g", title=f"{name}, s") for name in figures.columns[1:]]
    base = alt.Chart(data(figures)).encode(y=y, tooltip=["policy:N", *seconds])
    bar = base.mark_bar(color="#2f81d0", height={"band": 0.5}).encode(
        x=alt.X("total:Q", title="seconds of all steps", axis=alt.Axis(tickCount=6))
    )
    marks = alt.Chart(data(figures.unpivot(yardsticks, index="policy", variable_name="yardstick", value_name="s")))
    marks = marks.mark_point(size=90, filled=True, stroke="white", strokeWidth=1, opacity=1).encode(
        x="s:Q",
        y=y,
        color=alt.Color(
            "yardstick:N",
            title=None,
            scale=alt.Scale(domain=yardsticks, range=["#d56a1e", "#17916a"]),
            legend=alt.Legend(orient="top"),
        ),
        shape=alt.Shape("yardstick:N", title=None, scale=alt.Scale(domain=yardsticks, range=["diamond", "circle"])),
        tooltip=["policy:N", "yardstick:N", alt.Tooltip("s:Q", format=",.4~g", title="seconds")],
    )
    words = (
        "The bar is the time that the policy takes. The bound (diamond) is what no policy beats: GPU and units "
        "share all the work as well as starts, the link and the slots allow. The clairvoyant run (circle) keeps "
        "placement and dispatch, but what a layer needs is on the GPU already, up to the slots: from the circle to the "
        "end of the bar is what better residency and prefetch could still win."
    )
    chart = alt.LayerChart(layer=[bar, marks], height=34 * len(replayed.names))
    table = figures.rename({name: f"{name}, s" for name in figures.columns[1:]})
    return ChartGroup("bounds", "How far from the best possible", words, [("Total and yardsticks", chart)], table)


def over_time(replayed: Replayed) -> ChartGroup | None:
    """Draw the mean time of a step, and the hit rate, from the first step to the last."""
    import altair as alt

    if replayed.steps is None:
        return None
    counts = replayed.steps.filter(pl.col("policy").is_in(replayed.names)).group_by("policy").len()
    most: int = counts.select(pl.max("len")).collect().item() or 0  # counted in the file: summary.json may be wrong
    if most < 2:
        return None
    every = -(-most // _PERIODS)
    periods = pl.concat(
        [_periods(name, steps, every) for name, steps in _each(replayed, "duration_s", "hits", "misses")]
    )
    x = alt.X("from:Q", title="step", axis=alt.Axis(grid=False, format=",d", tickCount=5), scale=alt.Scale(nice=False))
    tooltip = ["policy:N", alt.Tooltip("from:Q", title="from step"), alt.Tooltip("ms:Q", format=",.4~g")]
    tooltip.append(alt.Tooltip("hit_rate:Q", format=".1%", title="hit rate"))
    y = alt.Y("ms:Q", title="ms", scale=log_if_wide(periods["ms"]), axis=alt.Axis(tickCount=5))
    panels: list[tuple[str, Any]] = [
        ("Mean time of a step", lines("time", periods.drop_nulls("ms"), x, y, replayed.names, tooltip))
    ]
    if periods["hit_rate"].drop_nulls().sum() > 0:
        y = alt.Y("hit_rate:Q", title=None, axis=alt.Axis(format="%", tickCount=5), scale=alt.Scale(domain=[0, 1]))
        panels.append(("Hit rate", lines("hits", periods.drop_nulls("hit_rate"), x, y, replayed.names, tooltip)))
    also = "so do pauses" if replayed.summary.of_cluster else "a hit rate that rises at first is a cache that fills"
    words = (
        f"From the first step to the last{f', {every:,} steps a point' if every > 1 else ''}. Prompts make steps "
        f"slow; {also}."
    )
    table = periods.rename({"from": "from step", "ms": "ms a step", "hit_rate": "hit rate"})
    return ChartGroup("over_time", "From the first step to the last", words, panels, table)


def _each(replayed: Replayed, *columns: str) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yield each policy and columns of its steps: one policy in memory at a time, summed in one order."""
    assert replayed.steps is not None
    for name in replayed.names:
        steps = replayed.steps.filter(policy=name).select(pl.col(*columns).fill_null(0)).collect()
        if len(steps):
            yield name, {column: steps[column].to_numpy() for column in columns}


def _periods(policy: str, steps: dict[str, np.ndarray], every: int) -> pl.DataFrame:
    """Return the mean time of a step, and the hit rate, of each group of steps."""
    first = np.arange(0, len(steps["hits"]), every)
    sums = {name: np.add.reduceat(values, first) for name, values in steps.items()}
    count = np.diff(np.append(first, len(steps["hits"])))
    active = sums["hits"] + sums["misses"]
    return pl.DataFrame(
        {
            "policy": pl.repeat(policy, len(first), eager=True),
            "from": first,
            "ms": 1e3 * sums["duration_s"] / count,
            "hit_rate": pl.Series(sums["hits"] / np.where(active > 0, active, np.nan), nan_to_null=True),
        }
    ).with_columns(pl.col("ms").round_sig_figs(5), pl.col("hit_rate").round(4))


def _samples(replayed: Replayed) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield measure, policy and sorted milliseconds of what there is; steps of one phase each if there are several."""
    by_phase: dict[Any, Any] = {}
    if replayed.steps is not None:
        times = replayed.steps.select("policy", "phase", "duration_s").drop_nulls().collect()
        by_phase = times.partition_by("policy", "phase", as_dict=True, maintain_order=True)
    phases = list(dict.fromkeys(phase for _, phase in by_phase))
    for measure in _STEPS:
        for policy in replayed.names:
            for phase in phases:
                if measure == f"{phase} step" and (policy, phase) in by_phase:
                    yield measure, policy, np.sort(1e3 * by_phase[policy, phase]["duration_s"].to_numpy())
    if replayed.requests is not None:
        for measure, (name, _) in _LATENCIES.items():
            for policy in replayed.names:
                column = replayed.requests.filter(policy=policy)[name].drop_nulls()
                if len(column):
                    yield measure, policy, np.sort(1e3 * column.to_numpy())


def _quantiles(measure: str, policy: str, sorted_ms: np.ndarray) -> pl.DataFrame:
    shares = _SHARES if len(sorted_ms) > 1 else np.array([0.0, 1.0])
    return pl.DataFrame(
        {
            "measure": pl.repeat(measure, len(shares), eager=True),
            "policy": pl.repeat(policy, len(shares), eager=True),
            "share": shares.round(4),
            "ms": np.quantile(sorted_ms, shares),
        }
    ).with_columns(pl.col("ms").round_sig_figs(6))


def _table_row(measure: str, policy: str, sorted_ms: np.ndarray) -> dict[str, Any]:
    quantiles = np.quantile(sorted_ms, list(_TABLE_SHARES.values())).tolist()
    named = {f"{name}, ms": value for name, value in zip(_TABLE_SHARES, quantiles, strict=True)}
    return {"of": _title(measure), "policy": policy, "count": len(sorted_ms), **named}


def _title(measure: str) -> str:
    return _LATENCIES[measure][1] if measure in _LATENCIES else f"{measure}s".capitalize()
