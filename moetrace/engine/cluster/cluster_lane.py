"""One policy of a cluster on its way through a trace: plans, what moves, and the steps in between."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moetrace.engine.cluster.auto import best_cut
from moetrace.engine.cluster.cluster_books import CLUSTER_STEP, Books, new_books
from moetrace.engine.cluster.cluster_replay import bound_s, record_step, replay_cluster
from moetrace.engine.cluster.cluster_tape import STAGE_SLICE, most_slices, new_tape
from moetrace.engine.cluster.fabric import Fabric, fabric_of, is_auto
from moetrace.engine.cluster.placed import PlacedCopies, Placer, copies_in, held_bytes, moved_into
from moetrace.engine.cluster.windows import Windows
from moetrace.engine.decoded import Decoded
from moetrace.engine.folding import FoldedSteps, StepStore
from moetrace.engine.in_common import InCommon, Yardstick
from moetrace.engine.layer import SAME
from moetrace.engine.machine import MachinePart
from moetrace.engine.replay import Aside, Batch
from moetrace.engine.setting import new_setting
from moetrace.engine.setup import Setup
from moetrace.engine.state import Log, new_steps
from moetrace.spec.cluster_policy import INTERVAL, WINDOW
from moetrace.spec.errors import UsageError
from moetrace.spec.fits import gpu_space_bytes
from moetrace.spec.model import Model
from moetrace.spec.policy import PolicySpec

_NEVER_S = np.inf


class ClusterRecording:
    """The record of the steps ``first`` to ``stop - 1`` of one policy, which grows with that window."""

    def __init__(self, first: int, stop: int) -> None:
        self.first, self.stop = first, stop
        self._slices: list[np.ndarray] = [np.zeros(0, STAGE_SLICE)]

    @property
    def slices(self) -> np.ndarray:
        """All slices so far, STAGE_SLICE [n], step by step."""
        return np.concatenate(self._slices)

    def record(self, batch: Batch, s: int, fabric: Fabric, copies: PlacedCopies, books: Books) -> None:
        """Replay step s of a block, and keep its record."""
        rows, layers = int(batch.steps.rows[s]), fabric.machine.weight_bytes.shape[0]
        cut, top_k = fabric.cut[batch.steps.phase[s]], batch.experts.shape[2]
        tape = new_tape(most_slices(rows, top_k, layers, fabric.gpus[0], cut), *books.stages.rows.shape)
        record_step(batch, fabric, copies, books, s, tape)
        written = int(tape.ends[0])
        if written > len(tape.slices):
            raise RuntimeError(f"step {batch.steps.first + s} has more to note than its tape has room for.")
        self._slices.append(tape.slices[:written].copy())


@dataclass
class ClusterLane:
    """One policy of a cluster, and what it recorded. Fields that `Lane` has, too, have the same names."""

    policy: PolicySpec
    fabric: Fabric
    parts: list[MachinePart]
    placer: Placer
    windows: Windows | None  # of a placement that plans from the steps before
    room: Any  # of a GPU's memory for experts: bytes, and the sentence that says so; None if that is not to count
    books: Books
    plan: np.ndarray  # int32 [L, GPUs, slots]
    copies: PlacedCopies
    work_bound: Yardstick
    log: Log
    folded: FoldedSteps | None = None  # instead of the log of each step
    recording: ClusterRecording | None = None  # of the steps of a timeline
    clairvoyant: None = None
    hooks: tuple = ()
    tiers: None = None
    aside: Aside = field(default_factory=Aside)
    level_steps: None = None
    remote: None = None
    losses: None = None
    cold_starts: None = None
    setting: Any = field(default_factory=new_setting)  # of which nothing is set
    work_bound_s: float = 0.0
    clairvoyant_s: float | None = None
    has_units: bool = False
    prefetch_bytes: float = 0.0
    late: int = 0
    cold_s: float = 0.0
    _first_step: int = 0  # that the log has
    _coming: np.ndarray | None = None  # a plan that moves while steps go on
    _wake_s: float = _NEVER_S  # when it has moved

    @property
    def lower_bound(self) -> Yardstick:
        """The bound of all schedules and placements."""
        return self.work_bound

    @property
    def lower_bound_s(self) -> float:
        """The same in seconds."""
        return self.work_bound_s

    @property
    def overhead_s(self) -> float:
        """Seconds of the host's overhead of all layers, micro-batches and steps."""
        return float(self.books.total["overhead_s"][0])

    @property
    def kernels(self) -> list[Any]:
        """The kernels that it calls."""
        return [replay_cluster, bound_s, *([record_step] if self.recording is not None else [])]

    @property
    def duration_s(self) -> np.ndarray:
        """Seconds of each step, float64 [steps]."""
        return np.ascontiguousarray(self.log.step["duration_s"]) if self.folded is None else self.folded.duration_s

    def fold(self, store: StepStore, common: InCommon) -> None:
        """Keep no log of each step, but what a summary needs."""
        del common
        self.folded = FoldedSteps(store)

    def keep(self, steps: int) -> None:
        """Keep the log of each step."""
        self.log = self.log._replace(step=new_steps(steps, CLUSTER_STEP))

    def advance(self, batch: Batch) -> None:
        """Replay a block, in the parts between which plans change."""
        number = len(batch.steps.rows)
        if self.folded is not None:
            self.log, self._first_step = self.log._replace(step=new_steps(number, CLUSTER_STEP)), batch.steps.first
        at = batch.steps.first - self._first_step
        books = self.books._replace(log=self.log._replace(step=self.log.step[at : at + number]))
        s = 0
        while s < number:
            self._change_plan(batch.steps.first + s, int(batch.steps.phase[s]))
            stop = number
            if self.windows is not None and self.windows.next_step is not None:
                stop = min(number, self.windows.next_step - batch.steps.first)
            after = self._replay(batch, books, s, stop)
            if self.windows is not None:
                self.windows.add(batch.demand, batch.steps.first, s, after)
            s = after
        if self.folded is not None:
            self.folded.add(batch.steps.first, self.log.step)
            self.log = self.log._replace(step=new_steps(0, CLUSTER_STEP))

    def _replay(self, batch: Batch, books: Books, s: int, stop: int) -> int:
        """Replay steps of a block from s on, with a tape in the recording's window; return the first that was not."""
        if self.recording is not None:
            first, end = self.recording.first - batch.steps.first, self.recording.stop - batch.steps.first
            if first <= s < end:
                self.recording.record(batch, s, self.fabric, self.copies, books)
                return s + 1
            stop = min(stop, first) if s < first else stop
        return replay_cluster(batch, self.fabric, self.copies, books, s, stop, self._wake_s)

    def finish(self) -> None:
        """Close the books after the last block."""
        self.work_bound_s = self.work_bound.seconds

    def memory_bytes(self, model: Model) -> float:
        """Bytes of the fullest GPU's memory: its experts now, and the dense weights where it has these too."""
        held = float(held_bytes(self.plan, self.placer.slots, self.fabric.machine.weight_bytes).max())
        dense = model.moe_layers * model.dense_bytes + model.head_bytes
        return held + dense if self.fabric.gpus["colocated"][0] else max(held, dense)

    def _change_plan(self, step: int, phase: int) -> None:
        """Before a step, take the plan that has come, and make the next one if it is time."""
        clock = self.books.clock[0]
        if self._coming is not None and not clock["now_s"] < self._wake_s * SAME:
            self._take(self._coming)
        if self.windows is None or step != self.windows.next_step:
            return
        loads = self.windows.take()
        if self._coming is not None:  # nothing is planned while something moves
            return
        plan = self.placer.plan(loads)
        self._check_room(plan)
        weight_bytes = self.fabric.machine.weight_bytes
        into = moved_into(self.plan, plan, weight_bytes)
        clock["plans"] += 1
        clock["moved_bytes"] += into.sum()
        if self.policy.migrate != "async":
            clock["most_into"] = into.max()
            self._take(plan)
            return
        share = self.fabric.gpus["migrate_share"][0]
        self._coming = plan
        self._wake_s = clock["now_s"] + into.max() / (share * self.fabric.network["bytes_s"][phase])
        clock["slowed"] = 1 - share
        if into.max() == 0.0:
            self._take(plan)

    def _take(self, plan: np.ndarray) -> None:
        """Let rows go by a plan from now on."""
        self.plan, self.copies = plan, copies_in(plan, self.fabric.machine.weight_bytes)
        self._coming, self._wake_s = None, _NEVER_S
        self.books.clock["slowed"] = 1.0

    def _check_room(self, plan: np.ndarray) -> None:
        """Raise UsageError if a GPU has no room for what a plan has on it."""
        if self.room is None:
            return
        need = float(held_bytes(plan, self.placer.slots, self.fabric.machine.weight_bytes).max())
        have, where = self.room
        if need > have:
            raise UsageError(
                f"Policy {self.policy.name}: {need / 1e9:.1f} GB of experts do not fit {where}; use more GPUs, fewer "
                "redundant experts or fewer bits a weight, or, in a replay, pass --ignore-capacity."
            )


def cluster_lane(
    decoded: Decoded, setup: Setup, policy: PolicySpec, weight_bytes: np.ndarray, common: InCommon
) -> ClusterLane:
    """Return a policy of a cluster before the first step.

    Raises UsageError if policy, model and cluster do not go together; MoetraceError if a file is wrong.
    """
    model, system, trace = setup.model, setup.system, decoded.trace
    assert system.cluster is not None
    if setup.regret or setup.decisions:
        raise UsageError(
            f"System {system.name} is a cluster, where no dispatch decides and nothing is to be regretted; leave out "
            "--regret and --export-decisions."
        )
    fabric = fabric_of(model, system, policy, weight_bytes)
    gpus = system.cluster.expert_gpus
    own = np.full(trace.layers, trace.num_experts) if isinstance(model.experts, int) else model.layer_experts
    placer = Placer(policy, gpus, own, trace.layer_index.astype(np.int64), model)
    windows = None
    if placer.is_planned:
        interval = INTERVAL if policy.interval is None else policy.interval
        windows = Windows(policy.name, policy.window or WINDOW, interval, weight_bytes.shape)
    plan = placer.first()
    copies = copies_in(plan, weight_bytes)
    requests = len(decoded.schedule.requests.id)
    if is_auto(policy):
        fabric = fabric._replace(cut=best_cut(decoded, fabric, copies, policy, requests))
    parts = int(fabric.cut["micro_batches"].max()), int(fabric.cut["chunks"].max())
    books = new_books(fabric, placer.most_copies, requests, parts, new_steps(0, CLUSTER_STEP))
    names = system.part_names
    lane = ClusterLane(
        policy=policy,
        fabric=fabric,
        parts=[MachinePart(name, row, 1) for row, name in enumerate(names)],
        placer=placer,
        windows=windows,
        room=None if setup.ignore_capacity else room_of(setup),
        books=books,
        plan=plan,
        copies=copies,
        work_bound=common.shared(("cluster", *_digested(fabric)), lambda: _bound_of(fabric)),
        log=books.log,
    )
    lane._check_room(plan)
    if setup.window is not None:
        lane.recording = ClusterRecording(setup.window.start, setup.window.stop)
    return lane


def room_of(setup: Setup) -> tuple[float, str]:
    """Return the bytes that a GPU has for experts, and how to call them."""
    model, system = setup.model, setup.system
    assert system.cluster is not None
    dense = system.cluster.is_colocated
    have = gpu_space_bytes(model, system) if dense else (system.gpu.memory_gb - system.gpu.reserve_gb) * 1e9
    have = max(have, 0.0)
    return have, f"the {have / 1e9:.1f} GB that a GPU of system {system.name} has left for them"


def _bound_of(fabric: Fabric) -> Yardstick:
    def add(batch: Batch, seconds: float) -> float:
        return bound_s(batch.steps, batch.demand, fabric, seconds)

    return Yardstick(add)


def _digested(fabric: Fabric) -> tuple[bytes, ...]:
    """The facts about a cluster that its bound depends on."""
    machine, gpus = fabric.machine, fabric.gpus
    names = ("attention", "experts", "colocated", "shared_bytes", "shared_flop_per_row", "all_factors")
    return (
        machine.device.tobytes(),
        machine.work.tobytes(),
        machine.weight_bytes.tobytes(),
        fabric.cut["apart"].tobytes(),
        *(gpus[name].tobytes() for name in names),
    )
