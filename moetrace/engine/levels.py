"""Frequency levels of the GPU under a deadline (timing model, section 10).

The replay runs at the top level. Beside it each layer is timed again at each other level, all else equal; at its end a
step takes the lowest level at which it is in time, and its figures become those of that level.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from moetrace.engine.cost import dense_s_on, head_s_on, varied_s
from moetrace.engine.layer import less, timeline
from moetrace.engine.machine import DEVICE, GPU_DEVICE, Machine
from moetrace.engine.state import GPU, records
from moetrace.engine.tiers.tier_host import spare_disk
from moetrace.engine.tiers.tier_line import tiers_line_again
from moetrace.jit.compile import kernel
from moetrace.spec.policy import PolicySpec
from moetrace.spec.system import System

# For each step: its level, 0 = the top, and its time at the top.
STEP_LEVEL = np.dtype([("level", np.int64), ("top_s", np.float64)])
# For each level: the steps that ran at it, and the GPU's busy seconds in them.
LEVEL_SUM = np.dtype([("steps", np.int64), ("busy_s", np.float64)])


class Levels(NamedTuple):
    """The levels that steps choose from, and the state of the current step."""

    deadline_s: float
    gpu: Any  # DEVICE [levels]: the GPU at each, the top first
    sums: Any  # LEVEL_SUM [levels]
    top_s: np.ndarray  # float64 [1]: what all steps take at the top, without waits
    steps: Any  # STEP_LEVEL [steps of the block]
    kept_s: np.ndarray  # float64 [E]: scratch: the prices at the top
    moe_s: np.ndarray  # float64 [levels, L]: of each layer of the step
    gpu_s: np.ndarray  # float64 [levels]: the GPU's seconds for experts, over the step
    frequency: np.ndarray  # float64 [levels]
    power: np.ndarray  # float64 [levels]: beyond idle, over that of the top


def levels_of(system: System, policy: PolicySpec, machine: Machine) -> Levels | None:
    """Return the levels that a policy's steps choose from; None if there is no choice."""
    given = system.gpu.levels
    if policy.deadline_ms is None or given is None or len(given) == 1:
        return None
    (layers, experts), count = machine.weight_bytes.shape, len(given)
    frequency = np.array([level.frequency for level in given])
    gpu = records(count, DEVICE)
    for name in DEVICE.names or ():
        gpu[name] = machine.device[name][GPU_DEVICE]
    gpu["s_per_row"] /= frequency
    gpu["flop_s"] *= frequency
    if system.gpu.memory_scales:
        gpu["s_per_byte"] /= frequency
        gpu["bytes_s"] *= frequency
    return Levels(
        deadline_s=policy.deadline_ms / 1e3,
        gpu=gpu,
        sums=records(count, LEVEL_SUM),
        top_s=np.zeros(1),
        steps=records(0, STEP_LEVEL),
        kept_s=np.zeros(experts),
        moe_s=np.zeros((count, layers)),
        gpu_s=np.zeros(count),
        frequency=frequency,
        power=np.array([level.power for level in given]),
    )


def power_s(levels: Levels | None, busy_s: float) -> float:
    """Return the seconds at the top level that draw what the GPU drew beyond idle: ``busy_s`` where all are such."""
    if levels is None or not levels.sums["steps"][1:].any():
        return busy_s
    return math.fsum(levels.power * levels.sums["busy_s"])


def mean_frequency(levels: Levels) -> float | None:
    """Return the mean relative frequency of all steps; None without steps."""
    steps = levels.sums["steps"]
    return float(np.dot(levels.frequency, steps) / steps.sum()) if steps.any() else None


@kernel
def time_levels(levels, layer, plan, shared, line, view, tiers, machine):
    """Time a layer, whose time line at the top level is ``line``, at the other levels, where there are some."""
    if levels is not None:
        _time_levels(levels, layer, plan, shared, line, view, tiers, machine)


@kernel(inline=False)
def _time_levels(levels, layer, plan, shared, line, view, tiers, machine):
    """Time the layer with other prices on the GPU; then those of the top are as they were."""
    active, size = view.active, plan.size
    levels.moe_s[0, layer] = line.moe_s
    levels.gpu_s[0] += line.gpu_s
    for i in range(size):
        levels.kept_s[i] = active[i].gpu_s
    for n in range(1, levels.gpu.size):
        gpu = levels.gpu[n]
        for i in range(size):
            expert = active[i]
            start_s = gpu.each_s if expert.resident else gpu.fetched_s
            expert.gpu_s = varied_s(gpu, expert.rows, expert.weight_bytes, start_s)
        slower = _line_of(tiers, machine, view, size, plan, shared)
        levels.moe_s[n, layer] = slower.moe_s
        levels.gpu_s[n] += slower.gpu_s
    for i in range(size):
        active[i].gpu_s = levels.kept_s[i]
    if tiers is not None:
        spare_disk(tiers.host, line.moe_s)


@kernel
def _line_of(tiers, machine, view, size, plan, shared):
    """Return the time line of a layer once more; the units' work is as before."""
    if tiers is None:
        return timeline(machine, view, size, plan, shared)
    return tiers_line_again(tiers, machine, view, size, plan)


@kernel
def choose_level(levels, s, dense, cold_s, work):
    """Give the step that has ended, number ``s`` of its block, its level, where there are some."""
    if levels is not None:
        _choose_level(levels, s, dense, cold_s, work)


@kernel(inline=False)
def _choose_level(levels, s, dense, cold_s, work):
    """Take the lowest level in time, the top if none is; ``dense``: of a layer at the top, ``cold_s``: of a start."""
    row, steps, layers = work.log.step[s], work.batch.steps, levels.moe_s.shape[1]
    levels.steps[s].top_s = row.duration_s
    levels.top_s[0] += row.duration_s - row.wait_s
    top_busy_s = _busy_s(levels, 0, dense, work)
    chosen, busy_s = 0, top_busy_s
    n = levels.gpu.size - 1
    while n > 0 and chosen == 0:
        gpu, asked, moe_s = levels.gpu[n], work.machine.work[0], 0.0
        dense_n, head = dense_s_on(gpu, asked, steps.rows[s], steps.kv_tokens[s]), head_s_on(gpu, asked)
        for layer in range(layers):
            moe_s += levels.moe_s[n, layer]
        dense_sum = row.dense_s + (dense_n - dense) * layers
        duration_s = dense_sum + moe_s + head + row.wait_s + cold_s
        if not less(levels.deadline_s, duration_s):
            chosen, busy_s = n, _busy_s(levels, n, dense_n, work)
            row.dense_s, row.moe_s, row.head_s, row.duration_s = dense_sum, moe_s, head, duration_s
            for layer in range(layers):
                work.log.layer[layer].dense_s += dense_n - dense
                work.log.layer[layer].moe_s += levels.moe_s[n, layer] - levels.moe_s[0, layer]
            work.log.unit[GPU].busy_s += busy_s - top_busy_s
        n -= 1
    levels.steps[s].level = chosen
    levels.sums[chosen].steps += 1
    levels.sums[chosen].busy_s += busy_s
    for n in range(levels.gpu.size):
        levels.gpu_s[n] = 0.0


@kernel
def _busy_s(levels, n, dense, work):
    """Return the GPU's busy seconds in a step at a level; in the host's overhead it is idle."""
    layers, asked = levels.moe_s.shape[1], work.machine.work[0]
    return (dense - asked.overhead_s) * layers + levels.gpu_s[n] + head_s_on(levels.gpu[n], asked)
