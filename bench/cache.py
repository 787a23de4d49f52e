"""Speed of the cache analysis, beside libcachesim on the same accesses: one at a time, a cache for each layer.

    python bench/cache.py [--rounds 5] [--requests 8] [--write docs/cache.md]

Every case is timed once a round, in turn; the tables show medians: nanoseconds an access of one core, and how many
times that libcachesim took in the same round. What is timed begins with accesses in memory, ours as arrays of keys,
theirs as files (which the system caches) of 24 bytes an access that hold its next access, too; it ends with the number
of hits, which is the same. "read" is what it takes to get there, from ids to accesses; "look ahead" finds the next
accesses. Both are done once, for all policies and capacities. One thread's time is that of the CPU, so that neighbours
on a busy machine count little; the last line is by the clock. `--write` puts the tables into a Markdown file.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from time import perf_counter, thread_time

import cachesim
import msgspec
import numpy as np
from markers import write_between

from moetrace.analyze.cache.accesses import accesses
from moetrace.analyze.cache.hit_curve import lru_curve
from moetrace.analyze.cache.kernels import stack
from moetrace.analyze.cache.kernels.replays import Budget, Demands, make_replay
from moetrace.analyze.cache.next_use import NextUses
from moetrace.generators import generate_trace
from moetrace.jit.compile import kernel
from moetrace.spec import load_model

MODELS = ("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3")  # 8, 128 and 256 experts
LAYERS = 16  # of each model
POLICIES = {"lru": "LRU", "fifo": "FIFO", "lfu-in-cache": "LFU in cache", "belady": "Belady"}
TARGETS = {"lru": "5", "fifo": "5", "lfu-in-cache": "8", "belady": "3 (8 experts), 8"}
PARTS = 13  # capacities are 1 to 12 of so many parts of a layer's experts


class Case:
    """A trace: its accesses here, and in files for libcachesim."""

    def __init__(self, model: str, requests: int, folder: Path):
        spec = msgspec.structs.replace(load_model(model), moe_layers=LAYERS)
        self.trace = generate_trace(spec, requests=requests, prompt=32, output=480, zipf=0.6, stick=0.3)
        self.experts = self.trace.num_experts
        self.blocks = list(accesses(self.trace, sequential=True))
        keys = np.concatenate([block.key for block in self.blocks])
        parts = [keys[keys // self.experts == layer] for layer in range(LAYERS)]
        self.accesses, self.sizes = keys.size, [part.size for part in parts]
        files = [cachesim.write(part, folder / f"{model}-{layer}") for layer, part in enumerate(parts)]
        self.readers = [cachesim.reader(file) for file in files]
        self.capacities = sorted({max(1, round(self.experts * part / PARTS)) for part in range(1, PARTS)})
        self.buffer = np.empty(max(block.key.size for block in self.blocks), np.int16)
        self.look_ahead()

    def ours(self, policy: str, capacities: list[int]) -> list[int]:
        size = np.ones(LAYERS * self.experts, np.int64)
        demands = Demands(LAYERS, self.experts, size, LAYERS, True, self.trace.rows * self.trace.top_k, size[:0])
        replay = make_replay(policy, [Budget(capacity, False) for capacity in capacities], demands)
        hits = [0] * len(capacities)
        for block, next_use in zip(self.blocks, self.next_uses, strict=True):
            for number, hit in enumerate(replay(block, next_use)):
                hits[number] += int(np.count_nonzero(hit.view(np.bool_)))
        return hits

    def theirs(self, policy: str, capacity: int) -> int:
        shares = (cachesim.misses(policy, capacity, reader) for reader in self.readers)
        return sum(size - round(share * size) for size, share in zip(self.sizes, shares, strict=True))

    def curve(self) -> np.ndarray:
        """Hits at every capacity."""
        stacks = stack.layer_stacks(LAYERS, self.experts)
        count = np.zeros((3, LAYERS, self.experts + 1), np.int64)
        for block in self.blocks:
            distance = self.buffer[: block.key.size]
            stack.layer_distances(stacks, block, self.experts, True, distance)
            stack.count_distances(distance, block, LAYERS, count)
        return np.cumsum(count.sum((0, 1))[:-1])

    def look_ahead(self) -> None:
        with NextUses(LAYERS * self.experts) as uses:
            uses.learn(self.blocks)
            self.next_uses = [uses.of(block) for block in self.blocks]

    def read(self) -> None:
        list(accesses(self.trace, sequential=True))


def measure(
    works: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = thread_time
) -> dict[str, list[float]]:
    """Seconds of each work in each round, after one that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            start = clock()
            work()
            if turn:
                times[name].append(clock() - start)
    return times


def ratio(theirs: list[float], ours: list[float]) -> str:
    value = median(a / b for a, b in zip(theirs, ours, strict=True))
    return f"{value:.1f}" if value < 20 else f"{value:.0f}"


def lines_of(case: Case, rounds: int) -> list[str]:
    """The rows of one trace's table."""
    one = case.experts // 4
    works: dict[str, Callable[[], object]] = {"read": case.read, "look ahead": case.look_ahead, "curve": case.curve}
    for policy in POLICIES:
        works[policy] = lambda policy=policy: case.ours(policy, [one])
        works["many " + policy] = lambda policy=policy: case.ours(policy, case.capacities)
        works["peer " + policy] = lambda policy=policy: case.theirs(policy, one)
        assert case.ours(policy, case.capacities) == [case.theirs(policy, c) for c in case.capacities]
    works["peer lru of all"] = lambda: [case.theirs("lru", capacity) for capacity in case.capacities]
    assert [case.curve()[c - 1] for c in case.capacities] == case.ours("lru", case.capacities)
    times = measure(works, rounds)
    ns = {name: f"{median(taken) / case.accesses * 1e9:.1f}" for name, taken in times.items()}
    found = []
    for policy, name in POLICIES.items():
        ours, many, peer = times[policy], times["many " + policy], times["peer " + policy]
        times_many = [seconds / len(case.capacities) for seconds in many]
        many_ns = f"{median(times_many) / case.accesses * 1e9:.1f}"
        found.append(
            f"| {name} | {ns[policy]} | {many_ns} | {ns['peer ' + policy]} | {ratio(peer, ours)}x | "
            f"{ratio(peer, times_many)}x | {TARGETS[policy]}x |"
        )
    found += [
        f"| LRU, every capacity | {ns['curve']} in all | | {ns['peer lru of all']} for {len(case.capacities)} | "
        f"{ratio(times['peer lru of all'], times['curve'])}x | | {'80x' if case.experts > 8 else ''} |",
        f"| look ahead | {ns['look ahead']} | | | | | |",
        f"| read | {ns['read']} | | | | | |",
    ]
    return found


@kernel(inline=False)
def spin(turns):
    """Keep a core busy, without memory."""
    value = 1.0
    for _ in range(turns):
        value = value * 1.0000001 + 1e-9
    return value


def threads(rounds: int) -> tuple[float, float]:
    """How much quicker two threads are with a curve, and with work that shares nothing, which no curve can exceed.

    By the clock, the fastest of many rounds, as neighbours on a busy machine only make them slower.
    """
    trace = generate_trace("qwen3-30b-a3b", requests=64, prompt=32, output=480, zipf=0.6, stick=0.3)
    turns = 40_000_000
    with ThreadPoolExecutor(2) as pool:
        works: dict[str, Callable[[], object]] = {
            "1": lambda: lru_curve(trace, scope="layer", sequential=True, threads=1),
            "2": lambda: lru_curve(trace, scope="layer", sequential=True, threads=2),
            "spin 1": lambda: spin(turns),
            "spin 2": lambda: list(pool.map(spin, [turns // 2] * 2)),
        }
        best = {name: min(times) for name, times in measure(works, 12 * rounds, perf_counter).items()}
    return best["1"] / best["2"], best["spin 1"] / best["spin 2"]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--requests", type=int, default=16)
    options.add_argument("--write", type=Path)
    given = options.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for model in MODELS:
            case = Case(model, given.requests, Path(folder))
            lines += [
                f"{case.experts} experts ({model}), a cache of {case.experts // 4} in each layer, or of "
                f"{', '.join(map(str, case.capacities))} at once; {case.accesses:,} accesses:",
                "",
                f"| | ns an access | of each of {len(case.capacities)} | libcachesim | ratio | of each | wanted |",
                "| --- | --- | --- | --- | --- | --- | --- |",
                *lines_of(case, given.rounds),
                "",
            ]
    curve, free = threads(given.rounds)
    lines.append(
        f"Reading a trace of qwen3-30b-a3b and LRU's whole curve with two threads instead of one: {curve:.1f}x; two "
        f"loops that share nothing, in the same rounds: {free:.1f}x "
        f"({os.cpu_count()} CPUs, load {os.getloadavg()[0]:.0f})."
    )
    print("\n".join(lines))
    if given.write:
        write_between(given.write, "speed", "\n".join(lines))


if __name__ == "__main__":
    main()
