"""The experiment of arXiv 2601.03992: `edge-ndp` and its ablations against `monde`, batch 1, 2 to 6 NDP-DIMMs.

    python bench/edge_ndp.py            print tables and shapes
    python bench/edge_ndp.py --write    also write bench/edge_ndp.md and .png, and the table in docs/experiment.md
    python bench/edge_ndp.py --check    exit 1 if the tables in bench/edge_ndp.md or docs/experiment.md are stale

`--write` needs matplotlib (`pip install '.[bench]'`). Everything is seeded: a second run gives the same files.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
from markers import replaced_between

import moetrace as mt

ROOT = Path(__file__).parents[1]
PAGE, TABLE, PLOT = ROOT / "docs/experiment.md", ROOT / "bench/edge_ndp.md", ROOT / "bench/edge_ndp.png"

# Model -> zipf and stick of its trace. Mixtral's fits the popularity that Fiddler's authors published, Qwen3's the
# overlap of successive tokens in a public capture, DeepSeek's both in public captures; OLMoE's popularity is between
# what its authors report per domain, and its stick is assumed.
MODELS = {
    "qwen3-30b-a3b": (0.6, 0.3),
    "mixtral-8x7b": (0.25, 0.2),
    "olmoe-1b-7b": (0.6, 0.3),
    "deepseek-v2-lite": (0.4, 0.2),
}
UNITS = range(2, 7)
PROMPT = OUTPUT = 512
REQUESTS = 8
POLICIES = ("monde", "ndp-ep", "edge-ndp-tp", "edge-ndp-tp-lb", "edge-ndp")
PAPER_MEAN, PAPER_MAX = 2.41, 2.56  # end to end, over MoNDE: abstract of arXiv 2601.03992
SLOT_STEPS = 16
WORSE = 1.005  # a sweep bends up if its last point takes this much longer than its best


class Point(NamedTuple):
    """A policy's figures for one model and number of DIMMs."""

    model: str
    units: int
    policy: str
    slots: int
    total_s: float
    prefill_s: float
    decode_s: float
    tpot_s: float
    hit_rate: float
    speedup: float  # over monde, end to end
    prefill_speedup: float
    decode_speedup: float


class Sweep(NamedTuple):
    """One request through `edge-ndp` with more and more slots; `blocks`: decoding waits for the prefetch."""

    model: str
    blocks: bool
    slots: list[int]
    total_s: list[float]

    @property
    def best(self) -> int:
        return min(range(len(self.slots)), key=self.total_s.__getitem__)

    @property
    def loss(self) -> float:
        """How much longer all slots take than the best number of them."""
        return self.total_s[-1] / self.total_s[self.best]


def trace_of(model: str, requests: int) -> mt.Trace:
    zipf, stick = MODELS[model]
    return mt.generate_trace(model, requests=requests, prompt=PROMPT, output=OUTPUT, zipf=zipf, stick=stick, seed=0)


def overlap(trace: mt.Trace) -> float:
    """Share of a decode token's experts that the token before it chose in that layer as well."""
    experts = trace.read("experts", PROMPT, PROMPT + OUTPUT)
    same = experts[1:, :, :, None] == experts[:-1, :, None, :]
    return float(np.mean(same.any(axis=3)))


def measure(model: str, trace: mt.Trace) -> Iterator[Point]:
    """All policies on 2 to 6 DIMMs; nothing where the experts do not fit them."""
    for units in UNITS:
        try:
            result = mt.replay(trace, policies=POLICIES, overrides={"system.ndp.units": units})
        except mt.UsageError:
            continue
        rows = result.summary.to_dicts()
        monde = rows[0]
        for row in rows:
            yield Point(
                model,
                units,
                row["name"],
                result.run.slots,
                *(row[name] for name in ("total_s", "prefill_s", "decode_s", "tpot_s_p50", "hit_rate")),
                *(monde[name] / row[name] for name in ("total_s", "prefill_s", "decode_s")),
            )


def sweep(model: str, blocks: bool, most: int) -> Sweep:
    trace = trace_of(model, 1)
    slots = sorted({most * i // SLOT_STEPS for i in range(SLOT_STEPS + 1)})
    overrides = {"policy.prefetch_blocks": blocks}
    results = [mt.replay(trace, policies="edge-ndp", slots=count, overrides=overrides) for count in slots]
    return Sweep(model, blocks, slots, [result.summary["total_s"][0] for result in results])


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [headings, ["---"] * len(headings), *rows])


def speedup(points: list[Point], model: str, units: int, policy: str) -> float | None:
    return next((p.speedup for p in points if p[:3] == (model, units, policy)), None)


def factor(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}x"


def readme_text(points: list[Point], overlaps: dict[str, float], sweeps: list[Sweep]) -> str:
    rows = []
    for model, (zipf, stick) in MODELS.items():
        values = [speedup(points, model, units, "edge-ndp") for units in UNITS]
        known = [value for value in values if value is not None]
        spec = mt.load_model(model)
        slots = next(p.slots for p in points if p.model == model)
        rows.append(
            [
                f"`{model}`",
                f"{zipf:g}, {stick:g}",
                f"{overlaps[model]:.0%}",
                f"{slots / (spec.moe_layers * spec.experts):.0%}",
                *map(factor, values),
                f"**{factor(fmean(known))}**",
            ]
        )
    ours = [p.speedup for p in points if p.policy == "edge-ndp"]
    headings = ["model", "zipf, stick", "overlap", "in GPU", *(f"{u} DIMMs" for u in UNITS), "mean"]
    means = {policy: fmean(p.speedup for p in points if p.policy == policy) for policy in POLICIES[2:]}
    return "\n\n".join(
        [
            f"![End-to-end speed-up over monde on 2 to 6 DIMMs](../{PLOT.relative_to(ROOT)})",
            "End-to-end speed-up of `edge-ndp` over `monde`:",
            markdown(headings, rows),
            f"| | mean | least | most |\n| --- | --- | --- | --- |\n"
            f"| here | {factor(fmean(ours))} | {factor(min(ours))} | {factor(max(ours))} |\n"
            f"| arXiv 2601.03992 | {PAPER_MEAN}x | | {PAPER_MAX}x |",
            "Step by step, means over the same machines: "
            + ", ".join(f"`{policy}` {factor(value)}" for policy, value in means.items())
            + ".",
            *shapes(points, sweeps),
        ]
    )


def shapes(points: list[Point], sweeps: list[Sweep]) -> list[str]:
    """The two shapes that the paper reports, each with what was found here."""
    return [tensor_parallelism_may_lose(points), more_slots_may_be_worse(sweeps)]


def tensor_parallelism_may_lose(points: list[Point]) -> str:
    two = UNITS[0]
    parts, losses, gains = [], 0, []
    for model in MODELS:
        fewest = min(point.units for point in points if point.model == model)
        speedups = {point.policy: point.speedup for point in points if point[:2] == (model, fewest)}
        losses += fewest == two and speedups["edge-ndp-tp"] < 1
        gains.append(speedups["edge-ndp-tp"] / speedups["ndp-ep"])
        where = "" if fewest == two else f" (on {fewest}, as it needs)"
        parts.append(f"`{model}` {factor(speedups['edge-ndp-tp'])}{where}")
    return (
        f"- *Tensor parallelism alone may lose at {two} DIMMs*: {'holds' if losses else 'does not hold'}. "
        f"`edge-ndp-tp` over `monde` there: {', '.join(parts)}. Over expert parallelism on the units alone (`ndp-ep`) "
        f"it gains: {factor(min(gains))} to {factor(max(gains))}."
    )


def more_slots_may_be_worse(sweeps: list[Sweep]) -> str:
    bent = [one for one in sweeps if one.loss >= WORSE]
    straight = sorted({one.model for one in sweeps} - {one.model for one in bent})
    text = (
        f"- *More prefetch slots are not always better*: {'holds' if bent else 'does not hold'}. One request on "
        f"{UNITS[-1]} DIMMs, from 0 slots to as many as the GPU has room for."
    )
    for one in bent:
        reading = "if decoding waits for the prefetch" if one.blocks else "if it does not wait"
        text += (
            f" `{one.model}` {reading}: {one.slots[one.best]:,} of {one.slots[-1]:,} slots are best, and all of them "
            f"take {100 * (one.loss - 1):.1f} % longer."
        )
    names = ", ".join(f"`{model}`" for model in straight)
    return f"{text} Not within the GPU's memory for {names}, whether it waits or not." if straight else text


def full_text(points: list[Point], sweeps: list[Sweep]) -> str:
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
            *map(factor, (p.speedup, p.prefill_speedup, p.decode_speedup)),
        ]
        for p in points
    ]
    swept = [
        [one.model, "yes" if one.blocks else "no", str(slots), f"{seconds:.4f}"]
        for one in sweeps
        for slots, seconds in zip(one.slots, one.total_s, strict=True)
    ]
    return "\n\n".join(
        [
            "# The experiment of arXiv 2601.03992, every figure",
            "Written by `python bench/edge_ndp.py --write`.",
            f"Batch 1, {REQUESTS} requests of {PROMPT} prompt and {OUTPUT} output tokens, system `edge-ndp`.",
            markdown(headings, rows),
            f"## More and more slots\n\n`edge-ndp`, one request, {UNITS[-1]} DIMMs.",
            markdown(["model", "decoding waits", "slots", "total s"], swept) + "\n",
        ]
    )


def plot(points: list[Point], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Okabe and Ito's colours, apart for every kind of colour vision; markers differ too.
    styles = {
        "edge-ndp": ("#0072B2", "o", "edge-ndp"),
        "edge-ndp-tp-lb": ("#D55E00", "s", "edge-ndp-tp-lb (no prefetch)"),
        "edge-ndp-tp": ("#009E73", "^", "edge-ndp-tp (neither)"),
    }
    figure, panels = pyplot.subplots(1, len(MODELS), figsize=(10, 3.7), sharey=True, layout="constrained")
    for panel, model in zip(panels, MODELS, strict=True):
        panel.axhline(PAPER_MEAN, color="black", linestyle=":", linewidth=1.2, label=f"paper's mean ({PAPER_MEAN}x)")
        panel.axhline(1, color="grey", linewidth=1, label="monde")
        for policy, (colour, marker, label) in styles.items():
            values = [speedup(points, model, units, policy) for units in UNITS]
            panel.plot(UNITS, [value or np.nan for value in values], color=colour, marker=marker, label=label)
        for units in UNITS:
            if speedup(points, model, units, "monde") is None:
                panel.text(units, 1.06, "does not fit", rotation=90, ha="center", va="bottom", color="dimgrey")
        panel.set_title(model)
        panel.set_xlabel("NDP-DIMMs")
        panel.set_xticks(list(UNITS))
        panel.set_xlim(UNITS[0] - 0.4, UNITS[-1] + 0.4)
        panel.grid(axis="y", color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(0, None)
    panels[0].set_ylabel("end-to-end speed-up over monde (x)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False, columnspacing=1.4)
    figure.savefig(path, dpi=160, metadata={"Software": None})


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = options.add_mutually_exclusive_group()
    mode.add_argument("--write", action="store_true")
    mode.add_argument("--check", action="store_true")
    options = options.parse_args()
    points, sweeps, overlaps = [], [], {}
    for model in MODELS:
        trace = trace_of(model, REQUESTS)
        overlaps[model] = overlap(trace)
        points += measure(model, trace)
        sweeps += [sweep(model, blocks, points[-1].slots) for blocks in (False, True)]
    summary, full = readme_text(points, overlaps, sweeps), full_text(points, sweeps)
    page = PAGE.read_text(encoding="utf-8")
    new_page = replaced_between(page, "edge-ndp", summary)
    if options.check:
        stale = [
            path.name
            for path, text in ((PAGE, new_page), (TABLE, full))
            if not path.is_file() or path.read_text(encoding="utf-8") != text
        ]
        if stale:
            sys.exit(f"{' and '.join(stale)} stale: run python bench/edge_ndp.py --write.")
        return
    print(full + "\n" + summary)
    if options.write:
        PAGE.write_text(new_page, encoding="utf-8")
        TABLE.write_text(full, encoding="utf-8")
        plot(points, PLOT)


if __name__ == "__main__":
    main()
