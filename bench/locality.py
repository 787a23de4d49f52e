"""Speed of `moetrace analyze locality` on one core, beside NumPy doing the least of it in the same run.

    python bench/locality.py [--rounds 5] [--write docs/speed.md]

Every case is measured once a round, in turn, as processor time of this thread; the table shows medians. NumPy counts
every expert and takes the overlap with the next token from a table of rows by experts: two of some forty statistics.
`--write` puts the table between the markers `locality` of a Markdown file.
"""

import argparse
from pathlib import Path
from statistics import median
from time import thread_time

import numpy as np
from markers import write_between

from moetrace.analyze.locality.measure import locality
from moetrace.generators import generate_trace

TARGET_NS = 20
# model, requests of 512 rows; the last is so short that the predictors, whose rows are bounded, weigh on its accesses
CASES = [("qwen3-30b-a3b", 256), ("deepseek-v3", 256), ("mixtral-8x7b", 512), ("qwen3-30b-a3b", 32)]


def analyze(trace, pairs):
    locality(trace, pairs=pairs)


def counts_and_overlap(trace):
    """Counts [L, E] and overlap with the next row [L], with NumPy."""
    rows = np.arange(1024)[:, None]
    counts, shared = np.zeros((trace.layers, trace.num_experts), np.int64), np.zeros(trace.layers)
    for start in range(0, trace.rows, 1024):
        ids = trace.read("experts", start, min(start + 1024, trace.rows))
        for layer in range(trace.layers):
            counts[layer] += np.bincount(ids[:, layer].ravel(), minlength=trace.num_experts)
            chosen = np.zeros((len(ids), trace.num_experts), bool)
            chosen[rows[: len(ids)], ids[:, layer]] = True
            shared[layer] += (chosen[1:] & chosen[:-1]).sum()
    return counts, shared


def seconds(function, *arguments):
    start = thread_time()
    function(*arguments)
    return thread_time() - start


def measure(rounds):
    lines = []
    for model, requests in CASES:
        trace = generate_trace(model, requests=requests, prompt=256, output=256, batch=16, seed=0)
        accesses = trace.rows * trace.layers * trace.top_k
        analyze(trace, True)  # compiles
        ours, pairs, theirs = [], [], []
        for _ in range(rounds):
            ours.append(seconds(analyze, trace, False))
            theirs.append(seconds(counts_and_overlap, trace))
            pairs.append(seconds(analyze, trace, True) - ours[-1])
        ns, more_ns, numpy_ns = (median(part) / accesses * 1e9 for part in (ours, pairs, theirs))
        ratio = median(b / a for a, b in zip(ours, theirs, strict=True))
        lines.append(
            f"| `{model}`, {trace.rows:,} rows, {accesses / 1e6:.0f} M accesses | {ns:.1f} ns an access | "
            f"{more_ns:.1f} ns | ≤ {TARGET_NS} ns | {numpy_ns:.1f} ns, {ratio:.1f}x |"
        )
    return lines


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--write", type=Path)
    options = options.parse_args()
    head = ["| trace, on one core | `analyze locality` | co-activation on top | target without it | NumPy, two of it |"]
    table = "\n".join([*head, "| --- | --- | --- | --- | --- |", *measure(options.rounds)])
    print(table)
    if options.write:
        write_between(options.write, "locality", table)


if __name__ == "__main__":
    main()
