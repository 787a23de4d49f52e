"""Trials of a search, carried from part to part of a trace."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moetrace.batch.cell import Cell, Resolver, Traces, hash_of
from moetrace.batch.executors import Farm, run_tasks
from moetrace.batch.metrics import value_of
from moetrace.batch.search_space import SearchChoices
from moetrace.batch.slo import worst_miss
from moetrace.batch.sweep_folder import SweepFolder
from moetrace.batch.work import Outcome, tasks_of
from moetrace.results.optional_figures import need_of
from moetrace.results.record import OF_A_TABLE, is_absent


@dataclass
class Trial:
    """One proposal: how far through the trace it came, and what the objective was there.

    ``part`` counts from 1; ``state`` is `complete` (of the whole trace), `stopped` or `failed`. ``miss`` is the share
    by which it misses a limit there, the largest.
    """

    number: int
    cell: Cell
    part: int = 0
    value: float | None = None
    state: str = "failed"
    error: str | None = None
    miss: float = 0.0

    def order(self, maximize: bool) -> tuple[float, float]:
        """Less is better: trials that keep the limits come first, then those with the better value."""
        return self.miss, (-1 if maximize else 1) * (self.value or 0.0)


@dataclass
class Halver:
    """Carries trials from part to part."""

    choices: SearchChoices
    farm: Farm
    folder: SweepFolder | None
    progress: Callable[[int], None] | None
    code: bool = True
    traces: Traces = field(default_factory=Traces)
    found: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    computed: int = 0
    reused: int = 0

    def __post_init__(self) -> None:
        self.values: list[list[tuple[float, float]]] = [
            [] for _ in range(self.choices.halving.parts)
        ]  # of each part, less is better
        self.trace, self.sha256 = self.traces.get(self.choices.plain().values["trace"])
        self.resolver = Resolver(self.traces, self.choices.space, self.code)

    def trial(self, number: int, point: Any) -> Trial:
        """A trial that has yet to begin; one that cannot be replayed has its error."""
        cell = self.resolver.resolve(point)
        return Trial(number, cell, error=cell.error)

    def replay(self, trials: Sequence[Trial], part: int) -> None:
        """Replay trials over a part of the trace, all in as few passes as there are jobs, and note their values."""
        steps: int | None = self.choices.halving.steps(part, self.trace.steps)
        steps = None if steps == self.trace.steps else steps
        going = [trial for trial in trials if trial.error is None]
        cells = {_key(trial.cell, steps): trial.cell for trial in going}
        for key in cells.keys() - self.found.keys() - self.errors.keys():
            if self.folder is not None and (finished := self.folder.finished(key)) is not None:
                self.found[key] = finished
                self.reused += 1
        missing = {key: cell for key, cell in cells.items() if key not in self.found and key not in self.errors}
        self._run(missing, steps)
        for trial in going:
            self._note(trial, part, _key(trial.cell, steps))
        if self.progress is not None:
            self.progress(len(trials))

    def _run(self, missing: Mapping[str, Cell], steps: int | None) -> None:
        def take(outcomes: list[Outcome]) -> None:
            for outcome in outcomes:
                if outcome.found is None:
                    self.errors[outcome.key] = outcome.error or "it was lost."
                    continue
                self.found[outcome.key] = outcome.found
                self.computed += 1
                if self.folder is not None:
                    self.folder.keep(part_of(missing[outcome.key], steps), outcome.found)

        tasks = tasks_of(self.trace, self.sha256, missing, self.farm.jobs, steps)
        if tasks:
            run_tasks(tasks, self.farm, take)

    def _note(self, trial: Trial, part: int, key: str) -> None:
        trial.part = part + 1
        if key in self.errors:
            trial.error = self.errors[key]
            return
        objective, figures = self.choices.halving.objective, self.found[key]["result"]["policies"][0]
        trial.value = value_of(figures, objective, trial.cell.name)
        trial.miss = worst_miss(self.choices.space.slos, figures)
        if math.isinf(trial.miss):
            trial.error = (
                f"what a limit is of is undefined in the first {part + 1} of {self.choices.halving.parts} parts."
            )
            for slo in self.choices.space.slos:
                if (need := need_of(slo.metric)) and is_absent(slo.metric, figures):
                    trial.error = f"{slo.metric} is undefined, as no {need.what}: {need.add}."
        if trial.value is None:
            trial.error = f"{objective} is undefined in the first {part + 1} of {self.choices.halving.parts} parts."
            if table := OF_A_TABLE.get(objective):
                rows = ", and the trace decode rows" if "token" in objective else ""
                trial.error = f"{objective} is undefined: the system needs [{table}]{rows}."
            elif (need := need_of(objective)) and is_absent(objective, figures):
                trial.error = f"{objective} is undefined, as no {need.what}: {need.add}."


def part_of(cell: Cell, steps: int | None) -> Cell:
    """Return the cell of only the first steps, with a name and a file of its own."""
    if steps is None or cell.inputs is None:
        return cell
    inputs = cell.inputs | {"steps": steps}
    return Cell(cell.point, cell.setup, inputs, hash_of(inputs))


def _key(cell: Cell, steps: int | None) -> str:
    key = part_of(cell, steps).key
    assert key is not None
    return key
