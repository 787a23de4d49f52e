"""Rates and a start that miss measured times least, and by how much they miss shapes that they have not seen."""

from itertools import chain, combinations
from typing import NamedTuple

import numpy as np
import polars as pl

from moetrace.calibration.measured import COPY, SHAPE, work
from moetrace.calibration.transfers import TRANSFER_SHAPE, transfer_work

_ROUNDS = 200


class Fit(NamedTuple):
    """Constants of one part, and how well they are known.

    Attributes:
        start_s: Seconds that each layer (or copy) adds.
        flop_s: FLOP a second; None for copies.
        bytes_s: Bytes a second.
        points: How many times were measured.
        shapes: How many shapes these times are of.
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


class TransferFit(NamedTuple):
    """Constants of a network, and how well they are known.

    Attributes:
        dispatch_s: Seconds that each transfer to the experts adds.
        combine_s: Seconds that each transfer back adds.
        row_s: Seconds that each row of a GPU adds; 0 without dedup.
        bytes_s: Bytes a second of a GPU, in each direction.
        points: How many times were measured.
        shapes: How many shapes these times are of.
        median_error: Median of |predicted / measured - 1| on shapes that were not fitted.
        p90_error: 90th percentile of the same.
    """

    dispatch_s: float
    combine_s: float
    row_s: float
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
    shapes = kernels.select(*SHAPE, "bits").cast(pl.Float64).to_numpy()
    floors = np.array([0.0, 1 / peak_flop_s, 1 / peak_bytes_s])
    constants, known = _judged(work(kernels), kernels["seconds"].to_numpy(), shapes, floors, roofline)
    start, flop, byte = constants
    return Fit(float(start), float(1 / flop), float(1 / byte), *known)


def fit_copies(copies: pl.DataFrame) -> Fit:
    """Fit a latency and a bandwidth to the times of copies; every other size is held out in turn."""
    size, seconds = (copies[name].to_numpy() for name in COPY)
    amounts = np.stack([np.ones_like(size), np.zeros_like(size), size], axis=1)
    constants, known = _judged(amounts, seconds, size[:, None], np.zeros(3))
    start, _, byte = constants
    return Fit(float(start), None, float(1 / byte), *known)


def fit_transfers(transfers: pl.DataFrame, peak_bytes_s: float, dedup: bool) -> TransferFit:
    """Fit a network's latencies, time of a row and bandwidth to the times of dispatches and combines.

    Loss and halves are those of `fit_kernels`; a shape is hidden, experts, top_k and gpus.

    Args:
        transfers: A frame of `Measured.transfers` with at least two shapes.
        peak_bytes_s: Bytes a second, in each direction, that no fit may exceed.
        dedup: Whether a row goes to a GPU once.

    Returns:
        The fit (docs/cluster.md, A2E and E2A).
    """
    shapes = transfers.select(*TRANSFER_SHAPE).to_numpy()
    floors = np.array([0.0, 0.0, 0.0, 1 / peak_bytes_s])
    constants, known = _judged(transfer_work(transfers, dedup), transfers["seconds"].to_numpy(), shapes, floors)
    dispatch, combine, row, byte = constants
    return TransferFit(float(dispatch), float(combine), float(row), float(1 / byte), *known)


def predict(amounts: np.ndarray, constants: np.ndarray, roofline: str) -> np.ndarray:
    """Seconds `[points]` from what they have of each constant `[points, constants]`.

    With roofline `max` the constants are a start and seconds of a FLOP and of a byte.
    """
    if roofline == "sum":
        return (amounts * constants).sum(axis=1)
    start, flop, byte = (amounts * constants).T
    return start + np.maximum(flop, byte)


def _judged(
    amounts: np.ndarray, seconds: np.ndarray, shapes: np.ndarray, floors: np.ndarray, roofline: str = "sum"
) -> tuple[np.ndarray, tuple[int, int, float, float]]:
    """Constants from all points, and how many points and shapes, median and p90 of errors on the half not fitted."""
    _, number = np.unique(shapes, axis=0, return_inverse=True)
    number = number.reshape(-1)
    errors = np.empty(len(seconds))
    for half in (0, 1):
        out = number % 2 == half
        constants = least_relative(amounts[~out], seconds[~out], floors, roofline)
        errors[out] = np.abs(predict(amounts[out], constants, roofline) / seconds[out] - 1)
    constants = least_relative(amounts, seconds, floors, roofline)
    median, p90 = float(np.median(errors)), float(np.quantile(errors, 0.9))
    return constants, (len(seconds), int(number.max()) + 1, median, p90)


def least_relative(amounts: np.ndarray, seconds: np.ndarray, floors: np.ndarray, roofline: str) -> np.ndarray:
    """Constants of least mean |predicted / measured - 1|, none below its floor; as many as columns."""
    if roofline == "sum":
        return _least_sum(amounts, seconds, floors)
    # Each point counts only for the side of the roof that it lies under. The search starts at the sum's constants.
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
    for free in chain.from_iterable(combinations(range(len(floors)), count) for count in range(len(floors) + 1)):
        constants = floors.copy()
        rest = 1 - relative @ floors
        if free:
            constants[list(free)] += _absolute(relative[:, free], rest)
        if (constants >= floors).all() and constants[-1] > 0:  # those of bytes come last
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
