"""The cost of one piece of work (timing model, section 2)."""

from typing import NamedTuple

import numpy as np

from moetrace.engine.machine import FIRST_HOME, GPU_DEVICE
from moetrace.jit.compile import kernel


@kernel
def dense_s(machine, rows, kv_tokens):
    """Return the seconds of attention, shared experts and router of one layer of a step, and the host's overhead."""
    return dense_s_on(machine.device[GPU_DEVICE], machine.work[0], rows, kv_tokens)


@kernel
def dense_s_on(gpu, work, rows, kv_tokens):
    """Return the same on a GPU (a record of DEVICE)."""
    weights_s = max(work.dense_bytes / gpu.bytes_s, work.dense_flop_per_row * rows / gpu.flop_s)
    return weights_s + work.kv_bytes * kv_tokens / gpu.bytes_s + gpu.start_s + work.overhead_s


@kernel
def head_s(machine):
    """Return the seconds of the LM head and the dense first layers, once a step."""
    return head_s_on(machine.device[GPU_DEVICE], machine.work[0])


@kernel
def head_s_on(gpu, work):
    """Return the same on a GPU (a record of DEVICE)."""
    return work.head_bytes / gpu.bytes_s + gpu.start_s


@kernel
def expert_s(device, rows, weight_bytes):
    """Return the seconds that ``rows`` rows of an expert keep a device busy (a record of DEVICE, or ``Rates``)."""
    return max(rows * device.s_per_row, weight_bytes * device.s_per_byte) + device.start_s


@kernel
def varied_s(device, rows, weight_bytes, start_s):
    """Return the same with a start of its own, and where arithmetic and reading may follow each other."""
    compute_s, read_s = rows * device.s_per_row, weight_bytes * device.s_per_byte
    return (compute_s + read_s if device.is_serial else max(compute_s, read_s)) + start_s


class Prices(NamedTuple):
    """Values that the experts of a layer share: numbers in registers, where a record's are read for each expert."""

    gpu: "Rates"
    home: "Rates"  # of the first group of units
    one_home: bool  # all units share every expert
    even_bytes: float  # of each expert, 0 if they differ
    fetch_s_per_byte: float
    fetch_latency_s: float


class Rates(NamedTuple):
    """The time of a device for an expert."""

    s_per_row: float
    s_per_byte: float
    start_s: float


@kernel
def prices_of(machine):
    """Return the machine's ``Prices``."""
    link = machine.link[0]
    gpu, home = rates_of(machine.device[GPU_DEVICE]), rates_of(machine.device[FIRST_HOME])
    one_home = machine.device.size == FIRST_HOME + 1
    return Prices(gpu, home, one_home, machine.even_bytes, link.s_per_byte, link.latency_s)


@kernel
def rates_of(device):
    """Return a device's ``Rates``."""
    return Rates(device.s_per_row, device.s_per_byte, device.start_s)


@kernel
def price(machine, prices, layer, expert, rows, resident, active):
    """Fill the record (``ACTIVE``) of an expert that ``rows`` rows chose in ``layer``."""
    weight_bytes = prices.even_bytes if prices.even_bytes > 0.0 else machine.weight_bytes[layer, expert]
    if prices.one_home:
        active.group = 0
        active.ndp_s = expert_s(prices.home, rows, weight_bytes)
    else:
        home = machine.home[layer, expert]
        active.group = home - FIRST_HOME
        active.ndp_s = expert_s(machine.device[home], rows, weight_bytes)
    active.expert = expert
    active.rows = rows
    active.weight_bytes = weight_bytes
    active.resident = resident
    active.gpu_s = expert_s(prices.gpu, rows, weight_bytes)
    # A product: nobody can foretell who is resident, so a branch would cost more.
    active.fetch_s = (1 - resident) * (weight_bytes * prices.fetch_s_per_byte + prices.fetch_latency_s)


@kernel
def price_varied(machine, active, size):
    """Set once more what the active experts cost, on a machine that is not plain.

    A pass of its own: within ``price`` the choices took 3 to 8 ns an expert of everybody's time.
    """
    gpu = machine.device[GPU_DEVICE]
    for i in range(size):
        expert = active[i]
        home = machine.device[FIRST_HOME + expert.group]
        start_s = gpu.each_s if expert.resident else gpu.fetched_s
        expert.gpu_s = varied_s(gpu, expert.rows, expert.weight_bytes, start_s)
        expert.ndp_s = varied_s(home, expert.rows, expert.weight_bytes, home.each_s)


@kernel
def order_on_gpu(active, size, residents):
    """Set the order in which the GPU would run the active experts: resident ones first, each part in demand order."""
    here, coming = 0, residents
    for i in range(size):
        resident = np.int64(active[i].resident)
        active[here if resident else coming].turn = i
        here += resident
        coming += 1 - resident
