"""The GPUs of each expert: plans of a cluster, their copies, moves between two plans, and the room that they need."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moetrace.engine.eplb import eplb_plan
from moetrace.engine.placement import group_of_expert
from moetrace.jit.compile import kernel
from moetrace.spec.cluster_policy import PLANNED
from moetrace.spec.errors import UsageError
from moetrace.spec.model import Model
from moetrace.spec.plan import MAX_SLOTS, load_plan
from moetrace.spec.policy import PolicySpec

START = "ep-block"  # before the first plan


class PlacedCopies(NamedTuple):
    """Every copy of every expert, by layer: those of expert e are ``start[l, e]:start[l, e + 1]``, by GPU, then slot.

    Each is a slot of its own, whose weights a GPU reads if any row comes there.
    """

    start: np.ndarray  # int32 [L, E + 1]
    gpu: np.ndarray  # int32 [L, copies]
    weight_bytes: np.ndarray  # float64 [L, copies]


class Placer:
    """Makes the plans of a policy on a cluster: int32 [L, GPUs, slots], the expert in each slot, -1 for none."""

    def __init__(self, policy: PolicySpec, gpus: int, own: np.ndarray, layer_index: np.ndarray, model: Model) -> None:
        """Take the policy, the GPUs that hold experts, int64 [L] experts of each layer, and the numbers of the layers.

        Raises UsageError if the GPUs cannot have equally many slots, or nodes and groups do not divide what they
        must; MoetraceError if the file of a plan is wrong.
        """
        self._policy, self._gpus, self._own = policy, gpus, own
        self.is_planned = policy.placement in PLANNED
        self._given = None
        if policy.placement == "plan":
            assert policy.plan is not None
            self._given = load_plan(policy.plan, layer_index, int(own.max()), gpus, model)
        for experts in np.unique(own).tolist():
            self._check(experts)

    @property
    def slots(self) -> np.ndarray | None:
        """Slots of a GPU in each layer, int64 [L], under every plan; None where plans have as many as they need."""
        if self._policy.placement not in ("eplb", "eplb-hierarchical"):
            return None
        return np.array([self._all_slots(int(experts)) // self._gpus for experts in self._own])

    @property
    def most_copies(self) -> int:
        """Copies of a layer at most, under every plan."""
        most = max(self._all_slots(int(experts)) for experts in self._own) if self.slots is not None else 0
        return max(most, int(self._own.max()), 0 if self._given is None else self._given[0].size)

    def first(self) -> np.ndarray:
        """Return the plan before any other."""
        if self._given is not None:
            return self._given
        placement = START if self.is_planned else self._policy.placement
        return self._each(lambda experts, layers: _one_copy(placement, layers, experts, self._gpus, None))

    def plan(self, loads: np.ndarray) -> np.ndarray:
        """Return the plan for loads int64 [L, E]."""
        return self._each(self._planned, loads)

    def _planned(self, experts: int, layers: int, loads: np.ndarray) -> np.ndarray:
        policy = self._policy
        if policy.placement == "ep-lpt":
            return _one_copy("ep-lpt", layers, experts, self._gpus, loads.astype(np.float64))
        tiers = (policy.nodes or 1, policy.groups or 1) if policy.placement == "eplb-hierarchical" else (1, 1)
        slots = eplb_plan(loads, self._all_slots(experts), self._gpus, *tiers)
        return slots.reshape(layers, self._gpus, -1)

    def _each(self, make: Callable[..., np.ndarray], loads: np.ndarray | None = None) -> np.ndarray:
        """Make the plans of layers with equally many experts together."""
        parts = []
        for experts in np.unique(self._own).tolist():
            layers = np.flatnonzero(self._own == experts)
            of_these = () if loads is None else (np.ascontiguousarray(loads[layers, :experts]),)
            parts.append((layers, make(experts, layers.size, *of_these)))
        if len(parts) == 1:
            return parts[0][1]
        plan = np.full((self._own.size, self._gpus, max(part.shape[2] for _, part in parts)), -1, np.int32)
        for layers, part in parts:
            plan[layers, :, : part.shape[2]] = part
        return plan

    def _all_slots(self, experts: int) -> int:
        """Slots of a layer under EPLB: the given redundant ones, or the fewest with which each GPU has one."""
        redundant = self._policy.redundant
        if redundant is None:
            return -(-(experts + self._gpus) // self._gpus) * self._gpus
        return experts + redundant

    def _check(self, experts: int) -> None:
        policy, gpus = self._policy, self._gpus
        if policy.placement not in ("eplb", "eplb-hierarchical"):
            return
        slots = self._all_slots(experts)
        if slots % gpus or slots > MAX_SLOTS:
            fitting = -slots % gpus + (policy.redundant or 0)
            raise UsageError(
                f"Policy {policy.name}: {experts} experts and {policy.redundant} redundant ones are {slots} slots, "
                f"which {gpus} GPUs cannot share equally; set redundant = {fitting}."
            )
        nodes, groups = policy.nodes or 1, policy.groups or 1
        for what, number, of, parts in (
            ("GPUs", gpus, "nodes", nodes),
            ("groups", groups, "nodes", nodes),
            ("experts", experts, "groups", groups),
        ):
            if number % parts:
                raise UsageError(
                    f"Policy {policy.name}: hierarchical EPLB cannot share {number} {what} among {parts} {of} equally."
                )


def copies_in(plan: np.ndarray, weight_bytes: np.ndarray) -> PlacedCopies:
    """Turn a plan around; weight_bytes float64 [L, E]."""
    layers, experts = weight_bytes.shape
    start = np.zeros((layers, experts + 1), np.int32)
    gpu = np.zeros((layers, plan[0].size), np.int32)
    copy_bytes = np.zeros(gpu.shape)
    _turn_around(np.ascontiguousarray(plan, np.int32), weight_bytes, start, gpu, copy_bytes)
    return PlacedCopies(start, gpu, copy_bytes)


def moved_into(old: np.ndarray, new: np.ndarray, weight_bytes: np.ndarray) -> np.ndarray:
    """Return the bytes of experts that each GPU gets and did not hold, float64 [GPUs]."""
    into = np.zeros(new.shape[1])
    _count_into(np.ascontiguousarray(old, np.int32), np.ascontiguousarray(new, np.int32), weight_bytes, into)
    return into


def held_bytes(plan: np.ndarray, slots: np.ndarray | None, weight_bytes: np.ndarray) -> np.ndarray:
    """Return what each GPU's slots take, float64 [GPUs]; given ``slots`` int64 [L], each is as large as any there."""
    if slots is not None:
        return np.full(plan.shape[1], float((slots * weight_bytes.max(axis=1)).sum()))
    sizes = np.concatenate((weight_bytes, np.zeros((len(weight_bytes), 1))), axis=1)  # the last is that of no expert
    return np.take_along_axis(sizes[:, None, :], plan.astype(np.int64), axis=2).sum(axis=(0, 2))


def _one_copy(placement: str, layers: int, experts: int, gpus: int, loads: np.ndarray | None) -> np.ndarray:
    """Return the plan of a placement that has each expert once."""
    of_gpu = group_of_expert(placement, layers, experts, gpus, 1, loads)
    room = max(int(np.bincount(held, minlength=gpus).max()) for held in of_gpu)
    plan = np.full((layers, gpus, room), -1, np.int32)
    for layer, held in enumerate(of_gpu):
        for gpu in range(gpus):
            own = np.flatnonzero(held == gpu)
            plan[layer, gpu, : own.size] = own
    return plan


@kernel(inline=False)
def _turn_around(plan, weight_bytes, start, gpu, copy_bytes):
    """Fill start int32 [L, E + 1], gpu int32 and copy_bytes float64 [L, copies] from plan int32 [L, GPUs, slots]."""
    layers, gpus, slots = plan.shape
    end = np.empty(start.shape[1] - 1, np.int32)
    for layer in range(layers):
        for g in range(gpus):
            for slot in range(slots):
                if plan[layer, g, slot] >= 0:
                    start[layer, plan[layer, g, slot] + 1] += 1
        for e in range(end.size):
            end[e] = start[layer, e]
            start[layer, e + 1] += start[layer, e]
        for g in range(gpus):
            for slot in range(slots):
                expert = plan[layer, g, slot]
                if expert >= 0:
                    gpu[layer, end[expert]] = g
                    copy_bytes[layer, end[expert]] = weight_bytes[layer, expert]
                    end[expert] += 1


@kernel(inline=False)
def _count_into(old, new, weight_bytes, into):
    """Add to into float64 [GPUs] what each gets; old, new int32 [L, GPUs, slots], weight_bytes float64 [L, E]."""
    for layer in range(new.shape[0]):
        held = np.full(weight_bytes.shape[1], -1)  # of each expert: the last GPU that held it, or got it
        for g in range(new.shape[1]):
            for slot in range(old.shape[2]):
                if old[layer, g, slot] >= 0:
                    held[old[layer, g, slot]] = g
            for slot in range(new.shape[2]):
                expert = new[layer, g, slot]
                if expert >= 0 and held[expert] != g:
                    held[expert] = g
                    into[g] += weight_bytes[layer, expert]
