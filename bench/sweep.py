"""Time of a sweep of 200 small cells beside the sum of their replays, over the cores, in the same run.

    python bench/sweep.py [--rounds 5] [--jobs N]
    python bench/sweep.py --memory [--limit-mib 2048] [--write docs/sweep.md]

A cell is small: the shipped tiny-olmoe.h5, 8 to 30 ms each. The sweep's time has all in it: reading the grid, starting
processes, hashing the trace, writing 200 files and the tables. Each is measured once a round, in turn; medians. Where
other work shares the cores, the clock says little: --jobs 1 compares the same on one.

`--memory` sweeps many cells in one process, which may allocate `--limit-mib` and no more (RLIMIT_DATA). 1,000 cells of
a trace of 2 GB would take hours, so what they take is measured in two parts: their states, of 1,000 cells over a short
trace of a model of 48 x 128 experts, 32 requests at once; and the seconds of their steps, of 50 cells over a trace of
one layer that has as many steps as such a trace of 2 GB. Beside it stands what a cell takes with a log of each step, as
a replay has.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter, sleep

import msgspec
from markers import write_between
from memory import anonymous_bytes, temporary_bytes

import moetrace as mt
from moetrace.batch import work
from moetrace.batch.work import SECONDS_BYTES
from moetrace.engine.folding import StepStore
from moetrace.engine.run import run_setups
from moetrace.engine.setup import Setup
from moetrace.generators import generate_trace

TRACE = Path(__file__).parents[1] / "traces" / "tiny-olmoe.h5"
SLOTS, UNITS = [8, 16, 24, 32, 40, 48, 64, 80, 96, 112], [2, 3, 4, 5, 6]
POLICIES = ["monde", "ndp-ep", "edge-ndp", "on-demand"]
GRID = {"trace": str(TRACE), "policy": POLICIES, "slots": SLOTS, "set": {"system.ndp.units": UNITS}}
TARGET = 1.3
MODEL, BATCH, BYTES = "qwen3-30b-a3b", 32, 2e9
CELLS = {"short": 1000, "long": 50}  # of each part
LESS = 20  # of a cell's memory


def replays() -> float:
    """Each cell on its own, the trace open already: what the sweep may not cost much more than."""
    start = perf_counter()
    with mt.Trace.open(TRACE) as trace:
        for policy in POLICIES:
            for slots in SLOTS:
                for units in UNITS:
                    overrides = {"system.ndp.units": units}
                    mt.replay(trace, policies=policy, slots=slots, overrides=overrides, jobs=1).to_dict()
    return perf_counter() - start


def sweep(jobs: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        start = perf_counter()
        done = mt.sweep(GRID, folder, jobs=jobs)
        spent = perf_counter() - start
    assert done.computed == len(SLOTS) * len(UNITS) * len(POLICIES), done.failed
    return spent


def command(jobs: int) -> float:
    """The command in a process of its own, imports and all."""
    with tempfile.TemporaryDirectory() as folder:
        toml = Path(folder) / "sweep.toml"
        toml.write_text(f'trace = "{TRACE}"\npolicy = {POLICIES}\nslots = {SLOTS}\n[set]\nsystem.ndp.units = {UNITS}\n')
        start = perf_counter()
        arguments = ["sweep", toml, "-o", Path(folder) / "out", "--jobs", str(jobs)]
        subprocess.run([sys.executable, "-m", "moetrace", *arguments], check=True, capture_output=True)
        return perf_counter() - start


def limited(arguments: list[str], limit_mib: int) -> tuple[float, float, float, str]:
    """Run Python in a process of limited memory; return the most MiB of it and of its files, seconds and its output."""
    limit, start, anonymous, temporary = limit_mib << 20, perf_counter(), 0, 0
    with tempfile.NamedTemporaryFile("w+") as out:  # a pipe would fill up
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=out,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        )
        while process.poll() is None:
            anonymous = max(anonymous, anonymous_bytes(process.pid))
            temporary = max(temporary, temporary_bytes(process.pid))
            sleep(0.05)
        if process.returncode:
            raise SystemExit(f"{' '.join(arguments)} failed: {process.returncode}")
        return anonymous / 2**20, temporary / 2**20, perf_counter() - start, Path(out.name).read_text()


def steps_of_all() -> int:
    """How many steps a trace of BYTES has: one row of each request a step, and few steps of prompts."""
    model = mt.load_model(MODEL)
    return round(BYTES / (model.moe_layers * model.top_k) / BATCH)


def parts(folder: Path) -> dict[str, tuple[Path, str]]:
    """The two traces, and a sweep of so many cells over each."""
    several = generate_trace(MODEL, requests=2 * BATCH, prompt=8, output=12, batch=BATCH, zipf=0.6, stick=0.3)
    several.write(folder / "short.h5")
    small = msgspec.structs.replace(mt.load_model("mixtral-8x7b"), moe_layers=1)
    generate_trace(small, requests=1, prompt=1, output=steps_of_all()).write(folder / "long.h5")
    found = {}
    for name, slots in (("short", list(range(100, 1100, 100))), ("long", list(range(5)))):
        bandwidths = [10 + number / 2 for number in range(CELLS[name] // len(slots))]
        text = f'trace = "{name}.h5"\npolicy = "edge-ndp"\nslots = {slots}\n[set]\n'
        text += f"system.link.bandwidth_gb_s = {bandwidths}\n" + ("model.moe_layers = 1\n" if name == "long" else "")
        (folder / f"{name}.toml").write_text(text)
        found[name] = folder / f"{name}.h5", str(folder / f"{name}.toml")
    return found


def cell_mib(trace: Path, logs: bool) -> None:
    """Print the MiB that each of some cells takes, with a log of each step or with the steps folded into a file."""
    number = 100
    with mt.Trace.open(trace) as opened, StepStore(0) as store:
        model = msgspec.structs.replace(mt.load_model(opened.model), moe_layers=opened.layers)
        policy, system = mt.load_policy("edge-ndp"), mt.load_system("edge-ndp")
        setups = [Setup(model=model, system=system, policies=[policy], slots=slots % 8) for slots in range(number)]
        with_store = {} if logs else {"store": store}
        run_setups(opened, setups[:1], **with_store)
        before = anonymous_bytes(os.getpid())
        runs = run_setups(opened, setups, **with_store)
        print((anonymous_bytes(os.getpid()) - before) / len(runs) / 2**20)


def memory(limit_mib: int) -> str:
    """What a thousand cells take, as a Markdown table and a sentence."""
    lines = [
        f"Cells in one process that may allocate {limit_mib:,} MiB:",
        "",
        "| trace | steps | cells | anonymous MiB | temporary file, MiB | s | of a cell | with logs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    taken, logged, most, seconds_mib = 0.0, 0.0, SECONDS_BYTES / 2**20, 1000 * steps_of_all() * 8 / 2**20
    with tempfile.TemporaryDirectory() as name:
        for part, (trace, toml) in parts(Path(name)).items():
            anonymous, temporary, seconds, found = limited([__file__, "--sweep", toml], limit_mib)
            assert int(found) == CELLS[part], "each cell is there"
            own, logs = (
                float(limited([__file__, "--cell", str(trace), *more], 8 * limit_mib)[3]) for more in ([], ["--logs"])
            )
            with mt.Trace.open(trace) as opened:
                what = f"{opened.layers} x {opened.num_experts} experts, {trace.stat().st_size / 1e6:.0f} MB"
                row = f"{CELLS[part]:,} | {anonymous:.0f} | {temporary:.0f} | {seconds:.0f} | {own:.2f} | {logs:.2f}"
                lines.append(f"| {what} | {opened.steps:,} | {row} |")
            taken, logged = taken + own, logged + logs
            most += anonymous if part == "short" else 1000 * own
    lines += [
        "",
        f"Together, as of a trace of {BYTES / 1e9:.0f} GB: a cell takes {taken:.2f} MiB, and with logs {logged:.1f}: "
        f"{logged / taken:.0f}x less (wanted {LESS}x). 1,000 cells take {most:,.0f} MiB in one pass (wanted 2,000): "
        f"their states, and of {seconds_mib:,.0f} MiB of seconds {SECONDS_BYTES >> 20}; the rest of these is in a "
        "temporary file.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--limit-mib", type=int, default=2048)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--cell", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sweep", help=argparse.SUPPRESS)
    parser.add_argument("--logs", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        cell_mib(options.cell, options.logs)
        return
    if options.sweep:
        work.KEEP_BYTES = 0  # as a trace that is too large to be kept: all cells in one pass
        print(mt.sweep(options.sweep).computed)
        return
    if options.memory:
        found = memory(options.limit_mib)
        print(found)
        if options.write:
            write_between(options.write, "memory", found)
        return
    sweep(options.jobs)  # compiles
    rows = [(replays(), sweep(options.jobs), command(options.jobs)) for _ in range(options.rounds)]
    print(f"{options.jobs} jobs, medians of {options.rounds} rounds")
    alone = median(row[0] for row in rows) / options.jobs
    print(f"200 replays, over the jobs   {alone:6.2f} s")
    for name, at in (("mt.sweep", 1), ("moetrace sweep", 2)):
        ratio = median(row[at] * options.jobs / row[0] for row in rows)
        print(f"{name:<28} {median(row[at] for row in rows):6.2f} s   {ratio:.2f}x (target <= {TARGET}x)")


if __name__ == "__main__":
    main()
