"""One access at a time, of equal sizes: the same number of hits as libcachesim, to the last one."""

from pathlib import Path

import numpy as np
import pytest

from moetrace.analyze.cache.accesses import accesses
from moetrace.analyze.cache.hits import cache_hits
from moetrace.generators import generate_trace
from moetrace.importers.importing import import_traces
from moetrace.trace import Trace

pytest.importorskip("libcachesim")

import cachesim

HERE = Path(__file__).parents[2]
CAPTURES = HERE.parent / "shared" / "traces"
POLICIES = ("lru", "fifo", "lfu-in-cache", "belady", "sieve", "arc", "s3-fifo")


def expected(trace: Trace, policy: str, capacity: int, scope: str, folder: Path) -> int:
    """Hits of libcachesim; with scope "layer", of caches of `capacity` experts each."""
    keys = np.concatenate([block.key for block in accesses(trace, sequential=True)])
    parts = [keys] if scope == "global" else [keys[keys // trace.num_experts == i] for i in range(trace.layers)]
    return sum(
        cachesim.hits(policy, capacity, cachesim.write(part, folder / "part"), part.size) for part in parts if part.size
    )


def check(trace: Trace, capacities: list[int], scope: str, policies: tuple[str, ...], folder: Path) -> None:
    pools = trace.layers if scope == "layer" else 1
    asked = [capacity * pools for capacity in capacities]
    frame = cache_hits(trace, asked, policies, scope=scope, sequential=True).filter(phase="all")
    found = {(row["policy"], row["capacity_experts"]): row["hits"] for row in frame.iter_rows(named=True)}
    for policy in policies:
        for capacity in capacities:
            if policy == "s3-fifo" and capacity < 20:
                continue  # its small queue would hold nothing, which ends the process, or admit nothing
            theirs = expected(trace, policy, capacity, scope, folder)
            assert found[policy, capacity * pools] == theirs, (policy, capacity)


def generated(experts: int) -> Trace:
    """Three layers, skewed, a few rows a step, some choices absent."""
    rng = np.random.default_rng(experts)
    rows, top_k = 400, 2 if experts == 8 else 8
    weight = rng.random((1, 3, experts)) ** 3
    ids = np.argsort(rng.random((rows, 3, experts)) - weight, axis=2)[:, :, :top_k].astype(np.uint16)
    ids[rng.random(ids.shape) < 0.05] = 255 if experts <= 255 else 65535
    return Trace.from_arrays(ids, num_experts=experts, steps=np.full(rows // 4, 4))


@pytest.mark.parametrize("experts", [8, 64, 128, 256, 384])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_generated_traces(experts, scope, tmp_path):
    most = experts if scope == "layer" else 3 * experts
    capacities = sorted({1, 2, 3, *(most * part // 16 for part in (1, 2, 4, 7, 12)), most - 1, most} - {0})
    check(generated(experts), capacities, scope, POLICIES, tmp_path)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_trace_that_ships(scope, tmp_path):
    with Trace.open(HERE / "traces" / "mixtral-8x7b-b16.h5") as trace:
        check(trace, [1, 2, 3, 5, 7] if scope == "layer" else [20, 40, 100, 200], scope, POLICIES, tmp_path)


@pytest.mark.skipif(not CAPTURES.exists(), reason="needs the captures beside the repository")
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_captured_trace(scope, tmp_path):
    import_traces([CAPTURES / "qwen3-30b_bigmoeonedge.route.csv"], tmp_path / "qwen.h5")
    with Trace.open(tmp_path / "qwen.h5") as trace:
        check(trace, [5, 16, 60, 100] if scope == "layer" else [50, 400, 2000], scope, POLICIES, tmp_path)


def test_requests_of_a_batch(tmp_path):
    trace = generate_trace("tiny-olmoe", requests=6, prompt=10, output=100, batch=4)
    check(trace, [1, 2, 4, 9, 17, 30], "layer", POLICIES, tmp_path)
