"""Fit a system's constants to measured times, and write it down."""

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from moetrace.calibration.doubts import AT_LIMIT, CAUSES, doubts_of_copies, doubts_of_kernels, doubts_of_transfers
from moetrace.calibration.fitting import Fit, TransferFit, fit_copies, fit_kernels, fit_transfers, predict
from moetrace.calibration.measured import SHAPE, Measured, read_measured, work
from moetrace.calibration.system_file import Change, base_text, rewritten
from moetrace.calibration.transfers import TRANSFER_SHAPE
from moetrace.spec import System, UsageError, load_system
from moetrace.spec.errors import counted
from moetrace.spec.load import Loaded, convert

# Beyond this many rows kernels of another kind run; decode and short prompts are below.
MAX_ROWS = 256
# No port of a GPU moves more in one direction, GB/s: NVLink 5 moves 900, and what follows it twice that.
PORT_GB_S = 1800.0
# Start of an expert on a GPU without a measurement, as in version 1 of the timing model.
SHEET_START_S = 5e-6


@dataclass(frozen=True)
class Calibrated:
    """A system with fitted constants.

    Attributes:
        system: The system.
        text: Its TOML, with a source at each fitted value.
        fits: Part (gpu, cpu, link, network, ...) -> its fit.
        frame: A row for each fitted part: its constants, the points and shapes, median and p90 of the error on points
            that were not fitted, and of the data-sheet constants with a start for each expert on the same points.
        notes: Unused parts of the table, and doubts about the fits, as sentences.
        written: Whether any fitted value stands in `text`; none does of a part that the system lacks.
    """

    system: System
    text: str
    fits: dict[str, Fit | TransferFit]
    frame: pl.DataFrame
    notes: list[str]
    written: bool


def calibrate(
    table: str | Path | Measured,
    system: str | Path,
    *,
    gpu: str | None = None,
    dtype: str | None = None,
    framework: str | None = None,
    name: str | None = None,
    cache_mb: float = 0.0,
    max_rows: int = MAX_ROWS,
    port_gb_s: float = PORT_GB_S,
    source: str | None = None,
) -> Calibrated:
    """Fit efficiencies and starts of a system to measured times.

    The GPU's (and a CPU's) layer of experts is predicted as one start and the sum of its arithmetic and memory times
    (docs/timing-model.md, launches and roofline); a copy over the link as a latency and bytes over a bandwidth; rows on
    their way to the GPUs of their experts, and back, as docs/cluster.md says (A2E, E2A).

    Args:
        table: A file as `read_measured` takes it, or measured times.
        system: The preset or TOML file to begin with: its data-sheet peaks are the most that a fit may reach.
        gpu: Use the rows of this GPU only (column gpu).
        dtype: Use the rows of this type only (column dtype or moe_dtype).
        framework: Use the rows of this framework only (column framework).
        name: Name of the calibrated system. By default that of `system` with `-calibrated` behind it.
        cache_mb: Size of the processor's last cache, MB. Layers whose weights are smaller are left out: a whole model
            never reads them from there.
        max_rows: Leave out layers with more rows.
        port_gb_s: Rate of a GPU's port in each direction, GB/s: the most that a fit of a network may reach.
        source: A name of the table, for the TOML. By default its file's name and the chosen values.

    Returns:
        The calibrated system.

    Raises:
        UsageError: No row can be used, there are fewer than two shapes, or the system lacks a part that was measured.
        MoetraceError: A file cannot be read, or a value is wrong.

    Examples:
        >>> import moetrace as mt
        >>> found = mt.calibrate("mine.parquet", "rtx4090-offload")  # doctest: +SKIP
    """
    wanted = {"gpu": gpu, "dtype": dtype, "framework": framework}
    choose = {column: value for column, value in wanted.items() if value is not None}
    measured = table if isinstance(table, Measured) else read_measured(table, choose)
    if source is not None:
        measured = measured._replace(source=source)
    base = load_system(system)
    text, notes = base_text(system), list(measured.notes)
    changes, rows = [Change("", "name", name or f"{base.name}-calibrated", "")], []
    fits: dict[str, Fit | TransferFit] = {}
    for part, kernels in measured.kernels.items():
        used = _used(kernels, part, cache_mb if part == "gpu" else 0.0, max_rows, measured.source, notes)
        flop_s, bytes_s, start = _peaks(base, part)
        fit = fits[part] = fit_kernels(used, flop_s, bytes_s)
        sheet = _sheet_errors(used, flop_s, bytes_s)
        rows.append({"part": part, **_row(fit, flop_s, bytes_s), **sheet})
        notes += doubts_of_kernels(part, fit, flop_s, bytes_s, sheet["sheet_median_error"])
        changes += _kernel_changes(part, fit, (flop_s, bytes_s), start, measured.source)
    for part, copies in measured.copies.items():
        if copies["bytes"].n_unique() < 2:
            raise UsageError(
                f"{measured.source}: copies of one size say nothing of latency and bandwidth; measure two sizes for "
                f"part {part}."
            )
        fit = fits[part] = fit_copies(copies)
        rows.append({"part": part, **_row(fit, None, None), "sheet_median_error": None, "sheet_p90_error": None})
        there = base.disk if part == "disk" else base.link
        if there is None:
            notes.append(f"The fit of the {part} is printed only: system {base.name} has no [{part}].")
        else:
            notes += doubts_of_copies(part, fit, there.bandwidth_gb_s * 1e9)
            changes += _copy_changes(part, fit, measured.source)
    for part, transfers in measured.transfers.items():
        fit = fits[part] = _network_fit(transfers, part, base, port_gb_s, measured.source)
        rows.append({"part": part, **_network_row(fit)})
        assert base.network is not None
        bandwidth = base.network.of_phase(_phase(part))["bandwidth_gb_s"] * 1e9
        notes += doubts_of_transfers(part, fit, port_gb_s * 1e9, bandwidth)
        changes += _network_changes(part, fit, port_gb_s, measured.source)
    text = rewritten(text, changes)
    frame = pl.DataFrame(rows, infer_schema_length=None)
    return Calibrated(_loaded(text, measured.source), text, fits, frame, notes, written=len(changes) > 1)


def _used(
    kernels: pl.DataFrame, part: str, cache_mb: float, max_rows: int, source: str, notes: list[str]
) -> pl.DataFrame:
    used = kernels.filter(pl.col("rows") <= max_rows)
    if len(used) < len(kernels):
        notes.append(f"{counted(len(kernels) - len(used), 'layer')} of more than {max_rows} rows left out.")
    cached = work(used)[:, 2] < cache_mb * 1e6
    if cached.any():
        notes.append(f"{counted(int(cached.sum()), 'layer')} whose weights fit a cache of {cache_mb:g} MB left out.")
        used = used.filter(~pl.Series(cached))
    shapes = used.select(*SHAPE, "bits").n_unique() if len(used) else 0
    if shapes < 2:
        raise UsageError(
            f"{source} has {counted(shapes, 'shape')} of experts that can be used for the {part} (a shape is hidden, "
            "intermediate, experts, matrices and bits): measure at least 2, so that one can be predicted from the "
            "other."
        )
    return used


def _network_fit(transfers: pl.DataFrame, part: str, base: System, port_gb_s: float, source: str) -> TransferFit:
    if base.network is None:
        raise UsageError(
            f"The table has times of a network, but system {base.name} has no [network]: name a cluster with --system."
        )
    shapes = transfers.select(*TRANSFER_SHAPE).n_unique()
    if shapes < 2:
        raise UsageError(
            f"{source} has {counted(shapes, 'shape')} of transfers for the {part} (a shape is hidden, experts, top_k "
            "and gpus): measure at least 2, so that one can be predicted from the other."
        )
    return fit_transfers(transfers, port_gb_s * 1e9, dedup=base.network.of_phase(_phase(part))["dedup"])


def _phase(part: str) -> str:
    """The phase whose steps take the constants of a section of the network."""
    return part.removeprefix("network").removeprefix(".") or "mixed"


def _peaks(system: System, part: str) -> tuple[float, float, str]:
    """FLOP/s and bytes/s at the data sheet's peak, and the name of the field for a start."""
    if part == "gpu":
        return system.gpu.tflops * 1e12, system.gpu.bandwidth_gb_s * 1e9, "launch_us"
    if system.cpu is None:
        raise UsageError(
            f"The table has times of a CPU, but system {system.name} has no [cpu]: add one with its peaks."
        )
    return system.cpu.tflops * 1e12, system.cpu.bandwidth_gb_s * 1e9, "command_us"


def _row(fit: Fit, flop_s: float | None, bytes_s: float | None) -> dict[str, object]:
    return {
        "start_us": fit.start_s * 1e6,
        "compute_efficiency": fit.flop_s / flop_s if fit.flop_s and flop_s else None,
        "memory_efficiency": fit.bytes_s / bytes_s if bytes_s else None,
        "bandwidth_gb_s": fit.bytes_s / 1e9,
        "points": fit.points,
        "shapes": fit.shapes,
        "median_error": fit.median_error,
        "p90_error": fit.p90_error,
    }


def _network_row(fit: TransferFit) -> dict[str, object]:
    return {
        "dispatch_latency_us": fit.dispatch_s * 1e6,
        "combine_latency_us": fit.combine_s * 1e6,
        "row_ns": fit.row_s * 1e9,
        "bandwidth_gb_s": fit.bytes_s / 1e9,
        "points": fit.points,
        "shapes": fit.shapes,
        "median_error": fit.median_error,
        "p90_error": fit.p90_error,
    }


def _sheet_errors(kernels: pl.DataFrame, flop_s: float, bytes_s: float) -> dict[str, float]:
    """Errors of the peaks with a start for each expert and the greater of its two times: version 1 of the model."""
    amounts = work(kernels)
    active, seconds = kernels["active"].to_numpy(), kernels["seconds"].to_numpy()
    experts = predict(amounts, np.array([0.0, 1 / flop_s, 1 / bytes_s]), "max") + active * SHEET_START_S
    errors = np.abs(experts / seconds - 1)
    return {"sheet_median_error": float(np.median(errors)), "sheet_p90_error": float(np.quantile(errors, 0.9))}


def _kernel_changes(part: str, fit: Fit, peaks: tuple[float, float], start: str, source: str) -> Iterator[Change]:
    flop_s, bytes_s = peaks
    how = f"calibrated: {source}"
    yield Change(part, "compute_efficiency", _efficiency(fit.flop_s or flop_s, flop_s), how)
    yield Change(part, "memory_efficiency", _efficiency(fit.bytes_s, bytes_s), how)
    yield Change(part, start, round(fit.start_s * 1e6, 2), f"{how}, of a layer's kernel")
    yield Change(part, "launch", "layer", how)
    yield Change(part, "roofline", "sum", how)
    yield from _known(part, fit, source)


def _efficiency(rate: float, peak: float) -> float:
    """Four digits of rate / peak, however small: doubtful fits are written, too."""
    return float(f"{min(rate / peak, 1.0):.4g}")


def _copy_changes(part: str, fit: Fit, source: str) -> Iterator[Change]:
    how = f"measured: {source}"
    yield Change(part, "bandwidth_gb_s", round(fit.bytes_s / 1e9, 3), how)
    yield Change(part, "latency_us", round(fit.start_s * 1e6, 2), how)
    yield Change(part, "efficiency", 1.0, "the bandwidth is the measured one")
    yield from _known(part, fit, source)


def _network_changes(part: str, fit: TransferFit, port_gb_s: float, source: str) -> Iterator[Change]:
    how = f"calibrated: {source}"
    limit = ", at the limit of a GPU's port" if fit.bytes_s > AT_LIMIT * port_gb_s * 1e9 else ""
    yield Change(part, "bandwidth_gb_s", round(fit.bytes_s / 1e9, 1), how + limit)
    yield Change(part, "dispatch_latency_us", round(fit.dispatch_s * 1e6, 1), how)
    yield Change(part, "combine_latency_us", round(fit.combine_s * 1e6, 1), how)
    yield Change(part, "row_ns", round(fit.row_s * 1e9, 1), how)
    yield from _known(part, fit, source)


def _known(part: str, fit: Fit | TransferFit, source: str) -> Iterator[Change]:
    table = f"calibration.{part.replace('.', '_')}"
    what = "transfers" if isinstance(fit, TransferFit) else "layers" if fit.flop_s else "copies"
    yield Change(table, "source", source, "")
    yield Change(table, "points", fit.points, f"measured {what}")
    yield Change(table, "shapes", fit.shapes, "each predicted from the others")
    yield Change(table, "median_error", round(fit.median_error, 4), "of |predicted / measured - 1|, not fitted")
    yield Change(table, "p90_error", round(fit.p90_error, 4), "90th percentile of the same")


def _loaded(text: str, source: str) -> System:
    try:
        return convert(Loaded(tomllib.loads(text), "the calibrated system"), System)
    except UsageError as error:
        raise UsageError(
            f"{source}: no system can have what fits these times ({str(error).rstrip('.')}); {CAUSES}."
        ) from None
