"""Folders as `moetrace sweep` and `moetrace replay` leave them, made by hand: what a gate needs of them."""

import hashlib
import json
from pathlib import Path

FIGURES = {
    "name": "monde",
    "total_s": 12.957496905156987,
    "prefill_s": 0.6,
    "decode_s": 12.3,
    "mixed_s": 0.0,
    "tokens_per_s": 533.8,
    "hits": 10,
    "misses": 174137,
    **{
        name: {"mean": 0.0018, "p50": 0.0017, "p95": 0.002, "p99": 0.0021496, "max": 0.0143}
        for name in ("step_s", "ttft_s", "tpot_s")
    },
    "hit_rate": 0.71,
    "demand_bytes": 347326119936.0,
    "prefetch_bytes": 0.0,
    "late": 0,
    "wasted": 0,
    "used": 0,
    "imbalance_mean": None,
    "utilization": {"gpu": 0.29, "ndp": [0.25, 0.75], "link_in": 0.5, "link_out": 0.01, "cpu": 0.0},
    "work_bound_s": 4.68,
    "clairvoyant_s": 12.9,
    "speedup": 1.0,
    "optimal_fallbacks": 0,
    "choices": {"dispatch": "hot", "residency": "none"},
}
TRACE = {"model": "tiny-olmoe", "rows": 16414, "steps": 6981, "requests": 64, "sha256": "ab" * 32}


def summary(*policies, system=None, trace=None, **changed):
    return {
        "schema": "moetrace.result/1",
        "moetrace": "0.1.0",
        "trace": TRACE | (trace or {}),
        "model": {"name": "tiny-olmoe", "experts": 32},
        "system": {"name": "edge-ndp", "link": {"bandwidth_gb_s": 55.0}, "cpu": None} | (system or {}),
        "slots": 48,
        "policies": [FIGURES | one for one in policies] or [FIGURES],
    } | changed


def replay(folder: Path, *policies, **changed) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary(*policies, **changed)))
    return folder


def sweep(folder: Path, cells: dict[str, dict | str], engine="e" * 64, moetrace="0.1.0", **inputs) -> Path:
    """Make a sweep's folder of `cells`: by name, the summary of each, or its error; `inputs` are more of all cells."""
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    listed = []
    for name, cell in cells.items():
        if isinstance(cell, str):
            listed.append({"name": name, "cell": None, "error": cell})
            continue
        policy = cell["policies"][0]["choices"]
        given = {"trace": cell["trace"]["sha256"], "policy": {"name": cell["policies"][0]["name"], **policy}}
        given |= {key: cell[key] for key in ("model", "system", "slots")} | inputs
        text = {"schema": "moetrace.cell/1", "moetrace": moetrace, "engine": engine, "inputs": given, "result": cell}
        key = hashlib.sha256(name.encode()).hexdigest()
        (folder / "cells" / f"{key}.json").write_text(json.dumps(text))
        listed.append({"name": name, "cell": key, "error": None, "policy": policy})
    whole = {"schema": "moetrace.sweep/1", "moetrace": moetrace, "engine": engine, "axes": {}, "cells": listed}
    (folder / "sweep.json").write_text(json.dumps(whole))
    return folder
