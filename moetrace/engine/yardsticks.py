"""Bounds and clairvoyant runs of a pass: each is computed once, for all lanes that it is the same of."""

import hashlib
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from moetrace.engine.bounds import clairvoyant_s, work_bound_s
from moetrace.engine.machine import Machine
from moetrace.engine.plugin import is_users
from moetrace.engine.replay import Batch, new_scratch
from moetrace.engine.residency import empty_cells

# What of a policy's setting a dispatch may read (`View`), or the clairvoyant run does.
_SEEN = ("slots", "alpha", "half_life", "most_count", "gpu_rows", "own_dispatch", "splits")


class Yardstick:
    """Seconds that grow block by block; of the lanes that share them, the first that comes adds a block."""

    def __init__(self, add: Callable[[Batch, float], float]) -> None:
        """Take what adds the seconds of a block to those before it."""
        self.seconds = 0.0
        self._add, self._next_step, self._lock = add, 0, threading.Lock()

    def advance(self, batch: Batch) -> None:
        """Add a block, unless that was done."""
        with self._lock:
            if batch.steps.first < self._next_step:
                return
            self._next_step = batch.steps.first + len(batch.steps.rows)
        self.seconds = self._add(batch, self.seconds)  # whoever else comes has no need of it before the pass ends


class Yardsticks:
    """The machines of a pass and their yardsticks, each once."""

    def __init__(self) -> None:
        """Begin a pass over a trace."""
        self._machines: dict[bytes, Machine] = {}
        self._found: dict[tuple, Yardstick] = {}

    def machine(self, machine: Machine) -> Machine:
        """Return the machine, or one that is the same in every number."""
        return self._machines.setdefault(_digest(machine), machine)

    def work_bound(self, machine: Machine) -> Yardstick:
        """Return the work bound of a machine, which does not depend on where experts live."""

        def add(batch: Batch, seconds: float) -> float:
            return work_bound_s(batch.steps, batch.demand, machine, seconds)

        key = "work", _digest((machine.device[:1], machine.work, machine.weight_bytes))
        return self._found.setdefault(key, Yardstick(add))

    def clairvoyant(self, machine: Machine, setting: Any, dispatch: Any) -> Yardstick:
        """Return the clairvoyant run of a dispatch; a user's function may remember, so that of one is not shared."""
        seen = tuple(setting[name].tobytes() for name in _SEEN)
        key = "clairvoyant", _digest(machine), seen, dispatch
        if key in self._found:
            return self._found[key]
        cells, scratch = empty_cells(*machine.weight_bytes.shape, True), new_scratch(machine)

        def add(batch: Batch, seconds: float) -> float:
            return clairvoyant_s(batch.steps, batch.demand, machine, setting, cells, scratch, dispatch, seconds)

        yardstick = Yardstick(add)
        if not is_users(dispatch):
            self._found[key] = yardstick
        return yardstick


def _digest(parts: Any) -> bytes:
    """Return a hash of arrays and numbers."""
    hashed = hashlib.blake2b()
    for part in parts:
        hashed.update(np.ascontiguousarray(part).tobytes())
    return hashed.digest()
