"""Where the rows of a chunk go: to which copy of each expert, and how often to each GPU."""

from typing import Any, NamedTuple

import numpy as np

from moetrace.engine.cluster.fabric import EVEN, NEAREST, RANDOM
from moetrace.engine.state import records
from moetrace.jit.compile import kernel
from moetrace.jit.random import drawn

# If a chunk's choices times this are at most the number of copies, the copies with rows are listed; otherwise all are
# looked at.
FEW_CHOICES = 4


class Routes(NamedTuple):
    """Room for one layer of a step; the counts of a chunk are zero between chunks."""

    chosen: np.ndarray  # int32 [copies]: rows of the chunk
    touched: np.ndarray  # int32 [copies]: those with rows, of a chunk with few choices
    nth: np.ndarray  # int32 [E]: rows of the step so far
    into: np.ndarray  # int64 [GPUs]: rows of the chunk, or choices without dedup
    into_node: np.ndarray  # int64 [nodes]
    stamp: np.ndarray  # int64 [GPUs]: number of the row that came last
    node_stamp: np.ndarray  # int64 [nodes]
    sums: Any  # ROUTED [1]


# `mark` numbers rows, once a layer and chunk; the others are of the chunk at hand.
ROUTED = np.dtype([(name, np.int64) for name in ("mark", "touched", "choices", "distinct", "rows")])


@kernel(inline=False)
def route(experts, part, place, gpus, dedup, copies, routes):
    """Count a chunk's rows, ``part`` (begin, end) of experts uint16 [rows, L, k]; return how many chose anything.

    ``place`` is the layer, the number of the step and the step's first row. A row takes one of c copies: ``even``, by
    its number among the expert's rows of the step, less the step's number, modulo c; ``row``, by its place in the step;
    ``random``, by lot; ``nearest``, the one on its own GPU, else as ``row``.
    """
    begin, end = part
    layer, step, first_row = place
    top_k = experts.shape[2]
    start, gpu_of = copies.start[layer], copies.gpu[layer]
    num_experts = start.size - 1
    one_each = True
    for expert in range(num_experts + 1):
        one_each &= start[expert] == expert
    count, into, stamp, sums = routes.chosen, routes.into, routes.stamp, routes.sums[0]
    few = (end - begin) * top_k * FEW_CHOICES <= start[num_experts]
    mark, distinct, choices, touched, some = sums.mark, 0, 0, 0, 0
    for row in range(begin, end):
        mark += 1
        before = choices
        for slot in range(top_k):
            expert = np.int64(experts[row, layer, slot])
            if expert >= num_experts:
                continue
            copy = expert
            if not one_each:
                copy = np.int64(start[expert])
                number = np.int64(start[expert + 1]) - copy
                if number < 1:  # of another layer's experts: refused at the end, as in every replay
                    continue
                if number > 1:
                    copy += _chosen(expert, (copy, number), (row - first_row, layer, step), gpus, gpu_of, routes.nth)
            if few and count[copy] == 0:
                routes.touched[touched] = copy
                touched += 1
            count[copy] += 1
            gpu = gpu_of[copy]
            new = np.int64(stamp[gpu] != mark)
            stamp[gpu] = mark
            into[gpu] += new if dedup else 1
            distinct += new
            choices += 1
            if gpus.per_node > 0:
                node = (gpu + (0 if gpus.colocated else gpus.attention)) // gpus.per_node
                routes.into_node[node] += np.int64(routes.node_stamp[node] != mark) if dedup else 1
                routes.node_stamp[node] = mark
        some += choices > before
    sums.mark, sums.distinct, sums.choices, sums.rows = mark, distinct, choices, some
    sums.touched = touched if few else -1
    return some


@kernel
def _chosen(expert, copies, place, gpus, gpu_of, nth):
    """Return which of an expert's copies, the ``number`` from ``first`` on, on the GPUs ``gpu_of``, a row takes."""
    first, number = copies
    row, layer, step = place
    if gpus.copy_rule == EVEN:
        nth[expert] += 1
        # As `moetrace analyze balance`: the rows that are left over begin with another copy each step.
        return (nth[expert] - 1 - step) % number
    if gpus.copy_rule == RANDOM:
        return drawn(gpus.seed, step, layer, row, expert) % number
    if gpus.copy_rule == NEAREST and gpus.colocated:
        own = row % gpus.attention
        for copy in range(number):
            if gpu_of[first + copy] == own:
                return copy
    return row % number


def new_routes(copies: int, experts: int, gpus: int, nodes: int) -> Routes:
    """Return room for layers of ``copies`` copies and ``experts`` experts."""
    return Routes(
        chosen=np.zeros(copies, np.int32),
        touched=np.zeros(copies, np.int32),
        nth=np.zeros(experts, np.int32),
        into=np.zeros(gpus, np.int64),
        into_node=np.zeros(nodes, np.int64),
        stamp=np.zeros(gpus, np.int64),
        node_stamp=np.zeros(nodes, np.int64),
        sums=records(1, ROUTED),
    )
