"""How well calibrated GPUs predict kernels that they were not fitted to, beside the data sheets' peaks.

    python -m pip download --no-deps aisimulate==0.13.0.dev202610270000000085
    python bench/calibration.py aisimulate-*.whl [--write] [--rows OUT.csv]

The wheel of NVIDIA's aisimulate (Apache-2.0) holds measured times of MoE layers. Of all measurements without tensor
parallelism, the fastest framework counts for each GPU, type, shape and number of tokens. `--write` calibrates the
presets by them and writes the table of errors into docs/calibration.md; `--rows` writes six layers of each GPU, which a
unit test predicts.
"""

import argparse
import io
import re
import tempfile
import zipfile
from pathlib import Path

import polars as pl
from markers import write_between
from pages import ROOT
from reference import table as markdown

import moetrace as mt
from moetrace.calibration import read_measured
from moetrace.calibration.measured import KERNEL

PAGE = ROOT / "docs/calibration.md"
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
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--write", action="store_true", help="write the presets and the page")
    parser.add_argument("--rows", type=Path, help="write six rows of each GPU here")
    options = parser.parse_args()
    release = "aisimulate " + options.wheel.name.split("-")[1]
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "layers.parquet"
        fastest(options.wheel).write_parquet(table)
        rows, samples = _calibrated(table, release, options.write)
    text = markdown(_HEAD, rows)
    print(text)
    if options.write:
        write_between(PAGE, "gpus", text)
    if options.rows:
        pl.concat(samples).write_csv(options.rows)


def fastest(wheel: Path) -> pl.DataFrame:
    """Return, of all measured layers in the wheel, the fastest of each `KEY`."""
    frames = []
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            found = re.search(r"/data/(\w+)/moe/[^/]+/[^/]+/moe_perf\.parquet$", name)
            if found:
                frame = pl.read_parquet(io.BytesIO(archive.read(name))).with_columns(gpu=pl.lit(found[1]))
                frame = frame.filter(pl.col("moe_tp_size") == 1, pl.col("num_tokens") <= 4096)
                frames.append(
                    frame.select(*KEY, "kernel_source", pl.col("latency").cast(pl.Float64).alias("latency_ms"))
                )
    return (
        pl.concat(frames).sort("latency_ms", "kernel_source").unique(KEY, keep="first", maintain_order=True).sort(KEY)
    )


def _calibrated(table: Path, release: str, write: bool) -> tuple[list[tuple[str, ...]], list[pl.DataFrame]]:
    rows, samples = [], []
    for preset, (gpu, cache_mb) in GPUS.items():
        path = PRESETS / f"{preset}.toml"
        source = f"{release} (NVIDIA), {gpu}, bfloat16"
        found = mt.calibrate(table, path, gpu=gpu, dtype="bfloat16", name=preset, cache_mb=cache_mb, source=source)
        if write:
            path.write_text(found.text, encoding="utf-8")
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
