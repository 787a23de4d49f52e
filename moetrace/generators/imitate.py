"""Experts as a profile says that a captured model routes: a stream of few dimensions, and routers that read it.

The state of a row is a vector of `dimensions` standard normal numbers, x = sqrt(request) * t + sqrt(slow) * s +
sqrt(fast) * f + sqrt(token) * v + sqrt(rest) * n: t is the request's own, s and f are autoregressive from row to row of
a request, v belongs to the row's token, and n is new in each row. All but n are the same in every layer; n turns from
layer to layer with the correlation `depth`. The router of a layer gives expert e the logit w_e . x + b_e, with w_e of
length 1 and random, and the row takes the top_k largest. b_e is set such that popularity is what the profile says;
prompt and output have their own. docs/generate.md has the formulas.

Everything that decides about an id is an integer or one float32 operation after the other in a fixed order, so the same
seed gives the same bytes on any machine.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moetrace.generators.profile import Profile
from moetrace.generators.streams import SHIFT_32, check_seed, permutations
from moetrace.jit.compile import kernel
from moetrace.jit.random import GOLDEN, mix
from moetrace.trace.schema import DECODE, expert_dtype

# The purpose of a stream is in its high bits, apart from the streams of rows, whose counters are small.
_TOPICS, _TOKENS, _ROUTERS, _SAMPLES, _SINK = (np.uint64(tag << 56) for tag in range(1, 6))
_16, _48 = np.uint64(16), np.uint64(48)
_LOW_16 = np.uint64(0xFFFF)
_NORMAL_MEAN = np.float32(2 * 65535)  # of the sum of four uniform numbers from 0 to 65535 ...
_NORMAL_SCALE = np.float32(3**0.5 / 65536)  # ... and 1 over its standard deviation

# Rounds that set the biases, and how many at their end are averaged: from nothing, and from biases that are near.
CALIBRATION_ROUNDS, CALIBRATION_ROUNDS_NEAR = (14, 7), (5, 3)
CALIBRATION_CHOICES = 96  # of the average expert in a round: 10 % noise, which the rounds average out
MAX_SHARE = 0.95  # of the rows that the most popular expert may be in


class Tables(NamedTuple):
    """The tables of a draw; L layers, D dimensions, E experts, V tokens, phases 0 prefill and 1 decode.

    router float32 [L, D, E]: w; bias float32 [2, L, E]: b; token float32 [V, D]: sqrt(token) * v, and cumulative
    uint64 [V]: their frequencies summed, in units of 2**-32; weights float32 [8]: see `_weights`; sink uint16 [L, k]:
    the experts of a sink row, and sink_below: the chance of one, in units of 2**-32.
    """

    router: np.ndarray
    bias: np.ndarray
    token: np.ndarray
    cumulative: np.ndarray
    weights: np.ndarray
    sink: np.ndarray
    sink_below: np.uint64


class ProfileDrawer:
    """Draw experts as `profile` says, `top_k` of them.

    `prompt` is the number of prompt rows of each request, `slots` the number of requests alive at a time: two of them
    never have the same request number modulo `slots`. A request's rows must come in order of position, from 0.
    """

    def __init__(
        self,
        profile: Profile,
        seed: int,
        *,
        prompt: int = 0,
        slots: int = 1,
        top_k: int = 0,
        tables: Tables | None = None,
    ) -> None:
        """Draw the routers and set their biases, which takes tenths of a second, unless `tables` has them."""
        check_seed(seed)
        self.top_k = top_k or profile.top_k
        self.profile, self.prompt, self.seed = profile, prompt, np.uint64(seed)
        self.tables = make_tables(profile, seed, self.top_k) if tables is None else tables
        self._bias = self.tables.bias
        # By rank, after what prefill and decode have in common.
        self._by_rank = np.argsort(-self._bias.sum(axis=0), axis=1, kind="stable")
        # Slow and fast memory of each living request.
        self.memory = np.zeros((slots, 2, profile.dimensions), np.float32)

    def rank(self, expert_of_rank: np.ndarray) -> None:
        """Give the experts other ranks of popularity, uint8 or uint16 [L, E]: each gets the biases of its rank."""
        bias = np.empty_like(self._bias)
        layer = np.arange(len(expert_of_rank))[:, None]
        bias[:, layer, expert_of_rank] = self._bias[:, layer, self._by_rank]
        self.tables = self.tables._replace(bias=bias)

    def draw(self, request: np.ndarray, position: np.ndarray, phase: np.ndarray | None = None) -> np.ndarray:
        """Return the experts uint8 or uint16 [rows, layers, top_k] of the rows (request, position int32 [rows]).

        `phase` uint8 [rows] is 1 from position `prompt` on if it is not given.
        """
        if phase is None:
            phase = (position >= self.prompt).astype(np.uint8) * np.uint8(DECODE)
        profile = self.profile
        experts = np.empty((len(request), profile.layers, self.top_k), expert_dtype(profile.experts))
        with np.errstate(over="ignore"):  # uint64 wraps on purpose; NumPy would warn where Numba's JIT is disabled
            _draw_rows(self.tables, self.seed, request, position, phase, self.memory, experts)
        return experts


def make_tables(profile: Profile, seed: int, top_k: int, near: Tables | None = None) -> Tables:
    """Draw routers, tokens and popularity from `seed`, and set the biases that give the popularity.

    That starts from the biases of `near`, tables of the same seed and sizes and of almost the same popularity: faster.
    """
    layers, experts, dimensions = profile.layers, profile.experts, profile.dimensions
    start = _start(seed)
    with np.errstate(over="ignore"):
        router = _normals(start + _ROUTERS, layers * experts * dimensions).reshape(layers, experts, dimensions)
        router = router / np.sqrt((router.astype(np.float64) ** 2).sum(axis=2, keepdims=True))
    router = np.ascontiguousarray(_rounded(router.transpose(0, 2, 1)))
    bias = _biases(profile, seed, router, start, None if near is None else near.bias)
    sink = np.zeros((layers, top_k), np.uint16)
    with np.errstate(over="ignore"):
        _sink_experts(router, bias[0], start + _SINK, sink)
    below = np.uint64(round(profile.sink * 2**32))
    token, cumulative = _tokens(profile, start)
    return Tables(router, bias, token, cumulative, _weights(profile), sink, below)


def weights_of(profile: Profile, seed: int, tables: Tables) -> Tables:
    """Return the tables of `profile` from those of one with the same seed, sizes and popularity, which is faster."""
    token, cumulative = _tokens(profile, _start(seed))
    return tables._replace(token=token, cumulative=cumulative, weights=_weights(profile))


def _tokens(profile: Profile, start: np.uint64) -> tuple[np.ndarray, np.ndarray]:
    """Return the state of each token float32 [V, D], and uint64 [V] below which of 2**32 numbers each is drawn."""
    with np.errstate(over="ignore"):
        token = _normals(start + _TOKENS, profile.vocabulary * profile.dimensions).reshape(-1, profile.dimensions)
    cumulative = np.cumsum(np.arange(1, profile.vocabulary + 1, dtype=np.float64) ** -profile.token_zipf)
    return _rounded(token * np.sqrt(profile.token)), np.round(cumulative * (2.0**32 / cumulative[-1])).astype(np.uint64)


def popularity(profile: Profile, seed: int) -> np.ndarray:
    """Share of the choices that each expert gets, float64 [2, layers, experts]: in prefill and in decode."""
    knots = np.asarray(profile.curve)
    curve = np.interp(np.linspace(0, 1, profile.experts), np.linspace(0, 1, knots.size), knots)
    curve = (curve - curve.mean()) / (curve.std() or 1.0)
    shares = np.empty((2, profile.layers, profile.experts))
    common, own = np.sqrt(1 - profile.phase), np.sqrt(profile.phase)
    order = [np.argsort(permutations(seed ^ tag, profile.layers, profile.experts), axis=1) for tag in (0, 1, 2)]
    for phase in (0, 1):
        log_share = common * curve[order[0]] + (own * curve[order[1 + phase]] if own else 0.0)
        shares[phase] = np.exp(np.asarray(profile.skew)[:, None] * log_share)
        shares[phase] = _capped(shares[phase], MAX_SHARE / profile.top_k)
    return shares


def _capped(shares: np.ndarray, most: float) -> np.ndarray:
    """Scale each row of shares to a sum of 1 with none above `most`: no expert is in a row of tokens twice."""
    for _ in range(20):
        shares = shares / shares.sum(axis=1, keepdims=True)
        if shares.max() <= most:
            break
        shares = np.minimum(shares, most)
    return shares


def _biases(profile: Profile, seed: int, router: np.ndarray, start: np.uint64, near: np.ndarray | None) -> np.ndarray:
    """Return bias float32 [2, layers, experts] that makes each layer choose with the profile's popularity."""
    shares = popularity(profile, seed)
    bias = np.empty(shares.shape, np.float32)
    for phase in (0, 1) if profile.phase else (0,):
        wanted = np.log(shares[phase])
        # A logit is standard normal; near the threshold of a choice its log-chance rises by about 1.7 a unit.
        level = (wanted - wanted.mean(axis=1, keepdims=True)) / 1.7 if near is None else near[phase].astype(np.float64)
        bias[phase] = _calibrated(profile, router, start, wanted, level, near is not None)
    if not profile.phase:
        bias[1] = bias[0]
    return bias


def _calibrated(
    profile: Profile, router: np.ndarray, start: np.uint64, wanted: np.ndarray, level: np.ndarray, is_near: bool
) -> np.ndarray:
    """Move the biases `level` [layers, experts] until the logarithms of the shares of choices are those `wanted`.

    Each round counts the choices of fresh random states and moves each bias by a part of the difference (stochastic
    approximation: Robbins and Monro 1951); the last rounds are averaged (Polyak and Juditsky 1992).
    """
    rounds, averaged = CALIBRATION_ROUNDS_NEAR if is_near else CALIBRATION_ROUNDS
    samples = int(np.ceil(CALIBRATION_CHOICES * profile.experts / profile.top_k))
    total = np.zeros_like(level)
    for turn in range(rounds):
        counts = np.zeros(level.shape, np.int64)
        first = np.uint64(turn * samples)
        with np.errstate(over="ignore"):
            _count_choices(router, _rounded(level), start + _SAMPLES, first, samples, profile.top_k, counts)
        found = np.log((counts + 0.5) / (samples * profile.top_k + 0.5 * profile.experts))
        level = level + (0.6 if turn < rounds - averaged else 0.3) * np.clip(wanted - found, -2, 2)
        level -= level.mean(axis=1, keepdims=True)
        if turn >= rounds - averaged:
            total += level
    return _rounded(total / averaged)


def _weights(profile: Profile) -> np.ndarray:
    """Return float32 [8]: of topic, slow, fast and noise; what slow and fast keep a row; depth and its complement."""
    rest = max(0.0, 1 - profile.request - profile.slow - profile.fast - profile.token)
    keep_slow, keep_fast = np.exp(-1 / profile.slow_rows), np.exp(-1 / profile.fast_rows)
    squared = [profile.request, profile.slow, profile.fast, rest]
    return _rounded(np.array([*np.sqrt(squared), keep_slow, keep_fast, profile.depth, np.sqrt(1 - profile.depth**2)]))


def _rounded(values: np.ndarray) -> np.ndarray:
    """Round to multiples of 2**-16, in float32: the last digit of a mathematical library has no effect."""
    return (np.round(np.asarray(values, np.float64) * 65536) / 65536).astype(np.float32)


def _start(seed: int) -> np.uint64:
    """Where the streams of the tables start: apart from those of the rows, and from the permutations."""
    return mix_one(~np.uint64(seed) ^ np.uint64(0x5851F42D4C957F2D))


def mix_one(value: np.uint64) -> np.uint64:
    """SplitMix64's output function of one number."""
    with np.errstate(over="ignore"):
        return np.uint64(mix(value))


@kernel(inline=False)
def _normal(state):
    """A number, float32, of mean 0 and variance 1 from one draw: the sum of four uniform ones, bounded by 3.46."""
    bits = mix(state)
    total = (bits & _LOW_16) + ((bits >> _16) & _LOW_16) + ((bits >> SHIFT_32) & _LOW_16) + (bits >> _48)
    return (np.float32(total) - _NORMAL_MEAN) * _NORMAL_SCALE


@kernel(inline=False)
def _normals(state, count):
    """Return count numbers, float32, each as `_normal` makes it."""
    numbers = np.empty(count, np.float32)
    for i in range(count):
        state += GOLDEN
        numbers[i] = _normal(state)
    return numbers


@kernel(inline=False)
def _draw_rows(tables, seed, request, position, phase, memory, experts):
    """Fill experts [rows, L, k]; memory float32 [slots, 2, D] is the slow and fast part of each living request."""
    rows, layers, k = experts.shape
    dimensions = memory.shape[2]
    weights = tables.weights
    common = np.empty(dimensions, np.float32)
    noise = np.empty(dimensions, np.float32)
    state_vector = np.empty(dimensions, np.float32)
    logits = np.empty(tables.router.shape[2], np.float32)
    best = np.empty(k, np.float32)
    chosen = np.empty(k, np.int64)
    for row in range(rows):
        state = mix(seed + mix((np.uint64(request[row]) << SHIFT_32) | np.uint64(position[row])))
        topic = mix(seed + mix(_TOPICS + np.uint64(request[row])))
        own = memory[request[row] % len(memory)]
        is_first = position[row] == 0
        state = _common_state(tables, state, topic, own, is_first, common)
        for d in range(dimensions):
            state += GOLDEN
            noise[d] = _normal(state)
        is_sink = is_first and (mix(state) >> SHIFT_32) < tables.sink_below
        for layer in range(layers):
            if layer > 0:
                for d in range(dimensions):
                    state += GOLDEN
                    noise[d] = noise[d] * weights[6] + _normal(state) * weights[7]
            if is_sink:
                for j in range(k):
                    experts[row, layer, j] = tables.sink[layer, j]
                continue
            for d in range(dimensions):
                state_vector[d] = common[d] + noise[d] * weights[3]
            _fill_logits(tables.router[layer], tables.bias[phase[row], layer], state_vector, logits)
            _take_largest(logits, best, chosen)
            for j in range(k):
                experts[row, layer, j] = chosen[j]


@kernel(inline=False)
def _common_state(tables, state, topic, own, is_first, common):
    """Advance the request's memory by one row, fill what all layers share of its state; return the stream's state."""
    weights = tables.weights
    state += GOLDEN
    token = np.searchsorted(tables.cumulative, mix(state) >> SHIFT_32, side="right")
    for part in range(2):
        keep = weights[4 + part]
        new = np.float32(np.sqrt(np.float32(1) - keep * keep))
        for d in range(len(common)):
            state += GOLDEN
            fresh = _normal(state)
            own[part, d] = fresh if is_first else own[part, d] * keep + fresh * new
    for d in range(len(common)):
        topic += GOLDEN
        common[d] = (
            _normal(topic) * weights[0] + own[0, d] * weights[1] + own[1, d] * weights[2] + tables.token[token, d]
        )
    return state


@kernel(inline=False)
def _fill_logits(router, bias, vector, logits):
    """Set logits [E] to bias [E] + vector [D] @ router [D, E]."""
    for e in range(len(logits)):
        logits[e] = bias[e]
    for d in range(len(vector)):
        x = vector[d]
        for e in range(len(logits)):
            logits[e] += x * router[d, e]


@kernel(inline=False)
def _take_largest(logits, best, chosen):
    """Set chosen [k] to the experts of the k largest logits, in falling order, and best [k] to those logits."""
    k = len(chosen)
    for j in range(k):
        best[j] = -np.inf
    for e in range(len(logits)):
        value = logits[e]
        if value <= best[k - 1]:
            continue
        j = k - 1
        while j > 0 and best[j - 1] < value:
            best[j] = best[j - 1]
            chosen[j] = chosen[j - 1]
            j -= 1
        best[j] = value
        chosen[j] = e


@kernel(inline=False)
def _count_choices(router, bias, start, first, samples, k, counts):
    """Add to counts int64 [L, E] the choices of `samples` independent standard normal states in each layer."""
    layers, dimensions, experts = router.shape
    vector = np.empty(dimensions, np.float32)
    logits = np.empty(experts, np.float32)
    best = np.empty(k, np.float32)
    chosen = np.empty(k, np.int64)
    for sample in range(samples):
        state = mix(start + mix(first + np.uint64(sample)))
        for d in range(dimensions):
            state += GOLDEN
            vector[d] = _normal(state)
        for layer in range(layers):
            _fill_logits(router[layer], bias[layer], vector, logits)
            _take_largest(logits, best, chosen)
            for j in range(k):
                counts[layer, chosen[j]] += 1


@kernel(inline=False)
def _sink_experts(router, bias, start, sink):
    """Set sink uint16 [L, k] to what one state that all requests share chooses in each layer."""
    layers, dimensions, experts = router.shape
    vector = np.empty(dimensions, np.float32)
    logits = np.empty(experts, np.float32)
    best = np.empty(sink.shape[1], np.float32)
    chosen = np.empty(sink.shape[1], np.int64)
    for d in range(dimensions):
        start += GOLDEN
        vector[d] = _normal(start)
    for layer in range(layers):
        _fill_logits(router[layer], bias[layer], vector, logits)
        _take_largest(logits, best, chosen)
        for j in range(len(chosen)):
            sink[layer, j] = chosen[j]
