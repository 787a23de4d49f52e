"""The oracle's slots of each layer, where they are not all the same (timing model, section 7)."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

from support.oracle_layer import DECODE, Machine, OracleTrace


def layer_slots(trace: OracleTrace, m: Machine, policy: Any) -> list[int]:
    """Return the slots of each layer, where each has its own."""
    equal = [m.slots // m.L] * m.L
    budget = getattr(policy, "budget", None)
    if budget is None:
        return equal
    if budget != "auto":
        return [int(line) for line in Path(budget).read_text().split()]
    first = next((step for step in range(trace.steps) if trace.phase(step) == DECODE), trace.steps)
    steps = range(first or min(64, trace.steps))
    count: Counter = Counter()
    for step, layer in itertools.product(steps, range(m.L)):
        for e, n in trace.demand(step, layer).items():
            count[layer, e] += n
    best = sorted(count, key=lambda key: (-count[key], key[0]))[: sum(equal)]
    found = [sum(layer == of for of, _ in best) for layer in range(m.L)]
    exist = [sum(size > 0 for size in m.W[layer]) for layer in range(m.L)]
    while sum(found) < min(sum(equal), sum(exist)):
        room = [layer for layer in range(m.L) if found[layer] < exist[layer]]
        found[min(room, key=lambda layer: found[layer])] += 1
    return found
