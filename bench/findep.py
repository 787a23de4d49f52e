"""The experiment of FinDEP (arXiv 2512.21487): its schedules on its testbeds, beside its published ratios.

    python bench/findep.py            print all tables
    python bench/findep.py --write    also write them into docs/findep.md
    python bench/findep.py --check    exit 1 if the tables in docs/findep.md are stale

All traces are drawn from one seed: a second run gives the same tables.
"""

import argparse
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
from edge_ndp_page import table
from markers import replaced_between
from msgspec.structs import replace

from moetrace.engine.run import AnyLane, Run, run_setups
from moetrace.engine.setup import Setup
from moetrace.spec import PolicySpec, load_model, load_policy, load_system
from moetrace.spec.model import Model
from moetrace.spec.network import Cluster, Network
from moetrace.spec.system import System
from moetrace.trace import Trace
from moetrace.trace.schema import PREFILL

PAGE = Path(__file__).parents[1] / "docs/findep.md"

# Published. Table 5: throughput of FinDEP over PPPipe, by testbed and tokens of a prompt. Qwen's 1.13 of 2,048 tokens
# on A is the quotient of the two throughputs that the table prints; it prints 1.20.
LENGTHS = {"deepseek-v2": (1024, 2048, 4096), "qwen3-235b-a22b": (1024, 2048, 4096, 8192)}
PUBLISHED = {
    "deepseek-v2": {"A": (1.10, 1.09, 1.16), "B": (1.07, 1.06, 1.06), "C": (1.02, 1.03, 1.10), "D": (1.08, 1.12, 1.10)},
    "qwen3-235b-a22b": {
        "A": (1.13, 1.13, 1.13, 1.53),
        "B": (1.11, 1.08, 1.23, 1.61),
        "C": (1.03, 1.02, 1.07, 1.35),
        "D": (1.08, 1.08, 1.24, 1.22),
    },
}
# Published: transfers of DeepSeek-V2 on testbed A that nothing overlaps, ms: naive, PPPipe, FinDEP.
EXPOSED = {1024: (194.95, 188.65, 97.33), 2048: (536.22, 144.32, 52.60), 4096: (905.49, 528.94, 309.81)}

# Not published, or not known to us.
LAYERS = 2  # as in its tables 3 and 4
PROMPTS = (1, 2, 4)  # of a step, for each attention GPU: the values of its tables 3 and 4
SPLITS = ((3, 5), (4, 4))  # attention and experts on eight GPUs; which model has which is not known to us
NEAR = 0.02
BLOCK = 4096  # rows that are drawn; more rows repeat them

PARTS = (1, 2, 4, 8)  # micro-batches of a step, chunks of a micro-batch
NAMES = ("dep-naive", "dep-pppipe", "findep")

# Presets, as they are and divided as FinDEP divides its own.
CLUSTERS = (
    ("h100-x8", None),
    ("h100-x8", (3, 5)),
    ("h200-x16", None),
    ("h200-x16", (6, 10)),
    ("h20-x32", (8, 24)),
    ("gb200-nvl72", None),
    ("gb200-nvl72", (24, 48)),
)
TOKENS = tuple(2**power for power in range(9, 18))  # of a step


class Times(NamedTuple):
    """Seconds of a step, those of them in transfers that nothing overlaps, and how FinDEP cuts it."""

    naive_s: float
    pppipe_s: float  # the best of its micro-batches
    findep_s: float
    exposed: tuple[float, ...]  # of all three
    cut: str


def divided(system: System, split: tuple[int, int] | None) -> System:
    """Return a cluster with so many GPUs for attention and for experts."""
    if split is None or system.cluster is None:
        return system
    attention, experts = split
    return replace(system, cluster=replace(system.cluster, gpus=None, attention=attention, experts=experts))


@cache
def testbed(name: str, split: tuple[int, int]) -> System:
    """Return one of FinDEP's testbeds: D is a preset, C a node of it; A and B from data sheets, over PCIe 4.0."""
    large = load_system("h20-x32")
    if name == "D":
        return large
    if name == "C":
        return divided(replace(large, name="h20-x8", cluster=replace(large.cluster, gpus_per_node=None)), split)
    workstation = load_system("a6000-xeon")
    gpu, link = replace(workstation.gpu, launch_us=23.0, launch="layer", roofline="sum"), workstation.link
    if name == "B":  # NVIDIA's data sheet of the A10: bf16 dense, GDDR6
        gpu = replace(gpu, name="A10", tflops=125.0, bandwidth_gb_s=600.0, memory_gb=24.0)
    network = Network(bandwidth_gb_s=link.bandwidth_gb_s, dispatch_latency_us=67.8, combine_latency_us=29.4)
    plain = replace(large, name=name, gpu=gpu, network=network, cluster=Cluster(attention=split[0], experts=split[1]))
    return load_system(plain)


@cache
def model_of(name: str) -> Model:
    """Return a model of a few layers."""
    return load_model(name, {"moe_layers": LAYERS})


def step_of(model: Model, rows: int, prompt: int) -> Trace:
    """Return one step of prompts, whose tokens choose each expert equally often."""
    drawn = np.random.default_rng(0).random((min(rows, BLOCK), LAYERS, model.experts), dtype=np.float32)
    ids = np.argpartition(drawn, model.top_k, axis=2)[:, :, : model.top_k]
    row = np.arange(rows)
    return Trace.from_arrays(
        ids[row % len(ids)],
        num_experts=model.experts,
        steps=np.array([rows]),
        phase=np.array([PREFILL]),
        request=row // prompt,
        position=row % prompt,
    )


def replayed(model: Model, system: System, rows: int, prompt: int, policies: list) -> Run:
    setup = Setup(model=model, system=system, policies=policies, ignore_capacity=True)
    (run,) = run_setups(step_of(model, rows, prompt), [setup])
    if not isinstance(run, Run):
        raise run
    return run


@cache
def times_of(name: str, bed: str, split: tuple[int, int], prompt: int, prompts: int) -> Times:
    """Replay a step of so many prompts for each attention GPU of a testbed; micro-batches are whole prompts."""
    model, system = model_of(name), testbed(bed, split)
    rows = prompts * system.cluster.attention_gpus * prompt
    batches = [r1 for r1 in PARTS if r1 <= prompts]
    pipes = [load_policy("dep-pppipe", {"schedule": f"pipeline:{r1},1"}) for r1 in batches]
    lanes = replayed(model, system, rows, prompt, [*pipes, *finer(model, batches)]).lanes
    naive, pppipe, findep = (min(few, key=_step_s) for few in (lanes[:1], lanes[: len(pipes)], lanes))
    cut = findep.fabric.cut[PREFILL]
    exposed = tuple(float(lane.log.step["exposed_s"][0]) for lane in (naive, pppipe, findep))
    return Times(*map(_step_s, (naive, pppipe, findep)), exposed, f"{cut['micro_batches']},{cut['chunks']}")


def finer(model: Model, batches: list[int]) -> list[PolicySpec]:
    """Return what FinDEP tries beyond PPPipe: chunks, and shared experts apart in both orders."""
    ways = [{"shared": "with-attention"}]
    if model.shared_params_per_layer:
        ways += [{"shared": "apart", "order": order} for order in ("asas", "aass")]
    cuts = [(r1, r2) for r1 in batches for r2 in PARTS]
    return [load_policy("dep-naive", {"schedule": f"pipeline:{r1},{r2}"} | way) for r1, r2 in cuts for way in ways]


def _step_s(lane: AnyLane) -> float:
    return float(lane.duration_s[0])


def found_of(name: str, bed: str, prompt: int, prompts: int) -> list[Times]:
    """Replay what `times_of` does, for each way to divide the GPUs."""
    return [times_of(name, bed, split, prompt, prompts) for split in (((8, 24),) if bed == "D" else SPLITS)]


def gains(name: str, bed: str, prompt: int) -> list[list[float]]:
    """FinDEP over PPPipe, by the number of prompts."""
    return [[one.pppipe_s / one.findep_s for one in found_of(name, bed, prompt, prompts)] for prompts in PROMPTS]


def span(values: list[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def ratios() -> str:
    """FinDEP over PPPipe, and PPPipe over naive, beside what is published."""
    rows = []
    for name, lengths in LENGTHS.items():
        for bed, published in PUBLISHED[name].items():
            for prompt, paper in zip(lengths, published, strict=True):
                most = found_of(name, bed, prompt, PROMPTS[-1])
                naive = span([one.naive_s / one.pppipe_s for one in most])
                milliseconds = span([1e3 * one.findep_s for one in most])
                cells = [span(few) for few in gains(name, bed, prompt)]
                cuts = " ".join(dict.fromkeys(one.cut for one in most))
                rows.append([f"`{name}`", bed, f"{prompt:,}", f"**{paper:.2f}**", *cells, naive, milliseconds, cuts])
    counted = [f"{prompts} prompt{'s' if prompts > 1 else ''} a GPU" for prompts in PROMPTS]
    return table(
        ["model", "testbed", "tokens", "published", *counted, "PPPipe over naive", "FinDEP, ms", "r1,r2"], rows
    )


def exposed() -> str:
    """Transfers that nothing overlaps, as shares of naive's."""
    rows = []
    for prompt, (naive_ms, *others_ms) in sorted(EXPOSED.items()):
        found = [one for prompts in PROMPTS[1:] for one in found_of("deepseek-v2", "A", prompt, prompts)]
        cells = []
        for number, of_paper in enumerate(others_ms, start=1):
            ours = [one.exposed[number] / one.exposed[0] for one in found]
            cells += [f"**{of_paper / naive_ms:.2f}**", span(ours)]
        rows.append([f"{prompt:,}", *cells])
    return table(["tokens", "PPPipe, published", "here", "FinDEP, published", "here"], rows)


def orders() -> str:
    """From how many tokens a step naive takes at least as long as PPPipe, and PPPipe as FinDEP, on each preset."""
    rows = []
    for name, split in CLUSTERS:
        system, cells = divided(load_system(name), split), []
        for of_model in ("deepseek-v2", "deepseek-v3", "qwen3-235b-a22b"):
            model = model_of(of_model)
            policies = [load_policy(one) for one in NAMES]
            holds = []
            for tokens in TOKENS:
                times = [lane.duration_s[0] for lane in replayed(model, system, tokens, 512, policies).lanes]
                holds.append(all(a >= b * (1 - 1e-12) for a, b in pairwise(times)))
            last = max((i for i, held in enumerate(holds) if not held), default=-1)
            cells.append(f"{TOKENS[last + 1]:,}" if last + 1 < len(TOKENS) else "none of these")
        gpus = "the same for both" if split is None else f"{split[0]} and {split[1]}"
        rows.append([f"`{name}`", gpus, *cells])
    return table(["system", "GPUs for attention, experts", "DeepSeek-V2", "DeepSeek-V3", "Qwen3-235B"], rows)


def summary() -> str:
    """How many of the published ratios lie within what comes out here, and with how many prompts they would."""
    within, below, above = 0, 0, dict.fromkeys(LENGTHS, 0)
    grown, grown_here = 0, 0
    for name, lengths in LENGTHS.items():
        for bed, published in PUBLISHED[name].items():
            for prompt, paper in zip(lengths, published, strict=True):
                ours = [gain for few in gains(name, bed, prompt) for gain in few]
                below += paper < min(ours) - NEAR
                above[name] += paper > max(ours) + NEAR
                within += min(ours) - NEAR <= paper <= max(ours) + NEAR
            first, last = (fmean(gains(name, bed, prompt)[0]) for prompt in (lengths[0], lengths[-1]))
            grown, grown_here = grown + (published[-1] > published[0]), grown_here + (last > first)
    larger = sum(above.values())
    total = within + below + larger
    return (
        f"{within} of the paper's {total} ratios lie in the range of the ratios here, with {PROMPTS[0]} to "
        f"{PROMPTS[-1]} prompts a GPU, to {NEAR}; {below} are smaller. {larger} are larger: "
        + " and ".join(f"{count} of `{name}`" for name, count in above.items())
        + f". From the shortest prompts to the longest the gain grows in {grown} of 8 cases in the paper, and in "
        f"{grown_here} here with one prompt a GPU."
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = options.add_mutually_exclusive_group()
    mode.add_argument("--write", action="store_true")
    mode.add_argument("--check", action="store_true")
    options = options.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    new_page = page
    for name, make in {"summary": summary, "ratios": ratios, "exposed": exposed, "orders": orders}.items():
        text = make()
        new_page = replaced_between(new_page, name, text)
        if not options.check:
            print(text, end="\n\n")
    if options.check and new_page != page:
        sys.exit("findep.md stale: run python bench/findep.py --write.")
    if options.write:
        PAGE.write_text(new_page, encoding="utf-8")


if __name__ == "__main__":
    main()
