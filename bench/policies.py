"""Every online residency beside `edge-ndp`, on captured and generated traces: what of the gap to clairvoyant closes.

    python bench/policies.py [FOLDER ...] [--write] [--rows 5000]

Folders hold captures in any format that `moetrace import` recognizes, traces among them; by default `traces/`. Three
traces are generated beside them. Each is taken at batch 1 and, if it has 8 requests, at batch 8, with 2, 4 and 6
NDP-DIMMs; nothing is tuned for a capture. `--write` puts the tables into docs/winning.md.
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from time import process_time
from typing import Any

import numpy as np
from markers import write_between
from reference import table

import moetrace as mt
from moetrace.engine.run import Lane, Run, run_setups
from moetrace.engine.setup import Setup, weight_bytes_of
from moetrace.engine.state import FIRST_GROUP, GPU
from moetrace.spec import Model, PolicySpec, load_model, load_policy, load_system
from moetrace.spec.errors import MoetraceError
from moetrace.spec.fits import gpu_slots
from moetrace.trace import Trace
from moetrace.trace.schema import DECODE

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/winning.md"
UNITS, BATCHES = (2, 4, 6), (1, 8)
PROMPT = 64  # rows of a request that a capture without phases is taken to be prompted with
SMALL_SHARE = 4  # if the GPU can hold the whole model, only one expert in 4 has a slot
GENERATED: dict[str, dict[str, Any]] = {
    "Zipf's law (qwen3-30b-a3b)": {"model": "qwen3-30b-a3b", "zipf": 0.6, "stick": 0.3},
    "like DeepSeek-V2-Lite": {"profile": "deepseek-v2-lite"},
    "like gpt-oss-20b": {"profile": "gpt-oss-20b"},
}
_CHOSEN: dict[str, Any] = {"placement": "tp", "dispatch": "balance", "scope": "global"}


def others() -> list[PolicySpec]:
    """Return the online residencies, each with the prefetch that it goes with best."""
    kinds = [(name, "none") for name in ("lru", "fifo", "sieve", "lfu-in-cache", "least-stale")]
    partners = ("none", "online:1")
    kinds += [(name, prefetch) for name in ("lfu", "lfu-window", "lfuda", "ewma") for prefetch in partners]
    found = []
    for residency, prefetch in kinds:
        name = residency if prefetch == "none" else f"{residency} + {prefetch}"
        more: dict[str, Any] = {"lfu": {"half_life": 64}, "ewma": {"alpha": 0.02}}.get(residency, {})
        found.append(PolicySpec(name=name, residency=residency, prefetch=prefetch, **_CHOSEN, **more))
    return found


def presets() -> list[PolicySpec]:
    """Return `edge-ndp`, and what is measured beside it."""
    names = ("edge-ndp", "foresee", "foresee-split", "foresee-no-ahead", "foresee-no-follows", "foresee-long")
    return [load_policy(name) for name in names]


def belady() -> PolicySpec:
    """Return the residency that knows the trace, without prefetch."""
    return PolicySpec(name="belady", residency="belady", **_CHOSEN)


@dataclass
class Cell:
    """A policy on one trace and machine, decode steps only; ``closed`` of the gap from `edge-ndp` to clairvoyant.

    How far all steps are from the bounds, and `edge-ndp`'s clairvoyant time, is in percent of these.
    """

    capture: str
    batch: int
    units: int
    policy: str
    speedup: float
    closed: float
    link_gb: float  # a decode row
    memory_gb: float  # a row
    over_bound: float
    over_work: float
    clairvoyant_over_bound: float
    clairvoyant_over_work: float


def captured(folders: list[Path], scratch: Path) -> Iterator[tuple[str, Trace]]:
    """Yield the captures of folders as traces with phases, of known models."""
    for path in sorted(path for folder in folders for path in folder.iterdir() if path.is_file()):
        if path.suffix not in (".h5", ".npz", ".csv", ".jsonl"):
            continue
        target = path
        try:
            if path.suffix != ".h5":
                target = scratch / f"{path.stem}.h5"
                mt.import_traces(path, target)
            with Trace.open(target) as trace:
                if "generator" in trace.source:
                    continue  # the three above are enough of those
                whole = arrays_of(trace)
            load_model(whole["model"])
        except MoetraceError as error:
            print(f"{path.name}: left out: {error}")
            continue
        yield path.stem.removeprefix("real_"), Trace.from_arrays(**whole)


def arrays_of(trace: Trace) -> dict[str, Any]:
    """Return the arguments of `Trace.from_arrays`; of a capture of one phase, the first rows are the prompts."""
    columns = {name: np.array(trace.read(name, 0, trace.rows)) for name in ("experts", "request", "position")}
    phase = np.concatenate([np.array(block.phase) for block in trace.blocks()])
    if len(np.unique(phase)) == 1:
        number = np.zeros(trace.rows, np.int64)
        for request in np.unique(columns["request"]):
            own = np.flatnonzero(columns["request"] == request)
            number[own] = np.arange(len(own))
        phase = (number >= PROMPT).astype(np.uint8)
        steps = np.ones(trace.rows, np.int64)  # `rebatch` makes others
    else:
        steps = np.diff(trace.offset)
    at = np.concatenate(([0], np.cumsum(steps)))[:-1]
    first, last = np.minimum.reduceat(phase, at), np.maximum.reduceat(phase, at)
    step_phase = np.where(first == last, first, 2).astype(np.uint8)
    model = {"num_experts": trace.num_experts, "model": trace.model}
    return columns | model | {"row_phase": phase, "steps": steps, "phase": step_phase}


def batched(trace: Trace, batch: int, rows: int, scratch: Path) -> Trace | None:
    """Return the first requests of a trace at a batch, of up to so many rows; None where there are fewer requests."""
    request = np.array(trace.read("request", 0, trace.rows))
    order, size = np.unique(request, return_counts=True)
    fits = max(int(np.searchsorted(np.cumsum(size), rows, side="right")), min(batch, len(order)))
    if len(order) < batch:
        return None
    kept, target = scratch / "kept.h5", scratch / "batched.h5"
    mt.select(trace, kept, requests=[(int(r), int(r) + 1) for r in order[:fits]])
    mt.rebatch(kept, target, batch=batch)
    with Trace.open(target) as made:
        return Trace.from_arrays(**arrays_of(made))


def slots_for(trace: Trace, model: Model, units: int) -> int:
    system = load_system("edge-ndp", {"ndp.units": units})
    fitting = gpu_slots(model, system, weight_bytes_of(trace, model))
    return model.all_experts // SMALL_SHARE if fitting >= model.all_experts else fitting


def replayed(trace: Trace, policies: list[PolicySpec]) -> list[Run]:
    """Return a run for each number of units."""
    model = load_model(trace.model)
    setups = [
        Setup(
            model=model,
            system=load_system("edge-ndp", {"ndp.units": units}),
            policies=policies,
            slots=slots_for(trace, model, units),
            ignore_capacity=True,
        )
        for units in UNITS
    ]
    runs = run_setups(trace, setups, jobs=2)
    for run in runs:
        if isinstance(run, MoetraceError):
            raise run
    return [run for run in runs if isinstance(run, Run)]


def prompts_of(trace: Trace) -> Trace:
    """Return the prefill steps by themselves: what clairvoyant takes for them is no matter of decode."""
    given = arrays_of(trace)
    of_prompts = given["phase"] != DECODE
    rows = np.repeat(of_prompts, given["steps"])
    columns = {name: given[name][rows] for name in ("experts", "request", "position", "row_phase")}
    return Trace.from_arrays(**(given | columns | {name: given[name][of_prompts] for name in ("steps", "phase")}))


def measured(name: str, trace: Trace, batch: int, policies: list[PolicySpec]) -> Iterator[Cell]:
    """Yield the cells of a trace."""
    prompts = replayed(prompts_of(trace), policies[:1])
    rows = np.diff(trace.offset)
    decode = np.array(trace.phase) == DECODE
    for units, run, before in zip(UNITS, replayed(trace, policies), prompts, strict=True):
        edge = run.lanes[0]
        clairvoyant_s = edge.clairvoyant_s - before.lanes[0].clairvoyant_s
        edge_s = seconds(edge, decode)
        for lane in run.lanes:
            step = lane.log.step
            link_gb = float((step["demand_bytes"] + step["prefetch_bytes"])[decode].sum()) / rows[decode].sum() / 1e9
            of_units = lane.log.unit["bytes"]
            memory_gb = float(of_units[GPU] + of_units[FIRST_GROUP:].sum()) / rows.sum() / 1e9
            own_s = seconds(lane, decode)
            closed = 100 * (edge_s - own_s) / (edge_s - clairvoyant_s)
            all_s = float(step["duration_s"].sum())
            over = [
                100 * (spent_s / bound_s - 1)
                for spent_s in (all_s, edge.clairvoyant_s)
                for bound_s in (lane.lower_bound_s, lane.work_bound_s)
            ]
            yield Cell(name, batch, units, lane.policy.name, edge_s / own_s, closed, link_gb, memory_gb, *over)


def seconds(lane: Lane, steps: np.ndarray) -> float:
    return float(lane.log.step["duration_s"][steps].sum())


_HEADS = ("closed %", "decode", "link GB", "memory GB", "over bound %")


def bounded(cells: list[Cell]) -> str:
    """Return how far some policies are from the lower bound and the work bound: mean, least and most."""

    def spread(values: list[float]) -> str:
        return f"{mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"

    rows = []
    for policy in ("edge-ndp", "foresee", "foresee-split", "belady"):
        row = [f"`{policy}`"]
        for batch in BATCHES:
            own = [cell for cell in cells if cell.policy == policy and cell.batch == batch]
            row += [spread([cell.over_bound for cell in own]), spread([cell.over_work for cell in own])]
        rows.append(tuple(row))
    row = ["clairvoyant time of `edge-ndp`"]
    for batch in BATCHES:
        own = [cell for cell in cells if cell.policy == "edge-ndp" and cell.batch == batch]
        row += [spread([c.clairvoyant_over_bound for c in own]), spread([c.clairvoyant_over_work for c in own])]
    rows.append(tuple(row))
    head = [f"over the {name} bound %, batch {batch}" for batch in BATCHES for name in ("lower", "work")]
    return table(("policy", *head), rows)


def summary(cells: list[Cell]) -> str:
    """Return a row a policy: means over all traces and units, at each batch."""
    rows = []
    for policy in dict.fromkeys(cell.policy for cell in cells):
        row = [f"`{policy}`" if "+" not in policy else " + ".join(f"`{part}`" for part in policy.split(" + "))]
        for batch in BATCHES:
            own = [cell for cell in cells if cell.policy == policy and cell.batch == batch]
            row += [f"{mean(cell.closed for cell in own):.0f}", f"{mean(cell.speedup for cell in own):.2f}x"]
            row += [f"{mean(cell.link_gb for cell in own):.2f}", f"{mean(cell.memory_gb for cell in own):.2f}"]
            row += [f"{mean(cell.over_bound for cell in own):.0f}"]
        rows.append(tuple(row))
    head = [f"{name}, batch {batch}" for batch in BATCHES for name in _HEADS]
    return table(("policy", *head), rows)


def details(cells: list[Cell]) -> str:
    """Return a row a trace, batch and policy: what is closed with each number of units."""
    rows = []
    for capture, batch in dict.fromkeys((cell.capture, cell.batch) for cell in cells):
        own = [cell for cell in cells if (cell.capture, cell.batch) == (capture, batch)]
        by_policy = {
            policy: " / ".join(f"{cell.closed:.0f}" for cell in own if cell.policy == policy)
            for policy in dict.fromkeys(cell.policy for cell in own)
        }
        rows.append((capture, str(batch), *by_policy.values()))
    names = list(dict.fromkeys(cell.policy for cell in cells))
    return table(("trace", "batch", *(f"`{name}`" for name in names)), rows)


FORGETTING: dict[str, dict[str, Any]] = {
    "lfu": {"residency": "lfu"},
    "lfu, half-life 64": {"residency": "lfu", "half_life": 64},
    "lfu-window": {"residency": "lfu-window"},
    "lfu-in-cache": {"residency": "lfu-in-cache"},
    "ewma, alpha 0.02": {"residency": "ewma", "alpha": 0.02},
    "sieve": {"residency": "sieve"},
    "lfuda": {"residency": "lfuda"},
    "lfuda, counts to 4": {"residency": "lfuda", "most_count": 4.0},
    "lfuda, counts to 48": {"residency": "lfuda", "most_count": 48.0},
    "lfuda, evicted keep all": {"residency": "lfuda", "evicted_share": 1.0},
    "lfuda, evicted keep none": {"residency": "lfuda", "evicted_share": 0.0},
}


def forgetting(traces: list[tuple[str, Trace]]) -> str:
    """Return how far caches that fetch every miss are from LRU to Belady, in percent, with slots for a quarter."""
    bounds: dict[str, dict[str, Any]] = {"lru": {"residency": "lru"}, "belady": {"residency": "belady"}}
    policies = [
        PolicySpec(name=name, dispatch="gpu", scope="global", **fields)
        for name, fields in (bounds | FORGETTING).items()
    ]
    found = {}
    for name, trace in traces:
        model = load_model(trace.model)
        setup = Setup(model=model, system=load_system("edge-ndp"), policies=policies, slots="25%", ignore_capacity=True)
        (run,) = run_setups(trace, [setup], jobs=2)
        if isinstance(run, MoetraceError):
            raise run
        lru, belady, *own = (int(lane.log.step["hits"].sum()) for lane in run.lanes)
        found[name] = [100 * (hits - lru) / (belady - lru) for hits in own]
    rows = [
        (policy, *(f"{closed[at]:.0f}" for closed in found.values()), f"{mean(c[at] for c in found.values()):.0f}")
        for at, policy in enumerate(FORGETTING)
    ]
    return table(("cache", *found, "mean"), rows)


def costs(rounds: int = 5) -> str:
    """Return what a replay takes of the processor for each access and for each layer of a step, at batch 1 and 32."""
    rows = []
    policies = [load_policy("edge-ndp"), load_policy("foresee")]
    for name in ("gpt-oss-20b", "deepseek-v2-lite", "qwen3-30b-a3b"):
        for batch in (1, 32):
            trace = mt.generate_trace(name, requests=batch, prompt=8, output=800 if batch == 1 else 60, batch=batch)
            taken: dict[str, list[float]] = {policy.name: [] for policy in policies}
            for _ in range(rounds + 1):
                for policy in policies:
                    start = process_time()
                    replayed(trace, [policy])
                    taken[policy.name].append((process_time() - start) / len(UNITS))
            edge_s, own_s = (median(times[1:]) for times in taken.values())
            accesses = trace.rows * trace.layers * trace.top_k
            each = [f"{1e9 * own / accesses:.0f}" for own in (edge_s, own_s)]
            layer_us = 1e6 * (own_s - edge_s) / (trace.steps * trace.layers)
            rows.append((name, f"{trace.num_experts}", str(batch), *each, f"{own_s / edge_s:.1f}x", f"{layer_us:.1f}"))
    head = ("model", "experts", "batch", "`edge-ndp`, ns an access", "`foresee`", "ratio", "us more a layer of a step")
    return table(head, rows)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folders", type=Path, nargs="*", default=[ROOT / "traces"])
    options.add_argument("--write", action="store_true")
    options.add_argument("--rows", type=int, default=5000, help="take the first requests of a trace up to so many rows")
    asked = options.parse_args()
    policies = [*presets()[:3], *others(), *presets()[3:], belady()]
    cells: list[Cell] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        traces = list(captured(asked.folders, scratch))
        for name, shape in GENERATED.items():
            traces.append((name, mt.generate_trace(requests=16, prompt=PROMPT, output=160, seed=0, **shape)))
        singles = []
        for name, trace in traces:
            for batch in BATCHES:
                made = batched(trace, batch, asked.rows, scratch)
                if made is not None:
                    singles += [(name, made)] if batch == 1 else []
                    cells += measured(name, made, batch, policies)
                    print(f"{name}, batch {batch}: {made.rows} rows", flush=True)
    own = [cell for cell in cells if cell.policy not in ("edge-ndp", "belady")]
    parts = {
        "bounds": bounded(cells),
        "policies": summary([cell for cell in cells if cell.policy != "belady"]),
        "cells": details(own),
        "costs": costs(),
        "forgetting": forgetting(singles),
    }
    for name, text in parts.items():
        print(f"\n{text}")
        if asked.write:
            write_between(PAGE, name, text)


if __name__ == "__main__":
    main()
