"""How like its capture a generated trace is: shipped profiles against requests that they were not fitted to.

    python bench/profiles.py [--captures DIR] [--fit NAME ...] [--write docs/generate.md]

Of each capture the requests of even number are for the fit and those of odd number are held out. The table compares
statistics (means over layers) and the replay's speed-ups of the held-out half with those of traces that are generated
for its schedule, from the profile as shipped; medians over several seeds. --fit fits the named profiles anew to the
other half and writes them where they ship from.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from markers import write_between
from rich.console import Console

import moetrace as mt
from moetrace.analyze.locality.rows import Sample
from moetrace.analyze.locality.skew import gini
from moetrace.generators import ProfileDrawer, load_profile, save_profile
from moetrace.generators.fit import MOMENTS, MeasuredTrace, fit_profile, moments, search, take_sample
from moetrace.importers.importing import import_traces
from moetrace.trace import Trace

SHIPPED = Path(mt.__file__).parent / "generators" / "profiles"
POLICIES = ["monde", "ndp-ep", "edge-ndp", "edge-ndp-tp-lb", "on-demand"]
SEEDS = (1, 2, 3, 4, 5)  # not that of the fits
COMPARED = MOMENTS[:-1]
TOLERANCE = dict.fromkeys(COMPARED, 0.10) | {"next_layer_recall": 0.15, "icc": 0.15} | dict.fromkeys(POLICIES, 0.05)
TITLES = {
    "gini": "Gini",
    "overlap_1": "overlap, lag 1",
    "overlap_4": "overlap, lag 4",
    "overlap_16": "overlap, lag 16",
    "overlap_64": "overlap, lag 64",
    "lru_e8": "LRU hits, E/8 slots",
    "lru_e4": "LRU hits, E/4 slots",
    "next_layer_recall": "next-layer recall",
    "icc": "correlation of requests",
}


class Capture(NamedTuple):
    """Files of one model, and where they are from (a comment of the profile's TOML)."""

    files: tuple[str, ...]
    source: str
    decode_after: int | None = None  # text was fed in at once: the replay takes this number of rows as the prompt


CAPTURES = {
    "deepseek-v2-lite": Capture(
        ("real_deepseek-v2-lite_esft_law.npz", "real_deepseek-v2-lite_esft_summary.npz"),
        "deepseek-ai/ESFT (commit 579a7711, MIT), results/expert_scores: law and summary, teacher-forced text;\n"
        "the requests of even number, 23 of 46. In the capture all rows are of one phase: phase = 0 is assumed.\n"
        "It has no token ids: vocabulary, token_zipf and half of what is not memory for tokens are assumed.",
        64,
    ),
    "gpt-oss-20b": Capture(
        ("real_gpt-oss-20b_decode_24req_weights.npz",),
        "AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting (commit 72b368f6, Apache-2.0), decode of 24 requests;\n"
        "those of even number. It holds no prompts: phase = 0 and sink = 0 are assumed.\n"
        "It has no token ids: vocabulary, token_zipf and half of what is not memory for tokens are assumed.",
    ),
    "qwen3-30b-a3b": Capture(
        ("qwen3-30b_bigmoeonedge.route.csv",),
        "Helldez/BigMoeOnEdge (commit 2d4f2b11, Apache-2.0), one request, 28 prompt and 128 output tokens, top 6\n"
        "(lowered by its author from 8). One request can't tell what all requests have in common: request = 0.1 and\n"
        "sink = 0 are assumed, and popularity is as unequal as within that request.\n"
        "It has no token ids: vocabulary, token_zipf and half of what is not memory for tokens are assumed.",
    ),
    "tiny-olmoe": Capture(
        ("tiny-olmoe_aux.npz",),
        "An OLMoE of 5.4 M parameters, trained for minutes; 64 requests, those of even number. All measured.",
    ),
}
MIXTRAL = "mixtral-8x7b"
MIXTRAL_SOURCE = (
    "Measured: skew and curve, from the counts of efeslab/fiddler (branch popularity, commit 7f82a2d2, Apache-2.0;\n"
    "Mixtral-8x7B-Instruct, 7 subjects of MMLU); request and slow, from how much these subjects differ; fast,\n"
    "from how often two tokens in a row share an expert (Jiang et al. 2024, arXiv:2401.04088, table 5, layers 0, 15\n"
    "and 31). Assumed, as in deepseek-v2-lite: slow_rows, fast_rows, depth, tokens and sink; and phase = 0."
)
NOTES = [
    "*Fitted half* and *held out* are the requests of even and of odd number. Where the halves differ by more than is",
    "allowed (10 %; recall and correlation 15 %, speed-ups 5 %), no profile fitted to one can be sure to match the",
    "other. Speed-ups are over `monde` on system `edge-ndp`, with slots for a quarter of all experts.",
    "`qwen3-30b-a3b` has one captured request, so nothing is held out and there is no correlation between requests;",
    "`mixtral-8x7b` has no captured trace, only counts and published figures, which stand in the column of the fitted",
    "half. `gpt-oss-20b` was captured without prompts: `edge-ndp` prefetches nothing, and equals `edge-ndp-tp-lb`.",
]
# Two tokens in a row share an expert, mean of the eight sources of that table, in layers 0, 15 and 31.
MIXTRAL_SHARE = {0: 0.4804, 15: 0.6369, 31: 0.5091}


def imported(capture, captures):
    """The capture as a trace in memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "capture.h5"
        import_traces([captures / name for name in capture.files], path, decode_after=capture.decode_after)
        with Trace.open(path) as trace:
            return part_of(trace, lambda request: request >= 0)


def part_of(trace, chosen):
    """The steps of `trace`, in memory, with the rows of the requests that are `chosen` (a mask of request numbers)."""
    names = ("experts", "request", "position", *(name for name in ("token",) if name in trace.has))
    rows = {name: trace.read(name, 0, trace.rows) for name in names}
    keep = chosen(rows["request"])
    step = np.repeat(np.arange(trace.steps), np.diff(trace.offset))[keep]
    kept, count = np.unique(step, return_counts=True)
    rows = {name: array[keep] for name, array in rows.items()}
    return Trace.from_arrays(
        rows.pop("experts"),
        num_experts=trace.num_experts,
        model=trace.model,
        layer_index=trace.layer_index,
        steps=count,
        phase=trace.phase[kept],
        **rows,
    )


def halves(trace):
    """Fitted and held-out half; of a single request, all of it and None."""
    if np.unique(trace.read("request", 0, trace.rows)).size == 1:
        return trace, None
    return part_of(trace, lambda request: request % 2 == 0), part_of(trace, lambda request: request % 2 == 1)


def generated(profile, trace, seed):
    """A trace with the very schedule of `trace`, absent choices too, drawn from `profile`."""
    experts, request, position = (trace.read(name, 0, trace.rows) for name in ("experts", "request", "position"))
    phase = np.repeat(trace.phase, np.diff(trace.offset))
    number = np.unique(request, return_inverse=True)[1].astype(np.int32)
    order = np.argsort(number, kind="stable")
    first = np.searchsorted(number[order], number[order])
    from_zero = np.empty(number.size, np.int32)
    from_zero[order] = np.arange(number.size) - first
    drawer = ProfileDrawer(profile, seed, slots=int(number.max()) + 1, top_k=trace.top_k)
    drawn = drawer.draw(number, from_zero, phase)
    absent = np.iinfo(experts.dtype).max
    drawn[experts == absent] = absent
    return Trace.from_arrays(
        drawn,
        num_experts=trace.num_experts,
        model=trace.model,
        layer_index=trace.layer_index,
        request=request,
        position=position,
        steps=np.diff(trace.offset),
        phase=trace.phase,
    )


def figures(trace):
    """Statistics and speed-ups of a trace, by name."""
    found = dict(zip(MOMENTS, moments(take_sample(trace, trace.rows), trace.num_experts), strict=True))
    slots = trace.layers * trace.num_experts // 4
    summary = mt.replay(trace, system="edge-ndp", policies=POLICIES, slots=slots).summary
    return found | dict(zip(POLICIES, summary["speedup"].to_list(), strict=True))


def fit(name, captures, console):
    """Fit a profile to its half and write it where it ships from."""
    start, busy = time.perf_counter(), time.process_time()
    if name == MIXTRAL:
        profile, source = fit_mixtral(captures), MIXTRAL_SOURCE
    else:
        as_captured = CAPTURES[name]._replace(decode_after=None)
        profile = fit_profile(halves(imported(as_captured, captures))[0], name=name)
        source = CAPTURES[name].source
    comment = f"How {profile.model} routes; docs/generate.md explains each value. Made by bench/profiles.py --fit.\n"
    save_profile(profile, SHIPPED / f"{name}.toml", comment + f"Source: {source}")
    wall_s, cpu_s = time.perf_counter() - start, time.process_time() - busy
    console.print(f"{name}: fitted in {wall_s:.0f} s, of which {cpu_s:.0f} s on a core")


def mixtral_counts(captures):
    """Choices int64 [subjects, layers, experts] of the instruct model."""
    files = sorted((captures / "fiddler_popularity").glob("mixtral_8x7b_instruct__*.json"))
    return np.array([json.loads(file.read_text())["expert_popularity"] for file in files])


def mixtral_moments(counts):
    """The moments that the counts tell: Gini of all subjects together, and how much subjects differ."""
    total = counts.sum(axis=0)
    share = counts * (2 / counts.sum(axis=2, keepdims=True))  # of the rows that chose the expert
    p = 2 * total / total.sum(axis=1, keepdims=True)
    icc = share.var(axis=0, ddof=1).sum(axis=1) / (p * (1 - p)).sum(axis=1)
    return float(np.mean([gini(layer) for layer in total])), float(icc.mean())


def fit_mixtral(captures):
    """Fit what is known of Mixtral to a schedule of 16 requests of 256 rows; the rest is DeepSeek-V2-Lite's."""
    counts = mixtral_counts(captures)
    near, model = load_profile("deepseek-v2-lite"), mt.load_model(MIXTRAL)
    rows = np.arange(16 * 256)
    sample = Sample(
        np.zeros((model.moe_layers, rows.size, model.top_k), np.uint16),
        (rows // 256 * 256).astype(np.int32),
        (rows // 256).astype(np.int32),
        np.ones(rows.size, np.uint8),
        rows % 256 == 0,
    )
    ranked = np.log(np.sort(counts.sum(axis=0), axis=1)[:, ::-1])
    ranked -= ranked.mean(axis=1, keepdims=True)
    spread = ranked.std(axis=1)
    profile = {
        "name": MIXTRAL,
        "model": MIXTRAL,
        "layers": model.moe_layers,
        "experts": 8,
        "top_k": 2,
        "sink": near.sink,
    }
    profile |= {"skew": spread.tolist(), "curve": [float(f"{value:.4g}") for value in (ranked.T / spread).mean(axis=1)]}
    profile |= {"vocabulary": near.vocabulary, "token_zipf": near.token_zipf}
    wanted = np.full(len(MOMENTS), np.nan)
    wanted[0], wanted[MOMENTS.index("icc")] = mixtral_moments(counts)
    share = float(np.interp(np.arange(model.moe_layers), list(MIXTRAL_SHARE), list(MIXTRAL_SHARE.values())).mean())
    # Overlap is (share with one in common + share with both) / 2; the profile says how many have both.
    found, both = near, 0.07
    for _ in range(2):
        wanted[1] = (share + both) / 2
        found = search(sample, wanted, MeasuredTrace(profile), near=near)
        one_or_both, both = shared_in_a_row(mixtral_trace(found, 0))
    assert abs(one_or_both / share - 1) < 0.1
    return found


def mixtral_trace(profile, seed):
    return mt.generate_trace(profile=profile, requests=16, prompt=0, output=256, seed=seed)


def shared_in_a_row(trace):
    """Which share of rows has an expert, and which both, in common with the request's row before."""
    experts, request = (trace.read(name, 0, trace.rows) for name in ("experts", "request"))
    order = np.argsort(request, kind="stable")
    experts, same = experts[order], np.diff(request[order]) == 0
    common = (experts[1:, :, :, None] == experts[:-1, :, None, :]).sum(axis=(2, 3))[same]
    return float((common > 0).mean()), float((common == 2).mean())


def compare(name, captures):
    """Rows of the table: (what, fitted half, held-out half, generated, tolerance); None where there is nothing."""
    profile = load_profile(name)
    if name == MIXTRAL:
        traces = [mixtral_trace(profile, seed) for seed in SEEDS]
        found = [moments(take_sample(trace, trace.rows), 8) for trace in traces]
        known = mixtral_moments(mixtral_counts(captures))
        share = float(np.interp(np.arange(32), list(MIXTRAL_SHARE), list(MIXTRAL_SHARE.values())).mean())
        return [
            ("Gini", known[0], None, median(each[0] for each in found), 0.10),
            (
                "a token shares an expert with the next",
                share,
                None,
                median(shared_in_a_row(t)[0] for t in traces),
                0.10,
            ),
            ("correlation of subjects", known[1], None, median(each[8] for each in found), 0.15),
        ]
    fitted, held = halves(imported(CAPTURES[name], captures))
    theirs = figures(fitted)
    others = figures(held) if held is not None else None
    ours = [figures(generated(profile, held or fitted, seed)) for seed in SEEDS]
    rows = []
    for what in (*COMPARED, *POLICIES[1:]):
        if np.isnan(theirs[what]):
            continue
        title = TITLES.get(what, f"speed-up of {what}")
        middle = median(each[what] for each in ours)
        rows.append((title, theirs[what], others and others[what], middle, TOLERANCE[what]))
    real = others or theirs
    ranked = [
        sorted(POLICIES, key=lambda policy: -each[policy])
        for each in (real, {k: median(o[k] for o in ours) for k in POLICIES})
    ]
    rows.append(("ranking of the policies", None, None, ranked[0] == ranked[1], None))
    return rows


def table(results):
    lines = [
        "| profile | | captured, fitted half | captured, held out | generated | off by | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, rows in results.items():
        for index, (title, fitted, held, ours, tolerance) in enumerate(rows):
            first = f"`{name}`" if index == 0 else ""
            if tolerance is None:
                lines.append(f"| {first} | {title} | | | {'the same' if ours else 'differs'} | | |")
                continue
            real = fitted if held is None else held
            off = ours / real - 1
            lines.append(
                f"| {first} | {title} | {fitted:.3f} | {'none' if held is None else f'{held:.3f}'} | {ours:.3f} | "
                f"{off:+.1%} | {remark(fitted, held, off, tolerance)} |"
            )
    return "\n".join([*lines, "", *NOTES])


def summary(results):
    """A line for each profile: how many figures are within their target, and what is farthest off, relative to it."""
    lines = ["| profile | within target | farthest off | policies |", "| --- | --- | --- | --- |"]
    for name, rows in results.items():
        measured = [(title, ours / (fitted if held is None else held) - 1, limit, remark(fitted, held, 0, limit))
                    for title, fitted, held, ours, limit in rows if limit is not None]  # fmt: skip
        title, off, _, why = max(measured, key=lambda figure: abs(figure[1]) / figure[2])
        within = sum(abs(off) <= limit for _, off, limit, _ in measured)
        ranking = {True: "same ranking", False: "other ranking"} | {None: "-"}
        same = next((ours for title, _, _, ours, limit in rows if limit is None), None)
        farthest = f"{title} {off:+.1%}" + (f" ({why})" if why else "")
        lines.append(f"| `{name}` | {within} of {len(measured)} | {farthest} | {ranking[same]} |")
    return "\n".join(lines)


def remark(fitted, held, off, tolerance):
    """Why a figure is off by more than the tolerance, or that the halves are."""
    apart = None if held is None else fitted / held - 1
    if apart is not None and abs(apart) > tolerance:
        return f"the halves differ by {apart:+.1%}"
    return "" if abs(off) <= tolerance else f"above {tolerance:.0%}"


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--captures", type=Path, default=Path(__file__).parents[2] / "shared" / "traces")
    options.add_argument("--fit", nargs="+", default=[], metavar="NAME", choices=[*CAPTURES, MIXTRAL])
    options.add_argument("--only", nargs="+", default=[*CAPTURES, MIXTRAL], metavar="NAME")
    options.add_argument("--write", type=Path, metavar="PAGE.md", help="write the tables between the page's markers")
    options = options.parse_args()
    console = Console()
    for name in options.fit:
        fit(name, options.captures, console)
    results = {name: compare(name, options.captures) for name in options.only}
    page = f"{summary(results)}\n\n{table(results)}"
    console.print(page, markup=False, soft_wrap=True)
    if options.write:
        write_between(options.write, "profiles", page)


if __name__ == "__main__":
    main()
