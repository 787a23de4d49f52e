"""Sums and averages over the experts of a layer, many experts at a time (`foresight.py`).

Loops over experts touch few arrays each: of many, the compiler does not find out that they lie apart, and takes one
expert at a time.
"""

import numpy as np

from moetrace.jit.compile import kernel

LEARN = 1 / 32  # rate of a table in the long run
PRIOR = 4.0  # visits that a table's start is worth
LANES = 8  # 8 sums, each over every 8th expert: in a single sum, each addition waits for the one before


@kernel
def learn(table, count, choices, chosen):
    """Let the rows of a layer's table, float32 [E, E], that stand for choices follow ``chosen`` float32 [E].

    All of it in float32: sixteen at a time, and converted never.
    """
    for slot in range(choices.size):
        j = np.int64(choices[slot])
        if j < chosen.size:
            count[j] += 1
            rate = np.float32(max(LEARN, 1.0 / (count[j] + PRIOR)))
            for e in range(chosen.size):
                table[j, e] += rate * (chosen[e] - table[j, e])


@kernel
def add_up(table, choices, chosen, total):
    """Fill ``total`` float64 [E] with the sum of a table's rows over the choices; return how many there are.

    Four at a time, in the order of the slots; ``chosen`` int64 [k] is scratch.
    """
    experts, found = table.shape[0], 0
    for slot in range(choices.size):
        chosen[found] = choices[slot]
        found += choices[slot] < experts
    for e in range(experts):
        total[e] = 0.0
    done = 0
    while done + 4 <= found:
        a, b, c, d = chosen[done], chosen[done + 1], chosen[done + 2], chosen[done + 3]
        for e in range(experts):
            total[e] = total[e] + table[a, e] + table[b, e] + table[c, e] + table[d, e]
        done += 4
    for other in range(done, found):
        a = chosen[other]
        for e in range(experts):
            total[e] += table[a, e]
    return found


@kernel
def scale_of(lanes, top_k):
    """Return what chances, [E / LANES, LANES], are multiplied with to sum up to ``top_k``."""
    a, b, c, d, e, f, g, h = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(lanes.shape[0]):
        a += lanes[i, 0]
        b += lanes[i, 1]
        c += lanes[i, 2]
        d += lanes[i, 3]
        e += lanes[i, 4]
        f += lanes[i, 5]
        g += lanes[i, 6]
        h += lanes[i, 7]
    total = a + b + c + d + e + f + g + h
    return top_k / total if total > 0.0 else 1.0


@kernel
def raise_to(x, n, power):
    """Fill ``power`` float64 [E] with x to the n, by squaring; leaves x spoilt."""
    for e in range(power.size):
        power[e] = 1.0
    while n > 0:
        if n & 1:
            for e in range(power.size):
                power[e] *= x[e]
        n >>= 1
        if n > 0:
            for e in range(power.size):
                x[e] *= x[e]
