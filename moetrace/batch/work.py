"""The work of a worker: cells of one trace in, their figures out; several cells in one pass, the trace decoded once."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from moetrace.batch.cell import Cell, code_fingerprint, digest, error_sentence, files_of
from moetrace.engine.cluster.cluster_lane import ClusterLane
from moetrace.engine.decoded import Decoded, Needs, decoded_bytes, needs_of
from moetrace.engine.folding import StepStore
from moetrace.engine.prefetch import RELAYOUT
from moetrace.engine.run import Run, run_setups
from moetrace.engine.setup import Setup, weight_bytes_of
from moetrace.results import summary
from moetrace.results.frames import link_bytes_of
from moetrace.results.record import CellCosts
from moetrace.spec.choices import find
from moetrace.spec.errors import MoetraceError, stop_behind
from moetrace.spec.fits import dense_misfit
from moetrace.trace import Trace
from moetrace.version import __version__

# A trace that decodes to no more stays in a worker's memory, for all its tasks; a larger one is read in each of them.
KEEP_BYTES = 256 << 20
# States of the cells of one task.
LOGS_BYTES = 1 << 30
# The seconds of each step of these cells: in memory, and beyond that in a temporary file.
SECONDS_BYTES, FILED_BYTES = 256 << 20, 8 << 30
# Tasks a job: enough that all jobs end together, few enough that their cells share passes.
_TASKS_A_JOB = 6
_MOST_CELLS = 64


class Task(NamedTuple):
    """Cells that share a trace. The rest says what the worker must find, be it on another machine."""

    trace: str
    trace_sha256: str
    needs: Needs
    cells: list[tuple[str, Setup, dict[str, str]]]  # key, what to replay, digest of each file that it names
    code: list[str]  # code_fingerprint
    steps: int | None = None  # only the first ones


class Outcome(NamedTuple):
    """The outcome of a cell: the content of its file beside the inputs, or a sentence."""

    key: str
    found: dict[str, Any] | None
    error: str | None = None


def work(task: Task) -> list[Outcome]:
    """Replay the cells of a task; an error that stops one, or all, becomes a sentence."""
    try:
        if task.code != code_fingerprint():
            raise MoetraceError(f"a worker runs another moetrace ({__version__}): install the same on all machines.")
        changed = {key: why for key, setup, digests in task.cells if (why := _changed(setup, digests)) is not None}
        cells = [cell for cell in task.cells if cell[0] not in changed]
        found = evaluate(_decoded.get(task), [setup for _, setup, _ in cells]) if cells else []
    except MoetraceError as error:
        return failed(task, error)
    except Exception as error:
        if (stop := stop_behind(error)) is not None:
            raise stop from error
        # Whichever of them it was, the others go on.
        return failed(task, error) if len(task.cells) == 1 else [each for one in _single(task) for each in work(one)]
    return [Outcome(key, None, why) for key, why in changed.items()] + [
        Outcome(key, None, str(each)) if isinstance(each, MoetraceError) else Outcome(key, each)
        for (key, *_), each in zip(cells, found, strict=True)
    ]


def _changed(setup: Setup, digests: Mapping[str, str]) -> str | None:
    """Say which file of a cell is not what it was when the sweep began; None if all are."""
    for field, path in files_of(setup).items():
        try:
            if digest(path) != digests[field]:
                return f"{path} was changed while the sweep ran, or differs on a worker."
        except MoetraceError as error:
            return str(error)
    return None


def failed(task: Task, error: BaseException) -> list[Outcome]:
    """Say of every cell of a task that it ended with this error."""
    return [Outcome(key, None, error_sentence(error)) for key, *_ in task.cells]


def _single(task: Task) -> list[Task]:
    return [task._replace(cells=[cell]) for cell in task.cells]


def evaluate(trace: Trace | Decoded, setups: Sequence[Setup]) -> list[dict[str, Any] | MoetraceError]:
    """Replay setups of one policy each over a trace (or `trace.head(n)`) in one pass.

    Returns for each ``result`` (what `summary.json` holds), ``costs`` (the fields of `CellCosts`) and
    ``warnings``, or the error that it ended with. Raises MoetraceError if the trace is damaged.
    """
    of = trace if isinstance(trace, Trace) else trace.trace
    facts = summary.trace_facts(of)
    found: list[dict[str, Any] | MoetraceError] = []
    with StepStore(SECONDS_BYTES) as store:
        runs = run_setups(trace, setups, store=store)
        for run in reversed(runs):
            found.append(run if isinstance(run, MoetraceError) else _figures(run, facts, of))
            runs.pop()  # its state has no more use
    return found[::-1]


def tasks_of(trace: Trace, sha256: str, cells: Mapping[str, Cell], jobs: int, steps: int | None = None) -> list[Task]:
    """Cut cells of one trace (its first `steps`), by the keys of what they find, into tasks for `jobs` jobs.

    The number of cells of a task is limited by memory and by what pays off. A trace that is not kept is read once by
    each job, if memory holds its share of the cells.
    """
    systems = (cell.setup.system for cell in cells.values() if cell.setup)
    needs = needs_of((cell.policy for cell in cells.values()), systems)
    kept = is_kept(trace, needs)
    even = -(-len(cells) // (jobs * (_TASKS_A_JOB if steps is None and kept else 1)))
    # A trace that is read again by each task is read by as few as possible.
    most = max((state_bytes(trace, cell.setup) for cell in cells.values() if cell.setup), default=1)
    held = min(LOGS_BYTES // most, (SECONDS_BYTES + FILED_BYTES) // seconds_bytes(trace))
    size = max(1, min(even, held, _MOST_CELLS if kept else even))
    wanted = [(key, cell.setup, cell.inputs["files"]) for key, cell in cells.items() if cell.setup and cell.inputs]
    code = code_fingerprint()
    return [
        Task(str(trace.path), sha256, needs, wanted[first : first + size], code, steps)
        for first in range(0, len(wanted), size)
    ]


def state_bytes(trace: Trace, setup: Setup) -> int:
    """Most bytes of memory that a cell takes while it is replayed, without the seconds of its steps."""
    (policy,), keys = setup.policies, trace.layers * trace.num_experts
    residency, prefetch = find("residency", policy.residency), find("prefetch", policy.prefetch)
    foresees = residency is not None and residency.foresees
    moves = prefetch is not None and prefetch.rule == RELAYOUT
    a_key = 160 + 60 * (setup.system.disk is not None) + 64 * moves  # of host memory's cache, and of `Layout`
    return keys * a_key + (64 << 10) + foresees * keys * (8 * trace.num_experts + 80)


def seconds_bytes(trace: Trace) -> int:
    """How much is kept of a cell's steps: the seconds of each, and where experts are fetched ahead, the bytes."""
    return trace.steps * 16


def is_kept(trace: Trace, needs: Needs) -> bool:
    """Whether a worker decodes a trace once for all its tasks."""
    return decoded_bytes(trace, needs) <= KEEP_BYTES


def _figures(run: Run, facts: dict[str, Any], trace: Trace) -> dict[str, Any] | MoetraceError:
    try:
        result = summary.summary_dict(run, facts, summary.policy_figures(run))
    except MoetraceError as error:  # a figure that is not finite costs the other setups nothing
        return error
    misfit = dense_misfit(run.model, run.system)
    return {
        "result": result,
        "costs": msgspec.to_builtins(_costs(run, trace)),
        "warnings": [*([misfit] if misfit else []), *run.warnings],
    }


def _costs(run: Run, trace: Trace) -> CellCosts:
    """Bytes of GPU memory for dense weights and slots of the largest expert; bytes over the link; USD an hour.

    On a cluster these are bytes of its fullest GPU, and what its network carried.
    """
    model, weight_bytes = run.model, weight_bytes_of(trace, run.model)
    everything, lane = model.all_experts, run.lanes[0]
    if isinstance(lane, ClusterLane):
        return CellCosts(
            gpu_memory_bytes=lane.memory_bytes(model),
            link_bytes=float(lane.books.total["network_bytes"][0]),
            price=run.system.usd_hour,
        )
    experts_bytes = float(weight_bytes.sum()) if run.slots == everything else run.slots * float(weight_bytes.max())
    return CellCosts(
        gpu_memory_bytes=model.moe_layers * model.dense_bytes + model.head_bytes + experts_bytes,
        link_bytes=link_bytes_of(lane),
        price=run.system.usd_hour,
    )


class _LastDecoded:
    """The trace that a worker decoded last, kept for its next task; threads of a worker wait for one another here."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: tuple[str, str, Needs, int | None] | None = None
        self._decoded: Decoded | None = None

    def get(self, task: Task) -> Decoded:
        key = (task.trace, task.trace_sha256, task.needs, task.steps)
        with self._lock:
            if self._key != key or self._decoded is None:
                self._key = self._decoded = None  # before the next takes memory
                trace = Trace.open(task.trace)
                if (trace.content_sha256 or trace.hash_content()) != task.trace_sha256:
                    raise MoetraceError(f"{task.trace} was changed while the sweep ran, or differs on a worker.")
                part = trace if task.steps is None else trace.head(task.steps)
                self._decoded, self._key = Decoded(part, task.needs, KEEP_BYTES), key
                if is_kept(part, task.needs):
                    trace.close()
            return self._decoded

    def forget(self) -> None:
        with self._lock:
            self._key = self._decoded = None


_decoded = _LastDecoded()


def forget() -> None:
    """Give back the memory of the last trace."""
    _decoded.forget()
