"""Speed of `moetrace lint`, beside `info --verify` (sha256s and ids, sorted) and a plain sum of the same file.

    python bench/lint.py [--rounds 5] [--mb 200]

Traces are generated into a temporary folder. Each round times every case once, the three in turn; the table shows
medians over the rounds, in MB of ids (not of other data) a second of processor time, all threads together.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median
from time import process_time

from rich.console import Console
from rich.table import Table

from moetrace.generators import generate
from moetrace.lints import lint
from moetrace.spec import load_model
from moetrace.trace import Trace
from moetrace.trace.schema import expert_dtype

TARGET_MB_S = 200
MODELS = ["qwen3-30b-a3b", "mixtral-8x7b", "deepseek-v2-lite", "deepseek-v3"]


def add_up(trace: Trace) -> int:
    return sum(int(block.experts.sum()) for block in trace.blocks())


def timed(work, trace: Trace) -> float:
    start = process_time()
    work(trace)
    return process_time() - start


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--mb", type=int, default=200)
    options = options.parse_args()
    works = (lint, Trace.verify, add_up)
    table = Table("model", "MB", "lint MB/s", "target", "verify MB/s", "sum MB/s", "verify / lint")
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            model, path = load_model(name), Path(folder) / f"{name}.h5"
            row_bytes = model.moe_layers * model.top_k * expert_dtype(model.experts).itemsize
            requests = max(1, options.mb * 1_000_000 // (row_bytes * 1024))
            generate(path, model, requests=requests, prompt=512, output=512, batch=16)
            size_mb = requests * 1024 * row_bytes / 1e6
            seconds = [[], [], []]
            with Trace.open(path) as trace:
                for _ in range(options.rounds):
                    for work, times in zip(works, seconds, strict=True):
                        times.append(timed(work, trace))
            ours, verify, plain = (size_mb / median(times) for times in seconds)
            table.add_row(
                name,
                f"{size_mb:.0f}",
                f"{ours:.0f}",
                f">= {TARGET_MB_S}",
                f"{verify:.0f}",
                f"{plain:.0f}",
                f"{verify / ours:.2f}x",
            )
            path.unlink()
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
