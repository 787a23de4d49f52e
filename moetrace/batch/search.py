"""`search`: the best policy of a space, by successive halving on growing parts of a trace; Optuna proposes."""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import polars as pl

from moetrace.batch.executors import Farm, lasting
from moetrace.batch.grid import Grid, load_space
from moetrace.batch.search_space import Halving, SearchChoices, check_choices
from moetrace.batch.slo import parse_slos
from moetrace.batch.sweep import Sweep, check_jobs, farm_of
from moetrace.batch.sweep_folder import SweepFolder
from moetrace.batch.trials import Halver, Trial
from moetrace.batch.work import forget
from moetrace.results.record import SEARCH_FILE, SEARCH_SCHEMA, TRIALS_FILE
from moetrace.spec.errors import MoetraceError
from moetrace.spec.forks import refuse_if_forked
from moetrace.spec.ordinary_file import named_folder

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import Trial as Proposal

# Proposals for each trial of a round. A sampler that is sure of its ground repeats itself: the second half are random.
_PROPOSALS = 40
_MISS = "miss"  # the constraint that a sampler is given: by how much a trial misses the limits


_Pair = tuple["Proposal", Trial]


@dataclass(repr=False)
class Search:
    """A finished search.

    Attributes:
        choices: The axes to choose from, and how they were searched.
        trials: All different proposals, in order; fewer than asked for if there were no more.
        reference: The first of each axis, replayed over the whole trace; its `value` is what to beat.
        found: The content of each replay, by hash: `result`, `costs`, `warnings`.
        computed: How many replays of the trace or a part of it were made now.
        reused: How many were found in the folder.
    """

    choices: SearchChoices
    trials: list[Trial]
    reference: Trial
    found: dict[str, Mapping[str, Any]]
    computed: int = 0
    reused: int = 0

    def __repr__(self) -> str:
        return f"<Search of {len(self.trials)} trials: .best is a trial, .frame and .sweep.cells are frames>"

    @property
    def best(self) -> Trial | None:
        """The trial of the best objective over the whole trace that keeps the limits; the first of equal ones.

        The reference is one of them. If none keeps the limits, it is the one that misses them least.
        """
        complete = [trial for trial in [self.reference, *self.trials] if trial.state == "complete"]
        more = self.choices.halving.maximize
        return min(complete, key=lambda trial: (trial.order(more), trial.number), default=None)

    @cached_property
    def frame(self) -> pl.DataFrame:
        """One row a trial: its number, state, part, value, cell and error, and what it chose."""
        rows = [
            {"trial": trial.number, "state": trial.state, "part": trial.part, "value": trial.value}
            | {"name": trial.cell.name, "cell": trial.cell.key}
            | {name: str(value) if name == "policy" else value for name, value in self._chosen(trial).items()}
            | ({"slo_miss": trial.miss if trial.value is not None else None} if self.choices.space.slos else {})
            | {"error": trial.error}
            for trial in [self.reference, *self.trials]
        ]
        names = dict.fromkeys(name for row in rows for name in row if name != "error")
        columns = {name: pl.Series([row.get(name) for row in rows], strict=False) for name in names}
        return pl.DataFrame(columns | {"error": pl.Series([row["error"] for row in rows], dtype=pl.String)})

    @property
    def sweep(self) -> Sweep:
        """The replays of the whole trace, as a sweep: reports and gates take its folder."""
        listed = {
            trial.cell.name: trial.cell
            for trial in [self.reference, *self.trials]
            if trial.state == "complete" and trial.cell.key in self.found
        }
        space = self.choices.space
        grid = Grid(space.where, space.listed, [], space.ignore_capacity, space.pareto)
        counts = self.computed, self.reused, 0
        return Sweep(grid, list(listed.values()), self.found, *counts, space.pareto, space.slos)

    def to_dict(self) -> dict[str, Any]:
        """Return what `search.json` holds."""
        halving, best = self.choices.halving, self.best
        states = Counter(trial.state for trial in self.trials)
        return {
            "schema": SEARCH_SCHEMA,
            "objective": halving.objective,
            "maximize": halving.maximize,
            "seed": halving.seed,
            "sampler": halving.sampler,
            "parts": halving.parts,
            "keep": halving.keep,
            "slo": [slo.text for slo in self.choices.space.slos],
            "reference": {"name": self.reference.cell.name, "value": self.reference.value},
            "best": best and {"trial": best.number, "name": best.cell.name, "value": best.value} | self._chosen(best),
            "states": {state: states[state] for state in ("complete", "stopped", "failed")},
        }

    def _chosen(self, trial: Trial) -> dict[str, Any]:
        labels = trial.cell.point.labels
        return {name: labels[name] for name in labels if name in self.choices.ranges or name in self._lists}

    @cached_property
    def _lists(self) -> set[str]:
        return {"policy", *(field for axis in self.choices.space.axes if len(axis.values) > 1 for field in axis.fields)}


def search(
    source: str | os.PathLike[str] | Mapping[str, Any],
    folder: str | os.PathLike[str] | None = None,
    *,
    jobs: int = 1,
    dask: str | None = None,
    progress: Callable[[int], None] | None = None,
    code: bool = True,
    slo: str | Sequence[str] = (),
) -> Search:
    """Find the policy of a space that does best on one trace and system.

    Optuna's sampler proposes. A round of proposals is replayed over the first part of the trace. By successive halving
    the best of them go on to a part that is several times as long. docs/search.md describes it. Neither the proposals
    nor their values depend on `jobs`.

    Args:
        source: The path of a sweep's TOML file, or a mapping of the same form. Lists are choices; its `search` table
            adds ranges, the objective and the number of trials.
        folder: Keeps the replays, which the next search finds again. By default nothing is kept.
        jobs: Processes; 1 is this one.
        dask: Address of a Dask scheduler, to run on its workers instead.
        progress: A function that gets the number of trials judged, on a part of the trace, since its last call.
        code: With False trials fail whose policy names a Python file, whose code would run.
        slo: Limits that the best must keep, as `"tpot_s.p99<=50ms"`. By default those of the file.

    Returns:
        The finished search. `Search.best` is the best trial.

    Raises:
        UsageError: The space makes no sense.
        MoetraceError: Optuna is missing, the trace is damaged, or the folder cannot be written.

    Examples:
        >>> import moetrace as mt
        >>> mt.generate("made.h5", "tiny-olmoe", requests=2, prompt=8, output=8)
        >>> space = {"trace": "made.h5", "policy": ["monde", "edge-ndp"], "slots": 48}
        >>> found = mt.search(space | {"search": {"trials": 2, "parts": 1}})
        >>> found.best.cell.name
        'made/edge-ndp/edge-ndp'
    """
    refuse_if_forked()
    check_jobs(jobs)
    space = load_space(source)
    choices = check_choices(space._replace(slos=parse_slos(slo) or space.slos))
    with farm_of(jobs, dask) as (farm, _):
        return run_search(choices, None if folder is None else SweepFolder(named_folder(folder)), farm, progress, code)


def run_search(
    choices: SearchChoices,
    folder: SweepFolder | None,
    farm: Farm,
    progress: Callable[[int], None] | None = None,
    code: bool = True,
) -> Search:
    """Search on a farm; as `search` does."""
    with _study(choices) as study, lasting(farm) as kept:
        halver = Halver(choices, kept, folder, progress, code)
        try:
            reference = halver.trial(0, choices.plain())
            halver.replay([reference], choices.halving.parts - 1)
            reference.state = "failed" if reference.error else "complete"
            trials: list[Trial] = []
            while left := choices.halving.trials - len(trials):
                begun = _propose(study, halver, trials, min(choices.halving.round, left))
                if not begun:
                    break  # all that there is was tried
                _halve(study, halver, begun)
                trials += [trial for _, trial in begun]
        finally:
            forget()
    found = Search(choices, trials, reference, halver.found, halver.computed, halver.reused)
    if folder is not None:
        sweep = found.sweep
        folder.publish(sweep.to_dict(), sweep.cells, {SEARCH_FILE: found.to_dict()}, {TRIALS_FILE: found.frame})
    return found


def _propose(study: "Study", halver: Halver, trials: Sequence[Trial], count: int) -> list[_Pair]:
    """Return up to `count` trials that nobody proposed before, fewer if the sampler no longer finds any."""
    import optuna

    seen = {trial.cell.name for trial in trials}
    begun: list[_Pair] = []
    seed = (halver.choices.halving.seed + len(trials)) % 2**32
    sampler, chance = study.sampler, optuna.samplers.RandomSampler(seed=seed)
    for turn in range(count * _PROPOSALS):
        study.sampler = sampler if turn < count * _PROPOSALS // 2 else chance
        proposal = study.ask()
        point = halver.choices.suggest(proposal)
        if point.name in seen or not halver.choices.space.allows(point):
            study.tell(proposal, state=optuna.trial.TrialState.FAIL)  # which samplers overlook
            continue
        seen.add(point.name)
        begun.append((proposal, halver.trial(1 + len(trials) + len(begun), point)))
        if len(begun) == count:
            break
    study.sampler = sampler
    return begun


def _halve(study: "Study", halver: Halver, begun: Sequence[_Pair]) -> None:
    """Carry trials through the parts of the trace, fewer each time."""
    import optuna

    halving, going = halver.choices.halving, list(begun)
    for part in range(halving.parts):
        halver.replay([trial for _, trial in going], part)
        for proposal, trial in going:
            if trial.error is not None:
                study.tell(proposal, state=optuna.trial.TrialState.FAIL)
        going = [pair for pair in going if pair[1].error is None]
        if part + 1 < halving.parts:
            going = _best_of(study, going, halving, part, halver.values[part])
    for proposal, trial in going:
        trial.state = "complete"
        proposal.set_user_attr(_MISS, trial.miss)
        study.tell(proposal, trial.value)


def _best_of(
    study: "Study", going: Sequence[_Pair], halving: Halving, part: int, so_far: list[tuple[float, float]]
) -> list[_Pair]:
    """Return the trials that go on, the best of each `keep` that were replayed over this part so far; stop the others.

    The rule is that of Optuna's SuccessiveHalvingPruner, which however asks one trial after another, and so knows only
    those before it: of a round that is replayed at once only one would go on. `so_far` gets the round's values.
    """
    import optuna

    so_far += [trial.order(halving.maximize) for _, trial in going]
    worst = sorted(so_far)[max(len(so_far) // halving.keep, 1) - 1] if so_far else (0.0, 0.0)
    best = []
    for proposal, trial in going:
        assert trial.value is not None
        proposal.report(trial.value, halving.keep**part)  # samplers learn from it
        proposal.set_user_attr(_MISS, trial.miss)
        if trial.order(halving.maximize) <= worst:
            best.append((proposal, trial))
        else:
            trial.state = "stopped"
            study.tell(proposal, state=optuna.trial.TrialState.PRUNED)
    return best


def _misses(trial: Any) -> list[float]:
    """The violated constraints for the sampler: by how much a trial misses a limit."""
    return [trial.user_attrs.get(_MISS, 0.0)]


@contextmanager
def _study(choices: SearchChoices) -> Iterator["Study"]:
    """Yield an empty study, with Optuna silent; raises MoetraceError if it is missing."""
    try:
        import optuna
    except ImportError:
        raise MoetraceError("A search needs Optuna: pip install '.[search]' in the clone of moetrace.") from None
    halving = choices.halving
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant_liar is called experimental
            misses = _misses if choices.space.slos else None
            samplers: dict[str, Callable[[], Any]] = {
                "tpe": lambda: optuna.samplers.TPESampler(
                    seed=halving.seed, constant_liar=True, constraints_func=misses
                ),
                "random": lambda: optuna.samplers.RandomSampler(seed=halving.seed),
            }
            yield optuna.create_study(
                direction="maximize" if halving.maximize else "minimize",
                sampler=samplers[halving.sampler](),
                pruner=optuna.pruners.NopPruner(),
            )
    finally:
        optuna.logging.set_verbosity(verbosity)
