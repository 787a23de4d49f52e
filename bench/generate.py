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

from moetrace.spec import load_model
from moetrace.trace.generate import ZipfDrawer

TARGET_MIDS_S = 20
# model, zipf, stick; the last two leave draws by rejection little to find
CASES = [
    ("qwen3-30b-a3b", 0.6, 0.0),
    ("qwen3-30b-a3b", 0.6, 0.3),
    ("mixtral-8x7b", 0.6, 0.3),
    ("deepseek-v3", 0.6, 0.3),
    ("qwen3-30b-a3b", 2.0, 0.0),
    ("qwen3-30b-a3b", 3.0, 0.0),
]


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
    models = {name: load_model(name) for name, _, _ in CASES}
    drawers = [ZipfDrawer(models[name], zipf, stick, 0) for name, zipf, stick in CASES]
    times = [([], []) for _ in CASES]
    for turn in range(options.rounds + 1):
        for (name, zipf, _), drawer, (ours, theirs) in zip(CASES, drawers, times, strict=True):
            start = perf_counter()
            drawer.draw(request, position)
            middle = perf_counter()
            gumbel_top_k(random, options.rows, models[name], zipf)
            if turn:  # the first round compiles and warms up
                ours.append(middle - start)
                theirs.append(perf_counter() - middle)
    table = Table("model", "zipf", "stick", "ns an id", "M ids/s a core", "target", "NumPy ns an id", "ratio")
    for (name, zipf, stick), (ours, theirs) in zip(CASES, times, strict=True):
        ids = options.rows * models[name].moe_layers * models[name].top_k
        ours_ns, theirs_ns = (median(seconds) / ids * 1e9 for seconds in (ours, theirs))
        speed = [f"{ours_ns:.1f}", f"{1e3 / ours_ns:.0f}", f">= {TARGET_MIDS_S}", f"{theirs_ns:.0f}"]
        table.add_row(name, f"{zipf:g}", f"{stick:g}", *speed, f"{theirs_ns / ours_ns:.0f}x")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
