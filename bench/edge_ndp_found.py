"""What the experiment of arXiv 2601.03992 measures: models, machines and policies (edge_ndp.py runs it)."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import polars as pl
from msgspec.structs import replace

import moetrace as mt
from moetrace.spec.fits import gpu_slots
from moetrace.spec.system import Cpu, Host, System

MODELS = ("deepseek-moe-16b", "qwen3-30b-a3b", "phi-3.5-moe", "mixtral-8x7b")
ALL_FIT = "olmoe-1b-7b"  # not in the paper: the GPU can hold all its experts, so the sweep of slots goes to the end
UNITS = range(2, 7)
PROMPT = OUTPUT = 512
REQUESTS = 8
SLOT_STEPS = 16

# RTX 5080: the paper says 2.30 GHz and 336 tensor cores. One does 128 FLOP a cycle (fp16, sums in fp32): NVIDIA's white
# paper on RTX Blackwell gives 112.6 TFLOP/s for the same cores at 2.617 GHz.
TENSOR_CORES, CLOCK_GHZ, FLOP_A_CYCLE = 336, 2.30, 128
MACHINE = {
    "gpu.tflops": TENSOR_CORES * CLOCK_GHZ * FLOP_A_CYCLE / 1e3,
    # Assumed. With the preset's 2.0 GB, Mixtral would have room for 31 experts in its 32 layers, and the paper
    # prefetches at least one in each.
    "gpu.reserve_gb": 1.5,
}
MORE_MACS = 8  # times the DIMMs' assumed arithmetic, to see which figures depend on it

# i7-14700: two channels of DDR5-5600 and up to 192 GB, as the paper says. 8 cores x 5.3 GHz x 32 FLOP a cycle and
# 12 cores x 4.2 GHz x 16 (fp32, Intel's turbo clocks). Start and launch as in the other presets with a CPU.
I7_14700 = Cpu(tflops=2.16, bandwidth_gb_s=89.6, command_us=5.0, launch="layer")
SLOW_CPU = 0.33  # of its memory's bandwidth: the best fit to published speeds of llama.cpp (docs/real.md)

# The steps of the paper's ablation. No preset prefetches without balance, so this one stands here: residents
# run on the GPU, all other experts on the DIMMs, and nothing is fetched on demand.
PREFETCH = mt.PolicySpec(
    name="edge-ndp-tp-prefetch",
    placement="tp",
    dispatch="in-place",
    residency="prefill",
    prefetch="prefill",
    scope="layer",
)
LAYER = mt.load_policy("edge-ndp", {"name": "edge-ndp-layer", "scope": "layer"})
POLICIES = ("monde", "ndp-ep", "edge-ndp-tp", "edge-ndp-tp-lb", PREFETCH, LAYER, "edge-ndp")


class Point(NamedTuple):
    """A policy's figures for one model and number of DIMMs."""

    model: str
    units: int
    policy: str
    total_s: float
    prefill_s: float
    decode_s: float
    prefill_moe_s: float  # of which in experts
    decode_moe_s: float
    tpot_s: float
    hit_rate: float


class Sweep(NamedTuple):
    """One request through `edge-ndp` with more and more experts a layer; `blocks`: decoding waits for the prefetch."""

    model: str
    blocks: bool
    a_layer: list[int]
    total_s: list[float]

    @property
    def best(self) -> int:
        return min(range(len(self.a_layer)), key=self.total_s.__getitem__)

    @property
    def loss(self) -> float:
        """How much longer the most experts take than the best number of them."""
        return self.total_s[-1] / self.total_s[self.best]


class Found(NamedTuple):
    """All that was measured."""

    points: list[Point]
    on_demand_s: dict[str, float]  # by model; like the next two it needs no DIMMs
    fiddler_s: dict[str, float]
    slow_fiddler_s: dict[str, float]
    more_macs: list[Point]  # of Qwen3, with MORE_MACS
    sweeps: list[Sweep]
    slots_a_layer: dict[str, int]
    overlap: dict[str, float]

    def seconds(self, model: str, units: int, policy: str, field: str) -> float | None:
        """A field of a point; None where the model does not fit."""
        found = (p for p in self.points if p[:3] == (model, units, policy))
        return next((getattr(p, field) for p in found), None)

    def over(self, base: str, policy: str, model: str, units: int, field: str = "total_s") -> float | None:
        """How many times as fast as `base` the policy is; None where the model does not fit."""
        mine, other = (self.seconds(model, units, name, field) for name in (policy, base))
        return other / mine if mine and other else None


def profile_of(model: str) -> mt.Profile:
    """The profile that the model's trace is drawn from: fitted to it, or lent by its nearest relative."""
    if model == "deepseek-moe-16b":  # the same experts a layer; its last layer as the one before it
        lent = mt.load_profile("deepseek-v2-lite")
        return replace(lent, name=model, model=model, layers=lent.layers + 1, skew=[*lent.skew, lent.skew[-1]])
    if model == "phi-3.5-moe":  # the same layers and top-k, twice the experts
        return replace(mt.load_profile("mixtral-8x7b"), name=model, model=model, experts=16)
    return mt.load_profile(model)


def trace_of(model: str, requests: int) -> mt.Trace:
    routing = {"zipf": 0.6, "stick": 0.3} if model == ALL_FIT else {"profile": profile_of(model)}
    return mt.generate_trace(model, requests=requests, prompt=PROMPT, output=OUTPUT, seed=0, **routing)


def overlap(trace: mt.Trace) -> float:
    """Share of a decode token's experts that the token before it chose in that layer as well."""
    experts = trace.read("experts", PROMPT, PROMPT + OUTPUT)
    same = experts[1:, :, :, None] == experts[:-1, :, None, :]
    return float(np.mean(same.any(axis=3)))


def machine(**others: float) -> System:
    return mt.load_system("edge-ndp", MACHINE | {name.replace("__", "."): value for name, value in others.items()})


def desktop(memory_efficiency: float = 1.0) -> System:
    """The same GPU and link, and the CPU instead of DIMMs: Fiddler's machine."""
    cpu = replace(I7_14700, memory_efficiency=memory_efficiency)
    return replace(machine(), name="desktop", ndp=None, cpu=cpu, host=Host(memory_gb=192.0))


def measure(model: str, trace: mt.Trace, policies: tuple = POLICIES, macs: float = 1.0) -> Iterator[Point]:
    """All policies on 2 to 6 DIMMs; nothing where the experts do not fit them."""
    gmac_s = machine().ndp.gmac_s * macs
    for units in UNITS:
        try:
            result = mt.replay(trace, system=machine(ndp__units=units, ndp__gmac_s=gmac_s), policies=policies)
        except mt.UsageError:
            continue
        moe_s = dict(result.steps.group_by(pl.concat_str("policy", "phase")).agg(pl.sum("moe_s")).iter_rows())
        for row in result.summary.to_dicts():
            parts = [moe_s[row["name"] + phase] for phase in ("prefill", "decode")]
            times = [row[name] for name in ("total_s", "prefill_s", "decode_s")]
            yield Point(model, units, row["name"], *times, *parts, row["tpot_s_p50"], row["hit_rate"])


def sweep(model: str, trace: mt.Trace, blocks: bool) -> Sweep:
    layers = mt.load_model(model).moe_layers
    most = slots_a_layer(model)
    a_layer = sorted({most * i // SLOT_STEPS for i in range(SLOT_STEPS + 1)})
    policy = mt.load_policy(LAYER, {"prefetch_blocks": blocks})
    results = [mt.replay(trace, system=machine(), policies=policy, slots=count * layers) for count in a_layer]
    return Sweep(model, blocks, a_layer, [result.summary["total_s"][0] for result in results])


def slots_a_layer(model: str) -> int:
    spec = mt.load_model(model)
    return gpu_slots(spec, machine(), spec.expert_bytes()) // spec.moe_layers


def find() -> Found:
    found = Found([], {}, {}, {}, [], [], {}, {})
    for model in MODELS:
        trace = trace_of(model, REQUESTS)
        found.points.extend(measure(model, trace))
        for times, policy, system in (
            (found.on_demand_s, "on-demand", machine()),
            (found.fiddler_s, "fiddler", desktop()),
            (found.slow_fiddler_s, "fiddler", desktop(SLOW_CPU)),
        ):
            times[model] = mt.replay(trace, system=system, policies=policy).summary["total_s"][0]
        if model == "qwen3-30b-a3b":
            found.more_macs.extend(measure(model, trace, ("monde", "edge-ndp-tp"), MORE_MACS))
        found.slots_a_layer[model], found.overlap[model] = slots_a_layer(model), overlap(trace)
        first = trace.head(trace.steps // REQUESTS)
        found.sweeps.extend(sweep(model, first, blocks) for blocks in (False, True))
    found.sweeps.extend(sweep(ALL_FIT, trace_of(ALL_FIT, 1), blocks) for blocks in (False, True))
    return found
