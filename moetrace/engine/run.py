"""One pass over a trace: blocks in, logs out; every policy of the pass sees a block while it is in the cache."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

from moetrace.engine.cluster.cluster_lane import ClusterLane, cluster_lane
from moetrace.engine.decision_log import DecisionLog
from moetrace.engine.decoded import SMALL_BYTES, Decoded, needs_of
from moetrace.engine.demand import Popularity, count_experts, new_popularity, without_ahead
from moetrace.engine.folding import StepStore
from moetrace.engine.in_common import InCommon
from moetrace.engine.lane import Lane, lane_of
from moetrace.engine.plugin import is_users
from moetrace.engine.recording import Recording
from moetrace.engine.relay import Relay, Walker
from moetrace.engine.schedule import Schedule
from moetrace.engine.setup import Setup, check_ids_of, check_setup, weight_bytes_of
from moetrace.jit.apart import Hands, may_wait
from moetrace.jit.compile import compile_now
from moetrace.spec.errors import MoetraceError
from moetrace.spec.model import Model
from moetrace.spec.participants import check_policy
from moetrace.spec.system import System
from moetrace.trace.format import Trace

_Made = TypeVar("_Made")

AnyLane = Lane | ClusterLane


@dataclass(frozen=True)
class Run:
    """A finished replay: the schedule of the trace and how popular experts were in it, and one lane a policy."""

    model: Model
    system: System
    slots: int
    schedule: Schedule
    popularity: Popularity
    lanes: list[AnyLane]
    warnings: list[str]

    @property
    def work_bound_s(self) -> float:
        """The work bound of the first policy: that of all, unless a CPU takes part in some of them only."""
        return self.lanes[0].work_bound_s


@dataclass
class _Underway:
    """One setup on its way through a trace; ``error`` ends it, but not the others."""

    setup: Setup
    slots: int
    lanes: list[AnyLane]
    warnings: list[str]
    error: MoetraceError | None = None

    def end(self, schedule: Schedule, popularity: Popularity) -> Run | MoetraceError:
        """Close the books of a setup that came through; else return why it did not."""
        if self.error is not None:
            return self.error
        model, system = self.setup.model, self.setup.system
        if (error := check_ids_of(model, popularity.rows)) is not None:
            return error
        for lane in self.lanes:
            lane.finish()
        return Run(model, system, self.slots, schedule, popularity, self.lanes, self.warnings)


def run_setups(
    trace: Trace | Decoded,
    setups: Sequence[Setup],
    *,
    jobs: int = 1,
    progress: Callable[[int], None] | None = None,
    store: StepStore | None = None,
) -> list[Run | MoetraceError]:
    """Replay a trace through any number of setups in one pass, each block decoded once.

    ``jobs`` threads work at a time; ``progress`` gets the number of rows that are newly done. Each lane keeps a
    recording of the steps in a setup's window, which changes nothing else. With a ``store`` lanes have no log of each
    step: `FoldedSteps` keep what a summary needs. The figures do not depend on ``jobs``, nor on how the trace is cut.

    Returns, for each setup, its run or the error that it ended with: one that does not fit the trace, or whose
    function fails, costs the others nothing. A damaged trace raises MoetraceError, unless all had failed before the
    damage was met; a small trace is read to its end first.
    A ``Decoded`` must have been made for what the policies need.
    """
    checked = [_attempt(check_setup, _trace_of(trace), setup) for setup in setups]
    if all(isinstance(one, MoetraceError) for one in checked):
        return [one for one in checked if isinstance(one, MoetraceError)]
    with Hands(jobs) if jobs > 1 else nullcontext() as pool:
        if isinstance(trace, Trace):
            needs = needs_of([each for one in setups for each in one.policies], (setup.system for setup in setups))
            trace = Decoded(trace, needs, 0 if needs.gates else SMALL_BYTES, pool)
        common = InCommon()
        begun = [
            one if isinstance(one, MoetraceError) else _attempt(_begin, trace, setup, *one, common, store)
            for setup, one in zip(setups, checked, strict=True)
        ]
        popularity = _pass(trace, [one for one in begun if isinstance(one, _Underway)], pool, progress)
    return [one if isinstance(one, MoetraceError) else one.end(trace.schedule, popularity) for one in begun]


def _trace_of(trace: Trace | Decoded) -> Trace:
    return trace if isinstance(trace, Trace) else trace.trace


def _attempt(function: Callable[..., _Made], *arguments: Any) -> _Made | MoetraceError:
    try:
        return function(*arguments)
    except MoetraceError as error:
        return error


def _begin(
    decoded: Decoded, setup: Setup, slots: int, warnings: list[str], common: InCommon, store: StepStore | None
) -> _Underway:
    weight_bytes = weight_bytes_of(decoded.trace, setup.model)
    lanes: list[AnyLane] = []
    for policy in setup.policies:
        check_policy(policy, setup.system)
        if setup.system.cluster is not None:
            lane = cluster_lane(decoded, setup, policy, weight_bytes, common)
        else:
            lane = lane_of(decoded, setup, policy, weight_bytes, slots, common)
            if setup.window is not None:
                lane.recording = Recording(setup.window.start, setup.window.stop)
            if setup.decisions:
                lane.decision_log = DecisionLog()
        lane.keep(decoded.trace.steps) if store is None else lane.fold(store, common)
        lanes.append(lane)
    warnings = warnings + [
        f"policy {lane.policy.name}: requests overlap from first to last, so scope request empties nothing."
        for lane in lanes
        if lane.cold_starts is not None and len(lane.cold_starts.steps) == 0 and len(decoded.schedule.requests.id) > 1
    ]
    return _Underway(setup, slots, lanes, warnings)


def _pass(
    decoded: Decoded, underway: list[_Underway], pool: Executor | None, progress: Callable[[int], None] | None
) -> Popularity:
    """Replay every block in every lane; return how much each expert was wanted."""
    popularity = new_popularity(decoded.trace.layers, decoded.trace.num_experts)
    compile_now(*(each for one in underway for lane in one.lanes for each in lane.kernels))  # before threads want them
    # A user's function may never return: that must not keep the main thread from hearing Ctrl-C. Built-in hooks return
    # soon, and would take a few percent longer in another thread, whose caches are cold.
    own = may_wait() and any(is_users(hook) for one in underway for lane in one.lanes for hook in lane.hooks)
    weighs = any(lane.setting["weighs"][0] for one in underway for lane in one.lanes)
    with Hands(1) if own and pool is None else nullcontext(pool) as hands:
        relay, given = Relay(_walkers(underway), hands), deque[int]()

        def note_ends() -> None:
            _end_failed(underway, relay)
            while len(given) > relay.under_way:
                rows = given.popleft()
                if progress is not None:
                    progress(rows)

        try:
            for batch, rows in decoded.batches(pool, weighs):
                if all(one.error is not None for one in underway):
                    break
                count_experts(without_ahead(batch.demand, len(batch.steps.rows), decoded.trace.layers), popularity)
                relay.give(batch)
                given.append(rows)
                note_ends()
        except MoetraceError:  # of the trace: it costs those nothing that had failed before, whatever the threads
            relay.finish()
            note_ends()
            if any(one.error is None for one in underway):
                raise
        relay.finish()
        note_ends()
    return popularity


def _walkers(underway: list[_Underway]) -> list[Walker]:
    """Return the lanes, by the place of their setup, and the bounds, each once: other setups may share it."""
    walkers: list[Walker] = []
    bounds: set[int] = set()
    for i, one in enumerate(underway):
        for lane in one.lanes:
            for bound in (lane.work_bound, lane.lower_bound):
                if bound is not None and id(bound) not in bounds:
                    bounds.add(id(bound))
                    walkers.append(Walker(None, bound.advance))
            walkers.append(Walker(i, lane.advance))
    return walkers


def _end_failed(underway: list[_Underway], relay: Relay) -> None:
    for i, one in enumerate(underway):
        if i in relay.errors:
            one.error = relay.errors[i]
            one.lanes = []
