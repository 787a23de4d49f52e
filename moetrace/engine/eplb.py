"""Plans by EPLB, DeepSeek's expert parallelism load balancer: which experts are copied, and which unit holds which.

The algorithm is that of https://github.com/deepseek-ai/EPLB (README and paper arXiv 2412.19437, section 3.4); the code
is not. A layer's expert groups are packed onto nodes, the experts of each node get its redundant copies, one after
another where a copy is loaded most, and the copies are packed onto the node's units, each of which has equally many
slots. With one node and one group that is its global policy, else the hierarchical one. Packing gives the heaviest item
to the least loaded pack that still has room. All ties go to the lower expert, copy or unit, so that a plan depends on
nothing but its loads.
"""

import numpy as np

from moetrace.jit.compile import kernel
from moetrace.jit.heap import sink


def eplb_plan(loads: np.ndarray, slots: int, units: int, nodes: int = 1, groups: int = 1) -> np.ndarray:
    """Plan each layer by EPLB: copies of experts for slots, and slots for units (arXiv 2412.19437, section 3.4).

    Args:
        loads: Load of each expert, [layers, experts], 0 or more.
        slots: Slots of a layer, at least one for each expert; `units` divides it.
        units: Number of units; unit u has the slots from `u * slots / units` on, in the order in which it got them.
        nodes: Nodes that the units are in; it divides `units` and `groups`.
        groups: Groups that the experts are in; it divides the experts.

    Returns:
        int32 [layers, slots], the expert in each slot. The numbers are only asserted here; `Tier` refuses users' ones.
    """
    layers, experts = loads.shape
    assert slots >= experts and slots % units == 0 and units % nodes == 0
    assert groups % nodes == 0 and experts % groups == 0
    expert_of_slot = np.empty((layers, slots), np.int32)
    _plan(np.ascontiguousarray(loads, np.float64), units, nodes, groups, expert_of_slot)
    return expert_of_slot


@kernel(inline=False)
def _plan(loads, units, nodes, groups, expert_of_slot):
    """Fill expert_of_slot int32 [layers, slots] for loads float64 [layers, experts]."""
    layers, experts = loads.shape
    slots = expert_of_slot.shape[1]
    in_node, node_slots, node_units = experts // nodes, slots // nodes, units // nodes
    size = max(slots, groups)
    heap_key, heap_id = np.empty(size), np.empty(size, np.int64)
    copies, inner = np.empty(experts, np.int64), np.empty(experts, np.int64)
    weight, place, expert_of_copy = np.empty(size), np.empty(size, np.int64), np.empty(slots, np.int64)
    filled, group_size = np.empty(max(units, nodes), np.int64), experts // groups
    for layer in range(layers):
        load, out = loads[layer], expert_of_slot[layer]
        for group in range(groups):
            weight[group] = load[group * group_size : (group + 1) * group_size].sum()
        _pack(weight[:groups], np.argsort(-weight[:groups], kind="mergesort"), nodes, heap_key, heap_id, filled, place)
        for group in range(groups):
            for i in range(group_size):
                inner[place[group] * group_size + i] = group * group_size + i
        for node in range(nodes):
            members = inner[node * in_node : (node + 1) * in_node]
            _copy(load, members, node_slots, heap_key, heap_id, copies)
            _list_copies(load, members, copies, node_slots, weight, expert_of_copy)
            order = np.argsort(-weight[:node_slots], kind="mergesort")
            _pack(weight[:node_slots], order, node_units, heap_key, heap_id, filled, place)
            for copy in range(node_slots):
                out[node * node_slots + place[copy]] = expert_of_copy[copy]


@kernel
def _copy(load, members, slots, heap_key, heap_id, copies):
    """Set how many ``copies`` each member has: one, and one more, ``slots`` in all, where a copy's load is highest.

    The heap's keys are negative loads of a copy, so that its root is the highest; on a tie, the first member.
    """
    for i in range(members.size):
        copies[members[i]] = 1
        heap_key[i], heap_id[i] = -load[members[i]], i
    for i in range(members.size // 2 - 1, -1, -1):
        sink(heap_key, heap_id, members.size, i)
    for _ in range(slots - members.size):
        expert = members[heap_id[0]]
        copies[expert] += 1
        heap_key[0] = -load[expert] / copies[expert]
        sink(heap_key, heap_id, members.size, 0)


@kernel
def _list_copies(load, members, copies, slots, weight, expert_of_copy):
    """List the members, then their further copies by member: the load and the expert of each of the ``slots``."""
    end = members.size
    for i in range(members.size):
        expert = members[i]
        share = load[expert] / copies[expert]
        weight[i], expert_of_copy[i] = share, expert
        for _ in range(copies[expert] - 1):
            weight[end], expert_of_copy[end] = share, expert
            end += 1


@kernel
def _pack(weight, order, packs, heap_key, heap_id, filled, place):
    """Give items, in ``order``, to the lightest of the ``packs`` that has room; ``place`` is pack * room + rank.

    Where a pack has room for one item, item i goes to pack i, as in EPLB.
    """
    room = weight.size // packs
    if room == 1:
        for i in range(weight.size):
            place[i] = i
        return
    open_packs = packs
    for pack in range(packs):
        heap_key[pack], heap_id[pack], filled[pack] = 0.0, pack, 0
    for item in order:
        pack = heap_id[0]
        place[item] = pack * room + filled[pack]
        filled[pack] += 1
        heap_key[0] += weight[item]
        if filled[pack] == room:
            open_packs -= 1
            heap_key[0], heap_id[0] = heap_key[open_packs], heap_id[open_packs]
        sink(heap_key, heap_id, open_packs, 0)
