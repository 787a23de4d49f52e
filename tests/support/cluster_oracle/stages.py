"""What the stages of a step take, and what its GPUs and wires have to do."""

import math
from dataclasses import dataclass, field

from support.cluster_oracle.parts import Chunk, Machine, MicroBatch, Network, Policy, Step
from support.cluster_oracle.schedule import Stages, last_end, run
from support.cluster_oracle.sharing import Choice, context


@dataclass
class Traffic:
    """What the rows of a chunk send through one layer: items are rows with dedup, else choices."""

    rows: int  # of the chunk, absent ones too
    items: list[int]  # for each expert GPU
    node_items: list[int]  # for each node
    loads: list[dict[tuple[int, int], int]]  # [GPU][(slot, expert)]: its rows


@dataclass
class Sizes:
    """Bytes of a transfer over wires: of one GPU's port in either direction, all together, and between nodes."""

    out: float  # an attention GPU's
    into: list[float]  # each expert GPU's
    total: float
    node_out: float = 0.0  # the largest of a node
    node_into: list[float] = field(default_factory=list)  # each node's
    node_total: float = 0.0


def traffic_of(choices: list[list[Choice]], chunk: Chunk, machine: Machine, dedup: bool) -> Traffic:
    gpus = machine.expert_gpus
    items, loads = [0] * gpus, [{} for _ in range(gpus)]
    node_items = [0] * nodes_of(machine)
    for of_row in choices[chunk.first : chunk.last]:
        for expert, gpu, slot in of_row:
            loads[gpu][slot, expert] = loads[gpu].get((slot, expert), 0) + 1
        on_gpus = [gpu for _, gpu, _ in of_row]
        for gpu in set(on_gpus) if dedup else on_gpus:
            items[gpu] += 1
        if machine.gpus_per_node:
            on_nodes = [node_of_expert_gpu(machine, gpu) for gpu in on_gpus]
            for node in set(on_nodes) if dedup else on_nodes:
                node_items[node] += 1
    return Traffic(len(chunk), items, node_items, loads)


def nodes_of(machine: Machine) -> int:
    if not machine.gpus_per_node:
        return 0
    gpus = machine.attention + (0 if machine.colocated else machine.expert_gpus)
    return -(-gpus // machine.gpus_per_node)


def node_of_expert_gpu(machine: Machine, gpu: int) -> int:
    return (gpu if machine.colocated else machine.attention + gpu) // machine.gpus_per_node


def sizes_of(traffic: Traffic, machine: Machine, bits: float) -> Sizes:
    """The same for both directions, but for the bits."""
    row_bytes = machine.width * bits / 8
    into = [row_bytes * items * machine.crossing for items in traffic.items]
    sizes = Sizes(math.fsum(into) / machine.attention, into, math.fsum(into))
    if machine.gpus_per_node:
        nodes = range(nodes_of(machine))
        attention_nodes = [gpu // machine.gpus_per_node for gpu in range(machine.attention)]
        share = [attention_nodes.count(node) / machine.attention for node in nodes]
        sizes.node_into = [row_bytes * traffic.node_items[node] * (1 - share[node]) for node in nodes]
        elsewhere = [sum(traffic.node_items[v] for v in nodes if v != node) for node in nodes]
        sizes.node_out = max(row_bytes * share[node] * elsewhere[node] for node in nodes)
        sizes.node_total = math.fsum(sizes.node_into)
    return sizes


def transfer_s(sizes: Sizes, latency_s: float, rows_s: float, net: Network) -> float:
    seconds = 0.0
    if sizes.total > 0:
        seconds = latency_s + rows_s + max(sizes.out, *sizes.into) / net.B_net
    if sizes.node_total > 0:
        seconds = max(seconds, net.node_s + max(sizes.node_out, *sizes.node_into) / net.B_node)
    return seconds


def work_of(traffic: Traffic, layer: int, machine: Machine) -> list[float]:
    """Seconds of each expert GPU."""
    seconds = []
    for gpu, loads in enumerate(traffic.loads):
        starts = (1 if machine.launch == "layer" else len(loads)) if loads else 0
        seconds.append(
            starts * machine.t_g
            + math.fsum(machine.work_s(gpu, layer, expert, rows) for (_, expert), rows in sorted(loads.items()))
        )
    return seconds


def own_attention_s(step: Step, batch: MicroBatch, machine: Machine, policy: Policy, gpu: int) -> float:
    """A of one attention GPU: the dense part of version 1, for its share of rows and context."""
    F, B = machine.F * machine.attention_factor(gpu), machine.B * machine.attention_factor(gpu)
    params = machine.dense_params - (machine.shared_params if policy.shared == "apart" else 0)
    rows = -(-len(batch) // machine.attention)
    work_s = max(params * machine.dense_bits / 8 / B, 2 * params * rows / F)
    cached = context(step, batch) / machine.attention
    return work_s + machine.kv_bytes * cached / B + machine.t_g + machine.overhead_s


def own_shared_s(batch: MicroBatch, machine: Machine, policy: Policy, gpu: int) -> float:
    """S of one attention GPU: shared experts."""
    if policy.shared != "apart" or not machine.shared_params:
        return 0.0
    rows = -(-len(batch) // machine.attention)
    F, B = machine.F * machine.attention_factor(gpu), machine.B * machine.attention_factor(gpu)
    weights_s = machine.shared_params * machine.dense_bits / 8 / B
    return max(weights_s, 2 * machine.shared_params * rows / F) + machine.t_g


def own_further_kernels_s(
    rows: int, machine: Machine, policy: Policy, gpu: int, starts: bool = True, locality: bool = True
) -> float:
    """What K - 1 kernels more add to a layer of one attention GPU: their starts, and values to memory and back."""
    own = -(-rows // machine.attention)
    each_s = machine.t_g if starts else 0.0
    if locality:
        B = machine.B * machine.attention_factor(gpu)
        each_s += 2 * own * machine.width * machine.activation_bytes / B
    return (policy.kernels_per_layer - 1) * each_s


@dataclass
class Priced:
    """A step in stages, before anything says in which order they run."""

    stages: Stages
    traffic: list[list[list[Traffic]]]  # [layer][batch][chunk]
    work_s: list[list[list[list[float]]]]  # [layer][batch][chunk][expert GPU]
    dispatch: list[list[list[Sizes]]]
    combine: list[list[list[Sizes]]]
    rows: int
    attended_s: list[float]  # of each attention GPU: its own A and S of all layers, overhead included


def price(
    step: Step,
    shared: list[list[list[Choice]]],
    batches: list[MicroBatch],
    machine: Machine,
    policy: Policy,
    net: Network,
) -> Priced:
    """Price all stages of a step; K is left to `step_s`."""
    stages, all_attention = Stages([], [], [], [], []), range(machine.attention)
    priced = Priced(stages, [], [], [], [], len(step.rows), [0.0] * machine.attention)
    for layer in range(machine.L):
        own_a = [[own_attention_s(step, batch, machine, policy, gpu) for batch in batches] for gpu in all_attention]
        own_s = [[own_shared_s(batch, machine, policy, gpu) for batch in batches] for gpu in all_attention]
        for gpu in all_attention:
            priced.attended_s[gpu] += math.fsum([*own_a[gpu], *own_s[gpu]])
        stages.A.append([max(of_batch) for of_batch in zip(*own_a, strict=True)])
        stages.S.append([max(of_batch) for of_batch in zip(*own_s, strict=True)])
        traffic = [
            [traffic_of(shared[layer], chunk, machine, net.dedup) for chunk in batch.chunks] for batch in batches
        ]
        work_s = [[work_of(t, layer, machine) for t in chunks] for chunks in traffic]
        dispatch = [[sizes_of(t, machine, net.dispatch_bits) for t in chunks] for chunks in traffic]
        combine = [[sizes_of(t, machine, net.combine_bits) for t in chunks] for chunks in traffic]
        times = {"A2E": (dispatch, net.dispatch_s), "E2A": (combine, net.combine_s)}
        for stage, (sizes, latency_s) in times.items():
            getattr(stages, stage).append(
                [
                    [
                        transfer_s(s, latency_s, rows_s(t, machine, net), net)
                        for s, t in zip(of_batch, chunks, strict=True)
                    ]
                    for of_batch, chunks in zip(sizes, traffic, strict=True)
                ]
            )
        stages.E.append([[max(seconds) for seconds in chunks] for chunks in work_s])
        priced.traffic.append(traffic)
        priced.work_s.append(work_s)
        priced.dispatch.append(dispatch)
        priced.combine.append(combine)
    return priced


def rows_s(traffic: Traffic, machine: Machine, net: Network) -> float:
    return -(-traffic.rows // machine.attention) * net.row_s


def further_kernels_s(priced: Priced, machine: Machine, policy: Policy, starts: bool, locality: bool) -> float:
    """What K - 1 kernels more add to a layer: that of the slowest attention GPU."""
    gpus = range(machine.attention)
    return max(own_further_kernels_s(priced.rows, machine, policy, gpu, starts, locality) for gpu in gpus)


def fused_part_s(priced: Priced, layer: int, machine: Machine, net: Network) -> float:
    """Dispatch, experts and combine of a layer in one kernel: the slowest GPU, each with its own seconds."""
    traffic = priced.traffic[layer][0][0]
    rows = rows_s(traffic, machine, net)
    longest_s = 0.0
    for gpu in range(machine.expert_gpus):
        c = priced.work_s[layer][0][0][gpu]
        x, x_latency_s = _fused_way(priced.dispatch[layer][0][0], gpu, net.dispatch_s, rows, machine, net)
        y, y_latency_s = _fused_way(priced.combine[layer][0][0], gpu, net.combine_s, rows, machine, net)
        part_s = x_latency_s + y_latency_s + (x + c + y) / 8 + 7 * max(x, c, y) / 8
        longest_s = max(longest_s, part_s)
    return longest_s


def _fused_way(
    sizes: Sizes, gpu: int, latency_s: float, rows: float, machine: Machine, net: Network
) -> tuple[float, float]:
    """Seconds of one GPU in one direction without latency, and the latency."""
    seconds, latency = 0.0, 0.0
    if sizes.into[gpu] > 0:
        seconds, latency = rows + max(sizes.out, sizes.into[gpu]) / net.B_net, latency_s
        if sizes.node_into:
            into = sizes.node_into[node_of_expert_gpu(machine, gpu)]
            if into > 0:
                seconds = max(seconds, max(sizes.node_out, into) / net.B_node)
                latency = max(latency, net.node_s)
    return seconds, latency


def step_s(
    priced: Priced,
    machine: Machine,
    policy: Policy,
    net: Network,
    order: str,
    *,
    execution: str | None = None,
    free: bool = False,
    starts: bool = True,
    locality: bool = True,
) -> tuple[float, list]:
    """Run a priced step; return its seconds, head included and pause not, and its spans.

    `free`: transfers take no time. `starts`, `locality`: whether what K - 1 more kernels cost in bulk is paid.
    """
    stages, none = priced.stages, [[[0.0] * len(j) for j in i] for i in priced.stages.E]
    fused = (execution or policy.execution) == "fused"
    if fused:
        if free:
            parts = [max(priced.work_s[layer][0][0]) for layer in range(machine.L)]
        else:
            parts = [fused_part_s(priced, layer, machine, net) for layer in range(machine.L)]
        stages = Stages(stages.A, stages.S, none, [[[part]] for part in parts], none)
    elif free:
        stages = Stages(stages.A, stages.S, none, stages.E, none)
    if not fused:
        each_s = further_kernels_s(priced, machine, policy, starts, locality)
        stages = Stages(stages.A, stages.S, stages.A2E, stages.E, stages.E2A, [each_s] * machine.L)
    spans = run(stages, colocated=machine.colocated, order=order, serial=policy.schedule == "serial")
    return last_end(spans) + machine.head_s(), spans
