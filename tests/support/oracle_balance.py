"""Plans and imbalance, slow and obvious: lists and dicts, one row at a time; shares no code with the kernels."""

from fractions import Fraction
from itertools import product


def pack(weights, packs):
    """Which items each pack gets, in order: heaviest first, to the lightest pack with room; ties to the lower."""
    room = len(weights) // packs
    held, total = [[] for _ in range(packs)], [0] * packs
    if room == 1:
        return [[item] for item in range(packs)]
    for item in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        open_packs = [p for p in range(packs) if len(held[p]) < room]
        lightest = min(open_packs, key=lambda p: (total[p], p))
        held[lightest].append(item)
        total[lightest] += weights[item]
    return held


def eplb(loads, slots, units, nodes=1, groups=1, number=Fraction):
    """Expert of each slot of one layer.

    With ``number`` float as DeepSeek adds up, one copy after another: sums of thirds that are equal may differ there.
    """
    loads = [number(int(load)) for load in loads]
    size = len(loads) // groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    plan = []
    for of_node in pack([sum(loads[e] for e in group) for group in members], nodes):
        experts = [e for g in of_node for e in members[g]]
        copies = dict.fromkeys(experts, 1)
        for _ in range(slots // nodes - len(experts)):
            copies[max(experts, key=lambda e: (loads[e] / copies[e], -experts.index(e)))] += 1
        listed = experts + [e for e in experts for _ in range(copies[e] - 1)]
        for unit in pack([loads[e] / copies[e] for e in listed], units // nodes):
            plan += [listed[i] for i in unit]
    return plan


def lpt(loads, units):
    """Unit of each expert."""
    total, unit_of = [0] * units, [0] * len(loads)
    for e in sorted(range(len(loads)), key=lambda e: (-loads[e], e)):
        unit_of[e] = min(range(units), key=lambda u: (total[u], u))
        total[unit_of[e]] += loads[e]
    return unit_of


def bin_loads(rows, held, turn, cost):
    """Rows and seconds of each bin: rows of each expert, which experts each bin holds, a list for each copy."""
    bins_of = {}
    for b, experts in enumerate(held):
        for e in experts:
            if e >= 0:
                bins_of.setdefault(e, []).append(b)
    done, busy_s = [0] * len(held), [0.0] * len(held)
    for e, n in enumerate(rows):
        if n == 0:
            continue
        copies = len(bins_of[e])
        got = [0] * copies
        # Row after row to copy after copy, beginning with another one each step.
        for row in range(n):
            got[(row - turn) % copies] += 1
        for b, own in zip(bins_of[e], got, strict=True):
            done[b] += own
            busy_s[b] += cost(e, own) if own else 0.0
    return done, busy_s


def bin_loads_of_rows(rows, held, copy_of, cost):
    """Rows and seconds of each bin: the experts of each row, what each bin holds, `copy_of(place of row, copies)`."""
    slots = [(b, slot, e) for b, experts in enumerate(held) for slot, e in enumerate(experts) if e >= 0]
    got = dict.fromkeys(slots, 0)
    for place, experts in enumerate(rows):
        for e in experts:
            copies = [slot for slot in slots if slot[2] == e]
            got[copies[copy_of(place, len(copies))]] += 1
    done, busy_s = [0] * len(held), [0.0] * len(held)
    for (b, _, e), own in got.items():
        done[b] += own
        busy_s[b] += cost(e, own) if own else 0.0
    return done, busy_s


def balancedness(steps):
    """What vLLM and SGLang log, as means over the steps: each a list of layers, each the rows of its bins."""
    vllm, sglang = [], []
    for layers in steps:
        layers = [rows for rows in layers if sum(rows)]
        if layers:
            means, most = [sum(rows) / len(rows) for rows in layers], [max(rows) for rows in layers]
            vllm.append(sum(means) / sum(most))
            sglang.append(sum(mean / top for mean, top in zip(means, most, strict=True)) / len(layers))
    return sum(vllm) / len(vllm), sum(sglang) / len(sglang)


def best_possible(rows, bins, slots, cost):
    """Least greatest rows and least greatest seconds of a bin, over every plan of so many copies, split evenly."""
    experts = len(rows)
    best_rows, best_s = None, None
    further = slots - experts
    for extra in product(range(further + 1), repeat=experts):
        if sum(extra) != further:
            continue
        listed = [e for e in range(experts) for _ in range(1 + extra[e])]
        for where in product(range(bins), repeat=slots):
            held = [[e for e, b in zip(listed, where, strict=True) if b == bin_] for bin_ in range(bins)]
            done, busy_s = bin_loads(rows, held, 0, cost)
            best_rows = max(done) if best_rows is None else min(best_rows, max(done))
            best_s = max(busy_s) if best_s is None else min(best_s, max(busy_s))
    return best_rows, best_s
