"""The replays of an advice: all candidates over the longest part of a trace that pays, then fewer over longer parts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from moetrace.batch.candidates import Candidate
from moetrace.batch.cell import Cell, Resolver
from moetrace.batch.executors import Farm, run_tasks
from moetrace.batch.grid import Point
from moetrace.batch.slo import Slo, worst_miss
from moetrace.batch.sweep_folder import SweepFolder
from moetrace.batch.trials import part_of
from moetrace.batch.work import Outcome, tasks_of
from moetrace.trace import Trace
from moetrace.trace.schema import PREFILL

# Work that one stage takes: active experts of all its replays, and of each layer of a step as many as it takes to score
# an expert of every layer, which is what a cache that all layers share does. 10 to 60 ns of a core each.
STAGE_WORK = 120_000_000
_SCORES = 64  # experts whose scores cost as much as an active one
# For each set of experts in the GPU's memory, this number of ways to share out the work goes on to the second stage.
_SPLITS = 3
_FINALISTS = 24
_FEWEST = 3


class Tried(NamedTuple):
    """A candidate that was replayed.

    Attributes:
        candidate: The policy.
        slots: Experts that the GPU could hold.
        cell: The replay as a cell of a sweep: its point, its inputs and their hash.
        found: The content of its cell's file: `result`, `costs` and `warnings`.
        miss: By what share of a limit it misses that, the largest; 0.0 if it keeps all.
        rank: Its place among the candidates: which of equal ones comes first.
    """

    candidate: Candidate
    slots: int
    cell: Cell
    found: Mapping[str, Any]
    miss: float
    rank: int

    @property
    def figures(self) -> Mapping[str, Any]:
        """The policy's part of summary.json."""
        return self.found["result"]["policies"][0]

    @property
    def total_s(self) -> float:
        """Time of all steps."""
        return self.figures["total_s"]

    @property
    def dropped(self) -> float:
        """Share of all gates that a relaxed link loses; 0.0 where none can get lost."""
        return self.figures.get("gate_mass_dropped", 0.0)

    @property
    def order(self) -> tuple[float, float, int]:
        """Less is better: what keeps the limits comes first, then less time."""
        return self.miss, self.total_s, self.rank


@dataclass
class Stages:
    """Replays candidates on one machine, and knows what it replayed.

    Attributes:
        trace: The trace, whose file is closed.
        sha256: SHA-256 of its content.
        point: The inputs that all replays have in common: trace, model, system and settings, without a policy.
        resolver: Makes cells of points.
        farm: Where replays run.
        slos: Limits of figures.
        folder: Keeps the replays of the whole trace; None keeps nothing.
        progress: Called with how many candidates were judged.
        work: The work of one stage.
        short_steps: Steps of the first stage, those of the whole trace if that took all.
        tried: How many candidates the first stage had.
        failure: Why the first replay that failed did; None if all went well.
    """

    trace: Trace
    sha256: str
    point: Point
    resolver: Resolver
    farm: Farm
    slos: Sequence[Slo] = ()
    folder: SweepFolder | None = None
    progress: Callable[[int], None] | None = None
    work: int = STAGE_WORK
    short_steps: int = 0
    tried: int = 0
    failure: str | None = None

    def __post_init__(self) -> None:
        self._ranks: dict[str, int] = {}
        rows = np.diff(np.asarray(self.trace.offset, np.int64))
        active = np.minimum(rows * self.trace.top_k, self.trace.num_experts)
        scores = self.trace.layers * self.trace.num_experts / _SCORES
        self._work = np.cumsum((active + scores) * self.trace.layers)
        self._has_output = np.cumsum(np.asarray(self.trace.phase) != PREFILL)

    def best_of(self, candidates: Sequence[Candidate], slots: int | str | None) -> list[Tried]:
        """Return the best of the candidates, replayed over the whole trace, in order; the first of them is the best.

        Where all together are too much, they first go over the beginning of the trace. The beginning does not show
        which content of the GPU's memory is best, as caches fill and learn, but it nearly shows which device should run
        the experts. So for each content of that memory the best splits go on, and every preset. Those go over a longer
        part, if all of it is too much, and the best over all of it. In the end the best one's split is tried with each
        content, and its content with each split.
        """
        self.tried, self._ranks = len(candidates), {one.label: at for at, one in enumerate(candidates)}
        going = list(candidates)
        self.short_steps = steps = self._steps(len(going))
        if steps < self.trace.steps:
            going = self._splits(self.over(going, slots, steps))
            steps = self._steps(len(going))
            if steps < self.trace.steps:
                most = int(self.work / max(float(self._work[-1]), 1.0))
                most = min(max(most, _FEWEST), _FINALISTS)
                going = self._shortest(self.over(going, slots, steps), most)
        ranked = sorted(self.over(going, slots), key=lambda one: one.order)
        for part in ("cache", "split") if ranked else ():
            done, best = {one.candidate.label for one in ranked}, getattr(ranked[0].candidate, part)
            more = [one for one in candidates if getattr(one, part) == best and one.label not in done]
            if more and self.can_take(len(more)):
                ranked = sorted([*ranked, *self.over(more, slots)], key=lambda one: one.order)
        return ranked

    def can_take(self, count: int) -> bool:
        """Whether `count` replays of the whole trace are at most the work of a stage."""
        return float(self._work[-1]) * count <= self.work

    def over(self, candidates: Sequence[Candidate], slots: int | str | None, steps: int | None = None) -> list[Tried]:
        """Replay candidates over the first steps, or all; candidates that cannot be replayed are left out."""
        steps = None if steps == self.trace.steps else steps
        found: list[Tried] = []
        cells = [self.cell(one, slots, steps) for one in candidates]
        missing = {cell.key: cell for cell in cells if cell.key}
        results = self._kept(missing) if steps is None else {}
        results |= self._replay({key: cell for key, cell in missing.items() if key not in results}, steps)
        for candidate, cell in zip(candidates, cells, strict=True):
            if cell.key not in results or cell.inputs is None:
                continue
            result = results[cell.key]
            miss = worst_miss(self.slos, result["result"]["policies"][0])
            rank = self._ranks.get(candidate.label, len(self._ranks) + len(found))
            found.append(Tried(candidate, cell.inputs["slots"], cell, result, miss, rank))
        if self.progress is not None:
            self.progress(len(candidates))
        return found

    def cell(self, candidate: Candidate, slots: int | str | None, steps: int | None = None) -> Cell:
        """Return what a sweep would call a candidate, with its error if it cannot be replayed."""
        changes = {f"policy.{name}": value for name, value in candidate.changes.items()}
        size = {} if slots is None else {"slots": slots}
        labels = self.point.labels | {"policy": candidate.label} | size
        parts = [str(labels[kind]) for kind in ("trace", "system", "policy")]
        name = "/".join([*parts, *(f"slots={number}" for number in size.values())])
        values = self.point.values | {"policy": candidate.preset} | size | changes
        return part_of(self.resolver.resolve(Point(name, values, labels)), steps)

    def _kept(self, cells: Mapping[str, Cell]) -> dict[str, Any]:
        if self.folder is None:
            return {}
        return {key: found for key in cells if (found := self.folder.finished(key)) is not None}

    def _replay(self, cells: Mapping[str, Cell], steps: int | None) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def take(outcomes: list[Outcome]) -> None:
            for outcome in outcomes:
                if outcome.found is None:
                    self.failure = self.failure or outcome.error
                else:
                    found[outcome.key] = outcome.found
                    if steps is None and self.folder is not None:
                        self.folder.keep(cells[outcome.key], outcome.found)

        if tasks := tasks_of(self.trace, self.sha256, cells, self.farm.jobs, steps):
            run_tasks(tasks, self.farm, take)
        return found

    def _steps(self, count: int) -> int:
        """How many of the first steps a stage takes, at least half as often with output rows as those of the trace.

        More than half of the work counts as the whole: the next stage would cost the same again.
        """
        affordable = max(int(np.searchsorted(self._work, self.work / max(count, 1), "right")), 1)
        if affordable >= self.trace.steps or 2 * self._work[affordable - 1] > self._work[-1]:
            return self.trace.steps
        share = self._has_output / np.arange(1, self.trace.steps + 1)
        return affordable + int(np.argmax(2 * share[affordable - 1 :] >= share[-1]))

    def _splits(self, tried: Sequence[Tried]) -> list[Candidate]:
        """The best splits for each content of the GPU's memory, by time and by the limits, and all presets."""
        groups: dict[tuple, list[Tried]] = {}
        for one in tried:
            groups.setdefault(one.candidate.cache, []).append(one)
        going = {one.rank for one in tried if not one.candidate.changes}
        for members in groups.values():
            going |= _both_orders(members, _SPLITS)
        return [one.candidate for one in tried if one.rank in going]

    def _shortest(self, tried: Sequence[Tried], most: int) -> list[Candidate]:
        going = _both_orders(tried, most)
        return [one.candidate for one in tried if one.rank in going]


def _both_orders(tried: Sequence[Tried], most: int) -> set[int]:
    """Ranks of those that keep the limits, or nearly do, and of the fastest, as a part may not show the limits."""
    fastest = sorted(tried, key=lambda one: (one.total_s, one.rank))[:most]
    nearest = sorted(tried, key=lambda one: one.order)[:most]
    return {one.rank for one in (*fastest, *nearest)}
