"""The arrays that kernels work on, and their types: what policies see, and what the engine keeps to itself.

Records (one array of structs) are used instead of one array a field: passing an array through a first-class function
costs about 6 ns for its reference count, so five arrays cost 18-35 ns a call where fourteen cost 86.
"""

import os
import tempfile
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from moetrace.jit.compile import PURE_PYTHON

# Values of `plan[i]`: where an active expert runs. With dispatch `split` one may be shared by the two.
DEVICES = ("home", "gpu", "cpu")
HOME, ON_GPU, CPU, SHARED = 0, 1, 2, 3  # odd numbers run on the GPU

# One expert of one layer, as policies see it. `resident` is a copy for reading: the engine keeps its own.
CELL = np.dtype(
    [
        ("score", np.float64),  # the least is evicted first; infinity is never evicted
        ("memory", np.float64),  # the policy's own, zero at the start
        ("touched", np.int64),  # when it was last touched, 0 = never
        ("resident", np.uint8),
        ("admit", np.uint8),  # whether a copy that arrives may be kept
    ],
    align=True,
)
# One active expert of the layer at hand, in demand order.
_ACTIVE = [
    ("expert", np.int64),
    ("group", np.int64),  # units that hold it
    ("rows", np.float64),
    ("ndp_s", np.float64),  # where it lives: on each unit of its group
    ("gpu_s", np.float64),
    ("cpu_s", np.float64),  # on a CPU beside units; infinite without one
    ("fetch_s", np.float64),  # 0 if resident
    ("weight_bytes", np.float64),
    ("next_use", np.float64),  # (step * layers + layer) of its next demand, where the policy looks ahead
    ("here", np.float64),  # share of its weights that the GPU holds, 1 if resident; only for dispatch `split`
    ("share", np.float64),  # what the GPU runs of it, if it is shared
    ("turn", np.int64),  # of record j: who is the j-th that the GPU would run, resident ones first
    ("outside_s", np.float64),  # that reading it from outside keeps the units busy which hold it
    ("ready_s", np.float64),  # when it is in host memory, after the router's word
    ("gate_mass", np.float64),  # sum of its rows' gates; only for a policy that names it
    ("resident", np.uint8),
]
# `device_s[d]` are the same seconds by what a plan says: 0 = home, 1 = GPU, 2 = CPU. It overlays three fields above.
ACTIVE = np.dtype(
    {
        "names": [name for name, _ in _ACTIVE] + ["device_s"],
        "formats": [kind for _, kind in _ACTIVE] + [(np.float64, len(DEVICES))],
        "offsets": [*range(0, 8 * len(_ACTIVE), 8), 8 * [name for name, _ in _ACTIVE].index("ndp_s")],
        "itemsize": 8 * len(_ACTIVE),
        "aligned": True,
    }
)
# A group of units that share experts: sums over the experts that it runs in this layer, and `outside_s`: the seconds in
# which others read what it holds.
GROUP = np.dtype(
    [(name, np.float64) for name in ("busy_s", "rows", "weight_bytes", "outside_s")] + [("count", np.int64)], align=True
)

# A policy's memory of each layer. A user's hook notes step and role, in case it fails; `memory` is the policy's own.
MEMORY, DISPATCH, RESIDENCY = 64, 0, 1
OWN = np.dtype(
    [
        ("step", np.int64),
        ("role", np.int64),
        ("term_at", np.int64),  # address of the machine's TERM (`tiers/tier_records.py`), 0 without one
        ("memory", np.float64, (MEMORY,)),
    ],
    align=True,
)

STEP = np.dtype(
    [
        (name, np.float64)
        for name in (
            "duration_s",
            "dense_s",
            "moe_s",
            "head_s",
            "wait_s",
            "demand_bytes",
            "prefetch_bytes",
            "imbalance",
        )
    ]
    + [(name, np.int64) for name in ("hits", "misses", "late")],
)
LAYER = np.dtype(
    [(name, np.float64) for name in ("dense_s", "moe_s", "imbalance_sum", "demand_bytes")]
    + [(name, np.int64) for name in ("imbalance_count", "hits", "misses", "gpu_experts", "ndp_experts", "cpu_experts")],
)
# Rows of the unit log: 0 the GPU, 1 the link towards the GPU, 2 the link away from it, 3.. the groups of units.
# `shared_s` of a link: seconds of `busy_s` that count twice, as two transfers pass at the same time.
UNIT = np.dtype(
    [(name, np.float64) for name in ("busy_s", "shared_s", "rows", "bytes")] + [("experts", np.int64)],
)
GPU, LINK_IN, LINK_OUT, FIRST_GROUP = 0, 1, 2, 3
TALLY = np.dtype([(name, np.int64) for name in ("wasted", "used", "clock", "waited", "evictions")])


class View(NamedTuple):
    """The values of the current layer that a policy may read. Times in seconds, sizes in bytes."""

    step: int
    phase: int  # 0 prefill, 1 decode, 2 mixed
    rows: int  # T
    slots: int
    share: int  # units in a group
    out_s_per_row: float  # activations of one row to one unit
    link_latency_s: float
    alpha: float
    half_life: int
    most_count: float
    age: float  # of the layer's pool, where evictions go by age
    gpu_start_s: float  # before the first resident that the GPU runs; 0 unless its launch is "layer"
    home_start_s: float  # before a unit's first expert; 0 unless the units' launch is "layer"
    gpu_rows: int  # from this number of rows on all experts run on the GPU; 0 = never
    gpu_launch_s: float  # in the `gpu_s` of an expert
    home_launch_s: float  # in the `ndp_s` of an expert
    is_full: int  # 1: no slot of the layer's pool is free
    active: Any  # ACTIVE [E]; the first `load.size` are valid
    groups: Any  # GROUP [groups]; scratch of the dispatch
    own: int  # address of the layer's OWN: an array would cost every call the count of its references

    @property
    def gate_mass(self) -> Any:
        """The sums of gates, float64 [E], for a user's function in plain Python."""
        return self.active["gate_mass"]

    @property
    def memory(self) -> Any:
        """The policy's own numbers of the layer, float64 [MEMORY], for a user's function in plain Python."""
        from moetrace.jit.addresses import record_at

        return record_at(self.own, OWN).memory


class UsersView(NamedTuple):
    """The values that a user's policy may read: as `View`, but the record of the layer is two arrays."""

    step: int
    phase: int
    rows: int
    slots: int
    share: int
    out_s_per_row: float
    link_latency_s: float
    alpha: float
    half_life: int
    most_count: float
    age: float
    gpu_start_s: float
    home_start_s: float
    gpu_rows: int
    gpu_launch_s: float
    home_launch_s: float
    is_full: int
    active: Any
    groups: Any
    gate_mass: Any  # float64 [E], for reading; the first `load.size` are valid
    memory: Any  # float64 [MEMORY], to write


class Log(NamedTuple):
    """The records of a replay."""

    step: Any  # STEP [steps]
    layer: Any  # LAYER [L]
    unit: Any  # UNIT [3 + groups]
    tally: Any  # TALLY [1]
    fallbacks: Any  # int64 [1]: layers in which `optimal` fell back to `balance`


def records(shape: int | tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return zeroed records; in pure Python (NUMBA_DISABLE_JIT) they also answer to ``record.field``."""
    array = np.zeros(shape, dtype)
    return array.view(np.recarray) if PURE_PYTHON else array


def file_backed(size: int, dtype: np.dtype) -> np.ndarray:
    """Return a zeroed array in a temporary file that has no name, so that it takes no memory that is not given back.

    Its space is reserved: a full disk is an OSError now, not a crash on the first write beyond it.
    """
    with tempfile.TemporaryFile() as file:
        size_bytes = max(size, 1) * dtype.itemsize
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size_bytes)
        else:
            file.truncate(size_bytes)
        return np.memmap(file, dtype, "r+").view(np.ndarray)


def new_log(steps: int, layers: int, groups: int) -> Log:
    """Return an empty log."""
    unit = records(FIRST_GROUP + groups, UNIT)
    return Log(new_steps(steps), records(layers, LAYER), unit, records(1, TALLY), np.zeros(1, np.int64))


def new_steps(steps: int, dtype: np.dtype = STEP) -> np.ndarray:
    """Return an empty log of steps; one of more than 64 MiB lies in a temporary file that has no name."""
    return file_backed(steps, dtype) if steps * dtype.itemsize > 64 << 20 else records(steps, dtype)


def _view(active: np.ndarray, groups: np.ndarray) -> View:
    return View(0, 0, 0, 0, 1, 0.0, 0.0, 0.0, 0, 0.0, 0.0, 0.0, 0.0, 0, 0.0, 0.0, 0, active, groups, 0)


@cache
def hook_signature() -> Any:
    """Return the types of a policy's hook: void of cells, view, layer, load and plan."""
    from numba import typeof, types

    view = _view(np.zeros(1, ACTIVE), np.zeros(1, GROUP))
    return types.void(typeof(np.zeros((1, 1), CELL)), typeof(view), types.int64, types.int64[::1], types.uint8[::1])
