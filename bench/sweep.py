"""Time of a sweep of 200 small cells beside the sum of their replays, over the cores, in the same run.

    python bench/sweep.py [--rounds 5] [--jobs N]

A cell is small: the shipped tiny-olmoe.h5, 8 to 30 ms each. The sweep's time has all in it: reading the grid, starting
processes, hashing the trace, writing 200 files and the tables. Each is measured once a round, in turn; medians. Where
other work shares the cores, the clock says little: --jobs 1 compares the same on one.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import moetrace as mt

TRACE = Path(__file__).parents[1] / "traces" / "tiny-olmoe.h5"
SLOTS, UNITS = [8, 16, 24, 32, 40, 48, 64, 80, 96, 112], [2, 3, 4, 5, 6]
POLICIES = ["monde", "ndp-ep", "edge-ndp", "on-demand"]
GRID = {"trace": str(TRACE), "policy": POLICIES, "slots": SLOTS, "set": {"system.ndp.units": UNITS}}
TARGET = 1.3


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
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
