"""A link's bandwidth over time: the CSV file that `link.rates` names."""

import math
from pathlib import Path

import numpy as np

from moetrace.spec.errors import MoetraceError
from moetrace.spec.load import data_lines

HEADER = ["seconds", "gb_s"]
MIN_GB_S, MAX_GB_S, MAX_SECONDS = 1e-9, 1e9, 1e12


def read_rates(path: str | Path) -> np.ndarray:
    """Read lines of `seconds,gb_s`, later ones further down, with that header or without.

    Blank lines and lines that begin with `#` are skipped.

    Returns:
        float64 [n, 2]: seconds since the start of the replay, and the bandwidth from then on, GB a second.

    Raises:
        MoetraceError: The file cannot be read, or a line is not as it must be; the message names it.
    """
    found: list[tuple[float, float]] = []
    for number, cells in data_lines(path, HEADER):
        where = f"{path}, line {number}"
        try:
            seconds, gb_s = (float(cell) for cell in cells)
        except ValueError:
            raise MoetraceError(f"{where}: wants {','.join(HEADER)}, as 2.5,0.012.") from None
        if not (math.isfinite(seconds) and abs(seconds) <= MAX_SECONDS):
            raise MoetraceError(f"{where}: wants seconds of at most {MAX_SECONDS:g}, got {seconds:g}.")
        if not MIN_GB_S <= gb_s <= MAX_GB_S:
            raise MoetraceError(f"{where}: wants a rate from {MIN_GB_S:g} to {MAX_GB_S:g} GB/s, got {gb_s:g}.")
        if found and seconds <= found[-1][0]:
            raise MoetraceError(
                f"{where}: goes back in time, from {found[-1][0]:g} to {seconds:g} s: sort the lines, and give each "
                "second once."
            )
        found.append((seconds, gb_s))
    if not found:
        raise MoetraceError(f"{path}: has no line of {','.join(HEADER)}: write one for each rate.")
    return np.array(found)
