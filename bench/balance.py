"""Speed of plans and of the balance analysis on one core, beside EPLB in torch and a NumPy histogram.

    python bench/balance.py [--rounds 7] [--write docs/balance.md]
    PYTHONPATH=path/of/deepseek-ai/EPLB python bench/balance.py

If EPLB itself (https://github.com/deepseek-ai/EPLB, eplb.py) can be imported it is the peer; else its algorithm is
written out here from its README and paper (arXiv 2412.19437, section 3.4), in the way that it is published: tensors,
with a loop over layers and experts where copies are packed. The table says which. "torch over all
layers at once" is the same algorithm with that loop turned inside out, as fast as torch can: what was not published.
Everything is timed in turn, round after round, what is short as often as fills 20 ms; the table shows medians, and
medians of the ratios within a round. All of it is of one thread, so the clock is the process's own: neighbours on the
machine do not count.
"""

import argparse
import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import process_time

import numpy as np
from markers import write_between

from moetrace.analyze.balance import loads as loads_module
from moetrace.analyze.balance.loads import count_ids
from moetrace.analyze.balance.units import balance
from moetrace.engine.eplb import eplb_plan
from moetrace.generators import generate_trace

LAYERS, EXPERTS, SLOTS, UNITS = 58, 256, 288, 32


def packed(weight, packs: int):
    """Place of each item of weight [X, n]: heaviest first onto the lightest pack with room, layer after layer."""
    import torch

    rows, items = weight.shape
    room = items // packs
    if room == 1:
        return torch.arange(items).expand(rows, items)
    order = weight.argsort(dim=-1, descending=True, stable=True)
    place = torch.zeros(rows, items, dtype=torch.int64)
    for row in range(rows):
        total, held = [0] * packs, [0] * packs
        for item in order[row]:
            pack = min((p for p in range(packs) if held[p] < room), key=total.__getitem__)
            place[row, item] = pack * room + held[pack]
            held[pack] += 1
            total[pack] = total[pack] + weight[row, item]
    return place


def packed_at_once(weight, packs: int):
    """Do the same for all rows together, item after item."""
    import torch

    rows, items = weight.shape
    room, every = items // packs, torch.arange(weight.shape[0])
    order = weight.argsort(dim=-1, descending=True, stable=True)
    place = torch.zeros(rows, items, dtype=torch.int64)
    total, held = torch.zeros(rows, packs), torch.zeros(rows, packs, dtype=torch.int64)
    for i in range(items):
        item = order[:, i]
        pack = total.masked_fill(held == room, torch.inf).argmin(dim=-1)
        place[every, item] = pack * room + held[every, pack]
        held[every, pack] += 1
        total[every, pack] += weight[every, item]
    return place


def torch_eplb(loads, pack: Callable, slots: int = SLOTS, units: int = UNITS) -> np.ndarray:
    """EPLB's global policy: the expert of each slot, [layers, slots]."""
    import torch

    layers, experts = loads.shape
    weight, every = loads.float(), torch.arange(layers)
    copies = torch.ones(layers, experts, dtype=torch.int64)
    expert_of_copy = torch.arange(experts).repeat(layers, 1)
    for _ in range(slots - experts):
        hottest = (weight / copies).argmax(dim=-1)
        expert_of_copy = torch.cat([expert_of_copy, hottest[:, None]], dim=1)
        copies[every, hottest] += 1
    place = pack((weight / copies).gather(1, expert_of_copy), units)
    return torch.empty_like(expert_of_copy).scatter_(1, place, expert_of_copy).numpy()


def imbalance(plan: np.ndarray, loads: np.ndarray) -> np.ndarray:
    """Busiest unit over the mean, of each layer."""
    copies = np.stack([np.bincount(row, minlength=loads.shape[1]) for row in plan])
    share = np.take_along_axis(loads / copies, plan.astype(np.int64), 1)
    totals = share.reshape(len(plan), UNITS, -1).sum(-1)
    return totals.max(1) / totals.mean(1)


def times_of(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each work in each round."""

    def timed(work: Callable[[], object], often: int) -> float:
        start = process_time()
        for _ in range(often):
            work()
        return (process_time() - start) / often

    for work in works.values():
        work()  # compiles
    often = {name: max(1, int(0.02 / timed(work, 1))) for name, work in works.items()}
    rows = [{name: timed(work, often[name]) for name, work in works.items()} for _ in range(rounds)]
    return {name: [row[name] for row in rows] for name in works}


def plans(rounds: int) -> None:
    rng = np.random.default_rng(0)
    popularity = 1 / np.arange(1, EXPERTS + 1) ** 0.8
    loads = np.stack([rng.multinomial(8 * 8192, rng.permutation(popularity / popularity.sum())) for _ in range(LAYERS)])
    works: dict[str, Callable[[], object]] = {"moetrace": lambda: eplb_plan(loads, SLOTS, UNITS)}
    try:
        import torch
    except ImportError:
        print("torch is not installed: no peer.")
    else:
        torch.set_num_threads(1)
        tensor = torch.tensor(loads)
        try:
            import eplb

            works["deepseek-ai/EPLB itself"] = lambda: eplb.rebalance_experts(tensor, SLOTS, 1, 1, UNITS)[0].numpy()
        except ImportError:
            works["EPLB in torch, rewritten"] = lambda: torch_eplb(tensor, packed)
        works["torch over all layers at once"] = lambda: torch_eplb(tensor, packed_at_once)
    own = imbalance(eplb_plan(loads, SLOTS, UNITS), loads)
    print(f"EPLB plan of {LAYERS} x {EXPERTS} experts, {SLOTS} copies on {UNITS} units, one thread")
    found = times_of(works, rounds)
    for name, taken in found.items():
        ratio = median(peer / ours for peer, ours in zip(taken, found["moetrace"], strict=True))
        plan: np.ndarray = works[name]()  # type: ignore[assignment]
        apart = np.abs(imbalance(plan, loads) / own - 1).max()
        even = f"imbalance {imbalance(plan, loads).mean():.5f}, differs by {apart:.1e} at most"
        print(f"  {name:30s} {1e3 * median(taken):9.2f} ms {ratio:8.1f}x   {even}")


def histograms(rounds: int) -> None:
    print("\nRows of each expert, step and layer, batch 256: ns an access")
    for layers, experts, top_k in ((48, 128, 8), (58, 256, 8), (26, 64, 6), (32, 8, 2)):
        rng, rows, batch = np.random.default_rng(0), 2048, 256
        dtype = np.uint8 if experts <= 255 else np.uint16
        every = np.tile(np.arange(experts, dtype=dtype), (rows, layers, 1))
        ids = rng.permuted(every, axis=2)[:, :, :top_k].copy()
        begin = np.arange(0, rows, batch)
        most = begin.size * layers * experts
        start, expert, count = (
            np.zeros(begin.size * layers + 1, np.int64),
            np.empty(most, np.int32),
            np.empty(most, int),
        )
        of_layer = (np.arange(layers) * experts)[:, None]

        def own(ids=ids, begin=begin, experts=experts, start=start, expert=expert, count=count, batch=batch):
            count_ids(ids, begin, begin + batch, experts, start, expert, count)

        def numpy(ids=ids, begin=begin, of_layer=of_layer, batch=batch, cells=layers * experts):
            for first in begin:
                np.bincount((ids[first : first + batch] + of_layer).ravel(), minlength=cells)

        found = times_of({"moetrace": own, "NumPy": numpy}, rounds)
        ratio = median(b / a for a, b in zip(found["moetrace"], found["NumPy"], strict=True))
        ns = {name: 1e9 * median(taken) / ids.size for name, taken in found.items()}
        print(
            f"  {layers} x {experts}, top {top_k}".ljust(24)
            + f"{ns['moetrace']:6.2f}   NumPy's bincount {ns['NumPy']:6.2f}, {ratio:.1f}x"
        )


def whole(rounds: int) -> None:
    print("\nThe whole of `analyze balance`, default placements, on edge-ndp and 8 units: ns an access")
    for model, batch, output in (("qwen3-30b-a3b", 256, 64), ("qwen3-30b-a3b", 1, 1024), ("deepseek-v3", 256, 32)):
        trace = generate_trace(model, requests=batch, prompt=16, output=output, batch=batch, zipf=0.8)
        accesses = trace.rows * trace.layers * trace.top_k
        works: dict[str, Callable[[], object]] = {
            "rows": lambda trace=trace: balance(trace, tier=8),
            "rows and seconds": lambda trace=trace: balance(trace, system="edge-ndp", tier=8),
            "one reading": lambda trace=trace: loads_module.summed(trace, np.arange(trace.steps)),
        }
        found = times_of(works, rounds)
        figures = ", ".join(f"{name} {1e9 * median(taken) / accesses:.2f}" for name, taken in found.items())
        print(f"  {model}, batch {batch}, {trace.steps} steps: {figures}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--write", type=Path, metavar="PAGE.md", help="write it between the page's markers")
    given = options.parse_args()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        plans(given.rounds)
        histograms(4 * given.rounds)
        whole(max(3, given.rounds // 2))
    print(printed.getvalue())
    if given.write:
        write_between(given.write, "speed", f"```\n{printed.getvalue().rstrip()}\n```")


if __name__ == "__main__":
    main()
