"""`advise`: which policy a machine should run for a trace, what that wins, and whether memory would win more."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from moetrace.batch.advice import WORTH, Advice, Size, distinct
from moetrace.batch.candidates import Candidate, candidates, oracles
from moetrace.batch.cell import Cell, Resolver, Traces
from moetrace.batch.executors import Farm, lasting
from moetrace.batch.grid import Grid, Point
from moetrace.batch.slo import parse_slos
from moetrace.batch.stages import STAGE_WORK, Stages, Tried
from moetrace.batch.sweep import Sweep, check_jobs, farm_of
from moetrace.batch.sweep_folder import SweepFolder
from moetrace.batch.work import forget
from moetrace.engine.setup import Setup, check_setup, weight_bytes_of
from moetrace.results.figure_text import beyond
from moetrace.results.optional_figures import may_have, need_of
from moetrace.results.record import ADVICE_FILE, OF_A_TABLE, POLICY_FILE, choices_of
from moetrace.results.resolve import by_spec, model_of
from moetrace.spec import Model, System, default_policies, gpu_slots, load_model, load_system
from moetrace.spec.choices import find
from moetrace.spec.errors import MoetraceError, UsageError, counted
from moetrace.spec.forks import refuse_if_forked
from moetrace.spec.ordinary_file import named_folder
from moetrace.spec.toml_text import toml
from moetrace.trace import Trace

# The best few of the policies are tried with other sizes of the GPU's memory: shares of what it has room for.
_SMALLER, _LARGER = (0.5, 0.75), (1.25, 1.5, 2.0)
_FROM_NOTHING = (0.125, 0.25, 0.5)  # of all experts, where it has room for none
_BEST_FEW = 3


def advise(
    trace: Trace | str | os.PathLike[str],
    *,
    system: str | Path | System,
    model: str | Path | Model | None = None,
    slo: str | Sequence[str] = (),
    budget_usd_hour: float | None = None,
    slots: int | str | None = None,
    overrides: Mapping[str, object] | None = None,
    folder: str | os.PathLike[str] | None = None,
    jobs: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Advice:
    """Find the best real policy for a trace on a machine, and say what would help most.

    Every policy that the choices' records allow on the machine is tried: over the whole trace, or over its beginning
    and the best of them over the whole. docs/advise.md describes it. The answer does not depend on `jobs`.

    Args:
        trace: A trace of a file, or the path of one.
        system: A preset's name, a TOML file or a System.
        model: A preset's name, a TOML, config.json or GGUF file, a model's folder or a Model. By default the preset
            that the trace names.
        slo: Limits that the best must keep, as `"tpot_s.p99<=50ms"`: one, or several.
        budget_usd_hour: The most that the machine may cost an hour, in USD. It is compared with the sum of its
            `[price]`.
        slots: Experts that the GPU can hold, as `replay` takes them. By default as many as its memory has room for.
        overrides: New values of single fields of the model and the system, by path: `{"system.ndp.units": 4}`.
        folder: Keeps the replays over the whole trace, and what the advice says. By default nothing is kept.
        jobs: Processes; 1 is this one.
        progress: A function that gets the number of policies judged, on a part of the trace, since its last call.

    Returns:
        The advice. `Advice.verdict` is a sentence, `Advice.best` the policy, and `Advice.command` replays it.

    Raises:
        UsageError: A name, value or limit is wrong, or the machine costs more than the budget.
        MoetraceError: The trace cannot be read, or the folder not be written.

    Examples:
        >>> import moetrace as mt
        >>> advice = mt.advise("traces/qwen3-30b-a3b-phone.h5", system="phone-ufs")
        >>> advice.kind
        'buy memory'
    """
    refuse_if_forked()
    check_jobs(jobs)
    question = Question(trace, system, model, slo, slots, overrides or {}, budget_usd_hour)
    with farm_of(jobs, None) as (farm, _):
        return question.answer(farm, None if folder is None else SweepFolder(named_folder(folder)), progress)


class Question:
    """A checked question: trace, machine, limits and budget."""

    def __init__(
        self,
        trace: Trace | str | os.PathLike[str],
        system: str | Path | System,
        model: str | Path | Model | None,
        slo: str | Iterable[str],
        slots: int | str | None,
        overrides: Mapping[str, object],
        budget_usd_hour: float | None,
    ) -> None:
        """Read the trace's hashes and the specs. Raises as `advise` does, before anything is replayed."""
        self.slos = parse_slos(slo)
        changes = by_spec(overrides)
        if changes["policy"]:
            raise UsageError("An advice chooses the policy: change fields of the model and the system only.")
        self.system = load_system(system, changes["system"])
        if self.system.cluster is not None:
            raise UsageError(
                f"System {self.system.name} is a cluster: ask moetrace advise rebalance about plans, and compare "
                "policies with moetrace replay or moetrace sweep."
            )
        for limit in self.slos:
            if (table := OF_A_TABLE.get(limit.metric)) and getattr(self.system, table) is None:
                raise UsageError(
                    f"The SLO {limit.text!r} needs [{table}] in system {self.system.name}: add it or drop the SLO."
                )
            need = need_of(limit.metric)
            if need and not any(may_have(limit.metric, self.system, one.policy) for one in self.candidates):
                todo = f"{need.add} or drop the SLO" if need.what.startswith("system") else "drop the SLO"
                raise UsageError(f"The SLO {limit.text!r}: no candidate has it, as no {need.what}: {todo}.")
        self.usd_hour, self.notes = _price(self.system, budget_usd_hour)
        path = trace.path if isinstance(trace, Trace) else trace
        if path is None:
            raise UsageError("An advice is about the trace of a file, and this one is in memory: write it first.")
        self._traces = Traces()
        self.trace, self._sha256 = self._traces.get(str(Path(path).absolute()))
        self.model = load_model(model_of(self.trace) if model is None else model, changes["model"])
        self.slots = slots
        self._room, _ = check_setup(self.trace, Setup(model=self.model, system=self.system, policies=[], slots=slots))
        self._fitting = gpu_slots(self.model, self.system, weight_bytes_of(self.trace, self.model))
        if self._room < self._fitting:
            unused = counted(self._fitting - self._room, "more expert")
            self.notes.append(f"the GPU has room for {unused} than slots = {slots}: to use it costs no new memory.")
        values: dict[str, Any] = {"trace": str(Path(path).absolute())} | ({} if model is None else {"model": model})
        labels: dict[str, Any] = {"trace": Path(path).name.removesuffix(".h5")}
        labels |= {"model": self.model.name, "system": self.system.name}
        self._point = Point("", values | {"system": system, **overrides}, labels)

    @cached_property
    def candidates(self) -> list[Candidate]:
        """The policies that are tried."""
        return candidates(self.system)

    def answer(
        self,
        farm: Farm,
        folder: SweepFolder | None,
        progress: Callable[[int], None] | None = None,
        work: int = STAGE_WORK,
    ) -> Advice:
        """Replay the candidates, and name the best; `work` limits the work of one stage."""
        grid = Grid("the advice", {}, [], False, "gpu_memory_bytes")
        resolver = Resolver(self._traces, grid, False)
        try:
            with lasting(farm) as kept:
                facts = self.trace, self._sha256, self._point, resolver, kept
                advice = self._advice(Stages(*facts, self.slos, folder, progress, work))
        finally:
            forget()
        if folder is not None:
            _publish(folder, advice, grid)
        return advice

    def _advice(self, stages: Stages) -> Advice:
        pool = self.candidates
        ranked = stages.best_of(pool, self.slots)
        if not ranked:
            raise MoetraceError(f"No policy can be replayed on {self.system.name}: {_why(stages, pool, self.slots)}")
        usual = [one for one in pool if not one.changes and one.preset in default_policies(self.system)]
        there = {one.candidate.label: one for one in ranked}
        defaults = [there.get(one.label) or (stages.over([one], self.slots) or [None])[0] for one in usual]
        default = min((one for one in defaults if one), key=lambda one: one.order, default=None)
        sizes = self._sizes(stages, distinct(ranked)) if self.system.link is not None else []
        own = best = ranked[0]
        # A smaller size may be faster, because a prefetch can cost more than it saves.
        faster = [size for size in sizes if size.slots < own.slots and size.order < own.order]
        if faster:
            best = min(faster, key=lambda size: size.order)
            ranked = [best, *ranked]
            sizes = sorted([own, *(size for size in sizes if size is not best)], key=lambda size: size.slots)
        compared = [_against(best, size) for size in sizes]
        seers = oracles(best.candidate, self.system)
        if not stages.can_take(len(seers)):  # one of each kind
            kinds = {(one.policy.residency, one.policy.prefetch): one for one in reversed(seers)}
            seers = [one for one in seers if one in kinds.values()]
        bounds = stages.over(seers, self.slots)
        return Advice(
            ranked=ranked,
            default=default,
            oracles=sorted(bounds, key=lambda one: (one.total_s, one.rank)),
            sizes=compared,
            all_experts=self.model.all_experts,
            fitting=self._fitting,
            has_link=self.system.link is not None,
            slos=self.slos,
            tried=stages.tried,
            short_steps=stages.short_steps,
            steps=self.trace.steps,
            usd_hour=self.usd_hour,
            notes=[*self.notes, *best.found["warnings"], *_free_starts(best, compared)],
        )

    def _sizes(self, stages: Stages, ranked: Sequence[Tried]) -> list[Tried]:
        """The best policy with each other size of the GPU's memory, by size."""
        everything, room = self.model.all_experts, self._room
        wanted = {round(share * everything) for share in _FROM_NOTHING} if room == 0 else set()
        wanted |= {round(share * room) for share in (*_SMALLER, *_LARGER)} | {everything}
        wanted = {slots for slots in wanted if 0 < slots <= everything and slots != room}
        count = _BEST_FEW if stages.can_take(_BEST_FEW * len(wanted)) else 1
        few = self._for_sizes(stages, ranked, min((slots for slots in wanted if slots > room), default=None))[:count]
        resident = [one for one in self.candidates if one.preset == "resident" and not one.changes]
        found = []
        for slots in sorted(wanted):
            also = [one for one in resident if slots == everything and one not in few]
            tried = stages.over([*few, *also], slots)
            found += sorted(tried, key=lambda one: one.order)[:1]
        return found

    def _for_sizes(self, stages: Stages, ranked: Sequence[Tried], next_slots: int | None) -> list[Candidate]:
        """The policies that are tried with other sizes, the best first.

        A policy that keeps nothing on the GPU says nothing of what memory wins. Then they are those that do best with
        the next size, of the presets and of what shares out the work as it does.
        """
        best = ranked[0].candidate
        keeps = best.policy.residency != "none" and self._room > 0
        if keeps or next_slots is None:
            return [one.candidate for one in ranked]
        pool = [one for one in self.candidates if not one.changes or one.split == best.split]
        if not stages.can_take(len(pool)):
            pool = [one for one in pool if not one.changes]
        return [one.candidate for one in sorted(stages.over(pool, next_slots), key=lambda one: one.order)]


def _against(best: Tried, size: Tried) -> Size:
    """The gain of a memory size over the best policy at the present size."""
    more = size.found["costs"]["gpu_memory_bytes"] - best.found["costs"]["gpu_memory_bytes"]
    return Size(size, more, beyond(best.total_s, size.total_s) / best.total_s)


def _free_starts(best: Tried, sizes: Sequence[Size]) -> list[str]:
    """Say where a size wins because its policy starts with experts on the GPU, and the present best does not."""
    starts = {size.best.slots: find("residency", size.best.candidate.policy.residency).starts_full for size in sizes}
    free = [size for size in sizes if size.wins > WORTH and starts[size.best.slots]]
    if not free or find("residency", best.candidate.policy.residency).starts_full:
        return []
    return [
        f"with {free[-1].best.slots:,} slots {free[-1].best.candidate.label} holds its experts from the start, while "
        f"{best.candidate.label} first has to fetch each once: of a short trace that may be most of what memory wins."
    ]


def _price(system: System, budget: float | None) -> tuple[float | None, list[str]]:
    """The machine's price by the hour, and a note where a budget has nothing to be compared with."""
    if budget is not None and not 0 <= budget < float("inf"):
        raise UsageError(f"The budget is {budget} USD an hour, but must be a number from 0.")
    usd_hour = system.usd_hour
    if usd_hour is None:
        note = f"system {system.name} has no price by the hour (usd_hour under [price]), so the budget decides nothing."
        return None, [note] if budget is not None else []
    if budget is not None and usd_hour > budget:
        raise UsageError(
            f"System {system.name} costs {usd_hour:g} USD an hour, and the budget is {budget:g}: name another system, "
            "or raise --budget-usd-hour."
        )
    return usd_hour, []


def _why(stages: Stages, pool: Sequence[Candidate], slots: int | str | None) -> str:
    errors = [stages.failure, *(stages.cell(one, slots, None).error for one in pool[:1])]
    return next((error for error in errors if error), "none goes with it.")


def _publish(folder: SweepFolder, advice: Advice, grid: Grid) -> None:
    """Write the replays of the whole trace as a sweep, which reports and gates take, and the advice."""
    tried = [*advice.ranked, *([advice.default] if advice.default else []), *advice.oracles]
    tried += [size.best for size in advice.sizes]
    listed: dict[str, Cell] = {one.cell.name: one.cell for one in tried}
    found = {one.cell.key: one.found for one in tried if one.cell.key}
    sweep = Sweep(grid, list(listed.values()), found, len(found), 0, 0, grid.pareto)
    policy = advice.best.candidate.policy
    text = toml({"name": policy.name} | choices_of(policy))
    folder.publish(sweep.to_dict(), sweep.cells, {ADVICE_FILE: advice.to_dict()}, texts={POLICY_FILE: text})
