"""Objects that lanes of a pass share: machines, books of prompts, bounds and clairvoyant runs, each made once."""

import hashlib
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from moetrace.engine.bounds import work_bound_s
from moetrace.engine.lower_bound import add_to_lower_bound, new_lower_bound, seconds_of
from moetrace.engine.machine import Machine
from moetrace.engine.plugin import is_users
from moetrace.engine.prompt import Prompts, emptied, prompts_of
from moetrace.engine.relay import UNDER_WAY
from moetrace.engine.replay import Batch
from moetrace.engine.residency import empty_cells
from moetrace.engine.schedule import Requests
from moetrace.engine.tiers.tier_records import Tiers, without_disk
from moetrace.engine.tiers.tier_remote import RemoteExperts
from moetrace.engine.tiers.tier_transfers import without_transfers
from moetrace.engine.variants import clairvoyant
from moetrace.engine.view import new_scratch

# Fields of a policy's setting that a dispatch may read (`View`), or that the clairvoyant run reads.
_SEEN = ("slots", "alpha", "half_life", "most_count", "gpu_rows", "own_dispatch", "splits")


class Yardstick:
    """Seconds that grow block by block; of the lanes that share them, the first that comes adds a block."""

    def __init__(self, add: Callable[[Batch, float], float], kept: Any = None) -> None:
        """Take what adds the seconds of a block to those before it, and the arrays that a dispatch writes into."""
        self.seconds = 0.0
        self.kept: Any = kept
        self._add, self._next_step, self._lock = add, 0, threading.Lock()

    def advance(self, batch: Batch) -> None:
        """Add a block, unless that was done."""
        with self._lock:  # another lane may be ready for the next block before this one is added
            if batch.steps.first >= self._next_step:
                self._next_step = batch.steps.first + len(batch.steps.rows)
                self.seconds = self._add(batch, self.seconds)


class PromptBooks:
    """The prompts' counts before a block, of which each lane gets a copy: they depend on who is remote, and on no more.

    With 32 requests at once in a model of 6,144 experts they take 768 KiB, more than the rest of a lane.
    """

    def __init__(self, prompts: Prompts) -> None:
        """Take the books before the first step."""
        self._before = {0: prompts}  # a block's first step -> the books before it
        self._lock = threading.Lock()

    def lend(self, batch: Batch) -> Prompts:
        """Return a copy of the books as they are before a block."""
        with self._lock:
            before = self._before[batch.steps.first]
        mine = {name: getattr(before, name).copy() for name in ("counts", "total", "cursor")}
        return before._replace(**mine)

    def give_back(self, batch: Batch, prompts: Prompts) -> None:
        """Take the books of a lane that came through the block."""
        with self._lock:
            self._before.setdefault(batch.steps.first + len(batch.steps.rows), prompts)
            while len(self._before) > UNDER_WAY + 1:
                del self._before[min(self._before)]


class InCommon:
    """Objects made once for all lanes of a pass with the same values."""

    def __init__(self) -> None:
        """Begin a pass over a trace."""
        self._machines: dict[bytes, Machine] = {}
        self._prompts: dict[bool, Prompts] = {}
        self._books: dict[bytes | None, PromptBooks] = {}
        self._remote: dict[bytes, RemoteExperts] = {}
        self._found: dict[tuple, Yardstick] = {}
        self._cells: np.ndarray | None = None

    def machine(self, machine: Machine) -> Machine:
        """Return the machine, or one that is the same in every number."""
        return self._machines.setdefault(_key_of(machine), machine)

    def prompts(self, requests: Requests, counts: bool, cells: int) -> Prompts:
        """Return new books of prompts, empty if nothing `counts` them; when requests end stands in one place."""
        if counts not in self._prompts:
            first = requests.first_prefill_step if counts else np.full(len(requests.id), -1)
            self._prompts[counts] = prompts_of(requests.last_step, first, requests.last_prefill_step, cells)
        return emptied(self._prompts[counts])

    def books(self, prompts: Prompts, remote: RemoteExperts | None) -> PromptBooks:
        """Return the books that all lanes lend which count prompts and leave out the same experts, or none."""
        return self._books.setdefault(remote and remote.key, PromptBooks(prompts))

    def remote(self, remote: RemoteExperts | None) -> RemoteExperts | None:
        """Return the remote experts of a lane, or those of another that are the same."""
        return None if remote is None else self._remote.setdefault(remote.key, remote)

    def shared(self, key: tuple, make: Callable[[], Yardstick]) -> Yardstick:
        """Return the yardstick of a key, made when it is first asked for."""
        if key not in self._found:
            self._found[key] = make()
        return self._found[key]

    def work_bound(self, machine: Machine, remote: RemoteExperts | None = None) -> Yardstick:
        """Return the work bound of a machine, wherever experts live; remote ones are not in it."""

        def add(batch: Batch, seconds: float) -> float:
            own = batch if remote is None else remote.split(batch)[0]
            return work_bound_s(own.steps, own.demand, machine, seconds)

        key = "work", _digest((machine.device[:1], machine.work, *_weights_of(machine))), remote and remote.key
        return self._found.setdefault(key, Yardstick(add))

    def lower_bound(self, machine: Machine, room: int, starts_full: bool) -> Yardstick:
        """Return the lower bound of a machine whose GPU holds ``room`` experts, from the start if ``starts_full``."""
        parts = machine.device, machine.link, machine.work, *_weights_of(machine)
        key = "lower", _digest(parts), machine.share, room
        key = *key, starts_full
        if key not in self._found:
            bound = new_lower_bound(machine, room, starts_full)

            def add(batch: Batch, seconds: float) -> float:
                add_to_lower_bound(batch.steps, batch.demand, machine, bound)
                return seconds_of(bound)

            self._found[key] = Yardstick(add)
        return self._found[key]

    def clairvoyant(
        self, machine: Machine, tiers: Tiers | None, setting: Any, dispatch: Any, remote: RemoteExperts | None = None
    ) -> Yardstick:
        """Return the clairvoyant run of a dispatch; a user's function may remember, so that of one is not shared.

        It has no clock and draws nothing: its link is plain, and it knows no disk.
        """
        tiers = without_transfers(without_disk(tiers))
        if tiers is not None and remote is not None:
            tiers = tiers._replace(term=tiers.term.copy())  # which it writes into, in another thread than the lane
        seen = tuple(setting[name].tobytes() for name in _SEEN)
        key = "clairvoyant", _key_of(machine), tiers and _digest((tiers.term, tiers.cpu)), seen, dispatch
        key = *key, remote and remote.key
        if key in self._found:
            return self._found[key]
        scratch = new_scratch(machine, tiers)
        if self._cells is None or setting["own_dispatch"][0]:  # others do not read whose they are
            layers, experts = machine.weight_bytes.shape
            self._cells = empty_cells(layers, experts, True)
        own, run = (self._cells, scratch), clairvoyant(tiers)

        def add(batch: Batch, seconds: float) -> float:
            beside = tiers
            if beside is not None and remote is not None:
                batch, times = remote.split(batch)
                beside = beside._replace(remote=times)
            return run(batch.steps, batch.demand, machine, beside, setting, own, dispatch, seconds)

        yardstick = Yardstick(add, own)
        if not is_users(dispatch):
            self._found[key] = yardstick
        return yardstick


def _key_of(machine: Machine) -> bytes:
    """Return a hash of everything in a machine."""
    return _digest((*machine._replace(weight_bytes=np.zeros(0)), *_weights_of(machine)))


def _weights_of(machine: Machine) -> tuple[Any, ...]:
    """Return all that is to be hashed of a machine's weights: not every expert's, where all have the same."""
    return (*machine.weight_bytes.shape, machine.even_bytes or machine.weight_bytes)


def _digest(parts: Any) -> bytes:
    """Return a hash of arrays and numbers."""
    hashed = hashlib.blake2b()
    for part in parts:
        hashed.update(np.ascontiguousarray(part).tobytes())
    return hashed.digest()
