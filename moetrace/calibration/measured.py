"""A table of measured times: a layer's experts on a GPU or CPU, a copy over the link or from the disk, a transfer."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import polars as pl

from moetrace.calibration.transfers import NETWORK_PARTS, TRANSFER, check_transfers, named
from moetrace.spec.errors import MoetraceError, UsageError, counted, printable
from moetrace.spec.ordinary_file import open_ordinary
from moetrace.spec.parquet_pages import DamagedParquetError, parquet_sizes

# Other names of the columns, as the tables of NVIDIA's aisimulate (Apache-2.0) have them.
ALIASES = {
    "hidden_size": "hidden",
    "inter_size": "intermediate",
    "num_experts": "experts",
    "topk": "top_k",
    "num_tokens": "rows",
    "moe_dtype": "dtype",
}
SHAPE = ("hidden", "intermediate", "experts", "matrices")
KERNEL = (*SHAPE, "top_k", "rows", "bits", "active", "seconds")
COPY = ("bytes", "seconds")
_OF_TRANSFERS = ("phase", "comm_dtype", "ep_size", "latency")  # beside comm_backend, in aisimulate's tables
_ROW = "number of the row"  # as messages count: from 1, the header aside
PARTS = ("gpu", "cpu", "link", "disk", *NETWORK_PARTS)
_TEXTS = ("gpu", "dtype", "distribution", "kernel_source", "framework", "stage", "comm_backend", "comm_dtype", "phase")
_OTHER_NUMBERS = ("choices", "latency_ms", "latency", "moe_ep_size", "ep_size")
# Bits of a stored weight with its scales, by the name of its type.
DTYPE_BITS = {
    "float32": 32.0,
    "bfloat16": 16.0,
    "float16": 16.0,
    "fp8": 8.0,
    "fp8_block": 8.0 + 32 / 128**2,
    "int4_wo": 4.0 + 16 / 128,
    "nvfp4": 4.5,
    "w4a16_mxfp4": 4.25,
    "w4a8_mxfp4_mxfp8": 4.25,
    "w4afp8": 4.0 + 16 / 128,
}
MAX_BYTES = 256 << 20
MAX_UNPACKED_BYTES = 1 << 30
MAX_ROWS = 2_000_000
MAX_SIZE = 2**40  # of any figure in a table: no shape or copy comes near


class Measured(NamedTuple):
    """Measured times, by the part of the machine.

    Attributes:
        kernels: Part (gpu, cpu) -> a frame with the columns `KERNEL`; a row is one layer's experts: `rows` rows of
            activations, `active` experts that have some. Where the table has it, `choices` is how many of the
            rows' choices fell on them.
        copies: Part (link, disk) -> a frame with the columns `COPY`; a row is one copy.
        source: A description of the table, in a few words, for comments.
        notes: The parts left out, and doubts about the times, as sentences.
        transfers: Part (network, network.decode, network.prefill) -> a frame with the columns stage and `TRANSFER`; a
            row is one dispatch or combine of `rows` rows of each of `gpus` GPUs.
    """

    kernels: dict[str, pl.DataFrame]
    copies: dict[str, pl.DataFrame]
    source: str
    notes: list[str]
    transfers: Mapping[str, pl.DataFrame] = MappingProxyType({})


def read_measured(path: str | Path, choose: Mapping[str, str] | None = None) -> Measured:
    """Read a table of measured times.

    Args:
        path: A Parquet or CSV file with the columns hidden, intermediate, experts, top_k, rows, bits (or dtype) and
            seconds (or latency_ms), and if it has them part (gpu if not), matrices (3 if not), active (experts with
            rows; if not, as many as balanced routing reaches), distribution, moe_ep_size and kernel_source. Rows of
            the parts link and disk have bytes and seconds; those of a network stage, hidden, experts, top_k, gpus,
            rows of each GPU, bits and seconds. `choices` beside `active` says what fell on one GPU of several.
        choose: Column -> the value that a row must have, such as {"gpu": "h100_sxm", "dtype": "bfloat16"}.

    Returns:
        The table. Rows of unbalanced routing without `active`, and of experts that are spread over several GPUs
        without `active` and `choices`, are left out.

    Raises:
        MoetraceError: The file cannot be read, or a value is wrong.
        UsageError: A column is missing, or no row is left.
    """
    path = Path(path)
    try:
        return _measured(_read(path), path, choose or {})
    except pl.exceptions.PolarsError as error:  # a column twice, a text that is no UTF-8, ...
        why = str(error).strip().split("\n")[0][:200]  # behind it stands advice on Polars' options
        raise MoetraceError(f"Cannot read {path}: it is not a table of times in Parquet or CSV ({why}).") from None


def _measured(frame: pl.DataFrame, path: Path, choose: Mapping[str, str]) -> Measured:
    frame = _typed(frame.rename(lambda name: ALIASES.get(name, name)).with_row_index(_ROW, 1), path)
    words = [path.name]
    for column, value in choose.items():
        frame = _chosen(frame, column, value, path)
        words.append(value)
    for column in ("gpu", "dtype"):
        if column in frame.columns and frame[column].n_unique() > 1 and column not in choose:
            names = ", ".join(sorted(map(str, frame[column].unique().to_list()))[:12])
            raise UsageError(f"{path} has rows of several values of {column} ({names}): choose one with --{column}.")
    notes: list[str] = []
    if "comm_backend" in frame.columns:
        for column in _OF_TRANSFERS:
            if column not in frame.columns:
                raise UsageError(f"{path} has no column {column}{_has(frame)}.")
        frame = named(frame, notes)
    elif "latency_ms" in frame.columns and "seconds" not in frame.columns:
        frame = frame.with_columns(seconds=pl.col("latency_ms") / 1e3)
    if "part" not in frame.columns:
        frame = frame.with_columns(part=pl.lit("gpu"))
    unknown = sorted(set(map(str, frame["part"].unique())) - set(PARTS))
    if unknown:
        raise UsageError(f"{path}: part {unknown[0]!r} is unknown; use one of {', '.join(PARTS)}.")
    kernels, copies, transfers = {}, {}, {}
    for part in PARTS:
        rows = frame.filter(pl.col("part") == part)
        if rows.is_empty():
            continue
        if part in ("link", "disk"):
            copies[part] = _checked(rows, COPY, path)
        elif part in NETWORK_PARTS:
            checked = _checked(rows, TRANSFER, path)
            check_transfers(rows, rows[_ROW], path)
            transfers[part] = checked.with_columns(rows["stage"])
        elif not (rows := _usable(rows, notes)).is_empty():
            rows = _completed(rows, path)
            kernels[part] = _checked(rows, (*KERNEL, "choices") if "choices" in rows.columns else KERNEL, path)
    if not (kernels or copies or transfers):
        raise UsageError(f"{path}: no row can be used. {' '.join(notes)}".rstrip())
    return Measured(kernels, copies, ", ".join(words), notes, transfers)


def work(kernels: pl.DataFrame) -> np.ndarray:
    """Starts, FLOP and bytes of the layers of a table; float64 `[points, 3]` (timing model, section 2)."""
    choices = pl.col("choices") if "choices" in kernels.columns else pl.col("rows") * pl.col("top_k")
    columns = kernels.select("hidden", "intermediate", "matrices", "bits", "active", choices.alias("choices"))
    hidden, intermediate, matrices, bits, active, choices = columns.cast(pl.Float64).to_numpy().T
    weights = matrices * hidden * intermediate
    return np.stack([np.ones_like(bits), 2 * weights * choices, active * weights * bits / 8], axis=1)


def _read(path: Path) -> pl.DataFrame:
    """The table as it is; raises PolarsError if the file is no table."""
    with open_ordinary(path) as file:
        if os.fstat(file.fileno()).st_size > MAX_BYTES:
            raise MoetraceError(f"Cannot read {path}: it has more than {MAX_BYTES >> 20} MiB.")
        try:
            if path.suffix == ".csv":
                frame = pl.read_csv(file, n_rows=MAX_ROWS + 1, infer_schema=False)  # `_typed` names a wrong row
                _check_rows(len(frame), path)
                return frame
            sizes = parquet_sizes(file)
            _check_rows(sizes.rows, path)
            if sizes.unpacked_bytes > MAX_UNPACKED_BYTES:
                raise MoetraceError(f"Cannot read {path}: it unpacks to more than {MAX_UNPACKED_BYTES >> 20} MiB.")
            file.seek(0)
            return pl.read_parquet(file)
        except DamagedParquetError as error:
            raise MoetraceError(f"Cannot read {path}: {error}, and no CSV file, whose name ends with .csv.") from None
        except OSError as error:
            raise MoetraceError(f"Cannot read {path}: {error.strerror or error}.") from None


def _check_rows(rows: int, path: Path) -> None:
    if rows > MAX_ROWS:
        raise MoetraceError(f"Cannot read {path}: it has more than {MAX_ROWS:,} rows.")


def _typed(frame: pl.DataFrame, path: Path) -> pl.DataFrame:
    """Texts as texts and numbers as numbers, regardless of the file's types."""
    texts = [name for name in (*_TEXTS, "part") if name in frame.columns]
    numbers = [name for name in {*KERNEL, *COPY, *TRANSFER, *_OTHER_NUMBERS} if name in frame.columns]
    frame = frame.with_columns(pl.col(name).cast(pl.String, strict=False) for name in texts)
    for name in sorted(numbers):
        values = frame[name].cast(pl.Float64, strict=False)
        wrong = frame.filter(values.is_null() & frame[name].is_not_null())
        if wrong.height:
            got = printable(repr(wrong[name][0]))[:80]
            raise MoetraceError(f"{path}, row {wrong[_ROW][0]}: {name} must be a number, got {got}.")
        frame = frame.with_columns(values)
    return frame


def _chosen(frame: pl.DataFrame, column: str, value: str, path: Path) -> pl.DataFrame:
    if column not in frame.columns:
        raise UsageError(f"{path} has no column {column}: leave out --{column}.")
    kept = frame.filter(pl.col(column).cast(pl.String) == value)
    if kept.is_empty():
        names = ", ".join(sorted(map(str, frame[column].unique().to_list()))[:20])
        raise UsageError(f"{path} has no row with {column} = {value}; it has {names}.")
    return kept


def _usable(rows: pl.DataFrame, notes: list[str]) -> pl.DataFrame:
    """Leave out what one device with known experts did not run, and say so."""
    tests = {
        "moe_ep_size": (pl.col("moe_ep_size") == 1.0, "of experts that are spread over several GPUs"),
        "distribution": (pl.col("distribution") == "balanced", "of unbalanced routing"),
    }
    given = {"distribution": {"active"}, "moe_ep_size": {"active", "choices"}}
    for column, (test, words) in tests.items():
        if column not in rows.columns or given[column] <= {*rows.columns}:
            continue
        kept = rows.filter(test)
        if len(kept) < len(rows):
            notes.append(f"{counted(len(rows) - len(kept), 'row')} {words} left out.")
        rows = kept
    if "kernel_source" in rows.columns and "matrices" not in rows.columns:
        rows = _with_matrices(rows, notes)
    return rows


def _with_matrices(rows: pl.DataFrame, notes: list[str]) -> pl.DataFrame:
    """Count an expert's matrices: 2 where a kernel without a gate ran the shape, else 3.

    The table does not say it otherwise, and a width of its own (not a multiple of 512, or 22 experts of 512) belongs
    to models without a gate: these shapes count only where such a kernel ran them.
    """
    shape = ["hidden", "intermediate", "experts", "top_k"]
    plain = pl.col("kernel_source").str.contains("nongated").any().over(shape)
    gateless = pl.col("intermediate").is_in([1856.0, 2688.0]) | (pl.col("top_k") == 22)
    kept = rows.with_columns(matrices=pl.when(plain).then(2.0).otherwise(3.0)).filter(~gateless | plain)
    if len(kept) < len(rows):
        notes.append(f"{counted(len(rows) - len(kept), 'row')} of shapes whose number of matrices is open left out.")
    return kept


def _completed(rows: pl.DataFrame, path: Path) -> pl.DataFrame:
    """Add the columns that have a default."""
    if "bits" not in rows.columns:
        if "dtype" not in rows.columns:
            raise UsageError(f"{path} has neither a column bits nor a column dtype{_has(rows)}.")
        unknown = sorted(set(map(str, rows["dtype"].unique())) - DTYPE_BITS.keys())
        if unknown:
            raise UsageError(f"{path}: the bits of dtype {unknown[0]} are unknown; give a column bits.")
        rows = rows.with_columns(bits=pl.col("dtype").replace_strict(DTYPE_BITS, return_dtype=pl.Float64))
    if "matrices" not in rows.columns:
        rows = rows.with_columns(matrices=pl.lit(3.0))
    if "active" not in rows.columns:
        missing = [name for name in ("experts", "rows", "top_k") if name not in rows.columns]
        if missing:
            raise UsageError(f"{path} has no column {missing[0]}{_has(rows)}.")
        rows = rows.with_columns(active=pl.min_horizontal("experts", pl.col("rows") * pl.col("top_k")))
    return rows


def _checked(rows: pl.DataFrame, columns: tuple[str, ...], path: Path) -> pl.DataFrame:
    for name in columns:
        if name not in rows.columns:
            raise UsageError(f"{path} has no column {name}{_has(rows)}.")
        values = rows[name]
        bad = rows.filter(~(values.is_not_null() & values.is_finite() & (values > 0) & (values <= MAX_SIZE)))
        if bad.height:
            got = "nothing" if bad[name][0] is None else f"{bad[name][0]:g}"
            raise MoetraceError(
                f"{path}, row {bad[_ROW][0]}: {name} must be a number greater than 0 (and at most 2^40), got {got}."
            )
    if "top_k" in columns and (wrong := rows.filter(pl.col("top_k") > pl.col("experts"))).height:
        row = wrong.row(0, named=True)
        raise MoetraceError(
            f"{path}, row {row[_ROW]}: top_k must be at most experts, got {row['top_k']:g} of {row['experts']:g}."
        )
    return rows.select(columns)


def _has(rows: pl.DataFrame) -> str:
    names = [name for name in rows.columns if name not in (_ROW, "part")]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"; it has {printable(', '.join(names[:8]))[:200]}{more} (docs/calibration.md says what a table has)"
