"""Charts of what `moetrace analyze` printed as JSON of the same trace: hit curves of caches, balance of plans."""

from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import polars as pl

from moetrace.results.read_json import read_json
from moetrace.results.record import Count, TraceFacts
from moetrace.show.charts.style import ChartGroup, in_order, lines
from moetrace.show.plots.cache_plot import curves
from moetrace.spec.errors import MoetraceError, UsageError

_MOST_POINTS = 160  # of a curve
_PHASES = {"all": "All steps", "prefill": "Prefill steps", "decode": "Decode steps", "mixed": "Mixed steps"}


class _Cache(msgspec.Struct):
    """A row of `analyze cache`; with --curve it has no policy, and is of LRU."""

    phase: str
    hit_rate: float | None
    policy: str = "lru"
    steps: Count | None = None
    capacity_experts: Count | None = None
    capacity_bytes: float | None = None
    hit_rate_low: float | None = None
    hit_rate_high: float | None = None


class _Row(msgspec.Struct):
    """A row of `analyze balance`, of its layers or of its periods."""

    placement: str
    plan: str
    layer: Count
    imbalance: float | None
    least_imbalance: float | None = None
    first_step: Count = 0


class _Balance(msgspec.Struct):
    trace: dict[str, Any]
    layers: list[_Row]
    over_time: list[_Row]


def hit_curves(path: Path, trace: TraceFacts) -> ChartGroup:
    """Draw how often caches of each capacity would have hit.

    Raises MoetraceError if the file is not what `analyze cache` prints, UsageError if its capacities are of two kinds,
    or if it is of a trace of another number of steps (which it says of all steps, and not of a curve).
    """
    import altair as alt

    found = read_json(path, list[_Cache])
    frame = _frame(found, _Cache).drop_nulls("hit_rate").filter(pl.col("phase").is_in(list(_PHASES)))
    if frame.is_empty():
        raise MoetraceError(f"{path} has no hit rates: analyze a trace that has steps of that phase.")
    if not frame.filter(phase="all")["steps"].drop_nulls().is_in([trace.steps]).all():
        raise _of_another(path)
    if frame["capacity_experts"].null_count() not in (0, len(frame)):
        raise UsageError(f"{path} has capacities in experts and in bytes: give one kind to `moetrace analyze cache`.")
    unit = "GB" if frame["capacity_experts"].null_count() else "experts"
    points = curves(frame, None).drop("replayed")
    names = frame["policy"].unique(maintain_order=True).to_list()
    x = alt.X("capacity:Q", title=f"capacity of all layers, {unit}", axis=alt.Axis(grid=False, tickCount=5))
    y = alt.Y("hit_rate:Q", title=None, axis=alt.Axis(format="%", tickCount=5), scale=alt.Scale(domain=[0, 1]))
    tooltip: list[Any] = ["policy:N", alt.Tooltip("capacity:Q", title=unit)]
    tooltip += [alt.Tooltip(f"{name}:Q", format=".1%") for name in ("hit_rate", "hit_rate_low", "hit_rate_high")]
    panels = []
    for phase, title in _PHASES.items():
        of = in_order(points.filter(phase=phase), names, "capacity")
        every = -(-max(1, of.group_by("policy").len()["len"].max() or 1) // _MOST_POINTS)  # type: ignore[operator]
        at = pl.int_range(pl.len()).over("policy")
        of = of.filter((at % every == 0) | (at == pl.len().over("policy") - 1)).drop("phase")
        if len(of):
            panels.append((title, lines(f"cache_{phase}", of, x, y, names, tooltip)))
    words = (
        "Result of `moetrace analyze cache`: how often a cache of this size would have had the expert that was "
        "needed, under each eviction policy."
    )
    if "belady" in names:
        words += (
            " Belady's knows the future: with experts of equal size, no other that keeps every demanded expert hits "
            "more. Where it is low, the working set does not fit; where it is high and the others are not, a better "
            "policy would help."
        )
    return ChartGroup("cache", "Hit curves of caches", words, panels, points.rename({"capacity": f"capacity, {unit}"}))


def balance(path: Path, trace: TraceFacts) -> ChartGroup:
    """Draw how evenly placements and plans spread rows over units, by layer and over time.

    Raises MoetraceError if the file is not what `analyze balance` prints, UsageError if it is of another trace.
    """
    import altair as alt

    found = read_json(path, _Balance)
    names = ["model", "layers", "experts", *(["steps"] if found.trace.get("phase") == "all" else [])]
    if any(found.trace.get(name) != getattr(trace, name) for name in names):
        raise _of_another(path)
    label = (pl.col("placement") + ", " + pl.col("plan")).alias("policy")
    layers = _frame(found.layers, _Row).with_columns(label).drop_nulls("imbalance")
    if layers.is_empty():
        raise MoetraceError(f"{path} has no imbalance of any layer: analyze a trace that has steps of that phase.")
    names = layers["policy"].unique(maintain_order=True).to_list()
    periods = (
        _frame(found.over_time, _Row)
        .with_columns(label)
        .drop_nulls("imbalance")
        .group_by("policy", "first_step", maintain_order=True)
        .agg(pl.col("imbalance").median())
    )
    shown = ["policy", "layer", "imbalance", "least_imbalance"]
    tooltip = [alt.Tooltip("policy:N", title="plan"), "layer:Q"]
    tooltip += [alt.Tooltip(f"{name}:Q", format=".3f") for name in shown[2:]]
    y = alt.Y("imbalance:Q", title="max / mean", scale=alt.Scale(zero=False))
    x = alt.X("layer:Q", title="MoE layer", axis=alt.Axis(grid=False, format="d", tickMinStep=1))
    by_layer = lines("balance_layers", in_order(layers, names, "layer").select(shown), x, y, names, tooltip)
    panels = [("Imbalance of each layer, mean of the steps", by_layer)]
    if periods["first_step"].n_unique() > 1:
        x = alt.X("first_step:Q", title="step", axis=alt.Axis(grid=False, format=",d", tickCount=5))
        tooltip = [alt.Tooltip("policy:N", title="plan"), "first_step:Q", alt.Tooltip("imbalance:Q", format=".3f")]
        over = lines("balance_time", in_order(periods, names, "first_step"), x, y, names, tooltip)
        panels.append(("Imbalance over time, median of the layers", over))
    words = (
        "Result of `moetrace analyze balance`: rows of the busiest unit over the mean of all, 1 at best. Kept plans "
        "are made once and get stale; re-made ones follow the load; clairvoyant ones know what they are judged on."
    )
    table = layers.select(shown).rename({"policy": "placement, plan", "least_imbalance": "least possible"})
    return ChartGroup("balance", "Balance of placements and plans", words, panels, table)


def _of_another(path: Path) -> UsageError:
    return UsageError(f"{path} is of another trace than the replay: analyze the trace that was replayed.")


def _frame(rows: list[Any], form: Any) -> pl.DataFrame:
    """A frame with every field of the struct, of fixed types: an empty list has them too."""
    kinds = {str: pl.String, int: pl.Int64, int | None: pl.Int64, float | None: pl.Float64}
    schema = {name: kinds[kind] for name, kind in get_type_hints(form).items()}  # without the bounds of a Count
    return pl.DataFrame([msgspec.structs.asdict(row) for row in rows], schema=schema)
