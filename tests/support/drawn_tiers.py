"""Random machines and policies with any mix of the mechanisms that `tiers_oracle` has.

As in `drawn_machines`, a machine is a plain dict, as its TOML file would be; but `link.rates` is a list of (second,
GB/s), and a policy's `layout` a dict, where the files of a TOML would be written from them.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from support.drawn_machines import MachineCase, fields, machine_cases
from support.oracle import OracleTrace

OWN = "own"  # a function of the user's: `own_dispatch`
CHUNKS = (1, 2, 8, "auto")
KEPT = (
    {"residency": "none"},
    {"residency": "lru"},
    {"residency": "lfu"},
    {"residency": "ewma"},
    {"residency": "sieve"},
    {"residency": "prefill", "prefetch": "prefill", "prefetch_blocks": True},
    {"residency": "foresee", "prefetch": "foresee"},
    {"residency": "lfuda", "prefetch": "oracle:1"},
    {"residency": "fifo", "prefetch": "oracle:4"},
    {"residency": "lfu", "prefetch": "online:2"},
    {"residency": "ewma", "prefetch": "online:1"},
    {"residency": "ewma", "prefetch": "online:2", "prefetch_blocks": True},
    {"residency": "lru", "prefetch": "oracle:2", "p": 0.7},
)
# Residencies of host memory, and the policy's numbers that each reads.
HOST_RESIDENCIES: dict[str, dict[str, tuple]] = {
    "lru": {},
    "fifo": {},
    "sieve": {},
    "lfu": {"half_life": (2, 3)},
    "lfu-in-cache": {},
    "lfu-window": {},
    "lfuda": {"most_count": (2.5,), "evicted_share": (0.25,)},
    "ewma": {"alpha": (0.3, 0.8)},
    "least-stale": {},
}


@st.composite
def tier_cases(draw, max_steps: int = 6, max_experts: int = 7, units: tuple[int, ...] = ()) -> MachineCase:
    """Draw a case of `machine_cases`, and switch mechanisms on; with NDP units if it says how many."""
    cases = machine_cases(max_steps=max_steps, max_experts=max_experts)
    case = draw(cases.filter(lambda case: not units or case.system.get("ndp", {}).get("units") in units))
    if draw(st.booleans(), label="requests in turn"):
        case.trace = in_turn(case.trace, draw(st.integers(1, 3), label="steps of each"))
    if draw(st.booleans(), label="gates"):
        case.trace = replace(case.trace, gates=draw(gates_of(case.trace)))
    system = case.system
    rate = system["link"]["bandwidth_gb_s"]
    system["gpu"] |= draw(fields(evict_us=(0.0, 130.0)))
    loss = {"loss": (0.0, 0.0, 0.02, 0.4), "mtu_bytes": (1460, 256, 10_000), "rto_ms": (0.0, 0.3)}
    loss |= {"loss_mode": ("reliable", "relaxed"), "seed": (0, 2**40 + 3)}
    system["link"] |= draw(fields(stream=(1, 0, 2, 5), **loss))
    if "loss" not in system["link"]:
        for name in loss:
            system["link"].pop(name, None)
    if draw(st.booleans(), label="rates"):
        times = draw(st.lists(st.floats(0, 0.03), min_size=1, max_size=5, unique=True))
        system["link"]["rates"] = [(at, rate * draw(st.sampled_from([0.3, 1.0, 2.5]))) for at in sorted(times)]
    if "cpu" in system:
        system["cpu"] |= draw(fields(chunks=CHUNKS))
    if "ndp" in system:
        units = {"chunks": CHUNKS, "contention": (False, True), "activations": ("per-unit", "host")}
        system["ndp"] |= draw(fields(**units, outside_gb_s=(1e6, rate * 0.6, rate * 1.7)))
        system["ndp"]["move_gb_s"] = rate * draw(st.sampled_from([0.5, 3.0]))
        system["host"] = draw(fields(channels_gb_s=(1e6, rate * 0.8, rate * 3)))
        if not ("outside_gb_s" in system["ndp"] or system["host"]):
            system["ndp"].pop("contention", None)
    elif draw(st.booleans(), label="disk"):
        system["disk"] = {"bandwidth_gb_s": rate * draw(st.sampled_from([0.2, 1.0, 4.0])), "latency_us": 50.0}
        system["disk"] |= draw(fields(efficiency=(1.0, 0.5)))
        most = case.model.moe_layers * case.model.most_experts
        system["host"] = {"slots": draw(st.integers(0, most))}
    if draw(st.booleans(), label="remote"):
        system["remote"] = {"tflops_per_vcpu": 0.01, "bandwidth_gb_s_per_vcpu": rate, "vcpus": 2, "network_gb_s": rate}
        often = {"call_ms": (0.0, 0.5), "start_ms": (0.0, 9.0), "payload_mb": (6.0, 1e-3)}
        system["remote"] |= {name: draw(st.sampled_from(values), label=name) for name, values in often.items()}
        system["remote"] |= {"load_gb_s": 1.0, "usd_per_gb_s": 1.0}
    return case


def in_turn(trace: OracleTrace, steps: int) -> OracleTrace:
    """Return the trace with one request after another, of so many steps each: caches may start cold with each."""
    request = np.repeat(np.arange(trace.steps) // steps, np.diff(trace.offset))
    return replace(trace, request=request, position=np.arange(len(request)) - np.searchsorted(request, request))


@st.composite
def gates_of(draw, trace: OracleTrace) -> np.ndarray:
    """Draw the gates of a trace, some of which nobody knows."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32), label="gates' seed"))
    gates = rng.random(trace.experts.shape).astype(np.float16)
    gates[rng.random(gates.shape) < draw(st.sampled_from([0.0, 0.2]))] = np.nan
    return gates


@st.composite
def tier_policies(
    draw,
    case: MachineCase,
    kinds: tuple[str, ...] = (),
    placements: tuple[str, ...] = ("ep", "ep-block", "tp", "striped", "mixed"),
    relayout: bool | None = None,
) -> dict[str, Any]:
    """Draw a policy that runs on the machine, of some dispatches and placements."""
    system = case.system
    known = ["gpu"]
    if "ndp" in system or "cpu" in system:
        known += ["home", "in-place", "hot", "hot:ratio", "balance", "optimal", "fiddler", "cheapest", "bottleneck"]
        known += ["halo", OWN]
    chosen: dict[str, Any] = {"placement": "ep", "dispatch": draw(st.sampled_from(kinds or known), label="dispatch")}
    kept = dict(draw(st.sampled_from(KEPT), label="kept"))
    if "ndp" in system:
        chosen["placement"] = draw(st.sampled_from(placements))
        if "cpu" in system and chosen["dispatch"] in ("cheapest", "bottleneck", OWN):
            chosen |= draw(fields(with_cpu=(None, True, False)))
            chosen = {name: value for name, value in chosen.items() if value is not None}
    if "disk" in system:
        chosen["host_residency"] = draw(st.sampled_from([*HOST_RESIDENCIES]), label="host residency")
        chosen |= draw(fields(**{name: (None, *of) for name, of in HOST_RESIDENCIES[chosen["host_residency"]].items()}))
        chosen = {name: value for name, value in chosen.items() if value is not None}
    if chosen["placement"] == "mixed":
        units = system["ndp"]["units"]
        where = st.sampled_from(["striped", *range(units)])
        keys = st.tuples(st.integers(0, case.model.moe_layers - 1), st.integers(0, case.model.most_experts - 1))
        chosen["layout"] = draw(st.dictionaries(keys, where, max_size=6), label="layout")
        if draw(st.booleans(), label="relayout") if relayout is None else relayout:
            kept = {"residency": "ewma", "prefetch": "relayout", "alpha": draw(st.sampled_from([0.3, 0.9]))}
    if chosen["dispatch"] in ("hot", "hot:ratio"):
        kept = {}
    if "remote" in system:
        chosen |= {
            "remote": draw(st.sampled_from([0.0, 0.3, 0.6])),
            "replicas": draw(st.integers(1, 3)),
            "plan_steps": 3,
        }
    scopes = ["global"] if kept.get("residency") == "foresee" else ["layer", "global", "request"]
    return chosen | kept | {"scope": draw(st.sampled_from(scopes))}


def own_dispatch(policy: dict[str, Any]) -> Callable | None:
    """Return the function of a policy with dispatch `OWN`, as the oracle calls it."""
    devices = 3 if policy.get("with_cpu") else 2

    def plan(layer: int, order: list[int], n: dict[int, int], resident: set[int]) -> dict[int, int]:
        return {e: (7 * e + layer + n[e]) % devices for e in order}

    return plan if policy["dispatch"] == OWN else None
