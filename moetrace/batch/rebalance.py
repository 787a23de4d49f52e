"""`advise rebalance`: how many redundant experts a cluster should hold, and how often it should plan again."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moetrace.batch.cell import Cell, Resolver, Traces
from moetrace.batch.executors import Farm, run_tasks
from moetrace.batch.grid import Grid, Point
from moetrace.batch.grid_labels import labels_of
from moetrace.batch.rebalance_advice import Planned, RebalanceAdvice
from moetrace.batch.sweep import Sweep, check_jobs, farm_of
from moetrace.batch.sweep_folder import SweepFolder
from moetrace.batch.work import Outcome, forget, tasks_of
from moetrace.engine.cluster.cluster_lane import room_of
from moetrace.engine.cluster.fabric import fabric_of
from moetrace.engine.cluster.placed import Placer
from moetrace.engine.setup import Setup, check_setup, weight_bytes_of
from moetrace.results.record import POLICY_FILE, REBALANCE_FILE, choices_of
from moetrace.results.resolve import by_spec, model_of
from moetrace.spec import Model, System, check_policy, load_model, load_policy, load_system
from moetrace.spec.cluster_policy import PLANNED, WINDOW
from moetrace.spec.errors import MoetraceError, UsageError, counted, printable
from moetrace.spec.forks import refuse_if_forked
from moetrace.spec.ordinary_file import named_folder
from moetrace.spec.toml_text import toml
from moetrace.trace import Trace

# By default: multiples of the GPUs beyond the fewest redundant experts, and shares of the steps behind the first plan.
_MORE_REDUNDANT = (0, 1, 2, 4)
_PLANS = (4, 16, 64)
_MOST_CELLS = 10_000


def advise_rebalance(
    trace: Trace | str | os.PathLike[str],
    *,
    system: str | Path | System,
    model: str | Path | Model | None = None,
    policy: str | Path = "eplb",
    redundant: int | Sequence[int] | None = None,
    interval: int | Sequence[int] | None = None,
    migrate: str | None = None,
    overrides: Mapping[str, object] | None = None,
    folder: str | os.PathLike[str] | None = None,
    jobs: int = 1,
    progress: Callable[[int], None] | None = None,
) -> RebalanceAdvice:
    """Replay a trace on a cluster for each number of redundant experts and each interval, and say which is best.

    docs/advise.md describes it. Every row is a replay of its own, to the last digit; they share passes over the trace.

    Args:
        trace: A trace of a file, or the path of one.
        system: A preset's name, a TOML file or a System with `[cluster]`.
        model: A preset's name, a TOML, config.json or GGUF file, a model's folder or a Model. By default the preset
            that the trace names.
        policy: A preset's name or a TOML file: schedule and all else that is the same in every row. A placement that
            makes no plans is replaced by `eplb`.
        redundant: Redundant experts of a layer, one number or several. By default up to four that the GPUs share
            equally and have room for.
        interval: Steps from one plan to the next, one number or several; 0 plans once. By default 0 and up to three
            that fit the number of steps.
        migrate: `"pause"` or `"async"`. By default the policy's.
        overrides: New values of other fields, by path: `{"policy.window": 64}`.
        folder: Keeps the replays as a sweep does, and what the advice says. By default nothing is kept.
        jobs: Processes; 1 is this one. Results do not depend on it.
        progress: A function that gets the number of replays done since its last call.

    Returns:
        The advice. `RebalanceAdvice.verdict` is a sentence, `frame` the table, and `command` replays the best row.

    Raises:
        UsageError: A name or value is wrong, the system is no cluster, a number of redundant experts is impossible, or
            the trace ends before the first plan.
        MoetraceError: The trace cannot be read, or the folder not be written.

    Examples:
        >>> import moetrace as mt
        >>> advice = mt.advise_rebalance("traces/mixtral-8x7b-b16.h5", system="h100-x8", interval=[0, 32])
        >>> advice.kind
        'nothing to win'
    """
    refuse_if_forked()
    check_jobs(jobs)
    question = RebalanceQuestion(trace, system, model, policy, redundant, interval, migrate, overrides or {})
    with farm_of(jobs, None) as (farm, _):
        return question.answer(farm, None if folder is None else SweepFolder(named_folder(folder)), progress)


class RebalanceQuestion:
    """A checked question: the trace, the cluster, the policy, and the rows of the table."""

    def __init__(
        self,
        trace: Trace | str | os.PathLike[str],
        system: str | Path | System,
        model: str | Path | Model | None,
        policy: str | Path,
        redundant: int | Sequence[int] | None,
        interval: int | Sequence[int] | None,
        migrate: str | None,
        overrides: Mapping[str, object],
    ) -> None:
        """Read the trace's hashes and the specs. Raises as `advise_rebalance` does, before anything is replayed."""
        changes = by_spec(overrides)
        for field in ("redundant", "interval", "migrate"):
            if field in changes["policy"]:
                raise UsageError(
                    f"policy.{field} is not a field to set here, but asked about: give {field} (--{field})."
                )
        self.system = load_system(system, changes["system"])
        if self.system.cluster is None:
            raise UsageError(
                f"System {self.system.name} has one GPU, and only clusters rebalance: use a system with [cluster] (as "
                "h100-x8), or moetrace advise."
            )
        base = load_policy(policy, code=False)
        check_policy(base, self.system)
        own = dict(changes["policy"]) | ({} if migrate is None else {"migrate": migrate})
        if own.get("placement", PLANNED[0]) not in PLANNED:
            raise UsageError(
                f"Placement {printable(str(own['placement']))} makes no plans: use one of {', '.join(PLANNED)}, or "
                "leave it out."
            )
        if base.placement not in PLANNED:
            own = {"placement": "eplb"} | own
        self.policy = load_policy(policy, own)
        path = trace.path if isinstance(trace, Trace) else trace
        if path is None:
            raise UsageError("An advice is about the trace of a file, and this one is in memory: write it first.")
        self._traces = Traces()
        self.trace, self._sha256 = self._traces.get(str(Path(path).absolute()))
        self.model = load_model(model_of(self.trace) if model is None else model, changes["model"])
        check_setup(self.trace, Setup(model=self.model, system=self.system, policies=[self.policy]))
        fabric_of(self.model, self.system, self.policy, weight_bytes_of(self.trace, self.model))
        self.window = self.policy.window or WINDOW
        if self.window >= self.trace.steps:
            raise UsageError(
                f"{self.trace.shown} has {counted(self.trace.steps, 'step')}, and the first plan is made from "
                f"{counted(self.window, 'step')}: use a longer trace, or set policy.window."
            )
        self.redundant: list[int | None] = [*self._redundant(redundant)]
        self.interval = self._intervals(interval)
        if len(self.redundant) * len(self.interval) > _MOST_CELLS:
            raise UsageError(f"The table has more than {_MOST_CELLS:,} rows: give fewer of redundant or interval.")
        values: dict[str, Any] = {"trace": str(Path(path).absolute()), "system": system, "policy": policy, **overrides}
        values |= ({} if model is None else {"model": model}) | {f"policy.{field}": own[field] for field in own}
        self._values = {field: str(v) if isinstance(v, Path) else v for field, v in values.items()}
        (name,) = labels_of("policy", [str(policy)])
        self._labels: dict[str, Any] = {"trace": Path(path).name.removesuffix(".h5"), "model": self.model.name}
        self._labels |= {"system": self.system.name, "policy": name}

    def answer(
        self, farm: Farm, folder: SweepFolder | None, progress: Callable[[int], None] | None = None
    ) -> RebalanceAdvice:
        """Replay every row, and say which is best."""
        grid = self._grid
        resolver = Resolver(self._traces, grid, False)
        rows = [(number, often, resolver.resolve(point)) for number, often, point in self._points()]
        for *_, cell in rows:
            if cell.error is not None:
                raise MoetraceError(cell.error)
        try:
            found = self._replay({str(cell.key): cell for *_, cell in rows}, farm, folder, progress)
        finally:
            forget()
        planned = [Planned(number, often, cell, found[str(cell.key)]) for number, often, cell in rows]
        if not any(row.fits for row in planned):
            raise UsageError(
                f"No GPU of system {self.system.name} has room for its experts in any row: use more GPUs, fewer "
                "redundant experts or fewer bits a weight."
            )
        # The row without plans is one on purpose, and has no other note than the rows with plans.
        notes = list(dict.fromkeys(note for row in planned[1:] for note in row.found["warnings"]))
        facts = self.window, self.trace.steps, self.policy.name, self.policy.migrate or "pause", notes
        advice = RebalanceAdvice(planned, *facts)
        if folder is not None:
            cells = [cell for *_, cell in rows]
            sweep = Sweep(grid, cells, found, len(found), 0, 0, grid.pareto)
            best = advice.best.cell.policy
            text = toml({"name": best.name} | choices_of(best))
            documents = {REBALANCE_FILE: advice.to_dict()}
            folder.publish(sweep.to_dict(), sweep.cells, documents, texts={POLICY_FILE: text})
        return advice

    @property
    def rows(self) -> int:
        """How many replays there are."""
        return 1 + len(self.redundant) * len(self.interval)

    @property
    def _grid(self) -> Grid:
        """The table as a sweep's; rows that do not fit are replayed, and marked."""
        numbers = [] if self.redundant == [None] else self.redundant
        axes = {"policy.redundant": numbers, "policy.interval": self.interval}
        return Grid(
            "the advice", {axis: values for axis, values in axes.items() if values}, [], True, "gpu_memory_bytes"
        )

    def _points(self) -> Iterator[tuple[int | None, int | None, Point]]:
        # A window as long as the trace: no plan is ever made, and all else is the same.
        yield self.redundant[0], None, self._point(self.redundant[0], 0, {"policy.window": self.trace.steps})
        for number in self.redundant:
            for often in self.interval:
                yield number, often, self._point(number, often, {})

    def _point(self, redundant: int | None, interval: int, more: dict[str, Any]) -> Point:
        own = {} if redundant is None else {"policy.redundant": redundant}
        own |= {"policy.interval": interval} | more
        labels = self._labels | own
        name = "/".join(str(self._labels[kind]) for kind in ("trace", "system", "policy"))
        return Point(
            f"{name}/" + "/".join(f"{field}={value}" for field, value in own.items()), self._values | own, labels
        )

    def _replay(
        self,
        cells: Mapping[str, Cell],
        farm: Farm,
        folder: SweepFolder | None,
        progress: Callable[[int], None] | None,
    ) -> dict[str, Any]:
        """Return what each cell holds, by its key: kept in the folder, or replayed now."""
        kept = {} if folder is None else {key: folder.finished(key) for key in cells}
        found: dict[str, Any] = {key: one for key, one in kept.items() if one is not None}

        def take(outcomes: list[Outcome]) -> None:
            for outcome in outcomes:
                if outcome.found is None:
                    raise MoetraceError(outcome.error or f"{cells[outcome.key].name} was lost.")
                found[outcome.key] = outcome.found
                if folder is not None:
                    folder.keep(cells[outcome.key], outcome.found)
            if progress is not None:
                progress(len(outcomes))

        missing = {key: cell for key, cell in cells.items() if key not in found}
        if tasks := tasks_of(self.trace, self._sha256, missing, farm.jobs):
            run_tasks(tasks, farm, take)
        return found

    def _redundant(self, asked: int | Sequence[int] | None) -> Sequence[int | None]:
        """The numbers of redundant experts, ascending; those that are asked for are possible, or refused."""
        if self.policy.placement == "ep-lpt":
            if asked is not None:
                raise UsageError(
                    f"Policy {self.policy.name} has placement ep-lpt, which has one copy of each expert: leave out "
                    "redundant, or use placement eplb."
                )
            return [None]
        if asked is not None:
            numbers = _whole_numbers("redundant", asked)
            for number in numbers:
                self._placer(number)
            return numbers
        assert self.system.cluster is not None
        gpus, own = self.system.cluster.expert_gpus, self._experts
        fewest = -int(own[0]) % gpus
        if any((own + fewest) % gpus):  # no number suits all layers
            return [None]
        numbers = [fewest + more * gpus for more in _MORE_REDUNDANT]
        return numbers[:1] + [number for number in numbers[1:] if number <= own.max() and self._has_room(number)]

    def _intervals(self, asked: int | Sequence[int] | None) -> list[int]:
        """The intervals: 0, then from long to short."""
        if asked is not None:
            numbers = _whole_numbers("interval", asked)
        else:
            behind = self.trace.steps - self.window
            numbers = sorted({0, *(_round(behind // plans) for plans in _PLANS if behind >= plans)})
        return [number for number in numbers if number == 0] + [number for number in numbers[::-1] if number]

    @property
    def _experts(self) -> np.ndarray:
        """Experts of each layer, int64 [layers]."""
        return np.asarray(self.model.layer_experts, np.int64)

    def _placer(self, redundant: int) -> Placer:
        assert self.system.cluster is not None
        policy = load_policy(self.policy, {"redundant": redundant})
        layers = np.asarray(self.trace.layer_index, np.int64)
        return Placer(policy, self.system.cluster.expert_gpus, self._experts, layers, self.model)

    def _has_room(self, redundant: int) -> bool:
        slots = self._placer(redundant).slots
        have, _ = room_of(Setup(model=self.model, system=self.system, policies=[]))
        return float((slots * weight_bytes_of(self.trace, self.model).max(axis=1)).sum()) <= have


def _whole_numbers(name: str, asked: int | Sequence[int]) -> list[int]:
    """The numbers asked for, ascending. Raises UsageError for a value that is no such number."""
    numbers = [asked] if isinstance(asked, int) else [*asked]
    if not numbers:
        raise UsageError(f"{name} is an empty list: give it a number, or leave it out.")
    for number in numbers:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**31:
            raise UsageError(f"{name} has {number!r}, but must be whole numbers from 0.")
    return sorted(set(numbers))


def _round(number: int) -> int:
    """The largest of 1, 2, 5, 10, 20 ... up to the value."""
    digits = 10 ** (len(str(number)) - 1)
    return next(step * digits for step in (5, 2, 1) if step * digits <= number)
