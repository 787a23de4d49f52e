"""`replay`: a trace, a machine and policies in, a `Result` out."""

import difflib
import operator
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, SupportsIndex

import msgspec
import polars as pl

from moetrace.engine.run import Run, run_setups
from moetrace.engine.setup import Setup
from moetrace.results import frames, summary, timeline, timeline_file, write
from moetrace.results.record import TIMELINE_FILE
from moetrace.results.window import Window, window_of
from moetrace.spec import Model, PolicySpec, System, list_presets, load_model, load_policy, load_system
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.spec.load import nearest
from moetrace.spec.system import dense_misfit
from moetrace.trace import Trace
from moetrace.trace.atomic import whole_file
from moetrace.trace.opening import opened

if TYPE_CHECKING:
    from moetrace.show.plot import Plots

DEFAULT_SYSTEM = "edge-ndp"
DEFAULT_POLICIES = ("monde", "edge-ndp")

# What `replay` takes for a policy: a preset's name, a TOML file, `file.py:function`, a spec, or a function.
Policy = str | Path | PolicySpec | Callable


@dataclass(frozen=True, repr=False)
class Result:
    """What a replay found. It makes each frame when you first ask for it; docs/results.md explains the columns.

    Attributes:
        run: The engine's own record.
        warnings: Sentences about what may not be meant so.
    """

    run: Run
    warnings: tuple[str, ...]
    _trace: dict[str, Any]

    def __repr__(self) -> str:
        names = ", ".join(lane.policy.name for lane in self.run.lanes)
        return f"<Result of {names}: .summary, .steps, .units, .layers, .requests, .experts are frames>"

    @cached_property
    def summary(self) -> pl.DataFrame:
        """One row a policy: times, speed-up against the first policy, hits, bytes, utilization, both bounds."""
        return summary.summary_frame(self._policies)

    @cached_property
    def steps(self) -> pl.DataFrame:
        """One row a policy and step. `write` streams them, and needs memory for a slice of them only."""
        return pl.concat(frames.step_slices(self.run))

    @cached_property
    def units(self) -> pl.DataFrame:
        """One row a policy and unit: `gpu`, `ndp0` .., `cpu`, `link_in`, `link_out`."""
        return frames.unit_frame(self.run)

    @cached_property
    def layers(self) -> pl.DataFrame:
        """One row a policy and MoE layer."""
        return frames.layer_frame(self.run)

    @cached_property
    def requests(self) -> pl.DataFrame:
        """One row a policy and request."""
        return frames.request_frame(self.run)

    @cached_property
    def experts(self) -> pl.DataFrame:
        """One row a MoE layer and expert, whatever the policy: how much it was wanted."""
        return frames.expert_frame(self.run)

    @property
    def plot(self) -> "Plots":
        """Charts for a notebook: `result.plot.latency()` and others, of Altair (the extra `report`)."""
        from moetrace.show.plot import Plots

        return Plots(self)

    @cached_property
    def timeline(self) -> pl.DataFrame:
        """One row a slice of work in the steps that `replay(timeline=...)` named; see `results.timeline`.

        Raises UsageError if it named none.
        """
        return timeline.timeline_frame(self.run)

    @cached_property
    def timeline_counters(self) -> pl.DataFrame:
        """Experts resident and queued over time, in the steps of the timeline. Raises UsageError like `timeline`."""
        return timeline.counter_frame(self.run)

    def write_timeline(self, path: str | os.PathLike[str]) -> None:
        """Write the timeline to a file that Perfetto and chrome://tracing open.

        Args:
            path: The new file; its name ends in .json.gz.

        Raises:
            UsageError: `replay(timeline=...)` named no steps.
            MoetraceError: The system refuses.
        """
        with whole_file(Path(path)) as file:
            timeline_file.write_timeline(self.run, file)

    def to_dict(self) -> dict[str, Any]:
        """Return what `summary.json` holds."""
        return summary.summary_dict(self.run, self._trace, self._policies)

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write `summary.json` and the Parquet files into a folder: all of them or none.

        Files of the same names are replaced, others stay. A timeline that was recorded is written too; one of an
        earlier replay does not stay. The same trace, specs and version give the same bytes.

        Args:
            folder: The folder, which is made if it does not exist.

        Raises:
            UsageError: `folder` is a file.
            MoetraceError: The system refuses.
        """
        with write.staged(folder) as temporary:
            self.write_into(temporary)

    def write_into(self, folder: Path) -> None:
        """Write the files into an existing folder, one after another."""
        tables = {"units": self.units, "layers": self.layers, "requests": self.requests, "experts": self.experts}
        more = (
            {}
            if self.run.lanes[0].recording is None
            else {TIMELINE_FILE: partial(timeline_file.write_timeline, self.run)}
        )
        write.write_files(folder, self.to_dict(), lambda: frames.step_slices(self.run), tables, more)

    @cached_property
    def _policies(self) -> list[dict[str, Any]]:
        return summary.policy_figures(self.run)


def replay(
    trace: Trace | str | os.PathLike[str],
    *,
    system: str | Path | System = DEFAULT_SYSTEM,
    policies: Policy | Sequence[Policy] = DEFAULT_POLICIES,
    model: str | Path | Model | None = None,
    overrides: Mapping[str, object] | None = None,
    slots: SupportsIndex | None = None,
    ignore_capacity: bool = False,
    jobs: SupportsIndex | None = None,
    progress: Callable[[int], None] | None = None,
    timeline: Window = False,
) -> Result:
    """Replay a trace through policies on a system, in one pass over it.

    docs/timing-model.md defines every figure. The same trace, specs and version give the same result to the last bit.

    Args:
        trace: A trace or the path of its file.
        system: A preset's name, a TOML file or a System.
        policies: One policy or several. Each is a preset's name, a TOML file, `file.py:function`, a PolicySpec or a
            function. A function is the dispatch beside an LRU cache. Speed-ups are against the first policy. Equal
            names get a number.
        model: A preset's name, a TOML file or a Model. By default the preset that the trace names.
        overrides: New values of single fields, by path: `{"system.ndp.units": 6}`. A path begins with `model`, `system`
            or `policy`. `policy.FIELD` is set in every policy, `policy.NAME.FIELD` in that one.
        slots: Experts that the GPU can hold. By default its memory decides.
        ignore_capacity: Replay even if the experts do not fit the NDP units.
        jobs: Threads. By default one a policy, at most one a core. They do not change the result.
        progress: A function that gets the number of rows since its last call.
        timeline: The steps whose every slice of work is recorded, for `Result.timeline` and `Result.write_timeline`: a
            window `(A, B)`, from step A up to B without it as in Python, or True for the first 16 steps. Memory grows
            with the window.

    Returns:
        The result. It has frames and `summary.json` as a dict, and `Result.write` writes files.

    Raises:
        UsageError: A name or value is unknown or wrong, or values do not go together. The message says what to do.
        MoetraceError: A file is damaged or cannot be read.

    Examples:
        >>> import moetrace as mt
        >>> result = mt.replay("traces/tiny-olmoe.h5", policies=["monde", "edge-ndp"], slots=48)
        >>> for name, total_s in result.summary.select("name", "total_s").rows():
        ...     print(f"{name} {total_s:.2f} s")
        monde 12.96 s
        edge-ndp 5.93 s
    """
    with opened(trace) as found:
        found.check_has_rows()  # before its model is asked for: no model would help
        slots, jobs = _whole("slots", slots), _whole("jobs", jobs)
        setup, warnings = _load_setup(found, model, system, policies, {} if overrides is None else overrides)
        jobs = min(_cores(), len(setup.policies)) if jobs is None else _at_least_one("jobs", jobs)
        window = window_of(timeline, found.steps, warnings)
        setup = replace(setup, slots=slots, ignore_capacity=ignore_capacity, window=window)
        (run,) = run_setups(found, [setup], jobs=jobs, progress=progress)
        if isinstance(run, MoetraceError):
            raise run
        return Result(run, (*warnings, *run.warnings), summary.trace_facts(found))


def _load_setup(
    trace: Trace,
    model: str | Path | Model | None,
    system: str | Path | System,
    policies: Policy | Sequence[Policy],
    overrides: Mapping[str, object],
) -> tuple[Setup, list[str]]:
    """Return the specs that were named, with their overrides, and sentences about what may not be meant so."""
    changes = by_spec(overrides)
    the_model = load_model(model_of(trace) if model is None else model, changes["model"])
    the_system = load_system(system, changes["system"])
    misfit = dense_misfit(the_model, the_system)
    warnings = [misfit] if misfit else []
    several = list(policies) if isinstance(policies, Sequence) and not isinstance(policies, str) else [policies]
    hooks: dict[str, Callable] = {}
    specs = _load_policies(several, changes["policy"], hooks, warnings)
    return Setup(model=the_model, system=the_system, policies=specs, hooks=hooks), warnings


def _whole(name: str, value: SupportsIndex | None) -> int | None:
    """The whole number itself, NumPy's too."""
    try:
        return None if value is None else operator.index(value)
    except TypeError:
        raise UsageError(f"{name} is {value!r}, but must be a whole number.") from None


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise UsageError(f"{name} is {value}, but must be at least 1.")
    return value


def by_spec(overrides: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """Sort overrides by `model`, `system` and `policy`, the paths without that; raise UsageError for any other."""
    by_spec: dict[str, dict[str, object]] = {"model": {}, "system": {}, "policy": {}}
    if not isinstance(overrides, Mapping):
        raise UsageError(f"overrides is a mapping of paths to values, got {type(overrides).__name__}.")
    for path, value in overrides.items():
        kind, _, field = str(path).partition(".")
        if kind not in by_spec or not all(field.split(".")):
            raise UsageError(f"An override is model.FIELD, system.FIELD or policy.FIELD, got {path!r}.")
        by_spec[kind][field] = value
    return by_spec


def model_of(trace: Trace) -> str:
    """Return the preset that the trace names; a stranger's file may not name another file."""
    presets = list_presets("models")
    if trace.model in presets:
        return trace.model
    raise UsageError(
        f"{trace.path or 'The trace in memory'} is of model {trace.model!r}, which is no preset"
        f"{nearest(trace.model, presets)}: name one, or a TOML file, with --model."
    )


def _load_policies(
    sources: Sequence[Policy], changes: Mapping[str, object], hooks: dict[str, Callable], warnings: list[str]
) -> list[PolicySpec]:
    """Load the policies; changes of the form NAME.FIELD go to the policy of that name."""
    if not sources:
        raise UsageError("A replay needs at least one policy.")
    everywhere = {field: value for field, value in changes.items() if "." not in field}
    own: dict[str, dict[str, object]] = {}
    for path in changes.keys() - everywhere.keys():
        name, _, field = path.rpartition(".")
        own.setdefault(name, {})[field] = changes[path]
    specs = []
    for source in sources:
        spec = _load_policy(source, everywhere, hooks)
        specs.append(_load_policy(source, everywhere | own[spec.name], hooks) if spec.name in own else spec)
    names = [spec.name for spec in specs]
    for name in own.keys() - set(names):
        near = difflib.get_close_matches(name, names, 1, 0.0)
        raise UsageError(f"No policy of this replay is called {name!r} (the nearest is {near[0]!r}).")
    return _distinct(specs, warnings)


def _distinct(specs: list[PolicySpec], warnings: list[str]) -> list[PolicySpec]:
    """Number the second and later policies of a name, as in `mine-2`, for every table to tell them apart."""
    taken = {spec.name for spec in specs}
    seen: Counter[str] = Counter()
    distinct = []
    for spec in specs:
        name, number = spec.name, 1
        seen[name] += 1
        while seen[spec.name] > 1 and name in taken:
            number += 1
            name = f"{spec.name}-{number}"
        if name != spec.name:
            warnings.append(f"more than one policy is called {spec.name}; one of them appears as {name}.")
        taken.add(name)
        distinct.append(msgspec.structs.replace(spec, name=name))
    return distinct


def _load_policy(source: Policy, changes: Mapping[str, object], hooks: dict[str, Callable]) -> PolicySpec:
    """Load one policy; a function becomes the dispatch beside `on-demand`'s other choices, and joins `hooks`."""
    if isinstance(source, str | Path | PolicySpec):
        return load_policy(source, changes)
    function = getattr(source, "py_func", source)
    if not isinstance(function, FunctionType):
        raise UsageError(
            "A policy is the name of a preset, the path of a TOML file, file.py:function, a PolicySpec or a function, "
            f"got {type(source).__name__}."
        )
    code = function.__code__
    spec = load_policy("on-demand", {"name": code.co_name, **changes})
    name, number = f"{Path(code.co_filename).name}:{code.co_name}", 1
    while hooks.setdefault(name, source) is not source:
        number += 1
        name = f"{Path(code.co_filename).name}:{code.co_name}-{number}"
    return msgspec.structs.replace(spec, dispatch=name)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
