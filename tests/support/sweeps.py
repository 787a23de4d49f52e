"""Folders of sweeps: one made by hand (three axes of three values, one cell failed), and what is in any."""

import itertools
import json
from pathlib import Path

import polars as pl

import moetrace as mt

# A policy that ends its process, the first `times` times.
KILLS = """
import os, pathlib
flag = pathlib.Path({flag!r})
if {times} > (len(flag.read_text()) if flag.exists() else 0):
    with flag.open("a") as file:
        file.write("x")
    os._exit(9)

def dies(state, view, layer, load, plan):
    pass
"""


def sweep_folder(folder: Path, policies: list[str]) -> Path:
    folder.mkdir()
    axes = {"policy": policies, "slots": [16, 48, 96], "system.ndp.units": [2, 4, 6]}
    rows = []
    for number, (policy, slots, units) in enumerate(itertools.product(*axes.values())):
        total_s = (10 - 3 * policies.index(policy)) / (1 + slots / 200) / units**0.5
        rows.append(
            {
                "name": f"tiny-olmoe/edge-ndp/{policy}/slots={slots}/system.ndp.units={units}",
                "cell": None if number == 0 else f"{number:064x}",
                "trace": "tiny-olmoe",
                "model": "tiny-olmoe",
                "system": "edge-ndp",
                "policy": policy,
                "slots": slots,
                "system.ndp.units": units,
                "error": "It was <b>refused</b>." if number == 0 else None,
                "total_s": None if number == 0 else total_s,
                "ttft_s_p50": total_s / 100,
                "tpot_s_p50": None,
                "hit_rate": slots / 200,
                "gpu_memory_bytes": slots * 12e6,
                "link_bytes": total_s * 1e9,
                "pareto": number % 5 == 1,
            }
        )
    pl.DataFrame(rows, infer_schema_length=None).write_parquet(folder / "cells.parquet")
    sweep = {"schema": "moetrace.sweep/1", "moetrace": "0.1.0", "engine": "0" * 64, "axes": axes, "cells": []}
    (folder / "sweep.json").write_text(json.dumps(sweep))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def files_of(grid, folder: Path) -> dict[str, bytes]:
    mt.sweep(grid, folder)
    return files(folder)
