"""Figures of systems about links, bits and functions: HALO, HAQ, SqueezeLLM, Intra-DP, Remoe (see neighbours.py)."""

import math
from functools import cache
from typing import NamedTuple

import numpy as np
from neighbours_figure import PLAUSIBLE, SHAPE, SHOWN, Figure, close, numbers, span, summary
from neighbours_tiers import experts_gb

import moetrace as mt
from moetrace.spec.model import Model


def resends(loss: float, packets: int, count: int = 100_000) -> tuple[float, float, float]:
    """Mean rounds of `count` fetches by replay; the expected ones, and three standard errors."""
    rto_s, layers = 1000.0, 4
    link = {"link.loss": loss, "link.mtu_bytes": 1000, "link.rto_ms": rto_s * 1e3, "link.bandwidth_gb_s": 1e3}
    system = mt.load_system("rtx4090-offload", link | {"link.latency_us": 0.0, "gpu.launch_us": 0.0})
    trace = mt.Trace.from_arrays(
        np.zeros((count // layers, layers, 1), np.uint8),
        num_experts=1,
        steps=np.ones(count // layers, np.int64),
        expert_bytes=np.full(layers, 1000 * packets),
    )
    model = mt.load_model("mixtral-8x7b", {"moe_layers": layers, "experts": 1, "top_k": 1})
    result = mt.replay(trace, model=model, system=system, policies="on-demand", slots=0)
    mean = result.layers["moe_s"].sum() / rto_s / count
    beyond = [1 - (1 - loss**k) ** packets for k in range(1, 2000)]  # probability of k rounds and more
    expected = math.fsum(beyond)
    variance = math.fsum((2 * k + 1) * p for k, p in enumerate(beyond)) - expected**2
    return mean, expected, 3 * math.sqrt(variance / count)


def dropped(loss: float, count: int = 40_000) -> tuple[float, float, float]:
    """Share of gates that one unit drops with a packet a row; the expected one, and three standard errors."""
    link = {"link.loss": loss, "link.mtu_bytes": 8192}
    system = mt.load_system("edge-pi-cluster", link | {"ndp.units": 1})
    ids = np.arange(count, dtype=np.int64).reshape(-1, 1, 1) % 4
    trace = mt.Trace.from_arrays(ids.astype(np.uint8), num_experts=4, steps=np.full(20, count // 20))
    shape = {"moe_layers": 1, "experts": 4, "top_k": 1, "hidden": 4096, "expert_intermediate": 64}
    model = mt.load_model("mixtral-8x7b", shape)
    policy = mt.load_policy("ndp-ep")
    share = mt.replay(trace, model=model, system=system, policies=policy, slots=0).summary["gate_mass_dropped"][0]
    expected = 1 - (1 - loss) ** 2
    return share, expected, 3 * math.sqrt(expected * (1 - expected) / count)


def halo_over_waiting(loss: float) -> tuple[float, float]:
    """Time of `strict`, which waits for what was lost, over that of `halo`, which does not; gate mass it drops."""
    trace = mt.generate_trace("tiny-olmoe", requests=8, prompt=32, output=64)
    link = {"link.loss": loss}
    waits = summary(
        trace, ["strict"], mt.load_system("edge-pi-cluster", link | {"link.loss_mode": "reliable"}), slots=96
    )
    goes_on = summary(trace, ["halo"], mt.load_system("edge-pi-cluster", link), slots=96)
    return waits["strict"]["total_s"] / goes_on["halo"]["total_s"], goes_on["halo"]["gate_mass_dropped"]


def halo() -> list[Figure]:
    figures = []
    for loss, packets in ((0.02, 40), (0.3, 7)):
        mean, expected, error = resends(loss, packets)
        what = f"rounds of resending, {packets} packets, loss {loss}"
        holds = abs(mean - expected) <= error
        formula = f"{expected:.4f} (by formula)"
        figures.append(Figure(what, formula, f"{mean:.4f}", "within 3 standard errors of 1e5 draws", holds))
    share, expected, error = dropped(0.03)
    what = "gate mass dropped, one packet a row, one unit, loss 0.03"
    formula, judged = f"{expected:.4f} (by formula)", "within 3 standard errors of 4e4 rows"
    figures.append(Figure(what, formula, f"{share:.4f}", judged, abs(share - expected) <= error))
    pairs = [halo_over_waiting(loss) for loss in (0.01, 0.02, 0.05)]
    lost = span([100 * share for _, share in pairs], "{:.1f}")
    here = f"{span([ratio for ratio, _ in pairs])}, dropping {lost} % of the gates"
    why = "Loss rates, protocol, timeouts and network of the paper are unknown: 1 to 5 % and 200 ms are assumed"
    figures.append(Figure("over waiting for lost packets", "3.41x", here, f"{SHAPE}: above 1", min(pairs)[0] > 1, why))
    return figures


# HAQ


def haq_memory() -> tuple[float, float]:
    """Decode of Mixtral, a fifth of its experts on the CPU: over all on the GPU; percent of the demands that miss."""
    trace = mt.generate_trace(profile="mixtral-8x7b", requests=4, prompt=64, output=128)
    bits = {"model.weight_bits": 8, "model.dense_weight_bits": 8, "system.gpu.memory_gb": 100.0}
    whole, less = (
        summary(trace, ["haq"], "a6000-xeon", slots=slots, overrides=bits)["haq"] for slots in (256, round(0.8 * 256))
    )
    return less["decode_s"] / whole["decode_s"], 100 * (1 - less["hit_rate"])


def haq() -> list[Figure]:
    size = experts_gb(mt.load_model("mixtral-8x7b", {"weight_bits": 8}))
    what = "experts of Mixtral-8x7B, 8 bits"
    figures = [Figure(what, "45.1 GB (by arithmetic)", f"{size:.1f} GB", "within 0.05 GB", abs(size - 45.1) <= 0.05)]
    slower, on_cpu = haq_memory()
    saved = 100 * (1 - 0.8 * size / experts_gb(mt.load_model("mixtral-8x7b")))
    what = "GPU memory of experts, with a fifth of them on the CPU, beside 16 bits"
    why = "How many experts stay is an input here. "
    why += f"A decode step takes {slower:.1f} times as long, with {on_cpu:.0f} % of the demands on the CPU"
    figures.append(Figure(what, "about 60 % less", f"{saved:.0f} % less", SHOWN, None, why))
    return figures


# SqueezeLLM


def llama(hidden: int, inner: int, matrices: int, bits: int, sparse: float) -> Model:
    """A dense layer as one expert that every row has."""
    shape = {"moe_layers": 1, "experts": 1, "top_k": 1, "hidden": hidden, "expert_intermediate": inner}
    table = {"weight_bits": bits, "weight_bits.codebook_bits": 16, "weight_bits.sparse": sparse}
    return mt.load_model("mixtral-8x7b", shape | {"expert_matrices": matrices} | table)


def layer_bits(bits: int, sparse: float) -> float:
    """Average of a layer of LLaMA-7B: attention is four square matrices, the MLP three others."""
    parts = [llama(4096, 4096, 4, bits, sparse), llama(4096, 11008, 3, bits, sparse)]
    return 8 * sum(part.expert_bytes().item() for part in parts) / sum(part.expert_params for part in parts)


# Layers, then seconds and GB of fp16 (where it fits), of 3 bit, and of 3 bit with 0.45 % apart; A6000, 1,024 tokens.
A6000 = {
    "7B": (32, (26.5, 13.1), (13.6, 3.4), (14.6, 3.6)),
    "13B": (40, (47.0, 25.2), (21.2, 6.1), (22.2, 6.5)),
    "30B": (60, None, (37.8, 16.1), (42.5, 17.4)),
    "65B": (80, None, (66.9, 29.9), (82.35, 32.4)),
}


def llama_s(layers: int, size_gb: float) -> float:
    """Seconds of 1,024 tokens, one after another, with all weights in the GPU."""
    trace = mt.Trace.from_arrays(
        np.zeros((4, layers, 1), np.uint8),
        num_experts=1,
        steps=np.ones(4, np.int64),
        expert_bytes=np.full(layers, round(size_gb * 1e9 / layers)),
    )
    starts = {"gpu.launch_us": 0.0, "gpu.layer_overhead_us": 276.0, "cpu": None, "host": None, "link": None}
    shape = {"moe_layers": layers, "experts": 1, "top_k": 1, "dense_params_per_layer": 0, "once_params": 0}
    model = mt.load_model("mixtral-8x7b", shape | {"kv_bytes_per_token_layer": 0})
    system = mt.load_system("a6000-xeon", starts)
    return summary(trace, ["resident"], system, model=model)["resident"]["total_s"] * 1024 / 4


def squeezellm() -> list[Figure]:
    here = [layer_bits(bits, sparse) for bits in (2, 3, 4) for sparse in (0.0, 0.0045)]
    paper = (2.01, 2.22, 3.02, 3.24, 4.05, 4.27)
    holds = all(abs(one - other) <= 0.01 for one, other in zip(here, paper, strict=True))
    what = "average bits of LLaMA-7B: 2, 3, 4 bit, each without and with 0.45 % apart"
    figures = [Figure(what, numbers(paper), numbers(here, "{:.3f}"), "within 0.01", holds)]
    dense = [(layers, *row) for layers, fp16, three, _ in A6000.values() for row in (fp16, three) if row]
    here = [llama_s(layers, size_gb) for layers, _, size_gb in dense]
    what = "LLaMA on an A6000, 1,024 tokens: 7B, 13B in fp16 and 3 bit; 30B, 65B in 3 bit"
    why = "276 us a layer fit 7B in fp16; bandwidth of the data sheet"
    seconds = [paper_s for _, paper_s, _ in dense]
    figures.append(close(what, seconds, here, 0.1, "{:.1f}", unit=" s", why=why))
    here = [llama_s(layers, size_gb) for layers, _, _, (_, size_gb) in A6000.values()]
    seconds = [sparse[0] for _, _, _, sparse in A6000.values()]
    why = "The sparse part costs more than its bytes, and no fixed start explains how much: `sparse_launches` is yours"
    what = "the same, 3 bit with 0.45 % apart"
    figures.append(Figure(what, numbers(seconds, "{:.1f}", " s"), numbers(here, "{:.1f}", " s"), SHOWN, None, why))
    return figures


# Intra-DP

ROBOT = {"energy.gpu.idle_w": 4.79, "energy.gpu.active_w": 15.07}
NO_STARTS = {"gpu.launch_us": 0.0, "cpu.command_us": 0.0, "link.latency_us": 0.0, "cpu.chunks": 1}
NO_DENSE = dict.fromkeys(("dense_params_per_layer", "once_params", "kv_bytes_per_token_layer"), 0)


SERVER = {"cpu.tflops": 30.0, "cpu.bandwidth_gb_s": 760.0, "link.bandwidth_gb_s": 0.0116}
ROBOT_RATES = {"gpu.tflops": 1.69, "gpu.bandwidth_gb_s": 51.2}
OFFLOAD = mt.PolicySpec(name="home", dispatch="home", residency="none")
SHARE = mt.load_policy("resident", {"name": "share", "dispatch": "balance"})


class Robot(NamedTuple):
    """A prompt on a robot, on a server behind its Wi-Fi, and on both: rows of summaries."""

    local: dict[str, float]
    offloaded: dict[str, float]
    both: dict[str, float]


@cache
def robot(local_s: float, offloaded_s: float) -> Robot:
    """Scale the rates of robot and server so that each takes this long by itself; there are no starts."""
    model = mt.load_model("tiny-olmoe", NO_DENSE)
    trace = mt.generate_trace(model, requests=1, prompt=64, output=0)

    def replay(policy: object, local: float, server: float, chunks: int | str = 1) -> dict[str, float]:
        rates = {name: rate * local for name, rate in ROBOT_RATES.items()}
        rates |= {name: rate * server for name, rate in SERVER.items()} | {"gpu.memory_gb": 64.0}
        system = mt.load_system("edge-robot", NO_STARTS | ROBOT | rates | {"cpu.chunks": chunks})
        (row,) = summary(trace, [policy], system, model=model).values()
        return row

    local = replay("resident", 1.0, 1.0)["total_s"] / local_s
    server = replay(OFFLOAD, 1.0, 1.0)["total_s"] / offloaded_s
    return Robot(
        *(replay(policy, local, server, "auto" if policy is SHARE else 1) for policy in ("resident", OFFLOAD, SHARE))
    )


def chunked_over_whole() -> float:
    """Offloaded time in chunks over that in one piece, on the same machine without starts: never more than 1."""
    model = mt.load_model("tiny-olmoe", NO_DENSE)
    trace = mt.generate_trace(model, requests=2, prompt=64, output=16)
    ratios = []
    for rate in (0.0116, 0.1, 1.0, 10.0):
        system = {chunks: NO_STARTS | {"link.bandwidth_gb_s": rate, "cpu.chunks": chunks} for chunks in (1, "auto")}
        one, auto = (
            mt.replay(trace, model=model, system=mt.load_system("edge-robot", of), policies=OFFLOAD).steps["duration_s"]
            for of in system.values()
        )
        ratios.append((auto / one).max())
    return max(ratios)


def intra_dp() -> list[Figure]:
    kapao = robot(0.397, 0.255)
    energy = [kapao.local["energy_j"], kapao.offloaded["energy_j"]]
    why = "Watts and times are the paper's; the replay decides which of them apply when"
    what = "robot's energy an inference (KAPAO indoors): local / offloaded"
    figures = [close(what, (5.98, 1.22), energy, 0.005, "{:.2f}", unit=" J", why=why)]
    ratio = chunked_over_whole()
    what = "a step in chunks over the same in one piece, starts 0, four rates: most"
    figures.append(Figure(what, "at most 1", f"{ratio:.4f}", "at most 1", ratio <= 1 + 1e-12))
    paper = {"KAPAO": (397, 255, 209), "AGRNav": (778, 567, 434), "VGG19": (87, 89, 61)}
    both = [1e3 * robot(local / 1e3, offloaded / 1e3).both["total_s"] for local, offloaded, _ in paper.values()]
    holds = all(here <= theirs < min(alone) for here, (*alone, theirs) in zip(both, paper.values(), strict=True))
    why = (
        "Here a layer's experts can be shared out freely, and travel in chunks; its networks have fewer places to cut. "
    )
    why += "The times of each side are inputs"
    what = f"both at once, {' / '.join(paper)} indoors"
    judged = f"{SHAPE}: between here and the better side"
    theirs = numbers([row[2] for row in paper.values()], "{:.0f}", " ms")
    figures.append(Figure(what, theirs, numbers(both, "{:.0f}", " ms"), judged, holds, why))
    return figures


# Remoe


def cold_starts(shares: tuple[float, ...]) -> list[float]:
    """Seconds of the cold start of DeepSeek-V2-Lite, by the share of each layer's experts that is remote."""
    trace = mt.generate_trace("deepseek-v2-lite", requests=1, prompt=32, output=8)
    policies = [mt.load_policy("remoe", {"name": f"remote-{share}", "remote": share}) for share in shares]
    return [row["cold_s"] for row in summary(trace, policies, "remoe").values()]


def remoe() -> list[Figure]:
    shares = (0.0, 0.25, 0.5, 0.75)
    whole, *parts = cold_starts(shares)
    saved = [100 * (1 - part / whole) for part in parts]
    what = f"cold start, with {numbers(shares[1:])} of the experts remote"
    holds = min(saved) <= 47 <= max(saved)
    why = "The share behind the paper's figure, the rate at which weights load and the start are unknown"
    judged = f"{PLAUSIBLE}: within these shares"
    return [Figure(what, "47 % less", numbers(saved, "{:.0f}", " % less"), judged, holds, why)]
