"""Speed of the cache analysis on one core, beside an LRU of Python's OrderedDict over the same accesses.

    python bench/cache.py [--rounds 5] [--requests 8] [--at-once]

Every case is timed once a round, in turn, and the table shows medians: nanoseconds an access, and how many times that
the OrderedDict took in the same round. "pass" is what is done once, whatever the number of policies and capacities:
reading ids, checking them, and putting them in order (per id); "look ahead" is Belady's next uses, also once. With
`--at-once` the experts of a layer and step are demanded together, which OrderedDict does not do: its hits differ.
"""

import argparse
from collections import OrderedDict
from collections.abc import Callable, Iterable
from statistics import median
from time import perf_counter

import numpy as np

from moetrace.analyze import cache
from moetrace.analyze.accesses import Accesses, accesses
from moetrace.analyze.next_use import NextUses
from moetrace.trace.generate import generate_trace

# model, batch, share of all experts that the cache holds
CASES = [("mixtral-8x7b", 1, 4), ("olmoe-1b-7b", 1, 4), ("qwen3-30b-a3b", 1, 4), ("qwen3-30b-a3b", 32, 4)]
CASES += [("deepseek-v3", 1, 8)]


def seconds(function: Callable[[], object]) -> float:
    start = perf_counter()
    function()
    return perf_counter() - start


def python_lru(keys: Iterable[list[int]], capacity: int) -> int:
    """Hits of an LRU of OrderedDict."""
    held, hits = OrderedDict(), 0
    for part in keys:
        for key in part:
            if key in held:
                hits += 1
                held.move_to_end(key)
            else:
                if len(held) == capacity:
                    held.popitem(last=False)
                held[key] = None
    return hits


def run_policy(
    policy: str,
    blocks: list[Accesses],
    next_uses: list[np.ndarray],
    layers: int,
    keys: int,
    part: int,
    sequential: bool = True,
) -> int:
    """Replay all blocks through a new cache; return its hits."""
    lane = cache._lane(policy, cache.parse_capacity(keys // part), np.ones(keys, np.int64), 1)
    for block, next_use in zip(blocks, next_uses, strict=True):
        hit = np.empty(block.key.size, np.uint8)
        cache._advance(lane, block, next_use, layers, sequential, hit)
        cache._tally(block, hit, lane.state.weight, layers, lane.totals)
    return int(lane.totals[:, 0].sum())


def case(model: str, batch: int, part: int, requests: int, rounds: int, sequential: bool) -> None:
    trace = generate_trace(
        model, requests=max(requests, batch), prompt=32, output=480, batch=batch, zipf=0.6, stick=0.3
    )
    keys = trace.layers * trace.num_experts
    blocks = list(accesses(trace, sequential=sequential))
    total = sum(block.key.size for block in blocks)
    lists = [block.key.tolist() for block in blocks]
    with NextUses(keys) as uses:
        uses.learn(blocks)
        next_uses = [uses.of(block) for block in blocks]

    def look_ahead() -> None:
        with NextUses(keys) as uses:
            uses.learn(accesses(trace, sequential=sequential))
            for block in blocks:
                uses.of(block)

    works: dict[str, Callable[[], object]] = {
        "OrderedDict": lambda: python_lru(lists, keys // part),
        "pass": lambda: list(accesses(trace, sequential=sequential)),
        "look ahead": look_ahead,
    }
    for policy in cache.POLICIES:
        works[policy] = lambda policy=policy: run_policy(
            policy, blocks, next_uses, trace.layers, keys, part, sequential
        )
    assert not sequential or works["lru"]() == works["OrderedDict"]()
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            taken = seconds(work)
            if turn:
                times[name].append(taken)
    print(f"\n{model}, batch {batch}, {keys // part} of {keys} experts, {total:,} accesses")
    for name, taken in times.items():
        ratio = median(theirs / ours for theirs, ours in zip(times["OrderedDict"], taken, strict=True))
        of = trace.rows * trace.layers * trace.top_k if name == "pass" else total
        print(f"  {name:12s} {median(taken) / of * 1e9:7.1f} ns {ratio:7.1f}x")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--requests", type=int, default=8)
    options.add_argument("--at-once", action="store_true")
    given = options.parse_args()
    for model, batch, part in CASES:
        case(model, batch, part, given.requests, given.rounds, not given.at_once)


if __name__ == "__main__":
    main()
