"""A set of experts for our own replays: lines `layer,expert`, as the parameter `static` of residency `static` reads it.

The layer is the entry in the trace. `moetrace analyze cache --export` writes the same for a policy of its own.
"""

from collections.abc import Callable
from typing import IO

from moetrace.exports.resident import Counted, KeptChoice, kept, tallied


def write(trace: Counted, file: IO[bytes], progress: Callable[[int], object], choice: KeptChoice) -> None:
    """Write the set to `file`."""
    pairs = kept(trace, choice, tallied(trace, choice, progress).counts)
    rows = "".join(f"{layer},{expert}\n" for layer, expert in pairs.tolist())
    file.write(f"layer,expert\n{rows}".encode())
