"""The choices of a policy, in numbers, as the kernels read them."""

from typing import Any

import numpy as np

from moetrace.engine.state import records

SETTING = np.dtype(
    [
        ("prefetch", np.int64),
        ("depth", np.int64),  # m of online, d of oracle
        ("waits", np.int64),  # 1: the first decode step waits for the queue
        ("counts_prompts", np.int64),
        ("learns", np.int64),  # 0: the residency's hook does nothing
        ("looks_ahead", np.int64),
        ("optimal", np.int64),  # 1: the dispatch is `optimal`
        ("splits", np.int64),  # 1: the dispatch may share an expert
        ("own_dispatch", np.int64),  # 1: a user's
        ("weighs", np.int64),  # 1: it names the sums of gates
        ("slots", np.int64),
        ("half_life", np.int64),  # 0 = never
        ("gpu_rows", np.int64),  # 0 = never
        ("alpha", np.float64),
        ("most_count", np.float64),
        ("chance", np.float64),
        ("seed", np.int64),
    ]
)


def new_setting(**fields: float) -> Any:
    """Return SETTING [1] of the given fields; the others are 0."""
    setting = records(1, SETTING)
    for name, value in fields.items():
        setting[name] = value
    return setting
