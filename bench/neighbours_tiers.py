"""Figures of systems that share experts between devices: the seed, MoNDE, HybriMoE, TriMoE (see neighbours.py)."""

import math
from functools import cache
from typing import NamedTuple

import edge_ndp_found as seed
import numpy as np
import polars as pl
from neighbours_figure import EXACT, PLAUSIBLE, SHAPE, SHOWN, Figure, close, numbers, span, summary

import moetrace as mt
from moetrace.spec.model import Model


class Decode(NamedTuple):
    """Speed-up over MoNDE by policy and number of DIMMs: decode, mean of four models; whole, of models that fit two."""

    decode: dict[str, dict[int, float]]
    whole_of_two: dict[str, float]


PAPER_DECODE = {
    "edge-ndp-tp": ("TP", 1.99),
    "edge-ndp-tp-lb": ("TP + balance", 2.19),
    "edge-ndp-tp-prefetch": ("TP + prefetch", 2.23),
    "edge-ndp-layer": ("all three", 2.41),
}


@cache
def decode_over_monde(requests: int) -> Decode:
    """The four models of the seed on 2 to 6 DIMMs, as in bench/edge_ndp.py."""
    points = [
        p for model in seed.MODELS for p in seed.measure(model, seed.trace_of(model, requests), seed.POLICIES[:-1])
    ]
    found = seed.Found(points, {}, {}, {}, [], [], {}, {})
    full = seed.UNITS[1:]
    decode = {
        policy: {
            units: float(np.mean([found.over("monde", policy, model, units, "decode_s") for model in seed.MODELS]))
            for units in full
        }
        for policy in PAPER_DECODE
    }
    small = ("deepseek-moe-16b", "qwen3-30b-a3b")
    return Decode(decode, {model: found.over("monde", "edge-ndp-tp", model, 2) or math.nan for model in small})


def edge_ndp(requests: int = seed.REQUESTS) -> list[Figure]:
    found = decode_over_monde(requests)
    why = {
        "TP": "The number of DIMMs of the paper's figure is unknown, and so is their arithmetic",
        "TP + balance": "An expert crosses the link whole or not at all here: with many DIMMs it comes too late",
        "TP + prefetch": "Generated traces, except Qwen3's, have the same popular experts in prompt and output",
        "all three": "As above",
    }
    figures = []
    for policy, (name, paper) in PAPER_DECODE.items():
        here = list(found.decode[policy].values())
        holds = min(here) <= paper <= max(here)
        judged = f"{PLAUSIBLE}: within 3 to 6 DIMMs"
        what = f"decode over MoNDE, mean of 4 models: {name}"
        figures.append(Figure(what, f"{paper:.2f}x", span(here), judged, holds, why[name]))
    two = list(found.whole_of_two.values())
    what = "TP over MoNDE with 2 DIMMs, end to end: DeepSeekMoE, Qwen3"
    judged = f"{SHAPE}: below 1"
    why_not = "In decode only it is just above 1 here ([experiment](experiment.md))"
    figures.append(Figure(what, "slightly below 1x", numbers(two, unit="x"), judged, max(two) < 1, why_not))
    return figures


# MoNDE

MONDE = {"link.bandwidth_gb_s": 32.0, "ndp.gmac_s": 1024.0}
ACTIVE, HOT = (1, 8, 17, 18, 34, 35, 100, 128), (1, 1, 1, 2, 2, 3, 6, 8)


def hot_of(active: int) -> int:
    """How many experts of a layer with so many active ones `monde-ratio` runs on the GPU."""
    trace = mt.Trace.from_arrays(np.arange(active, dtype=np.uint8).reshape(-1, 1, 1), num_experts=128, steps=[active])
    model = mt.load_model("qwen3-30b-a3b", {"moe_layers": 1, "top_k": 1})
    result = mt.replay(trace, model=model, system=mt.load_system("monde-cxl", MONDE), policies="monde-ratio")
    return result.layers["gpu_experts"][0]


# Dimensions of the config.json of each, with attention and the dense layers between counted to its MoE layers.
SWITCH = {"moe_layers": 24, "experts": 128, "top_k": 1, "hidden": 1024, "expert_intermediate": 4096}
NLLB = {"moe_layers": 12, "experts": 128, "top_k": 2, "hidden": 2048, "expert_intermediate": 8192}
OF_TWO_MATRICES = {"expert_matrices": 2, "weight_bits": 16, "dense_weight_bits": 16, "activation_bytes": 2}


def nllb(**changed: int) -> Model:
    """Four layers make one with experts: 4 x 4 x h^2 of attention, three dense MLPs of two matrices."""
    attention, mlps = 4 * 4 * 2048**2, 3 * 2 * 2048 * 8192
    dense = {"dense_params_per_layer": attention + mlps, "once_params": 256206 * 2048}
    kv = {"kv_bytes_per_token_layer": 4 * 2 * 2048 * 2}
    return mt.load_model("mixtral-8x7b", NLLB | OF_TWO_MATRICES | dense | kv | changed)


def experts_gb(model: Model) -> float:
    return float(model.expert_bytes().sum()) / 1e9


PYTHON_MS = 2.3  # a layer: what fits MoE-Infinity best (docs/real.md)


def monde_over_fetching(batch: int, python_ms: float = 0.0) -> tuple[float, float]:
    """NLLB: encoder over sentences of 512 tokens, and decoder; a runtime that takes so long for each of 24 layers."""
    model = nllb(moe_layers=6)
    system = mt.load_system("monde-cxl", MONDE | {"gpu.layer_overhead_us": 4e3 * python_ms})
    times = []
    for prompt, output, field in ((512, 0, "prefill_s"), (1, 32, "decode_s")):
        trace = mt.generate_trace(model, requests=batch, prompt=prompt, output=output, batch=batch)
        found = summary(trace, ["on-demand", "monde"], system, model=model, slots=0)
        times.append(found["on-demand"][field] / found["monde"][field])
    return times[0], times[1]


def monde() -> list[Figure]:
    hot = [hot_of(active) for active in ACTIVE]
    what = f"H, experts on the GPU of {numbers(ACTIVE, '{}')} active ones"
    figures = [Figure(what, numbers(HOT, "{}"), numbers(hot, "{}"), EXACT, tuple(hot) == HOT)]
    sizes = [experts_gb(mt.load_model("mixtral-8x7b", SWITCH | OF_TWO_MATRICES)), experts_gb(nllb())]
    figures.append(close("experts of Switch-Large-128 / NLLB-MoE", (51.5, 103.1), sizes, 0.001, "{:.1f}", unit=" GB"))
    pairs = [monde_over_fetching(batch) for batch in (1, 4, 16)]
    why = "Batch and sentences of the averages are unknown, routing is generated, and times are those of data sheets: "
    why += "the next two figures add the time of a runtime in each layer, which no policy shortens"
    for name, paper, here in zip(("encoder", "decoder"), ("6.7x", "1.9x"), zip(*pairs, strict=True), strict=True):
        what = f"NLLB-MoE, {name}, over fetching, batch 1 to 16"
        figures.append(Figure(what, f"{paper} (average)", span(here), f"{SHAPE}: above 1", min(here) > 1, why))
    slow = [monde_over_fetching(batch, PYTHON_MS) for batch in (1, 4, 16)]
    for name, paper, here in zip(("encoder", "decoder"), ("6.7x", "1.9x"), zip(*slow, strict=True), strict=True):
        what = f"the same, {name}, with a runtime of {PYTHON_MS} ms a layer"
        why = f"{PYTHON_MS} ms fit another engine ([real machines](real.md)), not MoNDE's"
        figures.append(Figure(what, f"{paper} (average)", span(here), SHOWN, None, why))
    return figures


# Replays as users run them: a cache on the GPU, and a CPU

CACHES = ("lru", "lfu-window", "lfuda", "ewma", "belady")


@cache
def hits(profile: str) -> dict[str, float]:
    """Percent of hits at decode with room for a quarter of all experts, by cache policy."""
    trace = mt.generate_trace(profile=profile, requests=4, prompt=64, output=128)
    frame = mt.cache_hits(trace, [trace.layers * trace.num_experts // 4], CACHES, scope="global")
    decode = frame.filter(pl.col("phase") == "decode")
    return {row["policy"]: 100 * row["hit_rate"] for row in decode.to_dicts()}


@cache
def hybrid_gain() -> tuple[float, float]:
    """Sharing each layer between GPU and CPU, over running what the GPU holds there and the rest on the CPU."""
    popular = {"residency": "static-popular"}
    fixed = mt.load_policy("hybrid", {"name": "fixed", "dispatch": "in-place"} | popular)
    shared = mt.load_policy("hybrid", {"name": "shared"} | popular)
    model = mt.load_model("qwen2-57b-a14b")
    trace = mt.generate_trace(model, requests=4, prompt=64, output=64)
    found = summary(trace, [fixed, shared], "a6000-xeon", slots=model.moe_layers * model.experts // 4)
    prefill, decode = (found["fixed"][field] / found["shared"][field] for field in ("prefill_s", "decode_s"))
    return prefill, decode


def hybrimoe() -> list[Figure]:
    mixtral, deepseek = hits("mixtral-8x7b"), hits("deepseek-v2-lite")
    lru = [one["lru"] for one in (mixtral, deepseek)]
    why = "The profiles are fitted to other prompts. There is no profile of Qwen2 (45.0 % in the paper)"
    models = "Mixtral / DeepSeek, one cache for a quarter of all experts"
    here = numbers(lru, "{:.1f}", " %")
    figures = [Figure(f"hits of LRU, {models}", "30.2 / 47.7 %", here, SHOWN, None, why)]
    best = [max(value for name, value in one.items() if name != "belady") for one in (mixtral, deepseek)]
    clairvoyant = [one["belady"] for one in (mixtral, deepseek)]
    holds = all(low <= theirs <= high for low, theirs, high in zip(lru, (36.2, 52.7), clairvoyant, strict=True))
    here = f"LRU {numbers(lru, '{:.1f}')}, best simple cache {numbers(best, '{:.1f}')}, "
    here += f"clairvoyant {numbers(clairvoyant, '{:.1f}')} %"
    why = "Its rule uses the gates of experts that were not chosen, which no trace here holds"
    judged = f"{SHAPE}: above LRU, below clairvoyant"
    figures.append(Figure(f"hits of HybriMoE's rule, {models}", "36.2 / 52.7 %", here, judged, holds, why))
    gain = hybrid_gain()
    why = "Without it, GPU and CPU already work at once here, and at decode a fetch takes longer than the CPU's work"
    what = "Qwen2, sharing each layer, prefill / decode"
    judged = f"{SHAPE}: above 1"
    figures.append(Figure(what, "1.26 / 1.50x", numbers(gain, unit="x"), judged, min(gain) > 1, why))
    return figures


# TriMoE

TRIMOE = {"trimoe-no-cpu": ("without the CPU", 1.75), "trimoe-greedy": ("without refinement", 1.28)}
TRIMOE["trimoe-static"] = "without relayout", 1.16
TRIMOE_MODELS = ("deepseek-v2", "qwen3-235b-a22b", "glm-4.5-air")
STRIPED = mt.load_policy("trimoe", {"name": "striped", "placement": "striped", "prefetch": "online:1"})


def trimoe_times(model: str, batch: int, output: int = 24, **changed: int) -> dict[str, float]:
    """Decode time over that of `trimoe`, by policy."""
    spec = mt.load_model(model, changed)
    trace = mt.generate_trace(spec, requests=batch, prompt=1, output=output, batch=batch, zipf=0.9, stick=0.3)
    slots = {"slots": 8 * spec.moe_layers} if changed else {}
    found = summary(trace, ["trimoe", *TRIMOE, STRIPED, "monde"], "h100-amx-dimm", model=spec, **slots)
    return {name: row["decode_s"] / found["trimoe"]["decode_s"] for name, row in found.items()}


def trimoe() -> list[Figure]:
    times = [trimoe_times(model, batch) for model in TRIMOE_MODELS for batch in (256, 512, 768)]
    why = {
        "trimoe-no-cpu": "Rates of CPU and DIMMs (its Table 1) are not public; those here are assumed",
        "trimoe-greedy": "No single expert ends sooner on the GPU, so all experts with many rows go to the CPU",
        "trimoe-static": "As above; the paper does not describe its baseline in detail",
    }
    figures = []
    for policy, (name, paper) in TRIMOE.items():
        here = [one[policy] for one in times]
        what = f"decode {name}, batch 256 to 768, 3 models"
        figures.append(Figure(what, f"{paper}x", span(here), f"{SHAPE}: above 1", min(here) > 1, why[policy]))
    for policy, name in (("striped", "every expert over all DIMMs"), ("monde", "`monde`, without a CPU")):
        here = [one[policy] for one in times]
        why_not = {
            "striped": "The timing model has no cost for the synchronization of 16 DIMMs",
            "monde": "`trimoe` moves one expert at a time until no move helps; `monde` tries every number of fetches",
        }[policy]
        figures.append(Figure(f"decode, {name}", "not given", span(here), SHOWN, None, why_not))
    return figures
