"""Speed of the cache analysis, beside libcachesim on the same accesses: one at a time, a cache for each layer.

    python bench/cache.py [--rounds 7] [--requests 16] [--end-to-end] [--write docs/cache.md]

Every case is timed once a round, in turn; the tables show medians: nanoseconds an access of one core, and how many
times that libcachesim took in the same round. What is timed begins with accesses in memory, ours as arrays of keys,
theirs as files (which the system caches) of 24 bytes an access that hold its next access, too; it ends with the number
of hits, which is the same. "read" is what it takes to get there, from ids to accesses; "look ahead" finds the next
accesses. Both are done once, for all policies and capacities. One thread's time is that of the CPU, so that neighbours
on a busy machine count little; the last line is by the clock. `--write` puts the tables into a Markdown file.

"End to end" is what a user waits for: ours from the path of a trace to the frame with all its figures, by request, by
step and of rows, as `analyze cache --sequential` computes it; theirs from the path of its own file to the miss ratios,
and nothing else. Both are processor seconds of the whole process (all threads), both files are in the system's cache,
both without the start of Python and imports, and without compiling. With `--end-to-end` only this is measured.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from time import perf_counter, process_time, thread_time

import cachesim
import msgspec
import numpy as np
import polars as pl
from markers import write_between

from moetrace.analyze.cache.accesses import accesses
from moetrace.analyze.cache.hit_curve import lru_curve
from moetrace.analyze.cache.hits import cache_hits
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
PARTS = 13  # capacities are 1 to 12 thirteenths of a layer's experts
# End to end: requests of 512 tokens of a model of 48 x 128 experts, top 8; policies, capacities, and the targets.
WHOLE = "qwen3-30b-a3b"
ALL = ("lru", "fifo", "lfu-in-cache", "belady", "sieve")
_FEW_ROUNDS = 3  # of many caches, as theirs takes long
ENDS = (
    ("one LRU", 40, ("lru",), 1, 6.0),
    ("one LRU", 2, ("lru",), 1, 1.5),
    ("60 caches", 10, ALL, 12, 8.0),
)


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


class EndToEnd:
    """A trace in a file, and its accesses in a file of libcachesim's for each scope's caches."""

    def __init__(self, requests: int, folder: Path):
        self.path = folder / f"whole-{requests}.h5"
        trace = generate_trace(WHOLE, requests=requests, prompt=32, output=480, zipf=0.6, stick=0.3)
        trace.write(self.path)
        keys = np.concatenate([block.key for block in accesses(trace, sequential=True)])
        layer = keys // trace.num_experts
        self.layers, self.experts, self.accesses = trace.layers, trace.num_experts, keys.size
        parts = {"global": [keys], "layer": [keys[layer == number] for number in range(trace.layers)]}
        self.files: dict[str, list[tuple[Path, int]]] = {scope: [] for scope in parts}
        for scope, part in ((scope, part) for scope, several in parts.items() for part in several):
            file = folder / f"{requests}-{scope}-{len(self.files[scope])}"
            self.files[scope].append((cachesim.write(part, file), part.size))

    def capacities(self, number: int) -> list[int]:
        """Capacities of one layer's cache."""
        one = [self.experts // 4]
        return one if number == 1 else [max(1, round(self.experts * part / PARTS)) for part in range(1, number + 1)]

    def ours(self, scope: str, policies: tuple[str, ...], number: int) -> list[int]:
        asked = [self.layers * capacity for capacity in self.capacities(number)]
        frame = cache_hits(self.path, asked, policies, scope=scope, sequential=True).filter(phase="all")
        return frame.sort(pl.col("capacity_experts"), maintain_order=True)["hits"].to_list()

    def theirs(self, scope: str, policies: tuple[str, ...], number: int) -> list[int]:
        readers = [(cachesim.reader(file), size) for file, size in self.files[scope]]
        scale = self.layers if scope == "global" else 1
        found = []
        for capacity in self.capacities(number):
            for policy in policies:
                shares = ((cachesim.misses(policy, scale * capacity, reader), size) for reader, size in readers)
                found.append(sum(size - round(share * size) for share, size in shares))
        return found


def end_to_end(rounds: int, folder: Path) -> list[str]:
    """The table from the file to the frame."""
    lines = [
        f"End to end, {WHOLE}, one access at a time, processor seconds, medians of {rounds} "
        f"(of many caches, of {min(rounds, _FEW_ROUNDS)}):",
        "",
        "| | accesses | caches | ours | libcachesim | ratio | wanted |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    cases = {requests: EndToEnd(requests, folder) for requests in {requests for _, requests, *_ in ENDS}}
    for name, requests, policies, number, wanted in ENDS:
        for scope in ("global", "layer"):
            case, asked = cases[requests], (scope, policies, number)
            assert case.ours(*asked) == case.theirs(*asked), "the same hits"
            works = {"ours": lambda c=case, a=asked: c.ours(*a), "theirs": lambda c=case, a=asked: c.theirs(*a)}
            times = measure(works, rounds if number == 1 else min(rounds, _FEW_ROUNDS), process_time)
            own, peer = times["ours"], times["theirs"]
            where = "of all layers" if scope == "global" else "a layer"
            lines.append(
                f"| {name} | {case.accesses:,} | {where} | {median(own):.3f} | {median(peer):.3f} | "
                f"{ratio(peer, own)}x | {wanted:g}x |"
            )
    return [*lines, "", f"({os.cpu_count()} CPUs, load {os.getloadavg()[0]:.0f}.)", ""]


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
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--requests", type=int, default=16)
    options.add_argument("--write", type=Path)
    options.add_argument("--end-to-end", action="store_true")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ends = "\n".join(end_to_end(given.rounds, Path(folder))).rstrip()
    print(ends, flush=True)
    if given.write:
        write_between(given.write, "end-to-end", ends)
    if given.end_to_end:
        return
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
