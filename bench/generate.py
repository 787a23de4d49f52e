"""Speed of `moetrace generate`'s drawing on one core, beside a NumPy Gumbel top-k of the same shape in the same run.

    python bench/generate.py [--rounds 7] [--rows 512]

Each round times every case once, moetrace and NumPy in turn; the table shows medians over the rounds.
"""

import argparse
from statistics import median
from time import perf_counter

import numpy as np
from rich.console import Console
from rich.table import Table

from moetrace.generators import ProfileDrawer, ZipfDrawer, load_profile
from moetrace.spec import load_model

TARGET_MIDS_S = {"zipf": 20, "profile": 2}
# model, zipf, stick; the last two leave draws by rejection little to find
CASES = [
    ("qwen3-30b-a3b", 0.6, 0.0),
    ("qwen3-30b-a3b", 0.6, 0.3),
    ("mixtral-8x7b", 0.6, 0.3),
    ("deepseek-v3", 0.6, 0.3),
    ("qwen3-30b-a3b", 2.0, 0.0),
    ("qwen3-30b-a3b", 3.0, 0.0),
]
PROFILES = ["qwen3-30b-a3b", "deepseek-v2-lite", "gpt-oss-20b", "mixtral-8x7b"]


def gumbel_top_k(random, rows, model, zipf):
    """The same draw with NumPy: Gumbel noise on log-popularity, then a partial sort; uint [rows, layers, k]."""
    log_popularity = (-zipf * np.log(np.arange(1, model.experts + 1))).astype(np.float32)
    noise = random.standard_exponential((rows, model.moe_layers, model.experts), dtype=np.float32)
    scores = log_popularity - np.log(np.maximum(noise, np.float32(1e-30)))
    return np.argpartition(-scores, model.top_k - 1, axis=2)[:, :, : model.top_k].astype(np.uint16)


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--rows", type=int, default=512)
    options = options.parse_args()
    request = np.zeros(options.rows, np.int32)
    position = np.arange(options.rows, dtype=np.int32)
    random = np.random.default_rng(0)
    cases = [(load_model(name), zipf, f"zipf {zipf:g}, stick {stick:g}") for name, zipf, stick in CASES]
    drawers = [ZipfDrawer(model, zipf, stick, 0) for (model, zipf, _), (_, _, stick) in zip(cases, CASES, strict=True)]
    for name in PROFILES:
        profile = load_profile(name)
        cases.append((load_model(profile.model), 0.6, f"profile {name}"))
        drawers.append(ProfileDrawer(profile, 0, prompt=options.rows // 2, top_k=cases[-1][0].top_k))
    times = [([], []) for _ in cases]
    for turn in range(options.rounds + 1):
        for (model, zipf, _), drawer, (ours, theirs) in zip(cases, drawers, times, strict=True):
            start = perf_counter()
            drawer.draw(request, position)
            middle = perf_counter()
            gumbel_top_k(random, options.rows, model, zipf)
            if turn:  # the first round compiles and warms up
                ours.append(middle - start)
                theirs.append(perf_counter() - middle)
    table = Table("model", "drawn by", "ns an id", "M ids/s a core", "target", "NumPy ns an id", "ratio")
    for (model, _, how), (ours, theirs) in zip(cases, times, strict=True):
        ids = options.rows * model.moe_layers * model.top_k
        ours_ns, theirs_ns = (median(seconds) / ids * 1e9 for seconds in (ours, theirs))
        target = f">= {TARGET_MIDS_S[how.partition(' ')[0]]}"
        speed = [f"{ours_ns:.1f}", f"{1e3 / ours_ns:.0f}", target, f"{theirs_ns:.0f}", f"{theirs_ns / ours_ns:.0f}x"]
        table.add_row(model.name, how, *speed)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
