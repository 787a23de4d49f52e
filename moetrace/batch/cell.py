"""A cell of a sweep: one policy of one replay, resolved, and named by the hash of all that its result depends on."""

import ast
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moetrace.batch.grid import Grid, Point, Space
from moetrace.engine.setup import Setup, check_setup
from moetrace.jit.fingerprint import room_fingerprint
from moetrace.results.record import CELL_SCHEMA
from moetrace.results.resolve import by_spec, model_of
from moetrace.spec import Model, PolicySpec, System, canonical, check_policy, load_model, load_system
from moetrace.spec.choices import KINDS, source_of
from moetrace.spec.errors import MoetraceError, UsageError, printable, stop_behind
from moetrace.spec.load import AUTO, FUNCTION_FIELDS, read_text
from moetrace.spec.named import nearest
from moetrace.spec.policy import CodeFile, note_code, read_policy, refuse_code
from moetrace.trace import Trace
from moetrace.version import __version__

# The rooms that replay, read a trace, derive bytes and slots from a spec, or turn the engine's logs into figures.
_ROOMS = ("jit", "spec", "trace", "engine", "results", "batch")


@dataclass
class Cell:
    """A point of the grid and what became of it; ``key`` is None until it is resolved, ``error`` a sentence or None."""

    point: Point
    setup: Setup | None = None
    inputs: dict[str, Any] | None = None
    key: str | None = None
    error: str | None = None

    @property
    def name(self) -> str:
        """The labels of its axes, joined by "/"."""
        return self.point.name

    @property
    def policy(self) -> PolicySpec:
        """Its only policy."""
        assert self.setup is not None
        return self.setup.policies[0]


class Traces:
    """The traces of a sweep, each opened and compared with its hashes once."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[Trace, str] | MoetraceError] = {}

    def get(self, path: str) -> tuple[Trace, str]:
        """Return a trace, whose file is closed, and the hash of its content.

        Raises MoetraceError if it cannot be read, or was changed under its hashes: results would be kept under a
        wrong name.
        """
        if path not in self._found:
            self._found[path] = self._open(path)
        found = self._found[path]
        if isinstance(found, MoetraceError):
            raise found
        return found

    def _open(self, path: str) -> tuple[Trace, str] | MoetraceError:
        try:
            with Trace.open(path) as trace:
                trace.check_has_rows()
                trace.verify_hashes()
                return trace, trace.content_sha256 or trace.hash_content()
        except MoetraceError as error:
            return error


class Resolver:
    """Loads what points name; each spec once, however many cells share it."""

    def __init__(self, traces: Traces, grid: Grid | Space, code: bool) -> None:
        self._traces, self._ignore_capacity, self._code = traces, grid.ignore_capacity, code
        self._where = grid.where if grid.is_file else None
        self._loaded: dict[str, Any] = {}
        self._policy_names: set[str] = set()

    def resolve(self, point: Point) -> Cell:
        """Return the cell of a point; one that cannot be replayed says why in ``error``."""
        cell = Cell(point)
        try:
            trace, sha256 = self._traces.get(point.values["trace"])
            setup = self._setup(point, trace)
            check_policy(setup.policies[0], setup.system)
            slots, _ = check_setup(trace, setup)
            cell.setup = setup
            cell.inputs = _inputs(setup, sha256, slots)
            cell.key = hash_of(cell.inputs)
        except MoetraceError as error:
            cell.error = str(error)
        except Exception as error:
            if (stop := stop_behind(error)) is not None:
                raise stop from error
            cell.error = error_sentence(error)
        return cell

    def check_policy_names(self, points: list[Point]) -> None:
        """Raise a UsageError if `policy.NAME.FIELD` names a policy that no point has; after they were resolved."""
        known = sorted(self._policy_names | {str(point.labels["policy"]) for point in points})
        for path in dict.fromkeys(path for point in points for path in point.values if path.count(".") > 1):
            kind, _, rest = path.partition(".")
            name = rest.rpartition(".")[0]
            if kind == "policy" and name not in known:
                raise UsageError(f"{printable(path)}: no policy of the sweep is called {name!r}{nearest(name, known)}.")

    def _setup(self, point: Point, trace: Trace) -> Setup:
        values = point.values
        changes = by_spec({path: value for path, value in values.items() if "." in path})
        model: Model = self._load(load_model, values.get("model") or model_of(trace), changes["model"])
        system: System = self._load(load_system, values["system"], changes["system"])
        everywhere = {field: value for field, value in changes["policy"].items() if "." not in field}
        policy, files = self._load(read_policy, values["policy"], everywhere)
        names = {policy.name, str(point.labels["policy"])}
        self._policy_names |= names
        own = {
            path.rpartition(".")[2]: value
            for path, value in changes["policy"].items()
            if "." in path and path.rpartition(".")[0] in names
        }
        if own:
            policy, files = self._load(read_policy, values["policy"], everywhere | own)
        self._check_code(point, policy, files)
        return Setup(
            model=model,
            system=system,
            policies=[policy],
            slots=values.get("slots"),
            ignore_capacity=self._ignore_capacity,
        )

    def _check_code(self, point: Point, policy: PolicySpec, files: list[CodeFile]) -> None:
        """Refuse each Python file that is named, or say which the sweep's file or the policy's file names."""
        named = [str(point.values["policy"])]
        named += [str(value) for path, value in point.values.items() if path.rpartition(".")[2] in FUNCTION_FIELDS]
        for file in files:
            if not self._code:
                refuse_code(f"policy {policy.name}: {file.kind}", file.path)
            if file.in_file:
                note_code(file.where, file.path)
            if self._where is not None and any(one.rpartition(":")[0] == file.path for one in named):
                note_code(self._where, file.path)

    def _load(self, load: Any, source: str, overrides: Mapping[str, Any]) -> Any:
        key = f"{load.__name__} {source} {sorted(overrides.items())!r}"
        if key not in self._loaded:
            try:
                self._loaded[key] = load(source, overrides)
            except MoetraceError as error:
                self._loaded[key] = error
        if isinstance(self._loaded[key], MoetraceError):
            raise self._loaded[key]
        return self._loaded[key]


def error_sentence(error: BaseException) -> str:
    """The sentence about a cell that ended with this error."""
    if isinstance(error, MoetraceError):
        return str(error)
    if isinstance(error, MemoryError):
        return "there is not enough memory for this."
    if isinstance(error, OSError) and error.strerror:
        return f"the system refused{f' {error.filename}' if error.filename else ''}: {error.strerror}."
    first, *_ = [*str(error).splitlines(), ""]
    what = f"{type(error).__name__}: {first[:200].rstrip('.')}" if first else type(error).__name__
    return f"moetrace has a fault that this cell meets ({printable(what)}): please report it."


def files_of(setup: Setup) -> dict[str, str]:
    """Paths of the files that the specs of a setup name, by field: tables of numbers, functions, other packages."""
    model, policy = setup.model, setup.policies[0]
    found: dict[str, Any] = {"model.weight_bits": model.weight_bits, "model.expert_bits": model.expert_bits}
    found["system.link.rates"] = setup.system.link and setup.system.link.rates
    found["system.cluster.rate_factors"] = setup.system.cluster and setup.system.cluster.rate_factors
    found |= {f"policy.{field}": getattr(policy, field) for field in ("loads", "plan", "static", "budget", "layout")}
    files = {field: path for field, path in found.items() if isinstance(path, str) and path != AUTO}
    for field in KINDS:
        file, colon, _ = getattr(policy, field).rpartition(":")
        if colon and file.endswith(".py"):
            files[f"policy.{field}"] = file
        elif source := source_of(field, getattr(policy, field)):
            files[f"policy.{field}"] = str(source)
    return files


def digest(path: str) -> str:
    """SHA-256 of a file's content; of a Python file, with the modules beside it that it imports; of a package, all."""
    hashed = hashlib.sha256()
    if Path(path).is_dir():
        found = sorted(Path(path).rglob("*.py"))
    else:
        found = _with_imports(Path(path)) if path.endswith(".py") else [Path(path)]
    for file in found:
        hashed.update(read_text(file).encode() + b"\0")
    return hashed.hexdigest()


def code_fingerprint() -> list[str]:
    """Moetrace's version, and hashes of all of its source that a figure depends on."""
    return [__version__, *(room_fingerprint(room) for room in _ROOMS)]


def hash_of(inputs: Mapping[str, Any]) -> str:
    """The name of a result: 32 digits of the SHA-256 of its inputs and of `code_fingerprint`."""
    content = [CELL_SCHEMA, code_fingerprint(), inputs]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _inputs(setup: Setup, trace_sha256: str, slots: int) -> dict[str, Any]:
    return {
        "trace": trace_sha256,
        "model": canonical(setup.model),
        "system": canonical(setup.system),
        "policy": canonical(setup.policies[0]),
        "slots": slots,
        "ignore_capacity": setup.ignore_capacity,
        "files": {field: digest(path) for field, path in files_of(setup).items()},
    }


@cache
def _imports(text: str) -> list[str]:
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError, RecursionError):
        return []  # the replay reports the error
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return sorted({name.partition(".")[0] for name in names})


def _with_imports(path: Path) -> list[Path]:
    files = [path]
    for file in files:  # grows
        for name in _imports(read_text(file)):
            beside = file.with_name(f"{name}.py")
            if beside.is_file() and beside not in files:
                files.append(beside)
    return files
