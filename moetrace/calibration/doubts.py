"""Doubts about a fit: most often the times or the peaks have another unit than they are taken to have."""

from collections.abc import Iterator

from moetrace.calibration.fitting import Fit, TransferFit

# Measured kernels reach 0.35 to 1.00 of a peak (docs/calibration.md); times in ms given as s reach 0.001.
LEAST_EFFICIENCY = 0.02
AT_LIMIT = 0.999
# Right tables of few rows say little of arithmetic and leave its rate at the peak (RTX PRO 6000, H100, H200). They
# still predict: their median error is at most 1.9 %. At a wrong peak the error is large.
_LEAST_ERROR = 0.05
# The nine public tables are missed by 0.5 to 3.3 %; a CPU that ran something else beside by 52 %.
MOST_ERROR = 0.25
# A copy above the data sheet's bandwidth by less than this is noise, or the sheet's figure is an effective one.
_MOST_OF_LINK = 1.5
CAUSES = (
    "likely causes are times in ms or us that are taken as s, a wrong peak in the system, a wrong dtype or bits, or a "
    "machine that was busy"
)


def doubts_of_kernels(part: str, fit: Fit, flop_s: float, bytes_s: float, sheet_error: float) -> Iterator[str]:
    """Yield a sentence if a fit of expert layers looks wrong.

    Args:
        part: "gpu" or "cpu".
        fit: The fit.
        flop_s: FLOP a second at the peak.
        bytes_s: Bytes a second at the peak.
        sheet_error: Median error of the data sheet's prediction of the same layers.
    """
    why = []
    for name, reached in (("compute", (fit.flop_s or flop_s) / flop_s), ("memory", fit.bytes_s / bytes_s)):
        if reached < LEAST_EFFICIENCY:
            why.append(f"{name}_efficiency is {reached:.2g}, below {LEAST_EFFICIENCY:g}")
        elif reached > AT_LIMIT and (name == "memory" or fit.median_error > _LEAST_ERROR):
            why.append(f"{name}_efficiency is at its limit of 1")
    if fit.median_error > min(sheet_error, MOST_ERROR):
        why.append(
            f"on shapes that were not fitted it errs by {fit.median_error:.1%} in the median, and the data sheet by "
            f"{sheet_error:.1%}"
        )
    if why:
        yield f"The fit of the {part} is doubtful: {', '.join(why)}; {CAUSES}."


def doubts_of_copies(part: str, fit: Fit, bandwidth: float) -> Iterator[str]:
    """Yield a sentence if the fitted bandwidth is far from `bandwidth`, the system's in bytes a second."""
    reached = fit.bytes_s / bandwidth
    if not LEAST_EFFICIENCY <= reached <= _MOST_OF_LINK:
        yield (
            f"The fit of the {part} is doubtful: {fit.bytes_s / 1e9:.3g} GB/s is {reached:.2g} times the system's "
            f"{bandwidth / 1e9:g} GB/s; likely causes are times in ms or us that are taken as s, or a wrong bandwidth "
            "in the system."
        )


def doubts_of_transfers(part: str, fit: TransferFit, port_bytes_s: float, bandwidth: float) -> Iterator[str]:
    """Yield a sentence if a fit of a network looks wrong.

    Args:
        part: The section of the system that is fitted.
        fit: The fit.
        port_bytes_s: The most that it may reach.
        bandwidth: The system's, in bytes a second.
    """
    why = []
    if fit.bytes_s < LEAST_EFFICIENCY * bandwidth:
        reached = f"{fit.bytes_s / 1e9:.3g} GB/s is {fit.bytes_s / bandwidth:.2g} times"
        why.append(f"its bandwidth of {reached} the system's {bandwidth / 1e9:g} GB/s")
    if fit.bytes_s > AT_LIMIT * port_bytes_s:
        why.append(f"its bandwidth is at the port's limit of {port_bytes_s / 1e9:g} GB/s")
    if fit.median_error > MOST_ERROR:
        why.append(f"on shapes that were not fitted it errs by {fit.median_error:.1%} in the median")
    if why:
        yield (
            f"The fit of the {part} is doubtful: {', and '.join(why)}; likely causes are times in another unit than s, "
            "a wrong number of bits or GPUs, or a network that others used."
        )
