"""A machine to work out by hand.

It counts in milliseconds: an expert of 1 MB is read in 1 ms by the GPU, in 2 ms by an
NDP unit and fetched in 4 ms; a row costs 0.1 ms on the GPU and 1 ms on a unit; its activations (2 kB) take 8 us each
way. dense is 1 ms; launches, commands, latencies and the head are free.
"""

from types import SimpleNamespace

import numpy as np
import pytest

from support.oracle import OracleTrace, simulate

MB = 1_000_000


def model_of(layers=1, experts=2, **changed):
    fields = {
        "moe_layers": layers,
        "experts": experts,
        "top_k": 1,
        "hidden": 1000,
        "expert_intermediate": 1000,
        "expert_matrices": 1,
        "weight_bits": 8,
        "dense_weight_bits": 8,
        "activation_bytes": 2,
        "dense_params_per_layer": MB,
        "once_params": 0,
        "kv_bytes_per_token_layer": 0,
    }
    return SimpleNamespace(**(fields | changed))


def system_of(units=1):
    gpu = SimpleNamespace(
        tflops=0.02,
        bandwidth_gb_s=1.0,
        memory_gb=1.0,
        reserve_gb=0.0,
        compute_efficiency=1.0,
        memory_efficiency=1.0,
        launch_us=0.0,
    )
    ndp = SimpleNamespace(units=units, gmac_s=1.0, bandwidth_gb_s=0.5, capacity_gb=1.0, command_us=0.0)
    link = SimpleNamespace(bandwidth_gb_s=0.25, latency_us=0.0)
    return SimpleNamespace(gpu=gpu, ndp=ndp if units else None, link=link, cpu=None)


def cpu_of(**changed):
    """A CPU that is as fast as one NDP unit."""
    fields = {"tflops": 0.002, "bandwidth_gb_s": 0.5, "command_us": 0.0}
    return SimpleNamespace(**(fields | changed))


def policy_of(placement="ep", dispatch="gpu", residency="none", prefetch="none", **changed):
    fields = {"scope": "layer", "half_life": None, "alpha": 0.3, "p": 1.0, "seed": 0, "prefetch_blocks": False}
    choices = {"placement": placement, "dispatch": dispatch, "residency": residency, "prefetch": prefetch}
    return SimpleNamespace(**(choices | fields | {"loads": None, "plan": None, "static": None} | changed))


def trace_of(*steps, phases=None, requests=None, expert_bytes=None):
    """Build a trace of steps, each a list of rows, each a list of layers, each a list of ids."""
    rows = [row for step in steps for row in step]
    k = max(len(ids) for row in rows for ids in row)
    experts = np.array([[ids + [-1] * (k - len(ids)) for ids in row] for row in rows])
    step_of = [s for s, step in enumerate(steps) for _ in step]
    phases = phases or [1] * len(steps)
    request = requests or [0] * len(rows)
    position = [request[:row].count(request[row]) for row in range(len(rows))]
    offset = np.cumsum([0] + [len(step) for step in steps])
    row_phase = np.array([phases[s] for s in step_of])
    return OracleTrace(experts, np.array(request), np.array(position), row_phase, offset, expert_bytes)


def one(*ids):
    """A row of one layer."""
    return [list(ids)]


def ms(value):
    return pytest.approx(value * 1e-3, rel=1e-12)


def unit(outcome, name):
    at = outcome.units["unit"].tolist().index(name)
    return {column: values[at] for column, values in outcome.units.items()}


def hits_of(trace, residency, slots, model=None, **policy):
    model = model or model_of(experts=5)
    return simulate(trace, model, system_of(), policy_of(residency=residency, **policy), slots).steps["hits"].tolist()


def replay(trace, slots, dispatch, residency, prefetch, model=None, units=1, **policy):
    """Replay on units that share each expert, with activations that cost nothing: times are whole milliseconds."""
    model = model or model_of(experts=5, activation_bytes=0)
    return simulate(trace, model, system_of(units), policy_of("tp", dispatch, residency, prefetch, **policy), slots)
