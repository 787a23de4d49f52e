"""Measured transfers between the GPUs of a cluster: rows to the GPUs of their experts (dispatch) and back (combine).

A table of them is of one node, each of whose GPUs holds an equal share of the experts, and routes its rows at random.
"""

import math
from pathlib import Path

import numpy as np
import polars as pl

from moetrace.spec.errors import MoetraceError, UsageError, counted

# Sections of a system that such times fit.
NETWORK_PARTS = ("network", "network.decode", "network.prefill")
STAGES = ("dispatch", "combine")
TRANSFER = ("hidden", "experts", "top_k", "gpus", "rows", "bits", "seconds")
TRANSFER_SHAPE = ("hidden", "experts", "top_k", "gpus")
# NVIDIA's aisimulate: the kernels of DeepEP's high throughput and low latency modes, and bits of an activation with
# its scales. The table does not say what vLLM sends in high throughput mode. FP8 misses less than bf16 on five of six
# GPUs (on H100 by 10.5 instead of 14.3 % in the median).
_PARTS = {
    "trtllm_deepep_ht": "network",
    "deepep_ht": "network",
    "trtllm_deepep_ll": "network.decode",
    "deepep_ll": "network.decode",
}
_BITS = {"bfloat16": 16.0, "default": 16.0, "fp8": 8.0 + 32 / 128, "nvfp4": 4.5, "fp4": 4.5}
_BITS_BACK = 16.0  # combine returns bf16 for every type that was sent: its times say so


def named(frame: pl.DataFrame, notes: list[str]) -> pl.DataFrame:
    """Give a table of aisimulate (one with a column `comm_backend`) the columns that tables of transfers have."""
    known = frame.filter(pl.col("comm_backend").is_in(list(_PARTS)) & pl.col("comm_dtype").is_in(list(_BITS)))
    if len(known) < len(frame):
        notes.append(
            f"{counted(len(frame) - len(known), 'row')} of other kernels than DeepEP's first version left out."
        )
    sent = pl.col("comm_dtype").replace_strict(_BITS, return_dtype=pl.Float64)
    sent = pl.when(pl.col("comm_backend") == "deepep_ht").then(_BITS["fp8"]).otherwise(sent)
    return known.with_columns(
        part=pl.col("comm_backend").replace_strict(_PARTS, return_dtype=pl.String),
        stage=pl.col("phase"),
        gpus=pl.col("ep_size"),
        bits=pl.when(pl.col("phase") == "combine").then(_BITS_BACK).otherwise(sent),
        seconds=pl.col("latency") / 1e6,
    )


def check_transfers(rows: pl.DataFrame, numbers: pl.Series, path: Path) -> None:
    """Raise UsageError or MoetraceError, by the number of the row, where a transfer cannot be one."""
    if "stage" not in rows.columns:
        raise UsageError(f"{path} has no column stage: dispatch, or combine, for each row of a network.")
    if "framework" in rows.columns and rows["framework"].n_unique() > 1:
        names = ", ".join(sorted(map(str, rows["framework"].unique())))
        raise UsageError(f"{path} has transfers of several frameworks ({names}): choose one with --framework.")
    for wrong, says in (
        (~rows["stage"].is_in(STAGES).fill_null(False), "stage must be dispatch or combine"),
        ((rows["gpus"] < 2) | (rows["experts"] % rows["gpus"] != 0), "gpus must be 2 or more and divide experts"),
    ):
        if wrong.any():
            raise MoetraceError(f"{path}, row {numbers.filter(wrong)[0]}: {says}.")
    for stage in STAGES:
        if stage not in rows["stage"]:
            raise UsageError(f"{path} has no time of stage {stage}: measure both, dispatch and combine.")


def transfer_work(transfers: pl.DataFrame, dedup: bool) -> np.ndarray:
    """Dispatches, combines, rows and bytes of transfers, float64 `[points, 4]` (docs/cluster.md, A2E and E2A).

    Args:
        transfers: A frame of `Measured.transfers`.
        dedup: Whether a row goes to a GPU once. Routing is random: the mean number of GPUs that hold experts of a row.
            Otherwise rows count nothing, since each of their copies has bytes.
    """
    columns = transfers.select("hidden", "top_k", "gpus", "rows", "bits").cast(pl.Float64).to_numpy().T
    hidden, top_k, gpus, rows, bits = columns
    copies = _distinct(transfers) if dedup else top_k
    there = (transfers["stage"] == "dispatch").to_numpy().astype(np.float64)
    moved = rows * copies * (1 - 1 / gpus) * hidden * bits / 8
    return np.stack([there, 1 - there, rows * dedup, moved], axis=1)


def _distinct(transfers: pl.DataFrame) -> np.ndarray:
    """Mean number of distinct GPUs that the experts of a row stand on."""
    found = []
    for experts, top_k, gpus in transfers.select("experts", "top_k", "gpus").rows():
        others = experts - experts / gpus
        missed = 0.0
        if top_k <= others:  # a GPU has none of the row's experts: all are drawn from the others
            missed = math.exp(_log_falling(others, top_k) - _log_falling(experts, top_k))
        found.append(gpus * (1 - missed))
    return np.array(found)


def _log_falling(count: float, drawn: float) -> float:
    """Logarithm of count (count - 1) ... (count - drawn + 1)."""
    return math.lgamma(count + 1) - math.lgamma(count - drawn + 1)
