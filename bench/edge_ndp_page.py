"""The experiment of arXiv 2601.03992 as text: tables of docs/experiment.md, and every figure (edge_ndp.py runs it)."""

from collections.abc import Callable, Sequence
from statistics import fmean

import numpy as np
from edge_ndp_found import (
    ALL_FIT,
    CLOCK_GHZ,
    FLOP_A_CYCLE,
    I7_14700,
    MODELS,
    MORE_MACS,
    OUTPUT,
    PREFETCH,
    PROMPT,
    REQUESTS,
    SLOW_CPU,
    TENSOR_CORES,
    UNITS,
    Found,
    Sweep,
    machine,
)

import moetrace as mt

# Figures of the paper, over MoNDE unless named; means and maxima are over its four models.
PAPER_DECODE = {
    "edge-ndp-tp": ("TP", 1.99),
    "edge-ndp-tp-lb": ("TP + balance", 2.19),
    "edge-ndp-tp-prefetch": ("TP + prefetch", 2.23),
    "edge-ndp-layer": ("all three", 2.41),
}
PAPER_MEAN, PAPER_MAX = 2.41, 2.56
PAPER_OVER_ON_DEMAND, PAPER_OVER_FIDDLER = 5.49, 4.05
PAPER_QWEN_PREFILL, PAPER_QWEN_DECODE = 1.36, 1.69
TP, BALANCE, BOTH, ALL = PAPER_DECODE
SMALL = ("deepseek-moe-16b", "qwen3-30b-a3b")  # they fit 2 DIMMs
FULL = UNITS[1:]  # numbers of DIMMs that hold all models
NOWHERE = "none of these"
WORSE = 1.005  # a sweep bends up if its last point takes this much longer than its best

Row = tuple[str, float, list[float]]  # a figure of the paper, its value there, ours for each of FULL


def factor(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}x"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return f"{low}x" if low == high else f"{low}x to {high}x"


def table(headings: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [headings, ["---"] * len(headings), *rows])


def lies(paper: float, ours: list[float]) -> str:
    """Say at which number of DIMMs our figure, which grows with it, is the paper's (to 1 %), or between which."""
    near = min(range(len(ours)), key=lambda i: abs(ours[i] - paper))
    if abs(ours[near] - paper) <= 0.01 * paper:
        return str(FULL[near])
    if not ours[0] <= paper <= ours[-1]:
        return NOWHERE
    above = next(i for i, value in enumerate(ours) if value >= paper)
    return f"{FULL[above - 1]} to {FULL[above]}"


def each(of: Callable[[str, int], float | None], how: Callable[[list[float]], float] = fmean) -> list[float]:
    """For each number of DIMMs that holds all models, the mean (or maximum) over the models."""
    return [how([of(model, units) or np.nan for model in MODELS]) for units in FULL]


def over(found: Found, base: str, policy: str, field: str = "total_s", how: Callable = fmean) -> list[float]:
    return each(lambda model, units: found.over(base, policy, model, units, field), how)


def over_rival(found: Found, rival_s: dict[str, float]) -> list[float]:
    return each(lambda model, units: rival_s[model] / found.seconds(model, units, ALL, "total_s"), max)


def qwen(found: Found, policy: str, field: str) -> list[float]:
    return [found.over("monde", policy, "qwen3-30b-a3b", units, field) for units in FULL]


def figures(found: Found) -> list[Row]:
    """Every figure that the paper gives, with ours."""
    return [
        *(
            (f"decode over MoNDE, {name}: mean", value, over(found, "monde", policy, "decode_s"))
            for policy, (name, value) in PAPER_DECODE.items()
        ),
        ("end to end over MoNDE, all three: mean", PAPER_MEAN, over(found, "monde", ALL)),
        ("end to end over MoNDE, all three: most", PAPER_MAX, over(found, "monde", ALL, how=max)),
        ("end to end over on-demand: most", PAPER_OVER_ON_DEMAND, over_rival(found, found.on_demand_s)),
        ("end to end over Fiddler: most", PAPER_OVER_FIDDLER, over_rival(found, found.fiddler_s)),
        ("experts of Qwen3, decode, TP over MoNDE", PAPER_QWEN_DECODE, qwen(found, TP, "decode_moe_s")),
        ("experts of Qwen3, prefill, TP over MoNDE", PAPER_QWEN_PREFILL, qwen(found, TP, "prefill_moe_s")),
    ]


def page_parts(found: Found) -> dict[str, str]:
    """The text between each pair of markers."""
    return {
        "machine": machine_table(),
        "policy": policy_toml(),
        "figures": figures_table(found),
        "differs": differences(found),
        "edge-ndp": models_table(found),
        "claims": claims(found),
    }


def machine_table() -> str:
    preset, here = mt.load_system("edge-ndp"), machine()
    macs = here.ndp.bandwidth_gb_s / 2  # one for each weight of 16 bit
    rows = [
        [
            "GPU: fp16 arithmetic",
            f"RTX 5080: 84 SMs, {TENSOR_CORES} tensor cores, {CLOCK_GHZ:.2f} GHz",
            f"{preset.gpu.tflops:g} TFLOP/s, at the boost clock",
            f"{here.gpu.tflops:.1f} TFLOP/s: {TENSOR_CORES} x {CLOCK_GHZ:.2f} GHz x {FLOP_A_CYCLE} FLOP a cycle, "
            "with sums in fp32",
        ],
        ["GPU: memory", "16 GB", f"{preset.gpu.memory_gb:g} GB", f"{here.gpu.memory_gb:g} GB"],
        ["GPU: bandwidth", "the card's", f"{preset.gpu.bandwidth_gb_s:g} GB/s (GDDR7)", "as the preset"],
        [
            "GPU: memory not for weights",
            "not known to us",
            f"{preset.gpu.reserve_gb:g} GB, assumed",
            f"{here.gpu.reserve_gb:g} GB, assumed: Mixtral then has room for one expert in each layer",
        ],
        ["Link", "PCIe 5.0 x16", f"{preset.link.bandwidth_gb_s:g} GB/s, effective, assumed", "as the preset"],
        [
            "DIMMs",
            "2 to 6 of 32 GB, DDR4-3200, 102.4 GB/s inside each",
            f"{preset.ndp.capacity_gb:g} GB, {preset.ndp.bandwidth_gb_s:g} GB/s inside each",
            "as the preset",
        ],
        [
            "DIMMs: arithmetic",
            "not known to us",
            f"{preset.ndp.gmac_s:g} GMAC/s each, as in Hermes",
            f"as the preset. A single token needs only {macs:g} to keep up with the memory, so it matters "
            "for prompts only",
        ],
        ["DIMMs of the main figure", "not known to us", "", f"{FULL[0]} to {FULL[-1]}, each shown"],
        [
            "CPU",
            "i7-14700, up to 192 GB at 89.6 GB/s",
            "none",
            f"only for Fiddler, instead of the DIMMs: {I7_14700.bandwidth_gb_s:g} GB/s, {I7_14700.tflops:g} TFLOP/s "
            "(fp32)",
        ],
        [
            "Launches and commands",
            "not known to us",
            f"GPU {preset.gpu.launch_us:g} us, DIMM {preset.ndp.command_us:g} us, transfer {preset.link.latency_us:g} "
            "us, all assumed",
            "as the preset",
        ],
    ]
    return table(["", "the paper", "preset `edge-ndp`", "here"], rows)


def policy_toml() -> str:
    fields = ("name", "placement", "dispatch", "residency", "prefetch", "scope")
    return "\n".join(["```toml", *(f'{field} = "{getattr(PREFETCH, field)}"' for field in fields), "```"])


def figures_table(found: Found) -> str:
    rows = [
        [name, f"**{factor(paper)}**", *map(factor, ours), lies(paper, ours)] for name, paper, ours in figures(found)
    ]
    inside = sum(row[-1] != NOWHERE for row in rows)
    meet = len({row[-1] for row in rows}) == 1
    return "\n\n".join(
        [
            f"{inside} of the paper's {len(rows)} figures lie within what {FULL[0]} to {FULL[-1]} DIMMs give here, "
            f"{'all' if meet else 'but not all'} at the same number of DIMMs.",
            table(["", "the paper", *(f"{units} DIMMs" for units in FULL), "same as the paper at"], rows),
        ]
    )


def differences(found: Found) -> str:
    """The paper's figures beside ours, and why they differ."""
    system = machine()
    crossing = {n: n * system.ndp.bandwidth_gb_s / system.link.bandwidth_gb_s for n in FULL}
    decode = {policy: over(found, "monde", policy, "decode_s") for policy in PAPER_DECODE}
    gain = [100 * (b / t - 1) for b, t in zip(decode[BALANCE], decode[TP], strict=True)]
    paper_gain = 100 * (PAPER_DECODE[BALANCE][1] / PAPER_DECODE[TP][1] - 1)
    chosen = sorted({mt.load_model(model).top_k for model in MODELS})
    ends = {
        model: span([found.over("monde", ALL, model, n) for n in FULL]) for model in ("qwen3-30b-a3b", "mixtral-8x7b")
    }
    balanced = qwen(found, BALANCE, "prefill_moe_s")
    macs = [
        other.prefill_moe_s / mine.prefill_moe_s
        for other, mine in zip(found.more_macs[::2], found.more_macs[1::2], strict=True)
    ]
    rows = [
        [
            "Gain from balance over TP in decode",
            f"{paper_gain:.0f} %",
            f"{min(gain):.0f} to {max(gain):.0f} %",
            "Here an expert crosses the link whole or not at all. While one crosses, "
            + ", ".join(f"{n} DIMMs read {value:.1f}" for n, value in crossing.items())
            + f" experts. A token chooses {', '.join(map(str, chosen[:-1]))} or {chosen[-1]} in a layer. Many "
            "DIMMs have read all of these before the first one has crossed. If every expert could be divided between "
            f"link and DIMMs, the gain would be up to {100 / crossing[FULL[0]]:.0f} % with {FULL[0]} DIMMs and up to "
            f"{100 / crossing[FULL[-1]]:.0f} % with {FULL[-1]}. The paper's exact rule is not known to us.",
        ],
        [
            "The models' spread end to end, all three over MoNDE",
            f"mean {factor(PAPER_MEAN)}, most {factor(PAPER_MAX)}",
            ", ".join(f"`{model}` {text}" for model, text in ends.items()),
            "A token of Mixtral or Phi-3.5-MoE chooses two experts. With MoNDE each of them is on one DIMM, so at most "
            "two DIMMs work; with TP all do. This gain grows with each DIMM, and more than it would in a machine: the "
            "timing model charges nothing for the synchronization of DIMMs. Qwen3's experts are small, so attention, "
            "launches and commands, which no policy changes, take a larger share of its time.",
        ],
        [
            "End to end over on-demand, most",
            f"at most {factor(PAPER_OVER_ON_DEMAND)}",
            span(over_rival(found, found.on_demand_s)),
            "DIMMs do not help on-demand, so this figure grows with each DIMM as well; it is Mixtral's. On-demand here "
            "keeps the experts used last in all of the GPU's free memory. Whether the paper's does is not known to us.",
        ],
        [
            "End to end over Fiddler, most",
            f"at most {factor(PAPER_OVER_FIDDLER)}",
            f"{span(over_rival(found, found.fiddler_s))}; with a slower CPU "
            f"{span(over_rival(found, found.slow_fiddler_s))}",
            "Fiddler has no DIMMs either, and this is Mixtral's figure, too. The first range has the CPU at its peak, "
            f"like all other parts here. The second has it read at {percent(SLOW_CPU)} of its memory's bandwidth, as "
            "[fits published speeds of llama.cpp best](real.md). Fiddler here knows from the start which experts of "
            "the trace are popular.",
        ],
        [
            "Experts of Qwen3, prefill, TP over MoNDE",
            factor(PAPER_QWEN_PREFILL),
            span(qwen(found, TP, "prefill_moe_s")),
            "Here the step TP runs the whole prompt on the DIMMs, while MoNDE gives the hottest experts to the GPU. "
            f"With {MORE_MACS} times the arithmetic in each DIMM it still reaches only {span(macs[1:])}. So the "
            "paper's step TP probably leaves a part of the prompt to the GPU. Here TP + balance does, and reaches "
            f"{span(balanced)}.",
        ],
    ]
    return table(["", "the paper", f"here, {FULL[0]} to {FULL[-1]} DIMMs", "why it differs"], rows)


def models_table(found: Found) -> str:
    rows = []
    for model in MODELS:
        values = [found.over("monde", ALL, model, units) for units in UNITS]
        rows.append(
            [f"`{model}`", str(found.slots_a_layer[model]), percent(found.overlap[model]), *map(factor, values)]
        )
    shared = over(found, ALL, "edge-ndp")
    return "\n\n".join(
        [
            "![End-to-end speed-up over MoNDE on 2 to 6 DIMMs](../bench/edge_ndp.png)",
            table(["model", "in GPU", "overlap", *(f"{units} DIMMs" for units in UNITS)], rows),
            f"The preset `edge-ndp`, in which all layers share the GPU's room, is {span(shared)} as fast as this "
            f"(means over the models, {FULL[0]} to {FULL[-1]} DIMMs).",
        ]
    )


def verdict(holds: bool) -> str:
    return "holds" if holds else "does not hold"


def claims(found: Found) -> str:
    bullets = [small_models_lose(found), gains_shrink(found), more_slots_may_be_worse(found.sweeps)]
    return "Statements are in italics. The first two are the paper's.\n\n" + "\n".join(bullets)


def small_models_lose(found: Found) -> str:
    two = UNITS[0]
    ends = {model: found.over("monde", TP, model, two) for model in SMALL}
    decode = {model: found.over("monde", TP, model, two, "decode_s") for model in SMALL}
    alone = [found.over("ndp-ep", TP, model, units) for model in MODELS for units in UNITS]
    known = [value for value in alone if value is not None]
    decodes = verdict(all(value < 1 for value in decode.values()))

    def said(values: dict[str, float]) -> str:
        return ", ".join(f"`{model}` {factor(value)}" for model, value in values.items())

    return (
        f"- *With {two} DIMMs, TP without balance is slightly slower than MoNDE for DeepSeekMoE and Qwen3*: end to end "
        f"it {verdict(all(value < 1 for value in ends.values()))} ({said(ends)}); in decode it {decodes} "
        f"({said(decode)}). End to end over only the DIMMs without TP (`ndp-ep`), all models: {span(known)}."
    )


def gains_shrink(found: Found) -> str:
    decode = {policy: over(found, "monde", policy, "decode_s") for policy in (TP, BALANCE, BOTH)}
    gains = {policy: [b / a for a, b in zip(decode[TP], decode[policy], strict=True)] for policy in (BALANCE, BOTH)}
    holds = all(values == sorted(values, reverse=True) and values[0] > values[-1] for values in gains.values())
    parts = [
        f"{name} {', '.join(map(factor, gains[policy]))}" for policy, name in ((BALANCE, "balance"), (BOTH, "prefetch"))
    ]
    return (
        f"- *With more DIMMs, balance and prefetch gain less*: {verdict(holds)}. Decode over TP, means on "
        f"{FULL[0]} to {FULL[-1]} DIMMs: {'; '.join(parts)}."
    )


def more_slots_may_be_worse(sweeps: list[Sweep]) -> str:
    bent = [one for one in sweeps if one.loss >= WORSE]
    straight = [model for model in (*MODELS, ALL_FIT) if model not in {one.model for one in bent}]
    outside = f"`{ALL_FIT}` is not one of the paper's models; it is here because the GPU can hold all its experts."
    text = (
        f"- *More prefetched experts are not always better*: {verdict(bool(bent))}. One request on "
        f"{UNITS[-1]} DIMMs, from no expert a layer to as many as the GPU has room for. {outside}"
    )
    for one in bent:
        reading = "if decoding waits for the prefetch" if one.blocks else "if it does not wait"
        text += (
            f" `{one.model}`, {reading}: {one.a_layer[one.best]} of {one.a_layer[-1]} are best, and all of them take "
            f"{100 * (one.loss - 1):.1f} % longer."
        )
    names = ", ".join(f"`{model}`" for model in straight)
    return f"{text} Not for {names}: the GPU's memory ends before." if straight else text


def every_figure(found: Found) -> str:
    headings = ["model", "DIMMs", "policy", "total s", "prefill s", "decode s", "TPOT ms", "hits %"]
    headings += ["over monde", "prefill", "decode"]
    rows = [
        [
            p.model,
            str(p.units),
            p.policy,
            *(f"{seconds:.3f}" for seconds in (p.total_s, p.prefill_s, p.decode_s)),
            f"{1e3 * p.tpot_s:.3f}",
            f"{100 * p.hit_rate:.1f}",
            *(factor(found.over("monde", p.policy, p.model, p.units, f)) for f in ("total_s", "prefill_s", "decode_s")),
        ]
        for p in found.points
    ]
    rivals = [
        [model, *(f"{times[model]:.3f}" for times in (found.on_demand_s, found.fiddler_s, found.slow_fiddler_s))]
        for model in MODELS
    ]
    swept = [
        [one.model, "yes" if one.blocks else "no", str(count), f"{seconds:.4f}"]
        for one in found.sweeps
        for count, seconds in zip(one.a_layer, one.total_s, strict=True)
    ]
    return "\n\n".join(
        [
            "# The experiment of arXiv 2601.03992, every figure",
            "Written by `python bench/edge_ndp.py --write`; [what it means](../docs/experiment.md).",
            f"Batch 1, {REQUESTS} requests of {PROMPT} prompt and {OUTPUT} output tokens. Policy `edge-ndp` shares the "
            "GPU's room over all layers, `edge-ndp-layer` gives each layer as much.",
            table(headings, rows),
            "## Without DIMMs\n\nSeconds for the same requests; Fiddler with its CPU at peak, and with its memory at "
            f"{percent(SLOW_CPU)}.",
            table(["model", "on-demand", "fiddler", f"fiddler, {percent(SLOW_CPU)}"], rivals),
            f"## More and more experts a layer\n\n`edge-ndp-layer`, one request, {UNITS[-1]} DIMMs.",
            table(["model", "decoding waits", "experts a layer", "total s"], swept) + "\n",
        ]
    )
