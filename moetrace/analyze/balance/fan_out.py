"""On how many units, and nodes of units, the experts of one row stand under a plan."""

import numpy as np

from moetrace.jit.compile import kernel
from moetrace.jit.random import drawn

SUMS = ("rows", "units", "nodes")  # of a layer: rows that chose anything, and the distinct units and nodes of each
EVEN, BY_PLACE = -2, -1  # which copy a row takes; a number from 0 is the seed that draws it


@kernel(inline=False)
def count(choices, copies, nodes_of, rule, turn, sums):
    """Add to sums int64 [L, len(SUMS)] the rows of some steps, and the distinct units and nodes that they are on.

    nodes_of int64 [bins, units of a bin] has the node of each unit. A row takes one of c copies: EVEN, by its number
    among the expert's rows of the step, less the step's number (``turn`` is that of the first), modulo c, which is how
    `imbalance.judge` shares rows; else as in `imbalance.judge_rows`.
    """
    layers, top_k = choices.experts.shape[1:]
    absent = np.int64((1 << (8 * choices.experts.itemsize)) - 1)
    bins, share = nodes_of.shape
    seen, seen_node = np.full(bins, -1), np.full(nodes_of.max() + 1, -1)
    nth = np.zeros(copies.start.shape[1] - 1, np.int64)
    mark = 0
    for step in range(choices.begin.size):
        begin = choices.begin[step]
        for layer in range(layers):
            start, bin_of = copies.start[layer], copies.bin[layer]
            nth[:] = 0
            for row in range(begin, choices.end[step]):
                mark += 1
                units, nodes = 0, 0
                for slot in range(top_k):
                    expert = np.int64(choices.experts[row, layer, slot])
                    if expert == absent:
                        continue
                    copy, number = np.int64(start[expert]), np.int64(start[expert + 1] - start[expert])
                    if number > 1:
                        place = row - begin
                        if rule == EVEN:
                            place = nth[expert] - (turn + step)
                            nth[expert] += 1
                        elif rule >= 0:
                            place = drawn(rule, turn + step, layer, place, expert)
                        copy += place % number
                    b = bin_of[copy]
                    if seen[b] == mark:
                        continue
                    seen[b] = mark
                    units += share
                    for unit in range(share):
                        nodes += np.int64(seen_node[nodes_of[b, unit]] != mark)
                        seen_node[nodes_of[b, unit]] = mark
                sums[layer, 0] += units > 0
                sums[layer, 1] += units
                sums[layer, 2] += nodes
