"""The rules of the house, which docs/contributing.md explains: read from the source, without running it.

Each list of exceptions says why; an exception that is no longer needed must go, too.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "moetrace"

# From the lowest floor to the highest: a room imports from the floors below its own, and not from its neighbours.
FLOORS = (
    {"jit"},
    {"spec"},
    {"trace"},
    {"calibration", "capture", "importers"},
    {"live"},
    {"engine"},
    {"analyze"},
    {"generators"},
    {"exports", "lints"},
    {"results"},
    {"show"},
    {"batch"},
    {"cli"},
)
ROOMS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
HEAVY = {"numba", "h5py", "polars", "click", "rich"}
FORBIDDEN = {room: {"numba", "click", "rich"} for room in ROOMS} | {
    "jit": {"h5py", "polars", "click", "rich"},
    "spec": HEAVY,
    "engine": HEAVY,
    "cli": {"numba"},
}

# (importing file, imported module): why.
UPWARD = {
    ("results/result.py", "show.plot"): "Result.plot draws, and nothing else here does",
}
UPWARD_IN_TEXT = {
    "spec/choices.py": "the folder is the registry: it names the folders of the engine that hold records of choices",
    "engine/residencies/": "a record names what replays the same rule in `analyze cache`, resolved there only",
    "engine/placements/": "a record names what plans by it in `analyze balance`, resolved there only",
}
HEAVY_IMPORTS = {
    ("engine/replay.py", "numba"): "declares the types that the replay is compiled for",
    ("engine/state.py", "numba"): "declares the types that the replay is compiled for",
    ("engine/bounds.py", "numba"): "declares the types that the bounds are compiled for",
    ("engine/lower_bound.py", "numba"): "declares the types that the bound is compiled for",
    ("engine/cluster/cluster_replay.py", "numba"): "declares the types that the replay of a cluster is compiled for",
    ("engine/plugin.py", "numba"): "says in one sentence what Numba refuses in a user's function",
}
NUMBA_AT_THE_TOP = {
    "jit/pipeline.py",
    "jit/read_only.py",
}  # they derive classes from Numba's, and are imported when a kernel compiles
LONG_MODULES: dict[str, str] = {}
LONG_FUNCTIONS: dict[tuple[str, str], str] = {}
MANY_PARAMETERS: dict[tuple[str, str], str] = {}
CLASSES_TWICE: dict[str, str] = {}
CHOICES = tuple(f"engine.{kind}." for kind in ("placements", "dispatches", "residencies", "prefetches"))
MODULES_TWICE = {
    "eplb": "the algorithm of that name, and the format that exports counts for it",
    "npz": "one format: an exporter and an importer are named by their format",
    "oracle_general": "the same",
    "prefetch": "the folder of a question, and the same in the replay",
    "replay": "the public function, and the loop in Numba that it ends in",
}


class Module:
    """A file of the package."""

    def __init__(self, path: Path) -> None:
        self.file = path.relative_to(PACKAGE).as_posix()
        self.lines = path.read_text(encoding="utf-8").splitlines()
        self.tree = ast.parse("\n".join(self.lines))
        self.room = self.file.partition("/")[0]
        parts = self.file.removesuffix(".py").split("/")
        self.name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def imports(self) -> Iterator[tuple[str, bool]]:
        """Yield every module that is imported, wherever in the file, and whether that is at the top level."""
        top = {id(node) for node in self.tree.body}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((alias.name, id(node) in top) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{self.file}: imports are absolute"
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    yield whole if whole.removeprefix("moetrace.") in modules() else str(node.module), id(node) in top

    def functions(self) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        """Yield every function with its name, behind that of the class or function that it stands in."""
        yield from _functions(self.tree, "")


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        name = f"{prefix}{child.name}" if isinstance(child, ast.FunctionDef | ast.ClassDef) else ""
        if isinstance(child, ast.FunctionDef):
            yield name, child
        yield from _functions(child, f"{name}." if name else prefix)


@cache
def modules() -> dict[str, Module]:
    """Every file in a room, by its name without `moetrace.`."""
    found = [Module(path) for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE]
    return {module.name: module for module in found}


def _inner_imports() -> Iterator[tuple[Module, str]]:
    for module in modules().values():
        for name, _ in module.imports():
            if name == "moetrace" or name.startswith("moetrace."):
                yield module, name.removeprefix("moetrace").removeprefix(".")


def _check(found: Iterable, listed: Iterable) -> None:
    """Check that what breaks a rule is what is listed, no more and no less."""
    found, listed = set(found), set(listed)
    assert (found - listed, listed - found) == (set(), set()), "(breaks the rule, is listed but no longer does)"


def test_every_room_has_a_floor_and_says_what_it_is():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == set(ROOMS)
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "version.py"}
    folders = {path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []
    silent = [name for name, module in modules().items() if not ast.get_docstring(module.tree)]
    assert silent == []


def test_arrows_point_down():
    found = set()
    for module, name in _inner_imports():
        room = name.partition(".")[0]
        if name == "version" or room == module.room:
            continue
        assert room in ROOMS, f"{module.file} imports moetrace.{name}: import from the room itself"
        if ROOMS[room] >= ROOMS[module.room]:
            found.add((module.file, name))
    _check(found, UPWARD)


def test_arrows_in_text_point_down_too():
    """A module's name in a string, to be imported later, counts like an import."""
    found = set()
    for module in modules().values():
        for node in ast.walk(module.tree):
            named = re.fullmatch(r"moetrace\.(\w+)[\w.]*(:\w+)?", str(getattr(node, "value", "")))
            if isinstance(node, ast.Constant) and named and ROOMS.get(named[1], 0) > ROOMS[module.room]:
                found.add(module.file if module.room != "engine" else f"{module.file.rpartition('/')[0]}/")
    _check(found, UPWARD_IN_TEXT)


def test_no_circle_among_modules():
    arrows = defaultdict(set)
    for module, name in _inner_imports():
        if name != module.name and (module.file, name) not in UPWARD:
            arrows[module.name].add(name)
    open_, done = [], set()

    def walk(name: str) -> None:
        assert name not in open_, f"a circle: {' -> '.join([*open_[open_.index(name) :], name])}"
        if name not in done:
            open_.append(name)
            for other in sorted(arrows[name]):
                walk(other)
            done.add(open_.pop())

    for name in modules():
        walk(name)


def test_heavy_packages_stay_in_their_rooms():
    found, top = set(), set()
    for module in modules().values():
        for name, at_top in module.imports():
            package = name.partition(".")[0]
            if package in FORBIDDEN[module.room]:
                found.add((module.file, package))
            if package == "numba" and at_top:
                top.add(module.file)
    _check(found, HEAVY_IMPORTS)
    assert top == NUMBA_AT_THE_TOP


def test_modules_have_400_lines_at_most():
    files = [path for folder in ("moetrace", "tests", "bench") for path in (ROOT / folder).rglob("*.py")]
    long = {path.relative_to(ROOT).as_posix() for path in files if len(path.read_text().splitlines()) > 400}
    _check(long, LONG_MODULES)


def test_functions_have_70_lines_and_8_parameters_at_most():
    long, wide = set(), set()
    for module in modules().values():
        for name, function in module.functions():
            if _lines(function) > 70:
                long.add((module.file, name))
            given = function.args
            positional = [a.arg for a in (*given.posonlyargs, *given.args) if a.arg not in ("self", "cls")]
            public = not any(part.startswith("_") for part in name.split(".") if part != "__init__")
            counted = positional if public else [*positional, *given.kwonlyargs]
            if len(counted) > 8 and not _is_command(function):
                wide.add((module.file, name))
    _check(long, LONG_FUNCTIONS)
    _check(wide, MANY_PARAMETERS)


def _lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many lines a function has beside its docstring, which says as much as there is to say."""
    first, docstring = function.body[0], ast.get_docstring(function) is not None
    said = (first.end_lineno or 0) - first.lineno + 1 if docstring else 0
    return (function.end_lineno or 0) - function.lineno + 1 - said


def _decorators(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    return [ast.unparse(d.func if isinstance(d, ast.Call) else d) for d in function.decorator_list]


def _is_command(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return "click.command" in _decorators(function)


def test_kernels_say_what_they_do():
    silent = {
        (module.file, name)
        for module in modules().values()
        for name, function in module.functions()
        if "kernel" in _decorators(function) and not ast.get_docstring(function)
    }
    assert silent == set()


def test_kernels_stand_in_rooms_of_kernels():
    found = {
        module.room
        for module in modules().values()
        for _, function in module.functions()
        if "kernel" in _decorators(function)
    }
    assert found <= {"jit", "engine", "analyze", "generators"}


def test_what_is_compiled_is_more_than_a_docstring():
    """Numba can't compile a docstring alone with line numbers, as a profiler wants them."""
    alone = {
        (module.file, name)
        for module in modules().values()
        for name, function in module.functions()
        if module.room in {"engine", "analyze", "generators"}
        and len(function.body) == 1
        and ast.get_docstring(function)
    }
    assert alone == set()


def test_no_class_is_named_as_another():
    places = defaultdict(set)
    for module in modules().values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].add(module.file)
    _check({name for name, files in places.items() if len(files) > 1}, CLASSES_TWICE)


def test_no_module_is_named_as_another():
    places = defaultdict(set)
    for name in modules():
        # Commands are named by what they call, records by the choice.
        if not name.startswith(("cli.commands.", *CHOICES)):
            places[name.rpartition(".")[2]].add(name)
    _check({name for name, found in places.items() if len(found) > 1}, MODULES_TWICE)


def test_names_say_something():
    names = [name for module in modules().values() for name in module.name.split(".")]
    names += [
        node.name
        for module in modules().values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    ]
    empty = re.compile(r"_*Base([A-Z]\w*)?|\w*Manager|_*(utils?|helpers?|common|misc)")
    assert [name for name in names if empty.fullmatch(name)] == []


def test_tests_mirror_the_package():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and list(path.rglob("*.py"))}
    assert folders - {"support"} <= set(ROOMS)
