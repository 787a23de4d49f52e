"""Rates and a start that miss measured times least, and by how much they miss shapes that they have not seen."""

from typing import NamedTuple

import numpy as np
import polars as pl

from moetrace.calibration.measured import COPY, SHAPE, work

_ROUNDS = 200
# Start, seconds a FLOP, seconds a byte: which of them stand at their floor.
_FREE = [[number for number in range(3) if mask >> number & 1] for mask in range(8)]


class Fit(NamedTuple):
    """Constants of one part, and how well they are known.

    Attributes:
        start_s: Seconds that each layer (or copy) adds.
        flop_s: FLOP a second; None for copies.
        bytes_s: Bytes a second.
        points: How many times were measured.
        shapes: Of how many shapes.
        median_error: Median of |predicted / measured - 1| on shapes that were not fitted.
        p90_error: 90th percentile of the same.
    """

    start_s: float
    flop_s: float | None
    bytes_s: float
    points: int
    shapes: int
    median_error: float
    p90_error: float


def fit_kernels(kernels: pl.DataFrame, peak_flop_s: float, peak_bytes_s: float, roofline: str = "sum") -> Fit:
    """Fit one start a layer, a rate of arithmetic and one of memory to the times of expert layers.

    The least sum of |predicted / measured - 1|, with no rate above its peak. Shapes, sorted, are halved alternately;
    each half is predicted from the other, which gives the errors, and the constants come from all points.

    Args:
        kernels: A frame of `Measured.kernels` with at least two shapes.
        peak_flop_s: FLOP a second that no fit may exceed.
        peak_bytes_s: Bytes a second that no fit may exceed.
        roofline: `sum` (no overlap of arithmetic and memory) or `max`.

    Returns:
        The fit (timing model, section on launches and roofline).
    """
    amounts, seconds = work(kernels), kernels["seconds"].to_numpy()
    shapes = kernels.select(*SHAPE, "bits").cast(pl.Float64).to_numpy()
    _, number = np.unique(shapes, axis=0, return_inverse=True)
    floors = np.array([0.0, 1 / peak_flop_s, 1 / peak_bytes_s])

    def solve(some: np.ndarray) -> np.ndarray:
        return _least_relative(amounts[some], seconds[some], floors, roofline)

    errors = np.empty(len(seconds))
    for half in (0, 1):
        out = number.reshape(-1) % 2 == half
        errors[out] = np.abs(predict(amounts[out], solve(~out), roofline) / seconds[out] - 1)
    start, flop, byte = solve(np.ones(len(seconds), bool))
    return Fit(float(start), float(1 / flop), float(1 / byte), len(seconds), int(number.max()) + 1, *_summary(errors))


def fit_copies(copies: pl.DataFrame) -> Fit:
    """Fit a latency and a bandwidth to the times of copies; every other size is held out in turn."""
    size, seconds = (copies[name].to_numpy() for name in COPY)
    amounts = np.stack([np.ones_like(size), np.zeros_like(size), size], axis=1)
    _, number = np.unique(size, return_inverse=True)

    def solve(some: np.ndarray) -> np.ndarray:
        return _least_relative(amounts[some], seconds[some], np.zeros(3), "sum")

    errors = np.empty(len(seconds))
    for half in (0, 1):
        out = number % 2 == half
        errors[out] = np.abs(predict(amounts[out], solve(~out), "sum") / seconds[out] - 1)
    start, _, byte = solve(np.ones(len(seconds), bool))
    return Fit(float(start), None, float(1 / byte), len(seconds), int(number.max()) + 1, *_summary(errors))


def predict(amounts: np.ndarray, constants: np.ndarray, roofline: str) -> np.ndarray:
    """Seconds of layers `[points]` from their starts, FLOP and bytes `[points, 3]`."""
    start, flop, byte = (amounts * constants).T
    return start + (flop + byte if roofline == "sum" else np.maximum(flop, byte))


def _summary(errors: np.ndarray) -> tuple[float, float]:
    return float(np.median(errors)), float(np.quantile(errors, 0.9))


def _least_relative(amounts: np.ndarray, seconds: np.ndarray, floors: np.ndarray, roofline: str) -> np.ndarray:
    """Constants of least mean |predicted / measured - 1|, none below its floor; float64 `[3]`."""
    if roofline == "sum":
        return _least_sum(amounts, seconds, floors)
    # Of the two sides of the roof, each point counts the one that it stands under; from the sum's constants on.
    found = _least_sum(amounts, seconds, floors)
    best = np.inf, found
    for _ in range(50):
        bound = amounts.copy()
        by_flop = amounts[:, 1] * found[1] > amounts[:, 2] * found[2]
        bound[by_flop, 2] = bound[~by_flop, 1] = 0
        found = _least_sum(bound, seconds, floors)
        loss = _loss(amounts, seconds, found, roofline)
        if loss >= best[0]:
            break
        best = loss, found
    return best[1]


def _least_sum(amounts: np.ndarray, seconds: np.ndarray, floors: np.ndarray) -> np.ndarray:
    """Solve by least squares with weights that turn them into absolute errors, for each set of constants at a floor."""
    relative, best = amounts / seconds[:, None], (np.inf, floors)
    for free in _FREE:
        constants = floors.copy()
        rest = 1 - relative @ floors
        if free:
            constants[free] += _absolute(relative[:, free], rest)
        if (constants >= floors).all() and constants[2] > 0:
            loss = float(np.abs(relative @ constants - 1).mean())
            best = min(best, (loss, constants), key=lambda pair: pair[0])
    return best[1]


def _absolute(columns: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    scale = np.abs(columns).max(axis=0)
    columns = columns / np.where(scale > 0, scale, 1)
    weights, found = np.ones(len(wanted)), np.zeros(columns.shape[1])
    for _ in range(_ROUNDS):
        found = np.linalg.lstsq(columns * weights[:, None], wanted * weights, rcond=None)[0]
        weights = 1 / np.sqrt(np.maximum(np.abs(columns @ found - wanted), 1e-6))
    return found / np.where(scale > 0, scale, 1)


def _loss(amounts: np.ndarray, seconds: np.ndarray, constants: np.ndarray, roofline: str) -> float:
    return float(np.abs(predict(amounts, constants, roofline) / seconds - 1).mean())
