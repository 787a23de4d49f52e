"""One policy on its way through a trace: its machine, its state and its books."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from moetrace.engine.against_optimal import Regret, new_regret
from moetrace.engine.bounds import work_bound_s
from moetrace.engine.cold import ColdStarts, cold_starts_of
from moetrace.engine.decision_log import DecisionLog
from moetrace.engine.decoded import Decoded
from moetrace.engine.failure import place_of
from moetrace.engine.folding import FoldedSteps, StepStore
from moetrace.engine.foresight import foresight_of
from moetrace.engine.in_common import InCommon, PromptBooks, Yardstick
from moetrace.engine.layer_slots import layer_slots
from moetrace.engine.levels import STEP_LEVEL, levels_of
from moetrace.engine.lower_bound import add_to_lower_bound, room_of
from moetrace.engine.machine import Machine, MachinePart, machine_of, parts_of
from moetrace.engine.placement import place_experts
from moetrace.engine.plugin import load_hook, weighs_gates
from moetrace.engine.prefetch import COMPLETED_EVER
from moetrace.engine.recording import Recording
from moetrace.engine.replay import Aside, Batch, State, Work, new_state
from moetrace.engine.residency import EVICTED_SHARE, MOST_COUNT, empty_cache, keep_for_good
from moetrace.engine.setting import new_setting
from moetrace.engine.setup import Setup
from moetrace.engine.state import FIRST_GROUP, LINK_IN, STEP, Log, new_log, new_steps, records
from moetrace.engine.tape import new_tape
from moetrace.engine.tiers.tier_host import end_disk
from moetrace.engine.tiers.tier_layout import movable_parts
from moetrace.engine.tiers.tier_records import DISK_ROW, MORE_ROWS, REMOTE_ROW, Tiers
from moetrace.engine.tiers.tier_remote import RemoteExperts, end_remote, remote_of, with_remote
from moetrace.engine.tiers.tier_transfers import Losses, losses_of, note_remote_mass, with_rates, with_transfers
from moetrace.engine.tiers.tiers_of import (
    adds_nothing,
    tier_parts_of,
    tiers_of,
    what_it_has,
    with_homes_of_its_own,
)
from moetrace.engine.variants import clairvoyant, variant
from moetrace.spec.choices import Dispatch, Prefetch, Residency, find
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.spec.fits import check_layout
from moetrace.spec.participants import seen_by
from moetrace.spec.policy import PolicySpec
from moetrace.spec.system import System

# Records for a user's own functions.
_OWN_DISPATCH, _OWN_RESIDENCY = Dispatch(name="own", meaning=""), Residency(name="own", meaning="")


@dataclass
class Lane:
    """One policy on its way through a trace, and what it recorded.

    ``clairvoyant_s``: seconds with all active experts resident already, up to the slots; ``work_bound_s``: of any
    schedule on the parts that take part; ``lower_bound`` counts starts, the link and the slots, too, and may serve
    several lanes (timing model, section 8).
    """

    policy: PolicySpec
    machine: Machine
    parts: list[MachinePart]
    has_units: bool
    setting: Any  # SETTING [1]
    log: Log
    state: State
    tiers: Tiers | None  # of a machine that has more of them
    aside: Aside
    hooks: tuple[Any, Any]
    work_bound: Yardstick
    lower_bound: Yardstick | None  # None with more tiers: its proof is of a plain link and one home
    clairvoyant: Yardstick | None  # None if it is the replay
    cold_starts: ColdStarts | None = None  # of scope "request"
    remote: RemoteExperts | None = None  # of a policy that has some
    clairvoyant_s: float = 0.0
    work_bound_s: float = 0.0
    recording: Recording | None = None  # of the steps of a timeline
    decision_log: DecisionLog | None = None  # of every decision, where they are exported
    folded: FoldedSteps | None = None  # instead of the log of each step
    books: PromptBooks | None = None  # then, of a policy that counts prompts: whose the prompts of the state are
    level_steps: Any = None  # STEP_LEVEL [steps], as the log of steps; of a lane with levels
    _first_step: int = 0  # that the log has

    def fold(self, store: StepStore, common: InCommon) -> None:
        """Keep no log of each step, but what a summary needs."""
        self.folded = FoldedSteps(store)
        if self.setting["counts_prompts"][0]:
            self.books = common.books(self.state.prompts, self.remote)
            self.state = self.state._replace(prompts=None)

    def keep(self, steps: int) -> None:
        """Keep the log of each step."""
        self.log = self.log._replace(step=new_steps(steps))
        if self.aside.levels is not None:
            self.level_steps = new_steps(steps, STEP_LEVEL)

    def advance(self, batch: Batch) -> None:
        """Replay a block."""
        cells, scratch, whole = self.state.cells, self.state.scratch, batch
        if self.folded is not None:
            self.log = self.log._replace(step=records(len(batch.steps.rows), STEP))
            self._first_step = batch.steps.first
            if self.aside.levels is not None:
                self.level_steps = records(len(batch.steps.rows), STEP_LEVEL)
        if self.books is not None:
            self.state = self.state._replace(prompts=self.books.lend(batch))
        if self.remote is not None and self.tiers is not None:
            whole, (batch, times) = batch, self.remote.split(batch)
            self.tiers = self.tiers._replace(remote=times)
            note_remote_mass(self.tiers.transfers, whole, batch)
        if self.decision_log is not None:
            self.aside = self.aside._replace(regret=self.decision_log.begin(self.aside.regret, batch, len(cells)))
        try:
            for part in self._cut_where_cold(batch):
                if self.recording is None:
                    self._replay(part)
                else:
                    self._replay_and_record(part, self.recording)
            if self.clairvoyant is not None:
                cells, scratch = self.clairvoyant.kept
                self.clairvoyant.advance(whole)
        except MemoryError:
            raise
        except Exception as error:  # only a user's function can raise
            why = f"{type(error).__name__}: {error}{place_of(error, self.work(batch), cells, scratch, self.hooks)}"
            raise MoetraceError(f"Policy {self.policy.name} failed: {why}.") from error
        if self.decision_log is not None:
            self.decision_log.end(self.aside.regret)
        if self.folded is not None:
            self.folded.add(batch.steps.first, self.log.step)
            self.log = self.log._replace(step=new_steps(0))
        if self.books is not None:
            self.books.give_back(whole, self.state.prompts)
            self.state = self.state._replace(prompts=None)

    def _cut_where_cold(self, batch: Batch) -> Iterator[Batch]:
        """Yield a block in the parts before which the cache is emptied, once that has been done."""
        if self.cold_starts is None:
            yield batch
            return
        for part, is_cold in self.cold_starts.parts(batch, len(self.state.cells)):
            if is_cold:
                self.cold_starts.empty(self.state, self.log)
            yield part

    def _replay(self, batch: Batch) -> None:
        self.kernel(self.work(batch), *self.hooks, self.tiers, self._aside(batch))

    def _replay_and_record(self, batch: Batch, recording: Recording) -> None:
        for part, is_recorded in recording.parts(batch, len(self.state.cells)):
            if is_recorded:
                recording.record(self.work(part), self.hooks, self.tiers, self._aside(part))
            else:
                self._replay(part)

    @property
    def kernel(self) -> Any:
        """The replay that is compiled for what the lane has."""
        return variant(self.tiers, self.aside)

    @property
    def kernels(self) -> list[Any]:
        """The kernels that it calls, in threads if there are some."""
        found: list[Any] = [work_bound_s, add_to_lower_bound, self.kernel]
        found += [clairvoyant(self.tiers)] if self.clairvoyant is not None else []
        return found + ([variant(self.tiers, self.aside._replace(tape=new_tape(1, 1)))] if self.recording else [])

    @property
    def lower_bound_s(self) -> float:
        """The bound that counts starts, the link and the slots; the work bound, should that be greater."""
        return self.work_bound_s if self.lower_bound is None else max(self.lower_bound.seconds, self.work_bound_s)

    def work(self, batch: Batch) -> Work:
        """Return all that the replay of a block takes."""
        first = batch.steps.first - self._first_step
        log = self.log._replace(step=self.log.step[first : first + len(batch.steps.rows)])
        return Work(batch, self.machine, self.setting, self.state, log)

    def _aside(self, batch: Batch) -> Aside:
        """Return what the replay of a block has beside."""
        levels = self.aside.levels
        if levels is None:
            return self.aside
        first = batch.steps.first - self._first_step
        steps = self.level_steps[first : first + len(batch.steps.rows)]
        return self.aside._replace(levels=levels._replace(steps=steps))

    @property
    def duration_s(self) -> np.ndarray:
        """Seconds of each step, float64 [steps]."""
        return np.ascontiguousarray(self.log.step["duration_s"]) if self.folded is None else self.folded.duration_s

    @property
    def prefetch_bytes(self) -> float:
        """Bytes of all prefetches."""
        return float(np.sum(self.log.step["prefetch_bytes"])) if self.folded is None else self.folded.prefetch_bytes

    @property
    def late(self) -> int:
        """Experts that were demanded while they were fetched ahead."""
        return int(np.sum(self.log.step["late"])) if self.folded is None else self.folded.late

    @property
    def losses(self) -> Losses | None:
        """The losses of the link, if it loses anything."""
        return losses_of(self.tiers)

    @property
    def cold_s(self) -> float:
        """Seconds of the cold start of functions, with which the first step begins."""
        return 0.0 if self.remote is None else self.remote.cold_s

    def finish(self) -> None:
        """Close the books after the last block: prefetched experts that were never run were wasted."""
        self.log.unit["experts"][LINK_IN] += self.state.queue.ends[COMPLETED_EVER]
        self.log.tally["wasted"] += int(self.state.cache.fresh.sum())
        if self.remote is not None:
            end_remote(self.remote, self.log.unit[FIRST_GROUP + len(self.state.scratch.groups) + REMOTE_ROW])
        if self.tiers is not None and self.tiers.host is not None:
            end_disk(self.tiers.host, self.log.unit[FIRST_GROUP + len(self.state.scratch.groups) + DISK_ROW])
        if not self.has_units:  # one CPU is no tier that could be out of balance
            self.log.step["imbalance"] = np.nan
            self.log.layer["imbalance_sum"], self.log.layer["imbalance_count"] = 0.0, 0
        self.work_bound_s = self.work_bound.seconds
        if self.clairvoyant is not None:
            self.clairvoyant_s = self.clairvoyant.seconds
        elif self.aside.levels is not None:
            self.clairvoyant_s = float(self.aside.levels.top_s[0])
        elif self.folded is not None:
            self.clairvoyant_s = float(np.sum(self.folded.busy_s))
        else:
            self.clairvoyant_s = float(np.sum(self.log.step["duration_s"] - self.log.step["wait_s"]))


def _or(given: float | None, default: float) -> float:
    return default if given is None else float(given)


def _clairvoyant_of(
    dispatch: Dispatch, seen: tuple[Machine, Tiers | None, Any, Any, RemoteExperts | None], common: InCommon
) -> Yardstick | None:
    """Return the clairvoyant run; None if it is the replay: the dispatch ignores residency, and nothing else counts."""
    machine, tiers, setting, hook, remote = seen
    if not dispatch.ignores_residency:
        return common.clairvoyant(machine, tiers, setting, hook, remote)
    if tiers is None:
        return None
    nothing_kept = setting.copy()
    nothing_kept["slots"] = 0
    return common.clairvoyant(machine, tiers, nothing_kept, hook, remote)


def _check_splits(policy: PolicySpec, dispatch: Dispatch, system: System, tiers: Tiers | None) -> None:
    """Raise UsageError if experts are to be split where there are more tiers."""
    if tiers is not None and dispatch.splits:
        others = '"balance", or "bottleneck", which uses the CPU, too' if system.cpu and system.ndp else '"balance"'
        raise UsageError(
            f"Policy {policy.name}: dispatch {dispatch.name} knows a plain link and one home only, and system "
            f"{system.name} has {', '.join(what_it_has(system, tiers))}: use dispatch = {others}, or leave that out."
        )


def _regret_of(setup: Setup, policy: PolicySpec, dispatch: Dispatch, system: System) -> Regret | None:
    """Return the books of decisions beside those of `optimal`, where they are asked for."""
    if not setup.regret:
        return None
    if dispatch.splits:
        raise UsageError(
            f"Policy {policy.name}: regret compares where whole experts run, and dispatch {dispatch.name} shares one; "
            'use dispatch = "balance", or replay without regret.'
        )
    return new_regret(setup.model.most_experts, system.home is not None, setup.decisions)


def _groups_of(
    decoded: Decoded, setup: Setup, policy: PolicySpec, system: System, weight_bytes: np.ndarray
) -> np.ndarray:
    """Return where a policy has the experts, once there is room for a layout."""
    groups = place_experts(policy, decoded.trace.layer_index, weight_bytes.shape[1], system.units, setup.model)
    if policy.layout is not None:
        check_layout(policy.name, system, groups, weight_bytes, setup.ignore_capacity)
    return groups


def lane_of(
    decoded: Decoded, setup: Setup, policy: PolicySpec, weight_bytes: np.ndarray, slots: int, common: InCommon
) -> Lane:
    """Return the lane of a policy of a setup, before the first step."""
    model, system = setup.model, seen_by(policy, setup.system)
    schedule, own = decoded.schedule, setup.hooks
    remote = common.remote(remote_of(policy, setup, system, decoded, weight_bytes))
    weight_bytes = weight_bytes if remote is None else remote.local_bytes
    layers, experts = weight_bytes.shape
    share = policy.group_size(system.units) if system.units else 1
    groups = _groups_of(decoded, setup, policy, system, weight_bytes)
    mixes = bool(system.units) and find("placement", policy.placement).mixes
    machine = common.machine(machine_of(model, system, weight_bytes, groups, share, mixes))
    dispatch: Dispatch = find("dispatch", policy.dispatch) or _OWN_DISPATCH
    residency: Residency = find("residency", policy.residency) or _OWN_RESIDENCY
    prefetch: Prefetch = find("prefetch", policy.prefetch)
    tiers = with_remote(tiers_of(model, system, policy, machine), remote)
    tiers = with_transfers(tiers, policy, setup.system, machine)
    _check_splits(policy, dispatch, setup.system, tiers)
    hooks = (
        load_hook("dispatch", policy.dispatch, own, tiers=tiers is not None),
        load_hook("residency", policy.residency, own),
    )
    setting = new_setting(
        prefetch=prefetch.rule,
        depth=policy.prefetch_depth or 0,
        waits=int(policy.prefetch_blocks),
        counts_prompts=int(residency.counts_prompts),
        learns=int(residency is _OWN_RESIDENCY or residency.hook is not None),
        looks_ahead=int(residency.next_steps),
        optimal=int(dispatch.counts_fallbacks),
        splits=int(dispatch.splits),
        own_dispatch=int(dispatch.reads_state),
        weighs=int(dispatch.weighs or any(map(weighs_gates, hooks))),
        slots=slots,
        half_life=policy.half_life or 0,
        gpu_rows=policy.gpu_rows or 0,
        alpha=float(policy.alpha),
        most_count=_or(policy.most_count, MOST_COUNT),
        chance=float(policy.p),
        seed=policy.seed,
    )
    pools = layers if policy.scope == "layer" and not residency.shares_slots else 1
    capacity: int | np.ndarray = slots // pools
    if policy.budget is not None:
        capacity = layer_slots(policy.budget, lambda: decoded.first_counts, slots, weight_bytes > 0)
    evicted_share = _or(policy.evicted_share, EVICTED_SHARE)
    cache = empty_cache(layers, experts, pools, capacity, residency.order, evicted_share)
    prompts = common.prompts(schedule.requests, residency.counts_prompts, layers * experts)
    common_machine, machine = machine, with_rates(with_homes_of_its_own(machine, tiers), tiers)
    state = new_state(machine, prompts, cache, residency.admits, tiers)
    if system.link is None:
        keep_for_good(state.cells, state.cache, np.arange(layers * experts))
    elif residency.begin is not None:
        residency.begin(policy, state, decoded)
    seen = common_machine, tiers, setting, hooks[0], remote
    best = _clairvoyant_of(dispatch, seen, common)
    log = new_log(0, layers, len(state.scratch.groups) + (MORE_ROWS if tiers else 0))
    parts = parts_of(system, share) if tiers is None else tier_parts_of(system, share, tiers, len(state.scratch.groups))
    aside = Aside(levels=levels_of(system, policy, machine), regret=_regret_of(setup, policy, dispatch, system))
    if residency.foresees:
        foresight = foresight_of(policy, schedule.requests, layers, experts, decoded.trace.top_k)
        aside = aside._replace(foresight=foresight)
    lower_bound = None
    if tiers is None or adds_nothing(tiers):
        lower_bound = common.lower_bound(machine, room_of(setting[0], layers * experts), bool(cache.residents.any()))
    layout = movable_parts(None if tiers is None else tiers.layout, machine)
    cold = cold_starts_of(policy, schedule.requests, decoded.trace.steps, state, layout)
    yardsticks = common.work_bound(machine, remote), lower_bound, best
    has_units = system.ndp is not None
    return Lane(policy, machine, parts, has_units, setting, log, state, tiers, aside, hooks, *yardsticks, cold, remote)
