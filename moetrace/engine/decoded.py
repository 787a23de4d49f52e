"""A trace ready for the kernels: the requests of each step, and blocks decoded once for all replays over them."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future
from functools import cached_property
from typing import NamedTuple

import numpy as np

from moetrace.engine.demand import Demand, count_experts, demand_of, new_popularity, with_gates, without_ahead
from moetrace.engine.layer_slots import first_counts, first_steps
from moetrace.engine.lookahead import NextSteps
from moetrace.engine.replay import Batch, Steps
from moetrace.engine.schedule import Schedule, request_index, schedule_of
from moetrace.engine.static_set import count_demands
from moetrace.jit.apart import result_of
from moetrace.spec.choices import find, source_of
from moetrace.spec.errors import MoetraceError
from moetrace.spec.load import FUNCTION_FIELDS
from moetrace.spec.policy import PolicySpec
from moetrace.spec.system import System
from moetrace.trace.format import Block, Trace
from moetrace.trace.schema import BLOCK_BYTES, DECODE, PHASE_NAMES, check_ids

# A trace that decodes to no more is decoded before its replay: some policies look at all of it first.
SMALL_BYTES = 96 << 20
KEPT_AT_ONCE = 8  # blocks of such a trace that are waiting or being decoded
# Threads share the work on a trace of this many blocks evenly; in blocks of fewer ids each costs more than it brings.
MANY_BLOCKS, FEW_IDS_BYTES = 8, 1 << 20


class Needs(NamedTuple):
    """Columns of a trace's blocks that policies need, beside the demanded experts."""

    ahead_layers: int  # how far a prefetch looks ahead
    next_steps: bool  # when each is demanded next
    prompts: bool  # which row of a prompt chose what
    rows: bool = False  # which row chose what
    gates: bool = False  # sums of gates: a dispatch reads them, or a user's function may name them
    each_gate: bool = False  # which row gave which choice which gate
    positions: bool = False  # where a row stands in its request: a policy of a cluster cuts steps


def needs_of(policies: Iterable[PolicySpec], systems: Iterable[System] = ()) -> Needs:
    """Return what at least one of the policies, or a system that they run on, needs."""
    ahead_layers, residencies, gates, positions = 0, [], False, False
    for policy in policies:
        if policy.schedule is not None:
            positions = True
            continue
        prefetch, residency = find("prefetch", policy.prefetch), find("residency", policy.residency)
        dispatch = find("dispatch", policy.dispatch)
        gates |= may_be_users(policy) or (dispatch is not None and dispatch.weighs)
        if prefetch.ahead:
            ahead_layers = max(ahead_layers, policy.prefetch_depth)
        if residency is not None:
            residencies.append(residency)
    return Needs(
        ahead_layers,
        any(residency.next_steps for residency in residencies),
        any(residency.counts_prompts for residency in residencies),
        positions or any(residency.foresees for residency in residencies),
        gates,
        any(system.link is not None and system.link.loses_rows for system in systems),
        positions,
    )


class Decoded:
    """A trace, its schedule, and its blocks as batches: decoded again in each pass, or once and kept.

    Kept batches serve any number of passes, from several threads too, and outlive the trace's file.
    """

    def __init__(self, trace: Trace, needs: Needs, keep_bytes: int = 0, pool: Executor | None = None):
        """Read who is in which step; read and keep all else if that takes at most ``keep_bytes`` of memory.

        With a pool, blocks that are kept are decoded in its threads.
        """
        self.trace = trace
        self.needs = needs
        self.schedule = schedule_of(trace)
        self._kept: list[tuple[Batch, int]] | None = None
        if decoded_bytes(trace, needs, pool is not None) <= keep_bytes:
            self._kept = list(self._decode(pool, needs.gates, KEPT_AT_ONCE))

    def batches(self, pool: Executor | None = None, gates: bool = False) -> Iterator[tuple[Batch, int]]:
        """Yield each block ready for the kernels, and its rows; with a pool the next one is made meanwhile.

        ``gates``: whether somebody weighs gates, as `Needs` said that somebody may.
        """
        return self._decode(pool, gates) if self._kept is None else iter(self._kept)

    @cached_property
    def demand_count(self) -> np.ndarray:
        """In how many steps each expert is demanded, int64 [layers * experts]; a pass over batches not kept."""
        trace = self.trace
        if self._kept is None:
            demands = (_demand(trace, block) for block in trace.blocks())
        else:
            demands = (without_ahead(batch.demand, len(batch.steps.rows), trace.layers) for batch, _ in self._kept)
        return count_demands(demands, trace.layers, trace.num_experts)

    @cached_property
    def first_counts(self) -> np.ndarray:
        """How many rows of the first steps chose each expert, int64 [L, E], as `layer_slots` wants it."""
        return self.counts_of_first(first_steps(self.schedule.phase))

    def counts_of_first(self, steps: int) -> np.ndarray:
        """Return how many rows of the first steps chose each expert, int64 [L, E]."""
        if self._kept is None:
            return first_counts(self.trace, steps)
        layers = self.trace.layers
        popularity = new_popularity(layers, self.trace.num_experts)
        for batch, _ in self._kept:
            own = min(len(batch.steps.rows), steps - batch.steps.first)
            if own <= 0:
                break
            count_experts(without_ahead(batch.demand, own, layers), popularity)
        return popularity.rows

    def first_batches(self, steps: int) -> Iterator[tuple[Batch, np.ndarray]]:
        """Yield the blocks with the first steps of each phase, and which these are, int64 numbers in the block.

        Blocks that are not kept are without demands.
        """
        phase = self.schedule.phase
        first = np.sort(np.concatenate([np.flatnonzero(phase == one)[:steps] for one in range(len(PHASE_NAMES))]))
        batches = (batch for batch, _ in self._kept) if self._kept is not None else self._without_demand()
        for batch in batches:
            begin, stop = batch.steps.first, batch.steps.first + len(batch.steps.rows)
            own = first[(first >= begin) & (first < stop)]
            if own.size:
                yield batch, own - begin
            if not (first >= stop).any():
                return

    def _without_demand(self) -> Iterator[Batch]:
        none = np.zeros(0, np.int32)
        for block in self.trace.blocks():
            nobody = Demand(np.zeros(block.steps * self.trace.layers + 1, np.int64), none, none, none, np.zeros(0))
            yield _batch(block, nobody, self.schedule, self.needs, None)

    def _decode(self, pool: Executor | None, gates: bool, at_once: int = 1) -> Iterator[tuple[Batch, int]]:
        trace, schedule = self.trace, self.schedule
        next_steps = None
        if self.needs.next_steps:
            most = int(np.minimum(schedule.rows * trace.top_k, trace.num_experts).sum()) * trace.layers
            demands = (_demand(trace, block) for block in trace.blocks())
            next_steps = NextSteps(demands, trace.layers, trace.num_experts, most)

        def prepare(block: Block) -> tuple[Batch, int]:
            demand = _demand(trace, block)
            if next_steps is not None:
                demand = next_steps.add_to(demand, block.steps, trace.layers)
            if gates:
                demand = _weighed(trace, block, demand)
            own_gates = _gates(trace, block) if self.needs.each_gate else None
            return _batch(block, demand, schedule, self.needs, own_gates), int(block.offset[block.steps])

        ahead = _ahead_steps(trace, self.needs)
        if pool is None:
            yield from map(prepare, trace.compared_blocks(ahead))
            return
        coming: deque[Future] = deque()
        for block in trace.compared_blocks(ahead, _few_rows(trace)):
            # One at a time where next steps are asked for: that looks ahead, and reads the blocks in order.
            many = len(coming) >= (at_once if next_steps is None else 1)
            ready = result_of(coming.popleft()) if many else None
            coming.append(pool.submit(prepare, block))
            if ready is not None:
                yield ready
        for last in coming:
            yield result_of(last)


def may_be_users(policy: PolicySpec) -> bool:
    """Whether a policy's dispatch or residency is a function that is not of this package."""
    chosen = [(kind, getattr(policy, kind)) for kind in FUNCTION_FIELDS]
    return any(find(kind, choice) is None or source_of(kind, choice) is not None for kind, choice in chosen)


def decoded_bytes(trace: Trace, needs: Needs, threads: bool = False) -> int:
    """Return how much memory a trace's batches take at most, by its steps' sizes; ``threads`` have more of them."""
    rows = np.diff(trace.offset)
    active = np.minimum(rows * trace.top_k, trace.num_experts) * trace.layers
    a_choice = 12 if needs.next_steps else 8
    a_choice += 8 if needs.gates else 0
    total = int(active.sum()) * a_choice + 8 * trace.steps * trace.layers + trace.rows
    ids = trace.rows * trace.layers * trace.top_k
    if needs.prompts or needs.rows or needs.each_gate:
        total += 2 * ids + 8 * trace.rows * (1 + needs.positions)
    total += 4 * ids if needs.each_gate and "gates" in trace.has else 0
    blocks = ids * (1 if trace.num_experts <= 255 else 2) // BLOCK_BYTES
    if threads:
        blocks = 2 * max(blocks, MANY_BLOCKS)
    return total + blocks * _ahead_steps(trace, needs) * int(active.max()) * a_choice


def _few_rows(trace: Trace) -> int:
    """Return the most rows of a block where threads share the work."""
    return max(1, min(BLOCK_BYTES, max(FEW_IDS_BYTES, trace.rows * trace.id_bytes // MANY_BLOCKS)) // trace.id_bytes)


def _ahead_steps(trace: Trace, needs: Needs) -> int:
    return -(-needs.ahead_layers // trace.layers)


def _demand(trace: Trace, block: Block) -> Demand:
    demand = demand_of(block.experts, block.offset, trace.num_experts)
    if demand is None:
        where = trace.shown
        check_ids(where, int(trace.offset[block.first_step]), block.experts, trace.num_experts)  # says which
        raise MoetraceError(f"{where}: /experts changed while it was read.")
    return demand


def _weighed(trace: Trace, block: Block, demand: Demand) -> Demand:
    """Return a block's demand with the sums of gates of its own steps."""
    offset = np.ascontiguousarray(block.offset[: block.steps + 1], np.int64)
    return with_gates(demand, block.experts, _gates(trace, block), offset)


def _gates(trace: Trace, block: Block) -> np.ndarray | None:
    """Return the gates of a block's own steps, float32 [rows, L, k]; None if the trace has no gates."""
    if "gates" not in trace.has:
        return None
    first = int(trace.offset[block.first_step])
    return trace.read("gates", first, first + int(block.offset[block.steps])).astype(np.float32)


def _batch(block: Block, demand: Demand, schedule: Schedule, needs: Needs, gates: np.ndarray | None) -> Batch:
    steps = slice(block.first_step, block.first_step + block.steps)
    shape = block.experts.shape
    with_request = needs.prompts or needs.rows
    with_rows = needs.rows or needs.each_gate or (needs.prompts and _mixes_prompts(block, schedule.phase[steps]))
    return Batch(
        steps=Steps(
            first=block.first_step,
            rows=schedule.rows[steps],
            kv_tokens=schedule.kv_tokens[steps],
            phase=schedule.phase[steps].astype(np.int64),
            prompt_ends=schedule.prompt_ends[steps],
        ),
        demand=demand,
        offset=np.ascontiguousarray(block.offset, np.int64),
        experts=block.experts.astype(np.uint16) if with_rows else np.zeros((0, *shape[1:]), np.uint16),
        request=request_index(schedule.requests, block) if with_request else np.zeros(0, np.int64),
        row_phase=np.ascontiguousarray(block.phase, np.uint8),
        gates=np.zeros((0, *shape[1:]), np.float32) if gates is None else gates,
        position=block.position.astype(np.int64) if needs.positions else np.zeros(0, np.int64),
    )


def _mixes_prompts(block: Block, phase: np.ndarray) -> bool:
    """Whether a step has rows of a prompt beside other rows; those of a lone prompt are counted by its demand."""
    rows = block.offset[block.steps]
    request, row_phase = block.request[:rows], block.phase[:rows]
    changes = np.zeros(rows, bool)
    changes[1:] = (request[1:] != request[:-1]) | (row_phase[1:] != row_phase[:-1])
    changes[block.offset[: block.steps]] = False
    return bool((np.logical_or.reduceat(changes, block.offset[: block.steps]) & (phase != DECODE)).any())
