"""What follows from a spec: sizes, times of one expert, and the numbers of rows where one way overtakes another."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from msgspec import UNSET

from moetrace.spec.fits import gpu_slots, gpu_space_bytes, host_slots
from moetrace.spec.model import Model
from moetrace.spec.participants import fed_by_host
from moetrace.spec.system import System
from moetrace.spec.weights import read_expert_bits

# Crossovers are looked for up to this many rows of one expert in one step.
MAX_ROWS = 1_000_000


class Derived(NamedTuple):
    """One derived quantity: a name with its unit, the value (None: undefined) and its meaning."""

    name: str
    value: float | int | None
    meaning: str


def model_figures(model: Model) -> list[Derived]:
    """Sizes of the weights and of what moves, and FLOP."""
    expert_bytes = model.expert_bytes()
    experts, largest = float(expert_bytes.sum()), float(expert_bytes.max())
    smallest = float(expert_bytes[model.has_expert].min())
    dense = model.moe_layers * model.dense_bytes
    bits = 8 * experts / (model.all_experts * model.expert_params)
    named = 0
    if model.expert_bits is not UNSET:
        named = int((~np.isnan(read_expert_bits(model.expert_bits, model.layer_experts))).sum())
    if isinstance(model.experts, int) and isinstance(model.top_k, int):
        read = float(expert_bytes.mean(axis=1).sum()) * model.top_k + dense + model.head_bytes
    else:
        chosen = expert_bytes.sum(axis=1) / model.layer_experts * model.layer_top_k
        read = float(chosen.sum()) + dense + model.head_bytes
    return [
        Derived("expert_mb", largest / 1e6, "W: weights of one expert"),
        *([Derived("expert_mb_min", smallest / 1e6, "W of the smallest expert")] if smallest < largest else []),
        Derived("expert_mb_mean", experts / model.all_experts / 1e6, "W on average"),
        Derived("weight_bits_mean", bits, "bits of a weight on average, with all that is stored"),
        *([Derived("experts_of_own_bits", named, "experts that the file expert_bits names")] if named else []),
        Derived("expert_mflop_per_row", model.flop_per_row / 1e6, "Q(1): one row through one expert"),
        Derived("experts_gb", experts / 1e9, f"all {model.all_experts} experts"),
        Derived("dense_layer_mb", model.dense_bytes / 1e6, "dense weights of one layer"),
        Derived("dense_gb", dense / 1e9, f"dense weights of all {model.moe_layers} layers"),
        Derived("head_mb", model.head_bytes / 1e6, "LM head and dense first layers, once a step"),
        Derived("weights_per_token_gb", read / 1e9, "weights that a step of one row needs"),
        Derived("activation_row_kb", model.activation_row_bytes / 1e3, "one row sent to a unit, and as much back"),
        Derived(
            "kv_token_kb", model.moe_layers * model.kv_bytes_per_token_layer / 1e3, "KV cache of one token, all layers"
        ),
    ]


def system_figures(system: System) -> list[Derived]:
    """Effective rates, totals of the NDP tier, and the machine balance of GPU, unit and CPU."""
    gpu, ndp, cpu = system.gpu, system.ndp, system.cpu
    figures = [
        Derived("gpu_tflops", gpu.flop_s / 1e12, "F_g: reached by the GPU"),
        Derived("gpu_bandwidth_gb_s", gpu.bytes_s / 1e9, "B_g: reached by the GPU"),
        Derived("gpu_flop_per_byte", gpu.flop_s / gpu.bytes_s, "balance of the GPU: below it, memory-bound"),
    ]
    if ndp is not None:
        figures += [
            Derived("ndp_tflops", ndp.units * ndp.flop_s / 1e12, f"N x F_n: all {ndp.units} units"),
            Derived("ndp_bandwidth_gb_s", ndp.units * ndp.bytes_s / 1e9, f"N x B_n: all {ndp.units} units"),
            Derived("ndp_capacity_gb", ndp.units * ndp.capacity_gb, f"all {ndp.units} units"),
            Derived("ndp_flop_per_byte", ndp.flop_s / ndp.bytes_s, "balance of a unit: below it, memory-bound"),
        ]
    if system.cluster is not None:
        figures += _cluster_figures(system)
    if cpu is not None:
        runs = "runs experts where the dispatch is not gpu"
        if system.link is None:
            runs = "takes no part: without a link everything is in GPU memory"
        elif ndp is not None:
            runs = "takes no part beside NDP units, but with dispatch home"
        figures += [
            Derived("cpu_tflops", cpu.flop_s / 1e12, f"F_c: reached by the CPU, which {runs}"),
            Derived("cpu_bandwidth_gb_s", cpu.bytes_s / 1e9, "B_c: reached by the CPU"),
            Derived("cpu_flop_per_byte", cpu.flop_s / cpu.bytes_s, "balance of the CPU: below it, memory-bound"),
        ]
    return figures


def _cluster_figures(system: System) -> list[Derived]:
    """How many GPUs run what, and what the network brings in each phase."""
    cluster, network = system.cluster, system.network
    assert cluster is not None and network is not None
    figures = [
        Derived("attention_gpus", cluster.attention_gpus, "ag: GPUs that run attention"),
        Derived("expert_gpus", cluster.expert_gpus, "GPUs that hold experts"),
    ]
    for phase in ("prefill", "decode"):
        found = network.of_phase(phase)
        figures += [
            Derived(f"{phase}_network_gb_s", found["bandwidth_gb_s"], f"of a GPU and direction, in {phase} steps"),
            Derived(f"{phase}_dispatch_us", found["dispatch_latency_us"], "start of a transfer to the experts"),
            Derived(f"{phase}_combine_us", found["combine_latency_us"], "start of a transfer back"),
        ]
    return figures


def pair_figures(model: Model, system: System) -> list[Derived]:
    """The room for experts in each memory, and the cost of one expert (the largest) on each part of the machine."""
    expert_bytes = model.expert_bytes()
    slots = gpu_slots(model, system, expert_bytes)
    everything = model.all_experts
    figures = [
        Derived("gpu_space_gb", gpu_space_bytes(model, system) / 1e9, "GPU memory left for experts"),
        Derived("slots", slots, f"experts that the GPU can hold, of {everything}"),
        Derived("slots_per_layer", slots // model.moe_layers, "the same with scope = layer"),
        Derived("slots_percent", 100 * slots / everything, "share of all experts"),
    ]
    if system.ndp is not None:
        needed = -(-float(expert_bytes.sum()) // (system.ndp.capacity_gb * 1e9))
        figures.append(
            Derived("ndp_units_needed", int(needed), f"units whose memory holds all experts, of {system.units}")
        )
    elif system.link is not None:
        figures.append(
            Derived("host_gb_needed", float(expert_bytes.sum()) / 1e9, "host memory, or disk, that holds all experts")
        )
    if system.disk is not None:
        held = host_slots(model, system, expert_bytes)
        read_us = 1e6 * (float(expert_bytes.max()) / system.disk.bytes_s + system.disk.latency_s)
        figures += [
            Derived("host_slots", held, f"experts that host memory can hold above the disk, of {everything}"),
            Derived("read_us", read_us, "an expert's weights from the disk"),
        ]
    return figures + _times(model, fed_by_host(system), float(expert_bytes.max()))


def _times(model: Model, system: System, weight: float) -> list[Derived]:
    """Microseconds at one row, then the rows at which one way overtakes another (timing model, section 2)."""
    gpu, home, link, flop = system.gpu, system.home, system.link, model.flop_per_row
    starts = 1 + model.sparse_starts

    def work(device, rows, g=1):
        compute_s, read_s = flop * rows / (g * device.flop_s), weight / (g * device.bytes_s)
        return (compute_s + read_s if device.is_serial else np.maximum(compute_s, read_s)) + starts * device.start_s

    def on_gpu(rows):
        return work(system.accelerator, rows)

    bound = _first(lambda rows: flop * rows / gpu.flop_s - weight / gpu.bytes_s)
    dense = max(model.dense_bytes / gpu.bytes_s, model.dense_flop_per_row / gpu.flop_s) + gpu.launch_s
    dense += gpu.layer_overhead_s
    times = [
        Derived("dense_us", 1e6 * dense, "dense part of a layer at one row, empty KV cache"),
        Derived("head_us", 1e6 * (model.head_bytes / gpu.bytes_s + gpu.launch_s), "head, once a step"),
        Derived("gpu_us", 1e6 * float(on_gpu(1)), "a resident expert on the GPU, one row"),
    ]
    crossovers = [Derived("gpu_compute_bound_rows", bound, "from here an expert is compute-bound on the GPU")]
    if link is None:
        return times + crossovers
    fetch = weight / link.bytes_s + link.latency_s
    times.append(Derived("fetch_us", 1e6 * fetch, "its weights over the link"))
    if home is None:
        return times + crossovers

    def at_home(rows, g):
        activations = model.activation_row_bytes * rows * g / link.bytes_s + link.latency_s
        return work(home, rows, g) + 2 * activations

    bound = _first(lambda rows: flop * rows / home.flop_s - weight / home.bytes_s)
    where = "NDP units" if home.is_numbered else "the CPU"
    crossovers.append(Derived(f"{home.name}_compute_bound_rows", bound, f"from here it is compute-bound on {where}"))
    shares = {1: ("unit", "one unit"), home.count: ("all_units", f"all {home.count} units")}
    if not home.is_numbered:
        shares = {1: ("cpu", where)}
    for g, (name, words) in shares.items():
        times.append(Derived(f"{name}_us", 1e6 * float(at_home(1, g)), f"on {words}, one row, activations included"))
        resident = _first(lambda rows, g=g: at_home(rows, g) - on_gpu(rows))
        fetched = _first(lambda rows, g=g: at_home(rows, g) - on_gpu(rows) - fetch)
        crossovers.append(Derived(f"gpu_beats_{name}_rows", resident, f"from here a resident expert beats {words}"))
        crossovers.append(Derived(f"fetch_beats_{name}_rows", fetched, f"from here fetching it first beats {words}"))
    return times + crossovers


def _first(gain: Callable[[np.ndarray], np.ndarray]) -> int | None:
    """Fewest rows at which the gain in seconds is positive, beyond rounding; None if it never is."""
    positive = gain(np.arange(1, MAX_ROWS + 1, dtype=np.float64)) > 1e-15
    return int(np.argmax(positive)) + 1 if positive.any() else None
