"""How many cores this process may use: in this room because importing it loads nothing, which commands rely on."""

import os


def cores() -> int:
    """Return the number of cores that the process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
