"""`sweep`: a grid of replays, resumed where it stopped; cells that share a trace share passes over it."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import polars as pl

from moetrace.batch.cell import Cell, Resolver, Traces
from moetrace.batch.cell_frame import axes_of, cell_frame, speedups
from moetrace.batch.executors import Farm, dask_farm, local_farm, run_tasks
from moetrace.batch.grid import Grid, Point, load_grid
from moetrace.batch.processes import start_early
from moetrace.batch.rebatched import Rebatched
from moetrace.batch.slo import Slo, check_had, parse_slos
from moetrace.batch.sweep_folder import SweepFolder
from moetrace.batch.work import Outcome, Task, evaluate, forget, tasks_of
from moetrace.jit.fingerprint import room_fingerprint
from moetrace.results.record import FIGURES, FRONTS, value_in
from moetrace.results.sweep_record import ListedCell, SweepFile
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.spec.forks import refuse_if_forked
from moetrace.spec.html_table import html_table
from moetrace.spec.known import known_unlike
from moetrace.spec.ordinary_file import named_folder
from moetrace.spec.policy import names_code
from moetrace.trace import Trace
from moetrace.version import __version__

# An estimate replays this number of expert ids of each trace, in this number of its cells.
_SAMPLE_IDS = 200_000
_SAMPLE_CELLS = 8


class Estimate(NamedTuple):
    """How long the cells that are left will take: `seconds` of one core, from a measured sample of the work.

    `seconds` are without `unmeasured` cells: their policy names a Python file, and nothing of it is run for this.
    """

    cells: int
    seconds: float
    sampled: int
    unmeasured: int


@dataclass(repr=False)
class Sweep:
    """A finished sweep.

    Attributes:
        grid: The axes of the sweep's file.
        listed: Every cell, in the order of the grid.
        found: The content of each finished cell, by hash: `result`, `costs`, `warnings`.
        computed: How many different cells were replayed now.
        reused: How many different cells were found in the folder.
        unused: How many finished cells in the folder are not of this sweep.
        slos: Limits that cells on the front must keep.
    """

    grid: Grid
    listed: list[Cell]
    found: dict[str, Mapping[str, Any]]
    computed: int = 0
    reused: int = 0
    unused: int = 0
    _pareto: str = field(default="gpu_memory_bytes")
    slos: Sequence[Slo] = ()

    def __repr__(self) -> str:
        return f"<Sweep of {len(self.listed)} cells, {len(self.failed)} failed: .cells is a frame, .results are dicts>"

    def _repr_html_(self) -> str:
        """HTML for a notebook: a row for each cell, with its main figures, or why it failed."""
        figures = {name: FIGURES[name] for name in ("total_s", "ttft_s.p50", "tpot_s.p50", "tokens_per_s")}
        results = self.results
        rows = []
        for cell in self.listed:
            policy = results[cell.name]["policies"][0] if cell.name in results else None
            values = [None if policy is None else value_in(policy, name) for name in figures]
            shown = [figure.shown[0] for figure in figures.values()]
            row = [None if one is None else one * factor for one, factor in zip(values, shown, strict=True)]
            rows.append([cell.name, *row, cell.error or ""])
        return html_table(["cell", *(figure.column for figure in figures.values()), "error"], rows)

    @cached_property
    def cells(self) -> pl.DataFrame:
        """One row a cell, in the order of the grid: what `cells.parquet` holds."""
        return cell_frame(self.listed, self.found, self._pareto, self.slos)

    def against(self, axis: str, value: str | None = None) -> pl.DataFrame:
        """Return the cells with speed-ups against the cell of another axis, all else equal.

        Args:
            axis: A field of the sweep's file that is a list, as `slots` or `system.ndp.units`.
            value: Its value there, as the cells' names show it. By default the first.

        Returns:
            `cells`, with another column `speedup`.

        Raises:
            UsageError: The sweep has no such axis, or the axis no such value.
        """
        self.grid.check_axis(axis, value)
        if "total_s" not in self.cells.columns:
            return self.cells
        others = next((group for group in self.grid.zipped if axis in group), (axis,))
        fields = [axis, *(field for field in others if field != axis)]
        return self.cells.with_columns(speedups(self.listed, self.cells, fields, value))

    @property
    def failed(self) -> dict[str, str]:
        """Name of each cell that failed, and why."""
        return {cell.name: cell.error for cell in self.listed if cell.error is not None}

    @property
    def results(self) -> dict[str, Any]:
        """Name of each finished cell, and what `summary.json` of its replay would hold."""
        return {cell.name: self.found[cell.key]["result"] for cell in self.listed if cell.key and cell.error is None}

    @property
    def warnings(self) -> dict[str, int]:
        """Sentences about what may not be meant so, and how many cells each is about."""
        keys = [cell.key for cell in self.listed if cell.key and cell.error is None]
        return dict(Counter(warning for key in keys for warning in self.found[key]["warnings"]))

    @property
    def notes(self) -> list[str]:
        """Sentences about the cells as a whole, as that only some of the machines are calibrated."""
        systems = [cell.setup.system for cell in self.listed if cell.setup]
        note = known_unlike((system.name, system.known, system.calibration) for system in systems)
        return [note] if note else []

    def to_dict(self) -> dict[str, Any]:
        """Return what `sweep.json` holds."""
        cells = []
        for cell in self.listed:
            listed = ListedCell(cell.name, cell.key if cell.error is None else None, cell.error)
            cells.append(msgspec.structs.asdict(listed) | axes_of(cell))
        sweep = SweepFile(
            moetrace=__version__,
            engine=room_fingerprint("jit", "engine"),
            pareto=self._pareto,
            axes=self.grid.axes,
            cells=cells,
            notes=self.notes,
            slo=[slo.text for slo in self.slos],
        )
        return msgspec.structs.asdict(sweep)


class SweepPlan:
    """A sweep before it runs: its cells, and which of them a folder already has."""

    def __init__(
        self,
        source: str | os.PathLike[str] | Mapping[str, Any],
        path: Path | None,
        pareto: str | None = None,
        *,
        reads: bool = False,
        code: bool = True,
        slo: str | Sequence[str] = (),
    ) -> None:
        """Read the grid, the traces' hashes and every spec; make the folder at `path`, unless that is None.

        With `reads` the folder is only looked into, for what it has. Without `code` cells fail whose policy names a
        Python file. Limits in `slo` replace those of the file.

        Raises as `load_grid` and `SweepFolder` do.
        """
        if pareto is not None and pareto not in FRONTS:
            raise UsageError(f"pareto wants one of {', '.join(FRONTS)}, got {pareto!r}.")
        self.grid = load_grid(source)
        self.pareto, self.slos = pareto or self.grid.pareto, parse_slos(slo) or self.grid.slos
        folder = None if path is None else SweepFolder(path, reads=reads)  # before anything is read that takes long
        self._traces, self._folder = Traces(), folder
        resolver = Resolver(self._traces, self.grid, code)
        # Traces of other batches are files like others, and stay while this is needed.
        self._rebatched = Rebatched(self._traces, None if reads else path)
        self.cells = [self._resolved(resolver, point) for point in self.grid.points]
        resolver.check_policy_names(self.grid.points)
        base = f"{Path.cwd() if isinstance(source, Mapping) else Path(source).absolute().parent}{os.sep}"
        self._base = base
        for cell in self.cells:
            cell.error = self._relative(cell.error)
        check_had(self.slos, [cell.setup for cell in self.cells if cell.setup])
        self.found: dict[str, Mapping[str, Any]] = {}
        for key in dict.fromkeys(cell.key for cell in self.cells if cell.key):
            if folder is not None and (found := folder.finished(key)) is not None:
                self.found[key] = found
        self.reused = len(self.found)

    def _resolved(self, resolver: Resolver, point: Point) -> Cell:
        try:
            placed = self._rebatched.placed(point)
        except MoetraceError as error:
            return Cell(point, error=str(error))
        return resolver.resolve(placed)

    @property
    def missing(self) -> list[Cell]:
        """A cell for each result that is yet to be found."""
        first = {cell.key: cell for cell in reversed(self.cells) if cell.key and cell.key not in self.found}
        return [cell for cell in self.cells if cell.key and first.get(cell.key) is cell]

    def by_trace(self) -> dict[str, list[Cell]]:
        """The missing cells, by the path of the trace."""
        groups: dict[str, list[Cell]] = {}
        for cell in self.missing:
            groups.setdefault(cell.point.values["trace"], []).append(cell)
        return groups

    def tasks(self, jobs: int) -> list[Task]:
        """Cut the missing cells into tasks: cells of one trace each."""
        return [
            task
            for path, cells in self.by_trace().items()
            for task in tasks_of(*self._traces.get(path), {cell.key: cell for cell in cells if cell.key}, jobs)
        ]

    def run(self, farm: Farm, progress: Callable[[int], None] | None = None) -> Sweep:
        """Replay the missing cells; write each as it comes, and in the end the tables."""
        cells = {cell.key: cell for cell in self.missing}
        errors: dict[str, str] = {}

        def take(outcomes: list[Outcome]) -> None:
            for outcome in outcomes:
                if outcome.found is None:
                    errors[outcome.key] = outcome.error or "it was lost."
                    continue
                self.found[outcome.key] = outcome.found
                if self._folder is not None:
                    self._folder.keep(cells[outcome.key], outcome.found)
            if progress is not None:
                progress(len(outcomes))

        tasks = self.tasks(farm.jobs)
        try:
            if tasks:
                run_tasks(tasks, farm, take)
        finally:
            forget()
        for cell in self.cells:
            if cell.key in errors:
                cell.error = self._relative(errors[cell.key])
        keys = {cell.key for cell in self.cells if cell.key}
        unused = self._folder.count_others(keys) if self._folder else 0
        computed = len(self.found) - self.reused
        sweep = Sweep(self.grid, self.cells, self.found, computed, self.reused, unused, self.pareto, self.slos)
        if self._folder is not None:
            self._folder.publish(sweep.to_dict(), sweep.cells)
        return sweep

    def estimate(self) -> Estimate:
        """Measure how long the missing cells will take, on the first steps of each trace with a few of its cells."""
        seconds, sampled, unmeasured = 0.0, 0, 0
        for path, missing in self.by_trace().items():
            cells = [cell for cell in missing if not names_code(cell.policy)]
            unmeasured += len(missing) - len(cells)
            if not cells:
                continue
            setups = list({(cell.policy.name, cell.policy.dispatch): cell.setup for cell in cells}.values())
            setups = [setup for setup in setups if setup is not None][:_SAMPLE_CELLS]
            with Trace.open(path) as trace:
                rows = max(1, _SAMPLE_IDS // (trace.layers * trace.top_k))
                head = trace.head(int((trace.offset <= rows).sum()) - 1)
                evaluate(head, setups)  # compiles, and brings the file into memory
                start = time.perf_counter()
                evaluate(head, setups)
                spent = time.perf_counter() - start
            seconds += spent / len(setups) * len(cells) * trace.rows / head.rows
            sampled += len(setups)
        return Estimate(len(self.missing), seconds, sampled, unmeasured)

    def _relative(self, error: str | None) -> str | None:
        """The sentence with files as seen from beside the sweep: the same wherever that lies."""
        return None if error is None else error.replace(self._base, "")


def sweep(
    source: str | os.PathLike[str] | Mapping[str, Any],
    folder: str | os.PathLike[str] | None = None,
    *,
    jobs: int = 1,
    dask: str | None = None,
    pareto: str | None = None,
    progress: Callable[[int], None] | None = None,
    code: bool = True,
    slo: str | Sequence[str] = (),
) -> Sweep:
    """Replay every cell of a grid. Cells that share a trace share passes over it.

    docs/sweep.md describes the file and the folder. A cell that fails is in `Sweep.failed` and does not stop the
    others.

    Args:
        source: The path of a sweep's TOML file, or a mapping of the same form. Lists are axes of the grid.
        folder: Keeps the results, which the next sweep finds again. By default nothing is kept.
        jobs: Processes; 1 is this one. Results do not depend on it.
        dask: Address of a Dask scheduler, to run on its workers instead.
        pareto: The cost that the front sets against latency: "gpu_memory_bytes", "link_bytes" or "price". By default
            the file says it.
        progress: A function that gets the number of cells done since its last call.
        code: With False cells fail whose policy names a Python file, whose code would run.
        slo: Limits that a cell on the front must keep, as `"tpot_s.p99<=50ms"`. By default those of the file.

    Returns:
        The finished sweep. `Sweep.cells` is a frame with a row a cell.

    Raises:
        UsageError: The grid makes no sense.
        MoetraceError: The folder cannot be written, or workers are killed again and again. Finished cells are kept.

    Examples:
        >>> import moetrace as mt
        >>> found = mt.sweep({"trace": "traces/tiny-olmoe.h5", "policy": "edge-ndp", "slots": [24, 48]})
        >>> for slots, total_s in found.cells.select("slots", "total_s").rows():
        ...     print(f"{slots} {total_s:.2f} s")
        24 6.35 s
        48 5.93 s
    """
    refuse_if_forked()
    check_jobs(jobs)
    if jobs > 1 and dask is None:
        start_early()
    plan = SweepPlan(source, None if folder is None else named_folder(folder), pareto, code=code, slo=slo)
    with farm_of(jobs, dask) as (farm, _):
        return plan.run(farm, progress)


def check_jobs(jobs: int) -> None:
    """Raise UsageError unless a number of processes is a whole number of at least 1."""
    if not isinstance(jobs, int) or jobs < 1:
        raise UsageError(f"jobs is {jobs!r}, but must be a whole number of at least 1.")


@contextmanager
def farm_of(jobs: int, dask: str | None) -> Iterator[tuple[Farm, str | None]]:
    """Yield where to run, and the link of a dashboard if there is one."""
    if dask is None:
        yield local_farm(jobs), None
    else:
        with dask_farm(dask) as found:
            yield found
