"""How well one GPU's constants predict the busiest of several, and what DeepEP's kernels say of a network.

Part of calibration.py, which writes docs/calibration.md and the presets.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
from ep_loads import busiest

import moetrace as mt
from moetrace.calibration import Calibrated, read_measured
from moetrace.calibration.calibrate import MAX_ROWS
from moetrace.calibration.fitting import least_relative, predict
from moetrace.calibration.measured import SHAPE, work

SHAPES = ("hidden", "intermediate", "experts", "top_k")
EXPERTS_HEAD = (
    "GPU",
    "load",
    "rows",
    "EP 1",
    "EP 2 to 8",
    "EP 16, 32",
    "EP 64 to 256",
    "EP 1 to 32",
    "all",
    "aim",
    "points",
)
_EP = ((1, 1), (2, 8), (16, 32), (64, 256), (1, 32), (1, 256))
# (load, most rows): median and p90 in %, on Hopper; B200 has one for all.
_AIMS = {
    ("balanced", 256): (5, 20),
    ("power law", 256): (8, 22),
    ("balanced", 4096): (7, 27),
    ("power law", 4096): (12, 30),
}
_AIM_B200 = (10, 40)

TRANSFERS_HEAD = (
    "GPU", "GPUs", "kernels", "points", "shapes", "median", "p90", "aim", "dispatch", "combine", "a row", "GB/s",
)  # fmt: skip
# Rate of a GPU's NVLink in one direction, GB/s (the vendor's data sheets).
_PORTS = {"h100_sxm": 450, "h200_sxm": 450, "b200_sxm": 900, "b300_sxm": 900, "gb200": 900, "gb300": 900}
_FRAMEWORKS = {"TRTLLM": "TensorRT-LLM", "vLLM": "vLLM"}
_MODES = {"network": "high throughput", "network.decode": "low latency"}
_AIMS_OF_TRANSFERS = {
    ("TRTLLM", "network"): (8, 20),
    ("TRTLLM", "network.decode"): (7, 18),
    ("vLLM", "network"): (11, 27),
    ("vLLM", "network.decode"): (16, 40),
}
# Cluster preset -> the GPU's name in the table, and whose kernels fit each part. On GB200, TensorRT-LLM's low latency
# dispatch takes 175 us at any number of rows, vLLM's 69.
CLUSTERS = {
    "h100-x8": ("h100_sxm", {"network": "TRTLLM", "network.decode": "TRTLLM"}),
    "h200-x16": ("h200_sxm", {"network": "TRTLLM", "network.decode": "TRTLLM"}),
    "gb200-nvl72": ("gb200", {"network": "TRTLLM", "network.decode": "vLLM"}),
}


def expert_lines(layers: Path, gpus: dict[str, tuple[str, float]]) -> Iterator[tuple[str, ...]]:
    """Yield the errors on experts of EP groups, in bfloat16: `EXPERTS_HEAD` for each GPU, load and number of rows.

    A shape is predicted by constants that are fitted to other shapes, to single GPUs and to balanced routing of at most
    256 rows, as the presets are: neither the shape nor any group nor a power law is fitted.
    """
    for preset, (gpu, cache_mb) in gpus.items():
        system = mt.load_system(preset)
        if gpu not in _PORTS:  # GPUs that no cluster here is of
            continue
        kernels = _loaded(layers, gpu)
        kernels = kernels.filter(pl.Series(work(kernels)[:, 2] > cache_mb * 1e6))
        ratio = _held_out(kernels, system.gpu.tflops * 1e12, system.gpu.bandwidth_gb_s * 1e9)
        kernels = kernels.with_columns(error=(ratio - 1).abs())
        for load in ("balanced", "power law"):
            for most in (MAX_ROWS, 4096):
                some = kernels.filter(pl.col("load") == load, pl.col("rows") <= most)
                aim = _AIMS[load, most] if gpu in ("h100_sxm", "h200_sxm") else _AIM_B200 if gpu == "b200_sxm" else None
                errors = [some.filter(pl.col("gpus").is_between(*range_)) for range_ in _EP]
                yield (
                    system.gpu.name,
                    load,
                    f"<= {most:,}",
                    *(_both(group["error"]) for group in errors),
                    "-" if aim is None else f"{aim[0]} / {aim[1]}",
                    f"{len(some):,}",
                )


def _loaded(layers: Path, gpu: str) -> pl.DataFrame:
    """Layers of a GPU with what fell on the busiest of the group; columns of `KERNEL`, choices, gpus, load."""
    frame = pl.read_parquet(layers).filter(pl.col("gpu") == gpu, pl.col("moe_dtype") == "bfloat16")
    keys = ("num_experts", "topk", "num_tokens", "moe_ep_size", "distribution")
    loads = frame.select(keys).unique(maintain_order=True)
    found = [busiest(*row) for row in loads.rows()]
    loads = loads.with_columns(
        pl.Series("active", [active for active, _ in found]), pl.Series("choices", [choices for _, choices in found])
    )
    frame = frame.join(loads, on=keys, how="left", maintain_order="left")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "loaded.parquet"
        frame.write_parquet(path)
        known = read_measured(path).kernels["gpu"].select(*SHAPES, "matrices", "bits").unique()
    frame = frame.rename({"hidden_size": "hidden", "inter_size": "intermediate", "num_experts": "experts"})
    frame = frame.rename({"topk": "top_k", "num_tokens": "rows", "moe_ep_size": "gpus"})
    frame = frame.with_columns(pl.col(*SHAPES).cast(pl.Float64)).join(known, on=SHAPES, maintain_order="left")
    load = pl.when(pl.col("distribution") == "balanced").then(pl.lit("balanced")).otherwise(pl.lit("power law"))
    return frame.with_columns(load=load, seconds=pl.col("latency_ms") / 1e3)


def _held_out(kernels: pl.DataFrame, peak_flop_s: float, peak_bytes_s: float) -> pl.Series:
    """Predicted / measured of each layer, from the half of the shapes that it is not in."""
    amounts, seconds = work(kernels), kernels["seconds"].to_numpy()
    _, number = np.unique(kernels.select(*SHAPE).to_numpy(), axis=0, return_inverse=True)
    half = number.reshape(-1) % 2
    fitted = (pl.col("gpus") == 1) & (pl.col("load") == "balanced") & (pl.col("rows") <= MAX_ROWS)
    fitted = kernels.select(fitted).to_series().to_numpy()
    predicted = np.empty(len(seconds))
    floors = np.array([0.0, 1 / peak_flop_s, 1 / peak_bytes_s])
    for held in (0, 1):
        some = fitted & (half != held)
        constants = least_relative(amounts[some], seconds[some], floors, "sum")
        predicted[half == held] = predict(amounts[half == held], constants, "sum")
    return pl.Series(predicted / seconds)


def transfer_lines(transfers: pl.DataFrame) -> Iterator[tuple[str, ...]]:
    """Yield `TRANSFERS_HEAD` for each GPU, framework and mode of DeepEP."""
    for gpu, port in _PORTS.items():
        for framework, shown in _FRAMEWORKS.items():
            some = transfers.filter(pl.col("gpu") == gpu, pl.col("framework") == framework)
            if some.is_empty():
                continue
            found = calibrated(some, "h100-x8", port, gpu)
            for row in found.frame.rows(named=True):
                aim = _AIMS_OF_TRANSFERS[framework, row["part"]] if gpu in ("h100_sxm", "h200_sxm") else None
                yield (
                    gpu.removesuffix("_sxm").upper(),
                    f"{some['ep_size'][0]}",
                    f"{shown}, {_MODES[row['part']]}",
                    f"{row['points']}",
                    f"{row['shapes']}",
                    f"{100 * row['median_error']:.1f} %",
                    f"{100 * row['p90_error']:.1f} %",
                    "-" if aim is None else f"{aim[0]} / {aim[1]}",
                    f"{row['dispatch_latency_us']:.0f} us",
                    f"{row['combine_latency_us']:.0f} us",
                    f"{row['row_ns']:.0f} ns" if row["row_ns"] else "-",
                    f"{row['bandwidth_gb_s']:.0f}" + (" (limit)" if row["bandwidth_gb_s"] > 0.999 * port else ""),
                )


def calibrated(transfers: pl.DataFrame, system: str | Path, port: float, source: str, name: str = "x") -> Calibrated:
    """Fit the network of a cluster to transfers of one GPU and framework."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "transfers.parquet"
        transfers.write_parquet(path)
        return mt.calibrate(path, system, name=name, port_gb_s=port, source=source)


def write_cluster(preset: str, path: Path, transfers: pl.DataFrame, release: str) -> None:
    """Write the network of a cluster's preset."""
    gpu, frameworks = CLUSTERS[preset]
    for part, framework in frameworks.items():
        mode = "ht" if part == "network" else "ll"
        some = transfers.filter(
            pl.col("gpu") == gpu, pl.col("framework") == framework, pl.col("comm_backend").str.ends_with(f"_{mode}")
        )
        source = f"{release} (NVIDIA), {gpu}, DeepEP in {_MODES[part]} mode, {_FRAMEWORKS[framework]}, "
        source += f"{some['ep_size'][0]} GPUs of one node"
        found = calibrated(some, path, _PORTS[gpu], source, preset)
        path.write_text(found.text, encoding="utf-8")


def transfer_sample(transfers: pl.DataFrame) -> pl.DataFrame:
    """Return some transfers of each cluster's preset, which a unit test predicts."""
    samples = []
    for preset, (gpu, frameworks) in CLUSTERS.items():
        for part, framework in frameworks.items():
            some = transfers.filter(pl.col("gpu") == gpu, pl.col("framework") == framework)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "transfers.parquet"
                some.write_parquet(path)
                rows = read_measured(path).transfers[part]
            rows = rows.filter(pl.col("rows").is_in([16.0, 128.0, 256.0, 4096.0]), pl.col("hidden") == 7168.0)
            rows = rows.sort("stage", "experts", "top_k", "bits", "rows").gather_every(3)
            samples.append(rows.select(pl.lit(preset).alias("system"), pl.lit(part).alias("part"), pl.all()))
    return pl.concat(samples)


def _both(errors: pl.Series) -> str:
    if errors.is_empty():
        return "-"
    return f"{100 * errors.median():.1f} / {100 * errors.quantile(0.9, 'linear'):.1f}"
