"""How long the stages of a layer take: attention, shared experts, to the experts, the experts, and back."""

from typing import Any, NamedTuple

import numpy as np

from moetrace.engine.cost import dense_s_on
from moetrace.engine.machine import GPU_DEVICE
from moetrace.engine.state import records
from moetrace.jit.compile import kernel

# For each GPU that holds experts: 1 / its factor, the sums of a step, and the sums of a chunk.
GPU_SUM = np.dtype(
    [(name, np.float64) for name in ("slowness", "busy_s", "chunk_s", "weight_bytes", "chunk_bytes")]
    + [(name, np.int64) for name in ("rows", "chunk_rows", "slots")]
)


class LayerStages(NamedTuple):
    """Seconds of each stage of a layer; of a micro-batch or chunk without rows 0, and ``rows`` 0."""

    all_rows: np.ndarray  # int64 [r1], of each micro-batch
    rows: np.ndarray  # int64 [r1, r2], of each chunk
    attention_s: np.ndarray  # float64 [r1]
    shared_s: np.ndarray  # float64 [r1]
    dispatch_s: np.ndarray  # float64 [r1, r2]
    experts_s: np.ndarray  # float64 [r1, r2]
    combine_s: np.ndarray  # float64 [r1, r2]
    each: Any  # GPU_SUM [GPUs]


@kernel
def attend_s(fabric, cut, rows, tokens):
    """Return the seconds of the attention of a micro-batch, which the attention GPUs share evenly."""
    gpus, machine = fabric.gpus[0], fabric.machine
    own = -(-rows // gpus.attention)
    return dense_s_on(machine.device[GPU_DEVICE], machine.work[cut.apart], own, tokens / gpus.attention)


@kernel
def share_s(gpus, cut, rows):
    """Return the seconds of shared experts that run apart from the attention."""
    if cut.apart == 0:
        return 0.0
    own = -(-rows // gpus.attention)
    weights_s, compute_s = gpus.shared_bytes * gpus.attention_s_per_byte, gpus.shared_flop_per_row * own
    return max(weights_s, compute_s / gpus.attention_flop_s) + gpus.start_s


@kernel
def run_experts(layer, gpus, copies, routes, each):
    """Run what a chunk's rows chose, and forget who chose it: add to ``each``; return the greatest seconds of a GPU."""
    gpu_of, weight_bytes, count = copies.gpu[layer], copies.weight_bytes[layer], routes.chosen
    for g in range(each.size):
        each[g].chunk_s, each[g].chunk_bytes, each[g].chunk_rows = 0.0, 0.0, 0
    listed = routes.sums[0].touched
    size = listed if listed >= 0 else np.int64(copies.start[layer, copies.start.shape[1] - 1])
    for i in range(size):
        copy = routes.touched[i] if listed >= 0 else i
        rows = count[copy]
        if rows == 0:
            continue
        count[copy] = 0
        gpu = each[gpu_of[copy]]
        compute_s, read_s = rows * gpus.s_per_row, weight_bytes[copy] * gpus.s_per_byte
        own_s = compute_s + read_s if gpus.reads_first else max(compute_s, read_s)
        gpu.chunk_s += own_s * gpu.slowness + gpus.each_s + (gpus.layer_s if gpu.chunk_rows == 0 else 0.0)
        gpu.chunk_rows += rows
        gpu.chunk_bytes += weight_bytes[copy]
        gpu.slots += 1
    most_s = 0.0
    for g in range(each.size):
        gpu = each[g]
        gpu.busy_s += gpu.chunk_s
        gpu.weight_bytes += gpu.chunk_bytes
        gpu.rows += gpu.chunk_rows
        most_s = max(most_s, gpu.chunk_s)
    return most_s


class Crossing(NamedTuple):
    """The transfers of a chunk, in a row's bytes; if the same GPUs both send and get, only those over the wire."""

    port: float  # into the busiest GPU that holds experts, or out of an attention GPU, which all send the same
    out: float  # out of an attention GPU
    total: float
    between: float  # into or out of the busiest node, from or to others
    node_out: float  # out of the busiest node


@kernel
def cross(gpus, routes):
    """Return the ``Crossing`` of a chunk that was routed."""
    most, total = 0, 0
    for g in range(routes.into.size):
        total += routes.into[g]
        most = max(most, routes.into[g])
    between, node_out = 0.0, 0.0
    if gpus.per_node > 0:
        into_nodes = 0
        for node in range(gpus.nodes):
            into_nodes += routes.into_node[node]
        for node in range(gpus.nodes):
            share = _senders(gpus, node)
            between = max(between, routes.into_node[node] * (1 - share))
            node_out = max(node_out, share * (into_nodes - routes.into_node[node]))
    out = total / gpus.attention * gpus.wire_share
    return Crossing(max(out, most * gpus.wire_share), out, total * gpus.wire_share, max(between, node_out), node_out)


@kernel
def _senders(gpus, node):
    """Return the share of the attention GPUs that a node has."""
    first = node * gpus.per_node
    return max(min(first + gpus.per_node, gpus.attention) - first, 0) / gpus.attention


@kernel
def transfer_s(gpus, net, slowed, rows, crossing, row_bytes, latency_s):
    """Return the seconds of a transfer of a chunk of ``rows`` rows; one that puts nothing on the wire takes none.

    ``slowed`` is the share of the bandwidth that is left beside a migration.
    """
    if crossing.port * row_bytes <= 0.0:
        return 0.0
    own = -(-rows // gpus.attention)
    inside_s = latency_s + own * net.row_s + crossing.port * row_bytes / (net.bytes_s * slowed)
    if crossing.between > 0.0:
        return max(inside_s, net.node_s + crossing.between * row_bytes / net.node_bytes_s)
    return inside_s


@kernel
def fuse_s(gpus, net, slowed, rows, crossing, routes, each):
    """Return the seconds of a layer's experts and transfers in one kernel, in eight parts that overlap.

    Each GPU has seconds of its own, as if it waited for nobody: of its part of the transfers and of its experts.
    Latencies overlap with nothing.
    """
    most_s, row_s = 0.0, -(-rows // gpus.attention) * net.row_s
    for g in range(each.size):
        run_s = each[g].chunk_s
        if crossing.port <= 0.0 or routes.into[g] == 0:
            most_s = max(most_s, run_s)
            continue
        own, between = max(crossing.out, routes.into[g] * gpus.wire_share), 0.0
        if gpus.per_node > 0:
            node = (g + (0 if gpus.colocated else gpus.attention)) // gpus.per_node
            between = max(crossing.node_out, routes.into_node[node] * (1 - _senders(gpus, node)))
        to_s, to_latency_s = _own_transfer_s(net, slowed, row_s, own, between, net.dispatch_bytes, net.dispatch_s)
        back_s, back_latency_s = _own_transfer_s(net, slowed, row_s, own, between, net.combine_bytes, net.combine_s)
        overlapped_s = (to_s + run_s + back_s) / 8 + 7 * max(to_s, run_s, back_s) / 8
        most_s = max(most_s, to_latency_s + back_latency_s + overlapped_s)
    return most_s


@kernel
def _own_transfer_s(net, slowed, row_s, own, between, row_bytes, latency_s):
    """Return the seconds of a GPU's transfer without its latency, and that latency: of the tier that takes longer."""
    inside_s = row_s + own * row_bytes / (net.bytes_s * slowed)
    if between > 0.0:
        between_s = between * row_bytes / net.node_bytes_s
        if net.node_s + between_s > latency_s + inside_s:
            return between_s, net.node_s
    return inside_s, latency_s


def new_stages(micro_batches: int, chunks: int, slowness: np.ndarray) -> LayerStages:
    """Return room for a layer cut into ``micro_batches`` and ``chunks``; slowness float64 [GPUs with experts]."""
    parts = micro_batches, chunks
    each = records(len(slowness), GPU_SUM)
    each["slowness"] = slowness
    return LayerStages(
        all_rows=np.zeros(micro_batches, np.int64),
        rows=np.zeros(parts, np.int64),
        attention_s=np.zeros(micro_batches),
        shared_s=np.zeros(micro_batches),
        dispatch_s=np.zeros(parts),
        experts_s=np.zeros(parts),
        combine_s=np.zeros(parts),
        each=each,
    )
