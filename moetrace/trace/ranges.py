"""Ranges of rows, steps, requests or layers, as users say them: START:STOP, without STOP itself."""

from collections.abc import Sequence

import numpy as np

from moetrace.spec.errors import UsageError, counted

Range = tuple[int, int | None]


def merged(what: str, ranges: Sequence[Range] | None, size: int | None) -> np.ndarray | None:
    """Ranges as int64 [ranges, 2], in order and apart; `size` is how many there are, if that is known."""
    if ranges is None:
        return None
    parts: list[list[int]] = []
    for start, stop in sorted((start, (1 << 62) if stop is None else stop) for start, stop in ranges):
        if start < 0 or stop <= start:
            raise UsageError(f"the {what} {start}:{stop} are empty: a range is START:STOP, without STOP itself.")
        if size is not None and start >= size:
            raise UsageError(f"there are only {counted(size, what[:-1])}, so no {what} from {start} on exist.")
        if parts and start <= parts[-1][1]:
            parts[-1][1] = max(parts[-1][1], stop)
        else:
            parts.append([start, stop])
    if not parts:
        raise UsageError(f"no {what} are said.")
    return np.array(parts, np.int64)


def inside(numbers: np.ndarray, ranges: np.ndarray) -> np.ndarray:
    """bool [n]: which of `numbers` [n] lie in one of `ranges` [ranges, 2], which are in order and apart."""
    at = np.searchsorted(ranges[:, 0], numbers, side="right") - 1
    return (at >= 0) & (numbers < ranges[np.maximum(at, 0), 1])


def named_layers(where: str, index: np.ndarray, ranges: Sequence[Range]) -> np.ndarray:
    """bool [layers]: which of the layers numbered `index` [layers] lie in `ranges`; raise if a range is empty."""
    rows = merged("layers", ranges, None)
    assert rows is not None
    for start, stop in ranges:
        if not ((index >= start) & (index < (1 << 62 if stop is None else stop))).any():
            named = f"layer {start}" if stop == start + 1 else f"layers from {start} on"
            gap = " with gaps" if index[-1] - index[0] >= index.size else ""
            raise UsageError(f"{where} has no {named}, only {index[0]} to {index[-1]}{gap}.")
    return inside(index, rows)
