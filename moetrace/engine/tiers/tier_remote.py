"""Experts that live in remote functions (Remoe): who they are, and what their layers wait for.

They leave a block before the replay sees it: no residency, dispatch or prefetch knows them. The time of their rows does
not depend on a policy. So it is computed here, once for all lanes that leave out the same experts, and the replay only
reads the seconds of the layer at hand.
"""

import hashlib
import threading
from typing import Any, NamedTuple

import numpy as np

from moetrace.engine.decoded import Decoded
from moetrace.engine.demand import Demand
from moetrace.engine.layer import less
from moetrace.engine.relay import UNDER_WAY
from moetrace.engine.replay import Batch
from moetrace.engine.setup import Setup
from moetrace.engine.state import records
from moetrace.engine.tiers.tier_records import RemoteTimes, Tiers
from moetrace.jit.compile import kernel
from moetrace.spec.errors import UsageError
from moetrace.spec.fits import check_fits
from moetrace.spec.model import Model
from moetrace.spec.policy import PolicySpec
from moetrace.spec.policy_files import load_loads
from moetrace.spec.remote import PLAN_STEPS, Remote
from moetrace.spec.system import System

ABSENT = np.iinfo(np.uint16).max
EXACT = 1 + 1e-12  # 0.29 * 100 is less than 29 in floating point

# A copy of a function, and the network to it.
FUNCTION = np.dtype(
    [
        (name, np.float64)
        for name in (
            "s_per_row",  # of one row in one expert
            "s_per_byte",  # of weights
            "network_s_per_row",  # activations there and back
            "row_bytes",  # activations, one way
            "payload_bytes",
            "call_s",
        )
    ]
)
# Work of a layer's functions in the whole replay.
REMOTE_BOOKS = np.dtype(
    [
        ("busy_s", np.float64),  # in which any copy works
        ("work_s", np.float64),  # of all copies
        ("rows", np.float64),
        ("bytes", np.float64),
        ("experts", np.int64),
        ("calls", np.int64),
    ],
    align=True,
)


class RemotePlan(NamedTuple):
    """The remote experts, and the functions that run them."""

    is_remote: np.ndarray  # uint8 [L, E]
    weight_bytes: np.ndarray  # float64 [L, E]
    function: Any  # FUNCTION [1]


class RemoteScratch(NamedTuple):
    """Scratch space for the layer at hand."""

    order: np.ndarray  # int64 [E]: its remote experts by what they take, as places in the demand
    cost_s: np.ndarray  # float64 [E]: what each of these takes
    load_s: np.ndarray  # float64 [replicas]
    rows: np.ndarray  # float64 [replicas]


@kernel(inline=False)
def leave_out(demand, is_remote, local):
    """Copy a block's demand into ``local``, except for the experts that ``is_remote`` uint8 [L, E] marks."""
    layers, end = is_remote.shape[0], 0
    for at in range(demand.start.size - 1):
        there = is_remote[at % layers]
        for i in range(demand.start[at], demand.start[at + 1]):
            if there[demand.expert[i]]:
                continue
            local.expert[end], local.rows[end] = demand.expert[i], demand.rows[i]
            if i < demand.next_step.size:
                local.next_step[end] = demand.next_step[i]
            if i < demand.gate_mass.size:
                local.gate_mass[end] = demand.gate_mass[i]
            end += 1
        local.start[at + 1] = end


@kernel
def expert_in_function_s(function, rows, weight_bytes):
    """Return the seconds that an expert keeps a copy of a function: its work, and its rows there and back."""
    return max(rows * function.s_per_row, weight_bytes * function.s_per_byte) + rows * function.network_s_per_row


@kernel
def longest_first(plan, demand, at, layer, scratch):
    """Sort a layer's remote experts by descending seconds, then id; return how many there are."""
    size = 0
    for i in range(demand.start[at], demand.start[at + 1]):
        expert = demand.expert[i]
        if not plan.is_remote[layer, expert]:
            continue
        cost_s = expert_in_function_s(plan.function[0], demand.rows[i], plan.weight_bytes[layer, expert])
        j = size
        while j > 0:
            other_s = scratch.cost_s[j - 1]
            tied = not less(cost_s, other_s) and expert < demand.expert[scratch.order[j - 1]]
            if not (less(other_s, cost_s) or tied):
                break
            scratch.cost_s[j], scratch.order[j] = other_s, scratch.order[j - 1]
            j -= 1
        scratch.cost_s[j], scratch.order[j] = cost_s, i
        size += 1
    return size


@kernel
def share_among_copies(demand, size, scratch):
    """Give each expert, the longest first, to the copy with the least to do (LPT); ties: the lowest."""
    copies = scratch.load_s.size
    for c in range(copies):
        scratch.load_s[c] = scratch.rows[c] = 0.0
    for j in range(size):
        best = 0
        for c in range(1, copies):
            if less(scratch.load_s[c], scratch.load_s[best]):
                best = c
        scratch.load_s[best] += scratch.cost_s[j]
        scratch.rows[best] += demand.rows[scratch.order[j]]


@kernel(inline=False)
def call_functions(plan, demand, steps, seconds, books, scratch):
    """Write what each layer of ``steps`` steps waits for functions into ``seconds`` [steps, L]; add to the books."""
    layers, function = plan.is_remote.shape[0], plan.function[0]
    for at in range(steps * layers):
        layer = at % layers
        size = longest_first(plan, demand, at, layer, scratch)
        seconds[at // layers, layer] = 0.0
        if size == 0:
            continue
        share_among_copies(demand, size, scratch)
        longest_s, book = 0.0, books[layer]
        for c in range(scratch.load_s.size):
            if scratch.rows[c] > 0.0:
                calls = max(1, int(np.ceil(scratch.rows[c] * function.row_bytes / function.payload_bytes)))
                copy_s = scratch.load_s[c] + calls * function.call_s
                longest_s = max(longest_s, copy_s)
                book.work_s += copy_s
                book.calls += calls
        seconds[at // layers, layer] = longest_s
        book.busy_s += longest_s
        book.experts += size
        for j in range(size):
            i = scratch.order[j]
            book.rows += demand.rows[i]
            book.bytes += plan.weight_bytes[layer, demand.expert[i]]


class RemoteExperts:
    """The remote experts of lanes that leave out the same ones, in one pass over a trace.

    Attributes:
        plan: Who they are.
        books: REMOTE_BOOKS [L]: what their functions did so far.
        cold_s: Seconds of the cold start.
        key: Lanes with the same key share all of it.
    """

    def __init__(self, remote: Remote, model: Model, plan_of: tuple[np.ndarray, np.ndarray], replicas: int) -> None:
        """Take the functions, and of the experts bool [L, E], who is remote, and float64 [L, E], their bytes."""
        is_remote, weight_bytes = plan_of
        function, row_bytes = records(1, FUNCTION), model.activation_row_bytes
        function["s_per_row"], function["s_per_byte"] = model.flop_per_row / remote.flop_s, 1 / remote.bytes_s
        function["network_s_per_row"] = 2 * row_bytes / (remote.network_gb_s * 1e9)
        function["row_bytes"], function["payload_bytes"] = row_bytes, remote.payload_mb * 1e6
        function["call_s"] = remote.call_ms / 1e3
        self.plan = RemotePlan(is_remote.astype(np.uint8), np.ascontiguousarray(weight_bytes, np.float64), function)
        layers, experts = is_remote.shape
        self.books = records(layers, REMOTE_BOOKS)
        main_bytes = layers * model.dense_bytes + model.head_bytes + float(weight_bytes[~is_remote].sum())
        self.cold_s = remote.cold_s(main_bytes, float(self.function_bytes.max()))
        copies = min(replicas, max(int(is_remote.sum(1).max()), 1))  # more would have nothing to do
        self._scratch = RemoteScratch(np.zeros(experts, np.int64), np.zeros(experts), *np.zeros((2, copies)))
        hashed = hashlib.blake2b(np.array([copies, self.cold_s]).tobytes())
        for part in self.plan:
            hashed.update(part.tobytes())
        self.key = hashed.digest()
        self._parts: dict[int, tuple[Batch, RemoteTimes]] = {}  # by the first steps of the blocks under way
        self._lock = threading.Lock()

    @property
    def function_bytes(self) -> np.ndarray:
        """Bytes of the remote experts of each layer, float64 [L]."""
        return np.where(self.plan.is_remote, self.plan.weight_bytes, 0.0).sum(1)

    @property
    def local_bytes(self) -> np.ndarray:
        """Bytes of the other experts, float64 [L, E]; 0 of a remote one, which then does not exist for a lane."""
        return np.where(self.plan.is_remote, 0.0, self.plan.weight_bytes)

    def split(self, batch: Batch) -> tuple[Batch, RemoteTimes]:
        """Return a block without the remote experts, and what its layers wait for; made for the first who asks."""
        first = batch.steps.first
        with self._lock:
            if first not in self._parts:
                self._parts[first] = self._split(batch)
                while len(self._parts) > UNDER_WAY:
                    del self._parts[min(self._parts)]
            return self._parts[first]

    def _split(self, batch: Batch) -> tuple[Batch, RemoteTimes]:
        steps, demand = len(batch.steps.rows), batch.demand
        seconds = np.zeros((steps, len(self.books)))
        call_functions(self.plan, demand, steps, seconds, self.books, self._scratch)
        local = Demand(np.zeros_like(demand.start), *(np.empty_like(part) for part in demand[1:]))
        leave_out(demand, self.plan.is_remote, local)
        batch = batch._replace(demand=local, experts=self._without(batch.experts))
        return batch, RemoteTimes(batch.steps.first, seconds, self.cold_s)

    def _without(self, ids: np.ndarray) -> np.ndarray:
        """Return ids, uint16 [rows, L, k], of which those of remote experts are absent."""
        if not len(ids):
            return ids
        layers, experts = self.plan.is_remote.shape
        is_remote = np.concatenate((self.plan.is_remote, np.zeros((layers, 1), np.uint8)), 1)  # and absent ids
        there = is_remote[np.arange(layers)[:, None], np.minimum(ids, experts)]
        return np.where(there, np.uint16(ABSENT), ids)


def remote_of(
    policy: PolicySpec, setup: Setup, system: System, decoded: Decoded, weight_bytes: np.ndarray
) -> RemoteExperts | None:
    """Return the remote experts of a policy on a system as it sees it, of experts of float64 [L, E] bytes; or None.

    Raises UsageError if a function has too little memory for those of its layer, or the machine for all others.
    """
    remote = system.remote
    if policy.remote is None or remote is None:
        return None
    is_remote = remote_experts(policy, decoded, weight_bytes > 0)
    found = RemoteExperts(remote, setup.model, (is_remote, weight_bytes), policy.replicas or 1)
    check_fits(setup.model, system, found.local_bytes, setup.ignore_capacity)
    need_gb = found.function_bytes / 1e9
    if remote.memory_gb is not None and need_gb.max() > remote.memory_gb:
        layer = int(np.argmax(need_gb))
        raise UsageError(
            f"Policy {policy.name}: the {int(is_remote[layer].sum())} remote experts of layer {layer} take "
            f"{need_gb[layer]:.2g} GB, and a function of system {system.name} has {remote.memory_gb:g} GB: lower "
            f"remote = {policy.remote:g}, or raise system.remote.memory_gb."
        )
    return found


def with_remote(tiers: Tiers | None, remote: RemoteExperts | None) -> Tiers | None:
    """Return tiers with remote experts, where there are some; the clock runs in the cold start, too."""
    if tiers is None or remote is None:
        return tiers
    tiers.tally["now_s"] = remote.cold_s
    return tiers._replace(remote=RemoteTimes(0, np.zeros((1, len(remote.books))), remote.cold_s))


def end_remote(remote: RemoteExperts, part: Any) -> None:
    """Write what functions did into their record of the unit log, after the last block."""
    for name in ("busy_s", "rows", "bytes", "experts"):
        part[name] = remote.books[name].sum()


def remote_experts(policy: PolicySpec, decoded: Decoded, exists: np.ndarray) -> np.ndarray:
    """Return which experts are remote, bool [L, E]: of each layer's a share, those with the fewest rows in the plan.

    Args:
        policy: With `remote`.
        decoded: The trace, whose first steps are the plan, unless the policy has `loads` and no
            `plan_steps`.
        exists: bool [L, E], the experts of each layer.

    Raises:
        MoetraceError: The file of loads is wrong.
    """
    layers, experts = exists.shape
    if policy.loads is not None and policy.plan_steps is None:
        rows = load_loads(policy.loads, layers, experts)
    else:
        rows = decoded.counts_of_first(policy.plan_steps or PLAN_STEPS)
    is_remote = np.zeros_like(exists)
    for layer in range(layers):
        ids = np.flatnonzero(exists[layer])[::-1]  # of a tie the higher id first
        fewest_first = ids[np.argsort(rows[layer, ids], kind="stable")]
        is_remote[layer, fewest_first[: int((policy.remote or 0.0) * len(ids) * EXACT)]] = True
    return is_remote
