"""What engines of others did on real machines, and the replay that predicts each figure.

The machines lie in bench/real, as data sheets describe them; docs/real.md names the sources of the figures.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import product
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import polars as pl
from pages import ROOT

import moetrace as mt

MACHINES = ROOT / "bench/real"
Constants = Mapping[str, object]
Q4_K_M = 4.84  # gate and up Q4_K (4.5 bits), down Q4_K in one half of the layers and Q6_K (6.5625) in the other
PHONE = "qwen3-30b-a3b-phone.h5"


class Figure(NamedTuple):
    """What was published, and how a replay predicts it.

    `say` maps constants (path of a spec's field -> value) to the prediction; several values count as one figure, judged
    by the worst.
    """

    number: int
    what: str
    published: tuple[float, ...]
    unit: str
    say: Callable[[Constants], tuple[float, ...]]
    why: str  # what explains the rest


class Engine(NamedTuple):
    """One engine on one machine: what is known of its constants from tables, and what its own figures must tell.

    Attributes:
        name: What the engine and its machine are called.
        figures: Those that are judged.
        known: Constants from tables of measured times.
        free: Constants from the other figures, and the range in which they are looked for.
        beside: Published figures of the same engine and machine that are only fitted.
        borrowed: Another engine and one of its constants, where no own figure tells it.
        source: Where the constants come from, in a few words.
    """

    name: str
    figures: tuple[Figure, ...]
    source: str
    known: Constants = MappingProxyType({})
    free: Mapping[str, tuple[float, float]] = MappingProxyType({})
    beside: tuple[Figure, ...] = ()
    borrowed: tuple["Engine", str] | None = None

    def constants(self, judged: Figure) -> Constants:
        """The constants by which one figure is predicted: fitted to all figures but that one."""
        others = [figure for figure in (*self.figures, *self.beside) if figure is not judged]
        lent = {} if self.borrowed is None else {self.borrowed[1]: self.borrowed[0].best[self.borrowed[1]]}
        return {**self.known, **lent, **fitted(others, self.known, self.free)}

    @property
    def best(self) -> Constants:
        """The free constants that fit all figures: what a user would take, and what judges none of these figures."""
        return fitted([*self.figures, *self.beside], self.known, self.free)


def fitted(figures: list[Figure], known: Constants, free: Mapping[str, tuple[float, float]]) -> Constants:
    """The free constants with the least sum of |log(predicted / published)|, by a grid made finer four times."""
    if not free:
        return {}
    if not figures:
        raise ValueError(f"no other figure tells {', '.join(free)}.")
    ranges = {path: (math.log(low), math.log(high)) for path, (low, high) in free.items()}
    best: dict[str, float] = {}
    for _ in range(5):
        grids = [np.linspace(*span, 7) for span in ranges.values()]
        points = [dict(zip(ranges, map(math.exp, point), strict=True)) for point in product(*grids)]
        best = min(points, key=lambda point: sum(map(abs, _logs(figures, {**known, **point}))))
        ranges = {
            path: (
                max(math.log(best[path]) - (high - low) / 6, math.log(free[path][0])),
                min(math.log(best[path]) + (high - low) / 6, math.log(free[path][1])),
            )
            for path, (low, high) in ranges.items()
        }
    return best


def _logs(figures: list[Figure], constants: Constants) -> Iterator[float]:
    for figure in figures:
        for said, published in zip(figure.say(constants), figure.published, strict=True):
            yield math.log(said / published)


class Replay(NamedTuple):
    """A model's generated routing on a machine under one policy."""

    machine: str
    model: str
    policy: str
    slots: int | str | None = None
    prompt: int = 64
    output: int = 64
    given: tuple[tuple[str, object], ...] = ()  # what the engine ran with: bits, layers on the GPU, sockets
    profile: str | None = None
    trace: str | None = None  # a file instead of a generated one

    def result(self, constants: Constants) -> mt.Result:
        model = {path.removeprefix("model."): value for path, value in self.given if path.startswith("model.")}
        beside = {path: value for path, value in self.given if not path.startswith("model.")}
        spec = mt.load_model(self.model, model)
        return mt.replay(
            self.trace or _trace(self.model, tuple(model.items()), self.profile, self.prompt, self.output),
            system=MACHINES / f"{self.machine}.toml",
            model=spec,
            policies=self.policy,
            slots=self.slots,
            overrides={**beside, **constants},
        )

    def tokens_per_s(self, constants: Constants) -> tuple[float, ...]:
        """Decode tokens a second of one request."""
        return (1 / self.result(constants).summary["tpot_s_p50"][0],)

    def token_s(self, constants: Constants) -> tuple[float, ...]:
        """Seconds of a decode token."""
        return (self.result(constants).summary["tpot_s_p50"][0],)

    def prompt_tokens_per_s(self, constants: Constants) -> tuple[float, ...]:
        """Prompt tokens a second of one request."""
        return (self.prompt / self.result(constants).summary["ttft_s_p50"][0],)

    def mean_tokens_per_s(self, constants: Constants) -> tuple[float, ...]:
        """Decode tokens a second, as the mean over a generation that begins with a cold cache."""
        return (1 / self.result(constants).summary["tpot_s_mean"][0],)


@cache
def _trace(model: str, changed: tuple[tuple[str, object], ...], profile: str | None, prompt: int, output: int):
    if profile is not None:
        return mt.generate_trace(profile=profile, requests=1, prompt=prompt, output=output)
    return mt.generate_trace(mt.load_model(model, dict(changed)), requests=1, prompt=prompt, output=output)


def gpu_table(preset: str) -> Constants:
    """A calibrated preset's constants of the GPU: public times of MoE kernels (docs/calibration.md)."""
    gpu = mt.load_system(preset).gpu
    names = ("compute_efficiency", "memory_efficiency", "launch_us", "launch", "roofline")
    return {f"system.gpu.{name}": getattr(gpu, name) for name in names}


GDDR, HBM = gpu_table("l40s"), gpu_table("a100-sxm")
ONE_COMMAND = {"system.cpu.launch": "layer"}
MEMORY_SHARE = {"system.cpu.memory_efficiency": (0.1, 1.0)}
CPU_SHARE = {"system.cpu.memory_efficiency": (0.1, 1.0), "system.cpu.compute_efficiency": (0.05, 1.0)}
RUNTIME = {"system.gpu.layer_overhead_us": (1.0, 30_000.0)}

BITS = (("model.weight_bits", Q4_K_M), ("model.dense_weight_bits", Q4_K_M))
TWO_SOCKETS = (("system.cpu.tflops", 9.0), ("system.cpu.bandwidth_gb_s", 614.4), ("system.host.memory_gb", 1000.0))


def ktransformers(sockets: int, first: int, published: tuple[float, float, float, float]) -> Engine:
    """DeepSeek-V3 on one or two sockets: decode and prefill with 8 experts a token, and with 6 (fitted only)."""
    more = TWO_SOCKETS if sockets == 2 else ()
    decode, prefill, decode_6, prefill_6 = published
    what = f"KTransformers 0.2, DeepSeek-V3 Q4_K_M, RTX 4090D, {('one socket', 'two sockets')[sockets - 1]}"

    def replay(top_k: int, prompt: int) -> Replay:
        given = (*BITS, ("model.top_k", top_k), *more)
        return Replay("xeon-4090d", "deepseek-v3", "ktransformers", 0, prompt, 32, given)

    numa = "" if sockets == 1 else " Two sockets gained 1.4 times at decode, where their memory has twice the rate."
    why_decode = "The CPU gets a share of its memory's bandwidth." + numa
    why_prefill = "AVX-512 kernels on dequantized weights reach a share of the arithmetic's peak."
    return Engine(
        what,
        (
            Figure(first, f"{what}: decode", (decode,), "tokens/s", replay(8, 64).tokens_per_s, why_decode),
            Figure(
                first + 2,
                f"{what}: prompt of 500",
                (prefill,),
                "tokens/s",
                replay(8, 500).prompt_tokens_per_s,
                why_prefill,
            ),
        ),
        "its other figure here, and both with 6 experts a token; GPU: kernels of the L40S",
        {**GDDR, **ONE_COMMAND},
        CPU_SHARE,
        (
            Figure(0, "decode, 6 experts", (decode_6,), "tokens/s", replay(6, 64).tokens_per_s, ""),
            Figure(0, "prompt, 6 experts", (prefill_6,), "tokens/s", replay(6, 500).prompt_tokens_per_s, ""),
        ),
    )


def llama_cpp() -> Engine:
    """Whole layers' experts on the CPU (--n-cpu-moe)."""

    def replay(model: str, layers_on_gpu: int, bits: tuple = BITS) -> Replay:
        given = (*bits, ("policy.gpu_layers", layers_on_gpu))
        return Replay("i9-rtx2080", model, "n-cpu-moe", "100%", given=given)

    # DeepSeek's experts are 1,408 wide, which Q4_K's blocks of 256 do not divide: half of their tensors are Q5_0, Q8_0.
    wide = (("model.weight_bits", 5.3), ("model.dense_weight_bits", Q4_K_M))
    where = "llama.cpp, RTX 2080, four channels of DDR4"
    why = "The CPU gets a share of its memory's bandwidth."
    return Engine(
        where,
        (
            Figure(
                5,
                f"{where}: Qwen3-30B-A3B Q4_K_M, 36 of 48 layers on the CPU",
                (36.7,),
                "tokens/s",
                replay("qwen3-30b-a3b", 12).tokens_per_s,
                why,
            ),
            Figure(
                6,
                f"{where}: gpt-oss-20b MXFP4, 12 of 24",
                (36.4,),
                "tokens/s",
                replay("gpt-oss-20b", 12, ()).tokens_per_s,
                why,
            ),
            # The first of the 16 layers is dense.
            Figure(
                7,
                f"{where}: DeepSeek-Coder-V2-Lite Q4_K_M, 15 of 26",
                (49.6,),
                "tokens/s",
                replay("deepseek-v2-lite", 11, wide).tokens_per_s,
                why,
            ),
        ),
        "its other two figures; GPU: kernels of the L40S",
        {**GDDR, **ONE_COMMAND},
        MEMORY_SHARE,
    )


def moe_infinity() -> Engine:
    def figure(number: int, model: str, seconds: float, why: str) -> Figure:
        replay = Replay("a5000", model, "on-demand", profile=model)
        return Figure(number, f"MoE-Infinity, A5000, 16 bit: {model}", (seconds,), "s/token", replay.token_s, why)

    python = "A Python runtime at each layer, which small experts do not hide."
    return Engine(
        "MoE-Infinity, A5000",
        (
            figure(
                8,
                "mixtral-8x7b",
                0.735,
                "Bound by the link: on the machine the runtime's work overlaps with fetches; in a replay it is added.",
            ),
            figure(9, "deepseek-v2-lite", 0.100, python),
            figure(10, "qwen3-30b-a3b", 0.150, python),
        ),
        "its other two figures; GPU: kernels of the L40S",
        GDDR,
        RUNTIME,
    )


def mixtral_offloading() -> Engine:
    # Experts of 2 bits, with a scale and a zero of 8 bits for each 16 weights; attention of 4 bits.
    bits = (("model.weight_bits", 3.0), ("model.dense_weight_bits", 4.5))

    def figure(number: int, machine: str, name: str, experts_a_layer: int, published: float) -> Figure:
        replay = Replay(machine, "mixtral-8x7b", "on-demand", 32 * experts_a_layer, given=bits, profile="mixtral-8x7b")
        what = f"mixtral-offloading, {name}, Mixtral-8x7B, 2 bit, {experts_a_layer} of 8 experts of a layer kept"
        why = "Weights are dequantized into 16 bit at each use: few bits are read faster, but cost a kernel."
        return Figure(number, what, (published,), "tokens/s", replay.tokens_per_s, why)

    return Engine(
        "mixtral-offloading, 2 bit",
        (
            figure(11, "t4", "T4", 4, 2.09),
            figure(12, "rtx3060", "RTX 3060", 3, 2.28),
            figure(13, "a100", "A100", 4, 3.06),
        ),
        "the same engine on the other two machines",
        {},
        RUNTIME,
    )


def daop() -> Engine:
    """One block of Mixtral-8x7B in 16 bit with its experts on the GPU, one expert's move, one expert on the CPU; ms."""
    one_row = {"machine": "a100", "model": "mixtral-8x7b", "prompt": 1, "output": 32, "profile": "mixtral-8x7b"}
    on_gpu = Replay(policy="on-demand", given=(("system.link", None), ("system.gpu.memory_gb", 200.0)), **one_row)
    moved = Replay(policy="on-demand", slots=0, **one_row)
    on_cpu = Replay(policy="ktransformers", slots=0, **one_row)

    def say(constants: Constants) -> tuple[float, ...]:
        layers, steps = on_gpu.result(constants).layers, on_gpu.prompt + on_gpu.output
        block_s = (layers["dense_s"] + layers["moe_s"]).mean() / steps
        parts = [block_s, _expert_s(moved.result(constants), "link_in"), _expert_s(on_cpu.result(constants), "cpu")]
        return tuple(1e3 * seconds for seconds in parts)

    what = "DAOP, A100, Mixtral-8x7B in 16 bit: a block on the GPU, an expert's move, an expert on the CPU"
    why = (
        "The move is a copy from pageable memory, at a third of the link's rate; the block runs one kernel after the "
        "other from Python. No other figure of this machine shows the one or the other."
    )
    return Engine(
        "DAOP, A100",
        (Figure(14, what, (1.24, 39.87, 8.02), "ms", say, why),),
        "GPU: kernels of the A100; the CPU's share of its memory as in 5 to 7; the link: none",
        HBM,
        borrowed=(llama_cpp(), "system.cpu.memory_efficiency"),
    )


def _expert_s(result: mt.Result, unit: str) -> float:
    """Mean seconds that a unit is busy with an expert."""
    row = result.units.row(by_predicate=pl.col("unit") == unit, named=True)
    return row["busy_s"] / row["experts"]


def phone() -> Engine:
    bits = (("model.dense_weight_bits", Q4_K_M),)  # the trace has the bytes of its experts
    trace = str(ROOT / "traces" / PHONE)
    replay = Replay("oneplus-15r", "qwen3-30b-a3b", "on-demand", "4000MiB", given=bits, trace=trace)
    what = "BigMoeOnEdge, OnePlus 15R, Qwen3-30B-A3B Q4_K_M, 6 experts a token, 4000 MiB of experts kept"
    why = "The phone was hot and throttled its cores, which read the resident weights more slowly than its memory can."
    return Engine(
        "BigMoeOnEdge, OnePlus 15R",
        (Figure(15, what, (5.657,), "tokens/s", replay.mean_tokens_per_s, why),),
        "rate of its flash under the engine's own reads, from another session",
        {"system.link.bandwidth_gb_s": 1419 * 2**20 / 1e9},
    )


def hybrimoe() -> Engine:
    """Hit rates are of the routing alone, so no constant matters."""

    def say(_: Constants) -> tuple[float, ...]:
        return tuple(map(_lru_hits, ("mixtral-8x7b", "deepseek-v2-lite")))

    what = "HybriMoE's baseline: hits of LRU with room for a quarter of the experts, Mixtral and DeepSeek"
    figure = Figure(16, what, (30.2, 47.7), "%", say, "Other prompts: the profiles are of other text.")
    return Engine("HybriMoE", (figure,), "none needed")


@cache
def _lru_hits(model: str) -> float:
    """Hits at decode in percent, each layer with a quarter of its experts."""
    trace = mt.generate_trace(profile=model, requests=4, prompt=64, output=128)
    hits = mt.cache_hits(trace, [trace.layers * trace.num_experts // 4], ["lru"], scope="layer")
    return 100 * hits.row(by_predicate=pl.col("phase") == "decode", named=True)["hit_rate"]


def engines() -> list[Engine]:
    one, two = ktransformers(1, 1, (8.73, 54.21, 10.303, 65.14)), ktransformers(2, 2, (12.208, 82.94, 13.69, 97.32))
    return [one, two, llama_cpp(), moe_infinity(), mixtral_offloading(), daop(), phone(), hybrimoe()]
