"""Synthetic traces: who is in which step (`Schedule`), and which experts a row takes (`ZipfDrawer`).

The two don't know each other: anything with ``draw(request, position) -> experts [rows, layers, top_k]`` can fill a
schedule, so a generator that imitates a capture brings only another drawer.

What `ZipfDrawer` draws: in each layer a random permutation ranks the experts, and rank r has popularity
(r + 1) ** -zipf, the same for all requests, prompts and outputs. A row takes top_k distinct experts by successive
draws without replacement (Plackett-Luce), which is the distribution of Gumbel top-k over log-popularity (Yellott 1977;
Kool et al. 2019, arXiv:1903.06059); its slots hold them in draw order. With `stick` p, each expert of the request's
previous row in that layer first stays with probability p, independently (those that stay come first, in their old
order); the rest is drawn as above, without those. An expert that went may be drawn again, so two successive rows share
more than p of their experts; and popularity gets a little flatter (of 128 experts, top-8, zipf 0.6, the most popular is
in 42.8 % of the rows with p = 0, in 41.2 % with p = 0.3).

Random numbers are counter-based: each (seed, request, position, layer) has its own SplitMix64 stream (Steele, Lea and
Flood 2014), so neither the size of blocks nor the batch changes what a row draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import njit

from moetrace import __version__
from moetrace.spec import load_model
from moetrace.spec.errors import UsageError
from moetrace.spec.model import Model
from moetrace.trace.format import Trace
from moetrace.trace.schema import BLOCK_BYTES, DECODE, PREFILL, expert_dtype
from moetrace.trace.writer import Writer

MAX_ZIPF = 20.0  # well before the popularity of the last of 65535 experts leaves the range of float64
MAX_SEED = 2**63 - 1


class StepBlock(NamedTuple):
    """Successive whole steps: request, position int32 [rows]; step_rows int64 [steps]; phase uint8 [steps]."""

    request: np.ndarray
    position: np.ndarray
    step_rows: np.ndarray
    phase: np.ndarray


class Schedule(NamedTuple):
    """Equal requests through continuous batching that prefills before it decodes; no step mixes the two.

    As soon as a place is free the next request takes it: its prompt rows are one prefill step of their own, then it
    joins the decoding batch. Equal lengths end together, so requests run in groups of `batch`: their prefill steps one
    after another, then `output` decode steps with one row per request. The last group may be smaller. Positions of a
    request run from 0, first through the prompt, then through the output. A part of length 0 has no steps.
    """

    requests: int
    prompt: int
    output: int
    batch: int = 1

    @property
    def rows(self) -> int:
        """Token rows of all requests."""
        return self.requests * (self.prompt + self.output)

    @property
    def steps(self) -> int:
        """Steps of all groups."""
        groups = -(-self.requests // self.batch)
        return (self.requests if self.prompt else 0) + groups * self.output

    def check(self) -> None:
        """Raise a UsageError for a schedule that cannot run."""
        for option, value, least in zip(("requests", "prompt", "output", "batch"), self, (1, 0, 0, 1), strict=True):
            if not least <= value < 2**31:
                raise UsageError(f"--{option} is {value}: give a whole number from {least} to {2**31 - 1}.")
        if self.prompt + self.output == 0:
            raise UsageError("--prompt and --output are both 0: give at least one of them a length.")
        if self.prompt + self.output >= 2**31:
            raise UsageError(f"--prompt and --output together exceed {2**31 - 1} positions: shorten one of them.")

    def blocks(self, rows: int) -> Iterator[StepBlock]:
        """Yield all steps in time order, about `rows` rows at a time and at least one step."""
        first = 0
        while first < self.steps:
            group, index, prefills, step_rows = self._shape(np.arange(first, min(first + rows, self.steps)))
            count = max(1, int(np.searchsorted(np.cumsum(step_rows), rows, side="right")))
            first += count
            group, index, prefills, step_rows = (part[:count] for part in (group, index, prefills, step_rows))
            decode = index >= prefills
            step = np.repeat(np.arange(count), step_rows)
            within = np.arange(step.size) - (np.cumsum(step_rows) - step_rows)[step]
            request = group[step] * self.batch + np.where(decode[step], within, index[step])
            position = np.where(decode[step], self.prompt + index[step] - prefills[step], within)
            phase = np.where(decode, DECODE, PREFILL).astype(np.uint8)
            yield StepBlock(request.astype(np.int32), position.astype(np.int32), step_rows, phase)

    def _shape(self, step: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return group, index in the group, prefill steps of the group and rows, each int64 [steps]."""
        group, index = np.divmod(step, (self.batch if self.prompt else 0) + self.output)
        members = np.minimum(self.batch, self.requests - group * self.batch)
        prefills = members if self.prompt else np.zeros_like(members)
        return group, index, prefills, np.where(index < prefills, self.prompt, members)


class _Tables(NamedTuple):
    """What a draw looks up.

    threshold uint64 [E], alias uint16 [E]: Walker's alias table over ranks, thresholds in units of 2**-32;
    weight, tail float64 [E]: popularity of each rank, and of it with all after it; expert_of_rank uint8 or uint16
    [L, E].
    """

    threshold: np.ndarray
    alias: np.ndarray
    weight: np.ndarray
    tail: np.ndarray
    expert_of_rank: np.ndarray


class ZipfDrawer:
    """Draw experts by Zipf popularity without replacement, with a share kept from the previous row.

    `slots` is the number of requests alive at a time: two of them never have the same request number modulo `slots`.
    A request's rows must come in order of position and start at 0.
    """

    def __init__(self, model: Model, zipf: float, stick: float, seed: int, slots: int = 1) -> None:
        """Prepare the tables; a UsageError names the option whose value makes no sense."""
        if not (isfinite(zipf) and 0 <= zipf <= MAX_ZIPF):
            raise UsageError(f"--zipf is {zipf}: give an exponent from 0 (uniform) to {MAX_ZIPF:g}.")
        if not 0 <= stick <= 1:
            raise UsageError(f"--stick is {stick}: give a share from 0 to 1.")
        if not 0 <= seed <= MAX_SEED:
            raise UsageError(f"--seed is {seed}: give a whole number from 0 to {MAX_SEED}.")
        weight = np.arange(1, model.experts + 1, dtype=np.float64) ** -zipf
        expert_of_rank = _permutations(seed, model.moe_layers, model.experts)
        self.tables = _Tables(*_alias_table(weight), weight, np.cumsum(weight[::-1])[::-1].copy(), expert_of_rank)
        self.keep = np.uint64(round(stick * 2**32))
        self.seed = np.uint64(seed)
        # Ranks of the last row of each living request; without stick nobody reads them again and one place will do.
        self.last = np.zeros((slots if stick else 1, model.moe_layers, model.top_k), np.uint16)

    def draw(self, request: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Return the experts uint8 or uint16 [rows, layers, top_k] of the rows (request, position int32 [rows])."""
        experts = np.empty((len(request), *self.last.shape[1:]), self.tables.expert_of_rank.dtype)
        with np.errstate(over="ignore"):  # uint64 wraps on purpose; NumPy would warn where Numba's JIT is disabled
            _draw_rows(self.tables, self.keep, self.seed, request, position, self.last, experts)
        return experts


def generate(
    path: str | Path,
    model: Model | str,
    *,
    requests: int,
    prompt: int,
    output: int,
    batch: int = 1,
    zipf: float = 0.6,
    stick: float = 0.3,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write a synthetic trace to `path`, block by block in constant memory; the same arguments give the same bytes.

    `model` is a Model, a preset or a TOML file. `progress` is told the rows of each block once they are written.
    Raises UsageError for a value that makes no sense and MoetraceError or OSError where the file cannot be written.
    """
    model, schedule, drawer, source = _prepare(model, Schedule(requests, prompt, output, batch), zipf, stick, seed)
    with Writer(
        path,
        model=model.name,
        num_experts=model.experts,
        top_k=model.top_k,
        layers=model.moe_layers,
        rows=schedule.rows,
        steps=schedule.steps,
        source=source,
    ) as writer:
        for block in schedule.blocks(_block_rows(model)):
            experts = drawer.draw(block.request, block.position)
            writer.append(experts, block.request, block.position, block.step_rows, block.phase)
            if progress:
                progress(len(experts))


def generate_trace(
    model: Model | str,
    *,
    requests: int,
    prompt: int,
    output: int,
    batch: int = 1,
    zipf: float = 0.6,
    stick: float = 0.3,
    seed: int = 0,
) -> Trace:
    """Return in memory the trace that `generate` would write."""
    model, schedule, drawer, source = _prepare(model, Schedule(requests, prompt, output, batch), zipf, stick, seed)
    blocks = list(schedule.blocks(_block_rows(model)))
    request, position, step_rows, phase = (np.concatenate(column) for column in zip(*blocks, strict=True))
    return Trace.from_arrays(
        drawer.draw(request, position),
        num_experts=model.experts,
        model=model.name,
        source=source,
        request=request,
        position=position,
        steps=step_rows,
        phase=phase,
    )


def _prepare(
    model: Model | str, schedule: Schedule, zipf: float, stick: float, seed: int
) -> tuple[Model, Schedule, ZipfDrawer, dict]:
    """Check everything and return model, schedule, drawer and the `source` of the trace."""
    model = load_model(model)
    schedule.check()
    drawer = ZipfDrawer(model, zipf, stick, seed, slots=min(schedule.batch, schedule.requests))
    parameters = {**schedule._asdict(), "zipf": float(zipf), "stick": float(stick), "seed": seed}
    return model, schedule, drawer, {"generator": "zipf", "moetrace": __version__, "parameters": parameters}


def _block_rows(model: Model) -> int:
    return max(1, BLOCK_BYTES // (model.moe_layers * model.top_k * expert_dtype(model.experts).itemsize))


def _permutations(seed: int, layers: int, experts: int) -> np.ndarray:
    """Return expert_of_rank [layers, experts]: an independent random permutation in every layer."""
    cells = np.arange(layers * experts, dtype=np.uint64).reshape(layers, experts)
    start = _mix_64(np.full(1, ~np.uint64(seed)))  # the complement: apart from the streams that the rows draw from
    order = np.argsort(_mix_64(start + cells * _GOLDEN), axis=1, kind="stable")
    return order.astype(expert_dtype(experts))


def _alias_table(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return threshold uint64 [E] in units of 2**-32 and alias uint16 [E] (Walker's table, built as by Vose 1991)."""
    share = weight * (len(weight) / weight.sum())
    threshold = np.full(len(weight), 2**32, np.uint64)
    alias = np.arange(len(weight), dtype=np.uint16)
    small = [rank for rank in range(len(weight)) if share[rank] < 1]
    large = [rank for rank in range(len(weight)) if share[rank] >= 1]
    while small and large:
        low, high = small.pop(), large[-1]
        threshold[low] = round(share[low] * 2**32)
        alias[low] = high
        share[high] -= 1 - share[low]
        if share[high] < 1:
            small.append(large.pop())
    return threshold, alias


# Numba turns uint64 with a plain integer into float64, so every constant of the arithmetic below is typed.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FACTOR_1 = np.uint64(0xBF58476D1CE4E5B9)
_FACTOR_2 = np.uint64(0x94D049BB133111EB)
_27, _30, _31, _32, _11 = (np.uint64(bits) for bits in (27, 30, 31, 32, 11))
_LOW_32 = np.uint64(0xFFFFFFFF)


def _mix_64(z):
    """SplitMix64's output function, of uint64 numbers or arrays."""
    z = (z ^ (z >> _30)) * _FACTOR_1
    z = (z ^ (z >> _27)) * _FACTOR_2
    return z ^ (z >> _31)


def _kernel(function):
    """Compile without the GIL; the machine code is kept for later processes if there is a writable folder for it."""
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


_mix = _kernel(_mix_64)


@_kernel
def _draw_rows(tables, keep, seed, request, position, last, experts):
    """Fill experts [rows, L, k]; last uint16 [slots, L, k] holds the ranks of each living request's previous row."""
    rows, layers, k = experts.shape
    seen = np.zeros(len(tables.weight), np.int64)  # rank -> number of the last cell that took it: never cleared
    cell = 0
    for row in range(rows):
        slot = request[row] % len(last)
        token = _mix(seed + _mix((np.uint64(request[row]) << _32) | np.uint64(position[row])))
        for layer in range(layers):
            cell += 1
            state = _mix(token + np.uint64(layer) * _GOLDEN)
            ranks = last[slot, layer]
            kept = 0
            if keep and position[row] > 0:
                state, kept = _keep_ranks(keep, state, ranks, seen, cell)
            _draw_ranks(tables, state, kept, ranks, seen, cell)
            for j in range(k):
                experts[row, layer, j] = tables.expert_of_rank[layer, ranks[j]]


@_kernel
def _keep_ranks(keep, state, ranks, seen, cell):
    """Move the ranks that stay (each with probability keep / 2**32) to the front; return state and their count."""
    kept = 0
    for j in range(len(ranks)):
        state += _GOLDEN
        rank = ranks[j]
        stays = (_mix(state) >> _32) < keep
        ranks[kept] = rank
        seen[rank] = cell if stays else 0
        kept += 1 if stays else 0
    return state, kept


@_kernel
def _draw_ranks(tables, state, count, ranks, seen, cell):
    """Draw ranks[count:] by popularity among the unseen: by rejection from the alias table, then by scans.

    Rejection has no memory, so whatever number of tries it gets, what is missing afterwards is again a draw by
    popularity among the unseen: the switch to the scan changes the time, not the distribution.
    """
    experts = len(tables.weight)
    # As many repeats as cost about what the scans do, where popularity is so unequal that most tries repeat.
    for _ in range(len(ranks) + min(experts // 2 + 8, 3 * len(ranks) + 16)):
        if count == len(ranks):
            return
        state += _GOLDEN
        bits = _mix(state)
        rank = ((bits >> _32) * np.uint64(experts)) >> _32
        rank = rank if (bits & _LOW_32) < tables.threshold[rank] else np.uint64(tables.alias[rank])
        # Without a branch on `seen`, which no processor can predict: a repeat is overwritten by the next draw.
        ranks[count] = rank
        count += 0 if seen[rank] == cell else 1
        seen[rank] = cell
    _scan_ranks(tables.weight, tables.tail, state, count, ranks, seen, cell)


@_kernel
def _scan_ranks(weight, tail, state, count, ranks, seen, cell):
    """Draw ranks[count:] by popularity among the unseen, however little popularity is left to them."""
    first = 0
    for j in range(count, len(ranks)):
        while seen[first] == cell:
            first += 1
        # The popularity of the unseen, which is at least that of `first`, the largest in its tail: no digits are lost.
        total = tail[first]
        for rank in ranks[:j]:
            total -= weight[rank] if rank > first else 0.0
        state += _GOLDEN
        share = np.float64(_mix(state) >> _11) * 2.0**-53 * total
        for rank in range(first, len(weight)):
            if seen[rank] != cell:
                ranks[j] = rank
                share -= weight[rank]
                if share < 0:
                    break
        seen[ranks[j]] = cell
