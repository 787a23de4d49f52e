"""What one piece of work costs (timing model, section 2)."""

from typing import NamedTuple

import numpy as np

from moetrace.engine.machine import FIRST_HOME, GPU_DEVICE
from moetrace.jit.compile import kernel


@kernel
def dense_s(machine, rows, kv_tokens):
    """Return the seconds of attention, shared experts and router of one layer of a step, and the host's overhead."""
    gpu, work = machine.device[GPU_DEVICE], machine.work[0]
    weights_s = max(work.dense_bytes / gpu.bytes_s, work.dense_flop_per_row * rows / gpu.flop_s)
    return weights_s + work.kv_bytes * kv_tokens / gpu.bytes_s + gpu.start_s + work.overhead_s


@kernel
def head_s(machine):
    """Return the seconds of the LM head and the dense first layers, once a step."""
    return machine.work[0].head_bytes / machine.device[GPU_DEVICE].bytes_s + machine.device[GPU_DEVICE].start_s


@kernel
def roofline_s(device, rows, weight_bytes):
    """Return the seconds of arithmetic and reading for ``rows`` rows of an expert (a record of DEVICE, or ``Rates``).

    Their maximum, or their sum: a product with 0 or 1 costs less than a branch, and both are exact.
    """
    compute_s, read_s = rows * device.s_per_row, weight_bytes * device.s_per_byte
    return max(compute_s, read_s) + device.serial * min(compute_s, read_s)


@kernel
def expert_s(device, rows, weight_bytes):
    """Return the seconds that an expert which need not be fetched keeps a device busy; see ``roofline_s``."""
    return roofline_s(device, rows, weight_bytes) + device.each_s


class Prices(NamedTuple):
    """What the experts of a layer have in common: numbers in registers, where a record's are read for each expert."""

    gpu: "Rates"
    fetch_s_per_byte: float
    fetch_latency_s: float


class Rates(NamedTuple):
    """What a device takes for an expert."""

    s_per_row: float
    s_per_byte: float
    serial: float
    start_s: float
    each_s: float


@kernel
def prices_of(machine):
    """Return the machine's ``Prices``."""
    gpu, link = machine.device[GPU_DEVICE], machine.link[0]
    rates = Rates(gpu.s_per_row, gpu.s_per_byte, gpu.serial, gpu.start_s, gpu.each_s)
    return Prices(rates, link.s_per_byte, link.latency_s)


@kernel
def price(machine, prices, layer, expert, rows, resident, active):
    """Fill the record (``ACTIVE``) of an expert that ``rows`` rows chose in ``layer``."""
    weight_bytes, home = machine.weight_bytes[layer, expert], machine.home[layer, expert]
    active.expert = expert
    active.group = home - FIRST_HOME
    active.rows = rows
    active.weight_bytes = weight_bytes
    active.resident = resident
    active.gpu_s = roofline_s(prices.gpu, rows, weight_bytes) + (prices.gpu.each_s if resident else prices.gpu.start_s)
    active.ndp_s = expert_s(machine.device[home], rows, weight_bytes)
    active.fetch_s = 0.0 if resident else weight_bytes * prices.fetch_s_per_byte + prices.fetch_latency_s


@kernel
def order_on_gpu(active, size):
    """Set the order in which the GPU would run the active experts: resident ones first, each part in demand order."""
    residents = 0
    for i in range(size):
        residents += active[i].resident
    here, coming = 0, residents
    for i in range(size):
        resident = np.int64(active[i].resident)
        active[here if resident else coming].turn = i
        here += resident
        coming += 1 - resident
