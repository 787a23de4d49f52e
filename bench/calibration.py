"""How well calibrated GPUs and clusters predict kernels that they were not fitted to, beside the data sheets' peaks.

    python -m pip download --no-deps aisimulate==0.13.0.dev202610270000000085
    python bench/calibration.py aisimulate-*.whl [--write] [--rows FOLDER]

The wheel of NVIDIA's aisimulate (Apache-2.0) holds measured times of MoE layers, on one GPU and on the busiest of
several, and of DeepEP's dispatch and combine. Of all measurements of a layer without tensor parallelism, the fastest
framework counts for each GPU, type, shape and number of tokens. A folder with the excerpts moe_kernels.parquet and
moe_a2a.parquet does instead of the wheel, and is the default if ../shared/calibration is one. `--write` calibrates the
presets by the wheel and writes the tables of errors into docs/calibration.md; `--rows` writes six layers of each GPU
(layers.csv) and some transfers of each cluster (transfers.csv), which unit tests predict.
"""

import argparse
import io
import re
import tempfile
import zipfile
from pathlib import Path

import polars as pl
from cluster_constants import (
    CLUSTERS,
    EXPERTS_HEAD,
    TRANSFERS_HEAD,
    expert_lines,
    transfer_lines,
    transfer_sample,
    write_cluster,
)
from markers import write_between
from pages import ROOT
from reference import table as markdown

import moetrace as mt
from moetrace.calibration import read_measured
from moetrace.calibration.measured import KERNEL

PAGE = ROOT / "docs/calibration.md"
EXCERPTS = ROOT.parent / "shared/calibration"
RELEASE = "0.13.0.dev202610270000000085"
PRESETS = ROOT / "moetrace/spec/presets/systems"
# Preset -> the GPU's name in the table, and its last cache in MB (the vendor's architecture papers; for Blackwell, what
# its driver reports).
GPUS = {
    "a100-sxm": ("a100_sxm", 40),
    "l40s": ("l40s", 96),
    "rtx-pro-6000": ("rtx_pro_6000_server", 128),
    "h100-sxm": ("h100_sxm", 50),
    "h200": ("h200_sxm", 50),
    "b200": ("b200_sxm", 126),
    "b300": ("b300_sxm", 126),
    "gb200": ("gb200", 126),
    "gb300": ("gb300", 126),
}
KEY = (
    "gpu",
    "moe_dtype",
    "hidden_size",
    "inter_size",
    "num_experts",
    "topk",
    "moe_ep_size",
    "distribution",
    "num_tokens",
)
_HEAD = (
    "GPU",
    "points",
    "shapes",
    "data sheet: median",
    "p90",
    "calibrated: median",
    "p90",
    "start",
    "compute",
    "memory",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", default=EXCERPTS, help="the wheel, or a folder of excerpts")
    parser.add_argument("--write", action="store_true", help="write the presets and the page")
    parser.add_argument("--rows", type=Path, metavar="FOLDER", help="write layers.csv and transfers.csv here")
    options = parser.parse_args()
    if not options.source.exists():
        parser.error(f"no tables: python -m pip download --no-deps aisimulate=={RELEASE}, and name the wheel")
    if options.write and options.source.is_dir():
        parser.error("excerpts lack shapes: --write needs the wheel")
    release = f"aisimulate {RELEASE if options.source.is_dir() else options.source.name.split('-')[1]}"
    layers, transfers = tables(options.source)
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "layers.parquet"
        layers.write_parquet(table)
        rows, samples = _calibrated(table, release, options.write)
        found = {"gpus": markdown(_HEAD, rows), "groups": markdown(EXPERTS_HEAD, [*expert_lines(table, GPUS)])}
    found["transfers"] = markdown(TRANSFERS_HEAD, [*transfer_lines(transfers)])
    for name, text in found.items():
        print(f"{text}\n")
        if options.write:
            write_between(PAGE, name, text)
    if options.write:
        for preset in CLUSTERS:
            write_cluster(preset, PRESETS / f"{preset}.toml", transfers, release)
    if options.rows:
        _write_rows(
            options.rows / "layers.csv", pl.concat(samples), f"Six layers of each GPU, measured: NVIDIA {release}"
        )
        some = transfer_sample(transfers)
        _write_rows(options.rows / "transfers.csv", some, f"Some transfers of each cluster, measured: NVIDIA {release}")


def _write_rows(path: Path, rows: pl.DataFrame, what: str) -> None:
    path.write_text(f"# {what} (Apache-2.0).\n{rows.write_csv()}", encoding="utf-8")


def tables(source: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return, of all measured layers in the wheel or folder, the fastest of each `KEY`, and all transfers."""
    if source.is_dir():
        return pl.read_parquet(source / "moe_kernels.parquet"), pl.read_parquet(source / "moe_a2a.parquet")
    layers, transfers = [], []
    with zipfile.ZipFile(source) as archive:
        for name in sorted(archive.namelist()):
            found = re.search(r"/data/(\w+)/(moe|comm)/[^/]+/[^/]+/moe_(perf|a2a_perf)\.parquet$", name)
            if not found:
                continue
            frame = pl.read_parquet(io.BytesIO(archive.read(name))).with_columns(gpu=pl.lit(found[1]))
            if found[2] == "comm":
                transfers.append(frame.with_columns(pl.col("latency").cast(pl.Float64)))
                continue
            frame = frame.filter(pl.col("moe_tp_size") == 1, pl.col("num_tokens") <= 4096)
            layers.append(frame.select(*KEY, "kernel_source", pl.col("latency").cast(pl.Float64).alias("latency_ms")))
    fastest = pl.concat(layers).sort("latency_ms", "kernel_source").unique(KEY, keep="first", maintain_order=True)
    return fastest.sort(KEY), pl.concat(transfers, how="diagonal_relaxed")


def _calibrated(table: Path, release: str, write: bool) -> tuple[list[tuple[str, ...]], list[pl.DataFrame]]:
    rows, samples = [], []
    clusters = {preset: next(both for both in GPUS.values() if both[0] == gpu) for preset, (gpu, _) in CLUSTERS.items()}
    for preset, (gpu, cache_mb) in {**GPUS, **clusters}.items():
        path = PRESETS / f"{preset}.toml"
        source = f"{release} (NVIDIA), {gpu}, bfloat16"
        found = mt.calibrate(table, path, gpu=gpu, dtype="bfloat16", name=preset, cache_mb=cache_mb, source=source)
        if write:
            path.write_text(found.text, encoding="utf-8")
        if preset in CLUSTERS:
            continue
        rows.append(_line(found.system.gpu.name, found.frame.row(0, named=True)))
        samples.append(_sample(table, preset, gpu, cache_mb))
    return rows, samples


def _line(name: str, row: dict) -> tuple[str, ...]:
    errors = ("sheet_median_error", "sheet_p90_error", "median_error", "p90_error")
    return (
        name,
        f"{row['points']}",
        f"{row['shapes']}",
        *(f"{100 * row[error]:.1f} %" for error in errors),
        f"{row['start_us']:.0f} us",
        f"{row['compute_efficiency']:.2f}",
        f"{row['memory_efficiency']:.2f}",
    )


def _sample(table: Path, preset: str, gpu: str, cache_mb: float) -> pl.DataFrame:
    """Return six layers of a GPU: two shapes that both ends of the sizes have, at 1, 32 and 256 rows."""
    kernels = read_measured(table, {"gpu": gpu, "dtype": "bfloat16"}).kernels["gpu"]
    weight = pl.col("hidden") * pl.col("intermediate")
    kernels = kernels.filter(pl.col("rows").is_in([1.0, 32.0, 256.0]), pl.col("active") * weight * 6 > cache_mb * 1e6)
    shapes = kernels.group_by("hidden", "intermediate", "experts", "top_k").len().filter(pl.col("len") == 3)
    shapes = shapes.sort(weight, "hidden", "experts", "top_k")
    kept = kernels.join(shapes[[0, -1]], on=["hidden", "intermediate", "experts", "top_k"], how="semi")
    return kept.sort(weight, "rows").select(pl.lit(preset).alias("system"), *KERNEL)


if __name__ == "__main__":
    main()
