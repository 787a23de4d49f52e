"""Plans: which unit holds which experts, copies included, and what it takes to get from one plan to the next."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moetrace.engine.eplb import eplb_plan
from moetrace.engine.placement import group_of_expert
from moetrace.jit.compile import kernel
from moetrace.spec.choices import find, planned_placements, resolve
from moetrace.spec.errors import UsageError
from moetrace.spec.named import nearest
from moetrace.spec.plan import MAX_SLOTS

DEFAULT_PLACEMENTS = ("ep", "ep-block", "ep-lpt", "eplb")
MAX_UNITS = 4096


class Tier(NamedTuple):
    """The units that the experts of a layer are spread over.

    Attributes:
        units: Number of units, N.
        redundant: Slots beyond one for each expert, for EPLB. By default the fewest that give each unit at least one
            and all units equally many slots.
        nodes: Nodes that the units are in, for hierarchical EPLB.
        groups: Groups that the experts are in, for hierarchical EPLB.

    Examples:
        >>> import moetrace as mt
        >>> mt.Tier(units=8).slots(32), mt.Tier(units=8, redundant=16).slots(32)
        (40, 48)
    """

    units: int
    redundant: int | None = None
    nodes: int = 1
    groups: int = 1

    def slots(self, experts: int) -> int:
        """Slots of a layer under EPLB.

        Args:
            experts: Experts of a layer.

        Returns:
            The number of slots.

        Raises:
            UsageError: The units cannot have equally many slots.
        """
        if self.redundant is None:
            return -(-(experts + self.units) // self.units) * self.units
        slots = experts + self.redundant
        if self.redundant < 0 or slots > MAX_SLOTS:
            raise UsageError(f"redundant experts are {self.redundant}: give 0 to {MAX_SLOTS - experts}.")
        if slots % self.units:
            fitting = -slots % self.units + self.redundant
            raise UsageError(
                f"{experts} experts and {self.redundant} redundant ones are {slots} slots, which {self.units} units "
                f"cannot share equally: give {fitting} redundant ones."
            )
        return slots


class Plan(NamedTuple):
    """Where every copy of every expert of L layers is.

    share: units that hold a part of each expert together (1 except for tensor parallelism).
    expert_of_slot: int32 [L, bins, room], what each bin (a unit, or a group of ``share`` units) holds; -1 = nothing.
    """

    share: int
    expert_of_slot: np.ndarray

    @property
    def bins(self) -> int:
        """Units, or groups of units that share their experts."""
        return self.expert_of_slot.shape[1]

    @property
    def slots(self) -> np.ndarray:
        """Copies of experts in each layer, int64 [L]."""
        return (self.expert_of_slot >= 0).sum(axis=(1, 2))


class Copies(NamedTuple):
    """A plan turned around: the bins that hold expert e of layer l are ``bin[l, start[l, e]:start[l, e + 1]]``."""

    start: np.ndarray  # int32 [L, E + 1]
    bin: np.ndarray  # int32 [L, slots], in the order of slots


def check_tier(tier: Tier) -> None:
    """Raise UsageError if there are too few or too many of something."""
    for name, number in (("units", tier.units), ("nodes", tier.nodes), ("groups", tier.groups)):
        if not 1 <= number <= MAX_UNITS:
            raise UsageError(f"{name} are {number}: give 1 to {MAX_UNITS}.")


def check_placement(placement: str, tier: Tier, experts: int | np.ndarray) -> None:
    """Raise UsageError if there is no such placement, or not for these numbers of units and experts (of each layer)."""
    record = find("placement", placement)
    _, colon, size = placement.partition(":")
    if record is None or not record.planner or (colon and not record.letter):
        *known, last = planned_placements()
        near = nearest(placement, [*known, last])
        raise UsageError(f"there is no placement {placement!r}{near}; known are {', '.join(known)} and {last}.")
    check_tier(tier)
    if colon and not (
        size.isascii() and size.isdigit() and len(size) < 9 and int(size) and tier.units % int(size) == 0
    ):
        raise UsageError(f"placement {placement!r} wants groups of a size that divides the {tier.units} units.")
    for number in np.unique(experts).tolist():
        resolve(record.planner).check(tier, number)


def is_made_from_loads(placement: str) -> bool:
    """Return whether a placement's plan is made from loads."""
    return "loads" in find("placement", placement).parameters


def make_plan(
    placement: str,
    tier: Tier,
    shape: tuple[int, int],
    loads: np.ndarray | None = None,
    own: np.ndarray | None = None,
) -> Plan:
    """Make the plan of a placement.

    Args:
        placement: A placement that `check_placement` accepts.
        tier: The units.
        shape: (layers, experts).
        loads: Load of each expert, [layers, experts], 0 or more, if the placement is made from loads.
        own: How many experts each layer has, int64 [layers], if not all the same.

    Returns:
        The plan. Layers with fewer slots than others have empty ones at the end of each unit's.
    """
    make = resolve(find("placement", placement).planner).make
    if own is None or (own == shape[1]).all():
        return make(placement, tier, shape, loads)
    parts = []
    for number in np.unique(own).tolist():  # layers of one size at a time
        layers = np.flatnonzero(own == number)
        of_these = None if loads is None else np.ascontiguousarray(loads[layers, :number])
        parts.append((layers, make(placement, tier, (layers.size, number), of_these)))
    room = max(plan.expert_of_slot.shape[2] for _, plan in parts)
    expert_of_slot = np.full((own.size, parts[0][1].bins, room), -1, np.int32)
    for layers, plan in parts:
        expert_of_slot[layers, :, : plan.expert_of_slot.shape[2]] = plan.expert_of_slot
    return Plan(parts[0][1].share, expert_of_slot)


class Planner(NamedTuple):
    """The maker of the plans of a placement; records name it (`Placement.planner`)."""

    check: Callable[[Tier, int], object]  # of a tier and a number of experts: raises UsageError if they do not fit
    make: Callable[[str, Tier, tuple[int, int], np.ndarray | None], Plan]  # as `make_plan`


def _one_copy_each(placement: str, tier: Tier, shape: tuple[int, int], loads: np.ndarray | None) -> Plan:
    """Place experts as a replay does."""
    record, size = find("placement", placement), placement.partition(":")[2]
    share = 1 if not record.splits else int(size) if size else tier.units
    of_unit = group_of_expert(placement, *shape, tier.units, share, None if loads is None else loads.astype(np.float64))
    return Plan(share, _by_bin(of_unit, tier.units // share))


def _with_copies(placement: str, tier: Tier, shape: tuple[int, int], loads: np.ndarray | None) -> Plan:
    """Place experts and their copies by EPLB's global policy."""
    return _in_nodes(placement, tier._replace(nodes=1, groups=1), shape, loads)


def _in_nodes(placement: str, tier: Tier, shape: tuple[int, int], loads: np.ndarray | None) -> Plan:
    """Place experts and their copies by EPLB's hierarchical policy."""
    del placement
    assert loads is not None
    layers, experts = shape
    slots = eplb_plan(loads, tier.slots(experts), tier.units, tier.nodes, tier.groups)
    return Plan(1, slots.reshape(layers, tier.units, -1))


def _check_nodes(tier: Tier, experts: int) -> None:
    tier.slots(experts)
    for what, number, of, parts in (
        ("units", tier.units, "nodes", tier.nodes),
        ("groups", tier.groups, "nodes", tier.nodes),
        ("experts", experts, "groups", tier.groups),
    ):
        if number % parts:
            raise UsageError(f"hierarchical EPLB cannot share {number} {what} among {parts} {of} equally.")


ONE_COPY = Planner(lambda tier, experts: None, _one_copy_each)
EPLB = Planner(Tier.slots, _with_copies)
HIERARCHICAL = Planner(_check_nodes, _in_nodes)


def copies_of(plan: Plan, experts: int) -> Copies:
    """Turn a plan around."""
    layers = len(plan.expert_of_slot)
    start = np.zeros((layers, experts + 1), np.int32)
    bin_of_copy = np.empty((layers, plan.expert_of_slot[0].size), np.int32)
    _turn(plan.expert_of_slot, start, bin_of_copy)
    return Copies(start, bin_of_copy)


def moved_bytes(old: Plan, new: Plan, expert_bytes: np.ndarray) -> np.ndarray:
    """Bytes that each layer copies to get from one plan to another.

    A unit has to get what it is to hold and does not hold. Units keep their numbers: another numbering of the new
    plan's units would move less, but engines do not make use of that.

    Args:
        old: The plan before.
        new: The plan after, of equally many units.
        expert_bytes: int64 [layers, experts].

    Returns:
        int64 [layers].
    """
    moved = np.zeros(len(expert_bytes), np.int64)
    _count_moved(old.expert_of_slot, new.expert_of_slot, expert_bytes, moved)
    return moved


def _by_bin(bin_of_expert: np.ndarray, bins: int) -> np.ndarray:
    """Turn int64 [layers, experts] into what each bin holds, in the order of experts."""
    layers, experts = bin_of_expert.shape
    room = max(int(np.bincount(held, minlength=bins).max()) for held in bin_of_expert)
    expert_of_slot = np.full((layers, bins, room), -1, np.int32)
    for layer, held in enumerate(bin_of_expert):
        order = np.argsort(held, kind="stable")
        rank = np.arange(experts) - np.searchsorted(held[order], held[order])
        expert_of_slot[layer, held[order], rank] = order
    return expert_of_slot


@kernel(inline=False)
def _turn(expert_of_slot, start, bin_of_copy):
    """Fill start int32 [L, E + 1] and bin_of_copy int32 [L, slots] from expert_of_slot int32 [L, bins, room]."""
    layers, bins, room = expert_of_slot.shape
    end = np.empty(start.shape[1] - 1, np.int32)
    for layer in range(layers):
        for b in range(bins):
            for slot in range(room):
                if expert_of_slot[layer, b, slot] >= 0:
                    start[layer, expert_of_slot[layer, b, slot] + 1] += 1
        for e in range(end.size):
            end[e] = start[layer, e]
            start[layer, e + 1] += start[layer, e]
        for b in range(bins):
            for slot in range(room):
                expert = expert_of_slot[layer, b, slot]
                if expert >= 0:
                    bin_of_copy[layer, end[expert]] = b
                    end[expert] += 1


@kernel(inline=False)
def _count_moved(old, new, expert_bytes, moved):
    """Add to moved int64 [L] the bytes that bins get; old, new int32 [L, bins, room], expert_bytes int64 [L, E]."""
    layers, bins = new.shape[:2]
    for layer in range(layers):
        held = np.full(expert_bytes.shape[1], -1)  # of each expert: the last bin that held it, or got it
        for b in range(bins):
            for expert in old[layer, b]:
                if expert >= 0:
                    held[expert] = b
            for expert in new[layer, b]:
                if expert >= 0 and held[expert] != b:
                    held[expert] = b
                    moved[layer] += expert_bytes[layer, expert]
