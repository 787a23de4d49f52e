"""Fit a profile to a trace: what `moetrace generate --like` does (the method of simulated moments).

The statistics of the trace by which policies distinguish traces are its moments. A drawer with trial parameters
fills the very schedule of the trace's sample, so that few rows or requests change a statistic of both in the same way,
and the parameters move until the simulated moments are those of the trace. Shape and scale of popularity, the sink and
the tokens' law are measured directly.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from moetrace.analyze.locality import predict, request_spread, reuse, rows, skew
from moetrace.analyze.locality.chosen_counts import count
from moetrace.analyze.locality.overlap import mark, marked_overlap
from moetrace.analyze.locality.rows import ABSENT, Chosen, Sample, Sampler
from moetrace.generators.imitate import ProfileDrawer, Tables, make_tables, weights_of
from moetrace.generators.least_squares import least_squares
from moetrace.generators.profile import Profile, check_router, load_profile
from moetrace.spec.errors import MoetraceError
from moetrace.trace import Trace
from moetrace.trace.opening import accepts_path

# The time of a try is proportional to the logits of its sample: some tenths of a second at these limits.
SAMPLE_LOGITS, LEAST_SAMPLE_ROWS, MOST_SAMPLE_ROWS = 1 << 24, 1 << 11, 1 << 15
# The sample is simulated until there are SIMULATED_ROWS, within the limits of its repetitions. Routers with different
# seeds take turns, so that the profile does not fit one router's chance.
SIMULATED_ROWS, LEAST_SIMULATIONS, MOST_SIMULATIONS, SEEDS = 1 << 14, 2, 16, 2
SMALLEST_ROWS = 64
LAGS = np.array([1, 4, 16, 64])
MOMENTS = ("gini", *(f"overlap_{lag}" for lag in LAGS), "lru_e8", "lru_e4", "next_layer_recall", "icc", "phase_jsd")
# How far a simulated moment may be off for a residual of 1: relative, and absolute where a moment may be near 0.
_RELATIVE = np.array([0.1] * 5 + [0.06] * 2 + [0.15] * 3)  # hit rates decide about time most
_ABSOLUTE = np.array([0.0] * 8 + [0.001, 0.003])
DIMENSIONS = (8, 5, 14)  # tried first, where the next layer is more predictable than that allows, and where less
CURVE_KNOTS = 17
TOKEN_PART = 0.5  # of the part that is not memory, if the trace has no token ids
VOCABULARY, TOKEN_ZIPF = 4096, 1.0
SINGLE_REQUEST = 0.1  # share of a request's preference, assumed where there is only one request to measure it on
ITERATIONS = 8
PULL, HELD = 0.03, 30.0  # of a parameter towards its start: weak, to decide what moments leave open; and to hold it


class MeasuredTrace(NamedTuple):
    """Figures measured directly, which the search does not change.

    profile: fields of the profile, skew and curve among them; skew is the one that the search scales.
    token_part: the tokens' part of the logits without memory. request: the share of the request's preference, if it
    cannot be found from the moments.
    """

    profile: dict[str, Any]
    token_part: float = TOKEN_PART
    request: float | None = None


def moments(sample: Sample, experts: int) -> np.ndarray:
    """Measure a sample of whole requests: float64, in the order of `MOMENTS`, means over layers; NaN: not measurable.

    LRU hit rates are those of E/8 and E/4 slots a layer, one row at a time.
    """
    order = np.arange(sample.first.size, dtype=np.int32)
    train, test = predict.halves(sample.request)
    used = reuse.no_reuse(len(sample.ids), experts)
    reuse.add_all(used, sample.ids, order)
    found = np.full((len(sample.ids), len(MOMENTS)), np.nan)
    for layer, ids in enumerate(sample.ids):
        counts = np.zeros((2, experts), np.int64)
        count(ids, sample.phase, counts)
        found[layer, 0] = skew.gini(counts.sum(axis=0))
        found[layer, 1:5] = marked_overlap(mark(ids, experts), sample.starts, LAGS)
        curve = reuse.hit_curve(used, layer)
        found[layer, 5] = curve[max(1, experts // 8) - 1]
        found[layer, 6] = curve[max(1, experts // 4) - 1]
        if layer + 1 < len(sample.ids):
            found[layer, 7] = predict.recall(ids, sample.ids[layer + 1], train, test, 0, experts)[0]
        found[layer, 8] = request_spread.between_requests(ids, sample.starts, experts)
        found[layer, 9] = skew.jsd_bits(*counts)
    known = ~np.isnan(found)
    return np.where(known.any(axis=0), np.nansum(found, axis=0) / np.maximum(known.sum(axis=0), 1), np.nan)


@accepts_path
def fit_profile(
    trace: Trace,
    *,
    name: str = "",
    seed: int = 0,
    sample_rows: int | None = None,
    progress: Callable[[str], object] | None = None,
) -> Profile:
    """Fit a profile to a trace. The same trace and seed give the same profile.

    The method is that of simulated moments (docs/generate.md, "The fit").

    Args:
        trace: A trace or the path of its file.
        name: Name of the profile. By default that of the model.
        seed: Chooses the requests that are looked at and draws the simulations.
        sample_rows: The most rows that are looked at, in whole requests. By default the number that lets a fit take
            less than two minutes.
        progress: A function that gets a few words on the result, after each try.

    Returns:
        The profile. `save_profile` writes it, `generate` draws from it.

    Raises:
        MoetraceError: The trace holds only counts, is too short (64 rows), has fewer than 2 experts a layer or an
            impossible id.
        UsageError: The trace has too many layers and experts.

    Examples:
        >>> import moetrace as mt
        >>> model = mt.load_model("tiny-olmoe", {"moe_layers": 2, "experts": 8, "top_k": 2})
        >>> trace = mt.generate_trace(model, requests=4, prompt=8, output=8)
        >>> profile = mt.fit_profile(trace, name="mine")
        >>> profile.name, profile.layers, profile.experts, profile.top_k
        ('mine', 2, 8, 2)
    """
    check_router(trace.shown, trace.layers, trace.num_experts, max(DIMENSIONS))
    sample = take_sample(trace, sample_rows, seed)
    if sample.first.size < SMALLEST_ROWS or trace.num_experts < 2:
        raise MoetraceError(
            f"{trace.shown} has {sample.first.size} rows to fit and {trace.num_experts} experts a layer, "
            f"but a fit needs {SMALLEST_ROWS} rows and 2 experts."
        )
    measured = _measure(trace, sample, name or trace.model or "fitted")
    return search(sample, moments(sample, trace.num_experts), measured, seed, progress)


def search(
    sample: Sample,
    wanted: np.ndarray,
    measured: MeasuredTrace,
    seed: int = 0,
    progress: Callable[[str], object] | None = None,
    near: Profile | None = None,
) -> Profile:
    """Search the profile with which a drawer that fills the schedule of a sample has the wanted moments.

    Args:
        sample: Whole requests of the trace.
        wanted: Moments float64, in the order of `MOMENTS`; NaN where one is not known.
        measured: Figures measured directly.
        seed: Seed of the simulations.
        progress: A function that gets a few words after each try.
        near: Parameters that the known moments do not determine keep their value here. By default it stays at the start
        of the search.

    Returns:
        The profile.
    """
    tried: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    dimensions = DIMENSIONS[0]
    while dimensions not in tried:
        trial = _Search(sample, wanted, measured, dimensions, seed, progress)
        if near is not None:
            trial.start[:6] = _parameters(near)
            if np.isnan(wanted[2:5]).all():  # nothing tells how long memory lasts ...
                trial.pull[3:5] = HELD
            if np.isnan(wanted[MOMENTS.index("next_layer_recall")]):  # ... or what layers have in common
                trial.pull[5] = HELD
        start = tried[DIMENSIONS[0]][0] if tried else trial.start
        best = least_squares(trial.residuals, start, ITERATIONS)
        tried[dimensions] = best, trial.residuals(best)
        recall = tried[dimensions][1][MOMENTS.index("next_layer_recall")]
        if abs(recall) > 0.25 and dimensions == DIMENSIONS[0]:
            dimensions = DIMENSIONS[1] if recall < 0 else DIMENSIONS[2]
    dimensions = min(tried, key=lambda tried_dimensions: float(np.square(tried[tried_dimensions][1]).sum()))
    return load_profile(_profile(measured, dimensions, tried[dimensions][0], digits=4))


class _Search:
    """The residuals of trial parameters: seven numbers without bounds (`_profile` says what they stand for)."""

    def __init__(
        self,
        sample: Sample,
        wanted: np.ndarray,
        measured: MeasuredTrace,
        dimensions: int,
        seed: int,
        progress: Callable[[str], object] | None,
    ) -> None:
        self.sample, self.wanted, self.measured, self.seed = sample, wanted, measured, seed
        self.experts = measured.profile["experts"]
        self.dimensions, self.progress = dimensions, progress
        self.known = ~np.isnan(wanted)
        self.scale = np.maximum(_RELATIVE * np.abs(np.nan_to_num(wanted)) + _ABSOLUTE, 1e-6)
        self.request = np.unique(sample.request, return_inverse=True)[1].astype(np.int32)
        self.position = (np.arange(sample.first.size) - sample.first).astype(np.int32)
        self.start = np.array([-3.0, -1.5, -0.5, np.log(40), np.log(1.2), 2.5, -0.05, -3.0])
        self.pull = np.full(self.start.size, PULL)
        if measured.request is not None:
            self.pull[0] = HELD
        if not self.known[MOMENTS.index("phase_jsd")]:
            self.start[7], self.pull[7] = -20.0, HELD
        self.tables: dict[int, tuple[tuple, Tables]] = {}
        self.tries = 0

    def residuals(self, parameters: np.ndarray) -> np.ndarray:
        off = np.where(self.known, (self.simulated(parameters) - self.wanted) / self.scale, 0.0)
        off = np.nan_to_num(off)
        self.tries += 1
        if self.progress:
            self.progress(f"try {self.tries} of {self.dimensions} dimensions, off by {np.sqrt((off**2).mean()):.2f}")
        # A weak pull to the start decides where the moments leave parameters open.
        return np.concatenate([off, self.pull * (parameters - self.start)])

    def simulated(self, parameters: np.ndarray) -> np.ndarray:
        """Return the moments of what a drawer makes of the sample's schedule, means over the repetitions."""
        profile = load_profile(_profile(self.measured, self.dimensions, parameters))
        slots, found = int(self.request.max()) + 1, []
        drawers = [
            ProfileDrawer(profile, self.seed ^ i, slots=slots, tables=self._tables(profile, i)) for i in range(SEEDS)
        ]
        wanted = SIMULATED_ROWS // self.request.size
        for again in range(min(max(wanted, LEAST_SIMULATIONS), MOST_SIMULATIONS)):
            request = self.request + np.int32(again * slots)
            drawn = drawers[again % SEEDS].draw(request, self.position, self.sample.phase)
            ids = np.ascontiguousarray(drawn.transpose(1, 0, 2)).astype(np.uint16)
            ids[self.sample.ids == ABSENT] = ABSENT
            found.append(moments(self.sample._replace(ids=ids), self.experts))
        return np.mean(found, axis=0)

    def _tables(self, profile: Profile, index: int) -> Tables:
        """The tables of a profile for a seed: recomputed only if popularity changed, which costs most of a try."""
        key, (made_for, near) = (*profile.skew, profile.phase), self.tables.get(index, ((), None))
        if near is None or made_for != key:
            near = make_tables(profile, self.seed ^ index, profile.top_k, near)
            self.tables[index] = key, near
        return weights_of(profile, self.seed ^ index, near)


def _profile(measured: MeasuredTrace, dimensions: int, parameters: np.ndarray, digits: int = 17) -> Profile:
    """Turn the parameters of a search into a profile.

    They are the logarithms of the shares of request, slow and fast memory over the rest, of slow and fast rows, the
    logit of depth, the logarithm of the factor of the measured skew, and the logit of phase.
    """
    shares = np.exp(np.clip(parameters[:3], -12, 6))
    if measured.request is None:
        shares /= 1 + shares.sum()
    else:
        shares[0] = measured.request
        shares[1:] *= (1 - shares[0]) / (1 + shares[1:].sum())
    slow_rows, fast_rows = np.exp(np.clip(parameters[3:5], [1, -2], [7, 2.5]))
    depth, phase = 1 / (1 + np.exp(-np.clip(parameters[[5, 7]], -9, 9)))
    values: dict[str, Any] = {
        "request": shares[0],
        "slow": shares[1],
        "slow_rows": slow_rows,
        "fast": shares[2],
        "fast_rows": fast_rows,
        "token": (1 - shares.sum()) * measured.token_part,
        "depth": depth,
        "phase": phase if parameters[7] > -10 else 0.0,
    }
    scale = np.exp(np.clip(parameters[6], -3, 1))
    skews = [min(8.0, float(f"{scale * value:.{digits}g}")) for value in measured.profile["skew"]]
    rounded: dict[str, Any] = {key: float(f"{value:.{digits}g}") for key, value in values.items()}
    return Profile(**measured.profile | rounded | {"dimensions": dimensions, "skew": skews})


def _parameters(profile: Profile) -> np.ndarray:
    """The first six parameters with which `_profile` makes this profile."""
    memory = np.array([profile.request, profile.slow, profile.fast])
    shares = np.log(np.maximum(memory, 1e-4) / max(1 - memory.sum(), 1e-4))
    depth = np.clip(profile.depth, 1e-3, 1 - 1e-3)
    return np.array([*shares, np.log(profile.slow_rows), np.log(profile.fast_rows), np.log(depth / (1 - depth))])


def take_sample(trace: Trace, sample_rows: int | None = None, seed: int = 0) -> Sample:
    """Return the sample of whole requests that a fit looks at: up to `sample_rows` rows, chosen by `seed`.

    Raises MoetraceError if the trace holds only counts or an id is impossible.
    """
    if sample_rows is None:
        fitting = SAMPLE_LOGITS // (trace.layers * trace.num_experts)
        sample_rows = max(LEAST_SAMPLE_ROWS, min(fitting, MOST_SAMPLE_ROWS))
    chosen = Chosen()
    sampler = Sampler(trace, rows.count_requests(trace, chosen), sample_rows, seed)
    for block, row, ids in rows.blocks(trace, chosen):
        rows.check(trace, block)
        sampler.take(block, row, ids)
    return sampler.sample


def _measure(trace: Trace, sample: Sample, name: str) -> MeasuredTrace:
    experts = trace.num_experts
    counts = np.zeros((trace.layers, 1, experts), np.int64)
    label = np.zeros(sample.first.size, np.uint8)
    for layer in range(trace.layers):
        count(sample.ids[layer], label, counts[layer])
    # Half a choice more for each, so that the logarithm exists.
    ranked = np.log(np.sort(counts[:, 0] + 0.5, axis=1)[:, ::-1])
    ranked -= ranked.mean(axis=1, keepdims=True)
    spread = np.maximum(ranked.std(axis=1), 1e-6)
    curve = np.interp(
        np.linspace(0, 1, min(CURVE_KNOTS, experts)),
        np.linspace(0, 1, experts),
        (ranked / spread[:, None]).mean(axis=0),
    )
    first = sample.ids[:, sample.position_0]
    sinks = np.array([request_spread.sink(ids, experts) for ids in first])
    sinks = sinks[~np.isnan(sinks)]  # of a single request, or of absent choices only
    token = _tokens(trace, sample)
    return MeasuredTrace(
        {
            "name": name,
            "model": trace.model or name,
            "layers": trace.layers,
            "experts": experts,
            "top_k": trace.top_k,
            "skew": [float(value) for value in spread],
            "curve": [float(f"{value:.4g}") for value in curve],
            "sink": float(f"{np.clip(sinks.mean(), 0, 1):.4g}") if sinks.size else 0.0,
            "vocabulary": token[0],
            "token_zipf": token[1],
        },
        token[2],
        SINGLE_REQUEST if sample.starts.size == 1 else None,
    )


def _tokens(trace: Trace, sample: Sample) -> tuple[int, float, float]:
    """Return vocabulary, Zipf exponent of the tokens, and the tokens' part of the logits without memory."""
    if "token" not in trace.has:
        return VOCABULARY, TOKEN_ZIPF, TOKEN_PART
    request = np.concatenate([part.request for part in trace.row_blocks()])
    sampled = np.unique(request)[np.unique(sample.request)]
    order = np.argsort(request, kind="stable")
    token = trace.read("token", 0, trace.rows)[order[np.isin(request[order], sampled)]][: sample.first.size]
    distinct, index, frequency = np.unique(token, return_inverse=True, return_counts=True)
    same, chance = [], []
    # Each row beside the next one of the same token in another request, and beside the row half the sample away.
    order = np.argsort(index, kind="stable")
    pairs = (index[order[1:]] == index[order[:-1]]) & (sample.request[order[1:]] != sample.request[order[:-1]])
    if not pairs.any():
        return VOCABULARY, TOKEN_ZIPF, TOKEN_PART
    one, other = order[:-1][pairs], order[1:][pairs]
    far = np.roll(np.arange(token.size), token.size // 2)
    for ids in sample.ids:
        same.append(_shared(ids[one], ids[other]))
        chance.append(_shared(ids, ids[far]))
    excess = (np.mean(same) - np.mean(chance)) / max(1 - np.mean(chance), 1e-9)
    law = skew.zipf(frequency).exponent if distinct.size > 1 else 0.0
    return min(distinct.size, 65535), float(f"{min(law, 8.0):.4g}"), float(np.clip(excess, 0, 1))


def _shared(one: np.ndarray, other: np.ndarray) -> float:
    """Overlap of the rows of `one` with those of `other`, both uint16 [n, k]."""
    equal = (one[:, :, None] == other[:, None, :]) & (one != ABSENT)[:, :, None]
    return float(equal.sum() / max(1, (one != ABSENT).sum()))
