"""`locality`: statistics of a trace's routing, layer by layer; every statistic is defined in docs/locality.md."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from moetrace.analyze.locality import null, predict, request_spread, reuse, rows, skew
from moetrace.analyze.locality.chosen_counts import count
from moetrace.analyze.locality.coactivation import coactivation
from moetrace.analyze.locality.overlap import LAGS, mark, marked_overlap
from moetrace.analyze.locality.reuse import Reuse
from moetrace.analyze.locality.rows import Chosen, Sample, Sampler
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.spec.forks import refuse_if_forked
from moetrace.trace import Trace
from moetrace.trace.opening import accepts_path
from moetrace.trace.schema import PHASE_NAMES

SCHEMA = "moetrace.locality/1"
MOST_LAGS = 4096
MOST_LAYERS, MOST_EXPERTS, MOST_CHOICES = 512, 4096, 128  # several times those of any model
# So many random rows are enough of a cache without memory: its hit rates stand within 0.2 points. Fewer rows than that
# are shuffled several times, and the figures are means: one shuffle of 150 rows moves an overlap by two points.
SHUFFLED_ROWS, MOST_SHUFFLES = 1 << 14, 16
FRAMES = ("summary", "layers", "overlap", "hit_curve", "load")


@dataclass(frozen=True)
class Locality:
    """The result of `locality`. Nothing is pooled over layers.

    Attributes:
        trace: Sizes of the trace and of the selection, as plain values.
        summary: A row for each statistic: its mean, median, min and max over the layers that have it.
        layers: A row for each layer, a column for each statistic; null where a layer does not have it.
        overlap: A row for each layer and lag: overlap as it is, shuffled within requests, shuffled globally.
        hit_curve: A row for each layer and capacity of an LRU cache: hit rate as it is, and shuffled globally.
        load: A row for each layer and expert: choices in prefill and in decode rows.
    """

    trace: dict[str, Any]
    summary: pl.DataFrame
    layers: pl.DataFrame
    overlap: pl.DataFrame
    hit_curve: pl.DataFrame
    load: pl.DataFrame

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, in which None stands for what there is not; JSON takes it."""
        return {"schema": SCHEMA, "trace": self.trace} | {name: getattr(self, name).to_dicts() for name in FRAMES}


@accepts_path
def locality(
    trace: Trace,
    *,
    phase: str = "all",
    skip_position_0: bool = False,
    lags: Sequence[int] = LAGS,
    pairs: bool = True,
    seed: int = 0,
    sample_rows: int = rows.SAMPLE_ROWS,
    progress: Callable[[int], object] | None = None,
) -> Locality:
    """Measure by layer how skewed, how repetitive and how predictable the routing of a trace is.

    docs/locality.md defines every statistic. Counts, reuse distances and hit curves come from all rows, in constant
    memory. The rest, and all shuffles, come from a sample of whole requests.

    Args:
        trace: A trace or the path of its file.
        phase: The rows that are looked at, as if there were no others: "all", "prefill" or "decode".
        skip_position_0: Leave out the first row of each request too.
        lags: Distances in rows at which overlap is measured, increasing, 1 first, up to 4096.
        pairs: Whether to measure co-activation, which takes longest.
        seed: Seed of shuffles and draws, from 0.
        sample_rows: The most rows of the sample. `Locality.trace` says how many it has.
        progress: A function that gets the number of rows of each block.

    Returns:
        Frames of the statistics, lags, capacities and loads.

    Raises:
        UsageError: An option makes no sense.
        MoetraceError: The trace holds only counts, has no row to look at, is too large, or holds an impossible id.

    Examples:
        >>> import moetrace as mt
        >>> found = mt.locality("traces/tiny-olmoe.h5", phase="decode", pairs=False, sample_rows=2048)
        >>> overlap = found.summary.filter(statistic="overlap").row(0, named=True)
        >>> print(f"{overlap['median']:.3f}")
        0.445
    """
    refuse_if_forked()
    lags = _checked(phase, lags, seed, sample_rows)
    _check_sizes(trace)
    chosen = Chosen(phase, skip_position_0)
    seen = rows.count_requests(trace, chosen)
    if seen.rows.sum() == 0:
        left = "rows" if phase == "all" else f"{phase} rows"
        raise MoetraceError(f"{trace.shown} has no {left} to look at.")
    sampler = Sampler(trace, seen, sample_rows, seed)
    counts = np.zeros((trace.layers, 2, trace.num_experts), np.int64)
    real = reuse.no_reuse(trace.layers, trace.num_experts)
    for block, row, ids in rows.blocks(trace, chosen):
        sampler.take(block, row, ids)
        order, label = np.arange(row.size, dtype=np.int32), block.phase[row]
        for layer in range(trace.layers):
            count(ids[layer], label, counts[layer])
        reuse.add_all(real, ids, order)
        if real.distance[:, 0].any():
            rows.check(trace, block)
        if progress:
            progress(int(block.offset[block.steps]))
    _check_own_experts(trace, counts)
    return _Measure(trace, sampler.sample, counts, real, np.array(lags, np.int64), seed).result(
        _facts(trace, chosen, seen, sampler.sample, seed), pairs
    )


class _Measure:
    """Everything that the passes over the trace left, and each layer's statistics from it."""

    def __init__(
        self, trace: Trace, sample: Sample, counts: np.ndarray, real: Reuse, lags: np.ndarray, seed: int
    ) -> None:
        self.trace, self.sample, self.counts, self.real, self.lags, self.seed = trace, sample, counts, real, lags, seed
        self.experts = trace.num_experts
        first = sample.first
        self.starts = sample.starts
        turns = range(min(MOST_SHUFFLES, max(1, SHUFFLED_ROWS // first.size)))
        self.within = [null.within_requests(first, seed, turn) for turn in turns]
        self.globally = [null.globally(first, seed, turn) for turn in turns]
        self.shuffled = reuse.no_reuse(trace.layers, self.experts)
        self.train, self.test = predict.halves(sample.request)
        # Rows with a row of their request before them.
        self.later = [part[first[part] < part] for part in (self.train, self.test)]

    def result(self, facts: dict[str, Any], pairs: bool) -> Locality:
        for order in self.globally:
            reuse.forget(self.shuffled)
            reuse.add_all(self.shuffled, self.sample.ids, order[:SHUFFLED_ROWS])
        layers, overlaps = [], []
        for layer in range(self.trace.layers):
            overlaps.append(self._overlaps(layer))
            layers.append(
                {"layer": int(self.trace.layer_index[layer]), "rows": int(self.real.rows[layer])}
                | self._skew(layer)
                | self._static(layer)
                | {name: overlaps[-1][i][0] for i, name in enumerate(_named("overlap", *_SHUFFLES))}
                | self._reuse(layer)
                | self._recall(layer)
                | self._requests(layer)
                | self._phases(layer)
                | (self._pairs(layer) if pairs else {})
            )
        frame = pl.DataFrame(layers, infer_schema_length=None).with_columns(pl.col(pl.Float64).fill_nan(None))
        return Locality(
            facts, _summary(frame), frame, self._overlap_frame(np.array(overlaps)), self._hit_curve(), self._load()
        )

    def _overlaps(self, layer: int) -> list[np.ndarray]:
        """Return the overlaps at every lag, float64 [lags]: as it is, shuffled within requests, shuffled globally."""
        marks = mark(self.sample.ids[layer], self.experts)
        shuffled = [
            np.mean([marked_overlap(marks.ordered(order), self.starts, self.lags) for order in orders], axis=0)
            for orders in (self.within, self.globally)
        ]
        return [marked_overlap(marks, self.starts, self.lags), *shuffled]

    def _skew(self, layer: int) -> dict[str, Any]:
        own = self._experts_of(layer)
        choices = self.counts[layer].sum(axis=0)[:own]
        law = skew.zipf(choices)
        return {
            "zipf": law.exponent,
            "zipf_misfit": law.misfit,
            "zipf_least_squares": law.least_squares,
            "gini": skew.gini(choices),
            "top10_share": skew.top_share(choices, max(1, round(own / 10))),
            "max_over_mean": skew.max_over_mean(choices),
            "distinct": int((choices > 0).sum()),
            "dead": int((choices == 0).sum()),
        }

    def _experts_of(self, layer: int) -> int:
        """Experts that a layer has."""
        return self.experts if self.trace.layer_experts is None else int(self.trace.layer_experts[layer])

    def _static(self, layer: int) -> dict[str, Any]:
        """The k hottest experts as a static list, tried on the rows that the overlap at lag 1 is about."""
        ids, later = self.sample.ids[layer], np.zeros((2, self.experts), np.int64)
        count(ids, (self.sample.first < np.arange(len(ids))).astype(np.uint8), later)
        # Between equally hot experts the one with more later choices wins, so that the numbering has no effect.
        hottest = np.lexsort((-later[1], -self.counts[layer].sum(axis=0)))[: self.trace.top_k]
        total = later[1].sum()
        return {"static_share": later[1][hottest].sum() / total if total else np.nan}

    def _reuse(self, layer: int) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        own = self._experts_of(layer)
        for ending, of in (("", self.real), ("_shuffled", self.shuffled)):
            curve = reuse.hit_curve(of, layer)
            figures |= {f"reuse_{name}{ending}": reuse.quantile(of, layer, share) for name, share in _QUANTILES.items()}
            figures |= {
                f"reuse_mean{ending}": reuse.mean_distance(of, layer),
                f"reuse_within_1{ending}": reuse.share_within(of, layer, 1),
                f"reuse_within_4{ending}": reuse.share_within(of, layer, 4),
                f"lru_e8{ending}": float(curve[max(1, own // 8) - 1]),
                f"lru_e4{ending}": float(curve[max(1, own // 4) - 1]),
            }
        return figures

    def _recall(self, layer: int) -> dict[str, Any]:
        ids, both = self.sample.ids, (np.nan, np.nan)
        if layer + 1 < self.trace.layers:
            both = predict.recall(ids[layer], ids[layer + 1], self.train, self.test, 0, self.experts)
        after = predict.recall(ids[layer], ids[layer], self.later[0], self.later[1], 1, self.experts)
        return dict(zip(_RECALLS, (*both, *after), strict=True))

    def _requests(self, layer: int) -> dict[str, Any]:
        ids = self.sample.ids[layer]
        return {
            "icc": request_spread.between_requests(ids, self.starts, self.experts),
            "sink": request_spread.sink(ids[self.sample.position_0], self.experts),
        }

    def _phases(self, layer: int) -> dict[str, Any]:
        labels = [self.sample.phase, *(self.sample.phase[order] for order in self.globally)]
        counts = np.zeros((len(labels), 2, self.experts), np.int64)
        for label, of_label in zip(labels, counts, strict=True):
            count(self.sample.ids[layer], label, of_label)
        real, *null_bits = (skew.jsd_bits(*of_label) for of_label in counts)
        return {"phase_jsd": real, "phase_jsd_null": float(np.mean(null_bits))}

    def _pairs(self, layer: int) -> dict[str, Any]:
        real, chance = coactivation(self.sample.ids[layer], self.experts, (self.seed, 3, layer))
        return {
            "lift_p99": real.lift_p99,
            "lift_p99_null": chance.lift_p99,
            "chi2_over_dof": real.chi2_over_dof,
            "chi2_over_dof_null": chance.chi2_over_dof,
        }

    def _overlap_frame(self, overlaps: np.ndarray) -> pl.DataFrame:
        """Make a frame of overlaps float64 [layers, 3, lags]."""
        layers, lags = self.trace.layer_index.astype(np.int64), self.lags
        columns = {"layer": np.repeat(layers, lags.size), "lag": np.tile(lags, layers.size)}
        columns |= {name: overlaps[:, i].ravel() for i, name in enumerate(_named("overlap", *_SHUFFLES))}
        return pl.DataFrame(columns).with_columns(pl.col(pl.Float64).fill_nan(None))

    def _hit_curve(self) -> pl.DataFrame:
        layers, capacity = self.trace.layer_index.astype(np.int64), np.arange(1, self.experts + 1)
        columns = {"layer": np.repeat(layers, capacity.size), "capacity": np.tile(capacity, layers.size)}
        for name, of in (("hit_rate", self.real), ("hit_rate_shuffled", self.shuffled)):
            columns[name] = np.concatenate([reuse.hit_curve(of, layer) for layer in range(layers.size)])
        return pl.DataFrame(columns).filter(self._owned()).with_columns(pl.col(pl.Float64).fill_nan(None))

    def _owned(self) -> pl.Series:
        """Whether a layer has an expert of an id; bool [layers * experts]."""
        own = np.array([self._experts_of(layer) for layer in range(self.trace.layers)])
        return pl.Series((np.arange(self.experts) < own[:, None]).ravel())

    def _load(self) -> pl.DataFrame:
        layers = self.trace.layer_index.astype(np.int64)
        columns = {
            "layer": np.repeat(layers, self.experts),
            "expert": np.tile(np.arange(self.experts), layers.size),
        }
        frame = pl.DataFrame(columns | {name: self.counts[:, i].ravel() for i, name in enumerate(PHASE_NAMES[:2])})
        return frame.filter(self._owned())


_SHUFFLES = ("within_requests", "globally")
_QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99}
_RECALLS = ("next_layer_recall", "next_layer_popularity", "next_token_recall", "next_token_popularity")


def _named(statistic: str, *shuffles: str) -> list[str]:
    return [statistic, *(f"{statistic}_shuffled_{shuffle}" for shuffle in shuffles)]


def _checked(phase: str, lags: Sequence[int], seed: int, sample_rows: int) -> list[int]:
    if phase not in ("all", *PHASE_NAMES[:2]):
        raise UsageError(f"phase is {phase!r}: give all, prefill or decode.")
    whole = [int(lag) for lag in lags]
    if not whole or whole[0] != 1 or whole != sorted(set(whole)) or whole[-1] > MOST_LAGS:
        raise UsageError(f"lags are {whole}: give increasing whole numbers, 1 first, up to {MOST_LAGS}.")
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed is {seed}: give a whole number from 0 to {2**63 - 1}.")
    if not 1 <= sample_rows < 2**31:
        raise UsageError(f"sample_rows is {sample_rows}: give a whole number from 1 to {2**31 - 1}.")
    return whole


def _check_sizes(trace: Trace) -> None:
    """Refuse a trace whose tables no memory justifies: every layer has some of E and one of E * E numbers."""
    for name, size, most in (
        ("layers", trace.layers, MOST_LAYERS),
        ("experts", trace.num_experts, MOST_EXPERTS),
        ("choices a row", trace.top_k, MOST_CHOICES),
    ):
        if size > most:
            raise MoetraceError(f"{trace.shown} has {size} {name}, but locality takes up to {most}.")


def _check_own_experts(trace: Trace, counts: np.ndarray) -> None:
    """Refuse a trace whose rows chose experts that their layer does not have; counts int64 [layers, 2, E]."""
    if trace.layer_experts is None:
        return
    for layer, own in enumerate(trace.layer_experts.tolist()):
        if counts[layer, :, own:].any():
            raise MoetraceError(
                f"{trace.shown}: rows choose experts from {own} on in layer entry {layer}, which has {own} "
                f"(/layers/experts): import it again, or check it with `moetrace info --verify`."
            )


def _facts(trace: Trace, chosen: Chosen, seen: rows.RequestRows, sample: Sample, seed: int) -> dict[str, Any]:
    return {
        "model": trace.model,
        "layers": trace.layers,
        "experts": trace.num_experts,
        "top_k": trace.top_k,
        "rows": int(seen.rows.sum()),
        "requests": int(seen.request.size),
        "phase": chosen.phase,
        "skip_position_0": chosen.skip_position_0,
        "seed": seed,
        "sampled_rows": int(sample.first.size),
        "sampled_requests": int(sample.starts.size),
    }


def _summary(layers: pl.DataFrame) -> pl.DataFrame:
    """Make a row for each statistic of the layers: how it spreads over those that have it."""
    measured = [name for name in layers.columns if name not in ("layer", "rows")]
    return pl.DataFrame(
        [
            {"statistic": name}
            | {how: getattr(layers[name].cast(pl.Float64), how)() for how in ("mean", "median", "min", "max")}
            for name in measured
        ],
        schema={"statistic": pl.String, **dict.fromkeys(("mean", "median", "min", "max"), pl.Float64)},
    )
