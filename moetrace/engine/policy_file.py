"""Running a policy's Python file: its text runs, and never code compiled from another text."""

import contextlib
import hashlib
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader, SourcelessFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from moetrace.spec.errors import MoetraceError
from moetrace.spec.load import MAX_FILE_BYTES
from moetrace.spec.ordinary_file import read_ordinary

_INSTALLED = {"site-packages", "dist-packages"}
# Modules are looked up in one table of the process. A file that replays may run another one.
_one_at_a_time = threading.RLock()
_running = threading.local()


def run_file(path: Path) -> ModuleType:
    """Run a Python file as a module of its own and return it.

    It may import modules of its own folder. They are run each time, as the file is, and no other file sees them: one
    in another folder may have modules of the same names. A `__pycache__` beside it is neither read nor written, be it
    of this file or of such a module. Its output goes to stderr.

    Raises:
        MoetraceError: It cannot be read, or does not run.
    """
    source = read_ordinary(path, MAX_FILE_BYTES)
    name = f"moetrace_policy_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    try:
        with _one_at_a_time, _noted(), _own_modules(path.resolve().parent), contextlib.redirect_stdout(sys.stderr):
            exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        sys.modules.pop(name, None)  # others may look into the files of all modules, as Hypothesis does
        if isinstance(error, MoetraceError) or not isinstance(error, Exception | SystemExit):
            raise
        if isinstance(error, SyntaxError) and error.filename == str(path):
            raise MoetraceError(f"{path.name}:{error.lineno} is not Python: {error.msg}.") from error
        raise MoetraceError(f"{path} does not run: {type(error).__name__}: {' '.join(str(error).split())}.") from error
    return module


def is_running() -> bool:
    """Whether this thread runs a policy's file: an object that is not a policy matters only when it is chosen."""
    return getattr(_running, "depth", 0) > 0


@contextlib.contextmanager
def _noted() -> Iterator[None]:
    _running.depth = getattr(_running, "depth", 0) + 1
    try:
        yield
    finally:
        _running.depth -= 1


class _Source(SourceFileLoader):
    """Compiles a module's text each time; code in `__pycache__` may be of another text."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


class _Finder(MetaPathFinder):
    """Finds what Python's own finder does, in the folder first; modules there are loaded from source."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = None
        if path is None and fullname not in sys.stdlib_module_names:
            spec = PathFinder.find_spec(fullname, [str(self._folder)], target)
        if spec is None or spec.origin is None:
            spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None or not Path(spec.origin).resolve().is_relative_to(self._folder):
            return None
        if isinstance(spec.loader, SourcelessFileLoader):
            raise ImportError(f"{spec.origin} has no source beside it", name=fullname)
        if isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Source(spec.loader.name, spec.loader.path)
            spec.cached = None
        return spec


@contextlib.contextmanager
def _own_modules(folder: Path) -> Iterator[None]:
    """Within the block, imports find the folder's own modules; at its end they leave the table of modules.

    Others of the same names, as those of a script that replays, are set aside meanwhile. Modules that are installed, or
    belong to a package imported before, stay: many cannot be loaded twice.
    """
    aside = dict(_with_parts(_hiding(folder)))
    for name in aside:
        del sys.modules[name]
    known = {name.partition(".")[0] for name in sys.modules}
    finder = _Finder(folder)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        new = {name for name in sys.modules if "." not in name} - known
        for name, _ in _with_parts({name for name in new if _place(name).parent == folder}):
            del sys.modules[name]
        sys.modules.update(aside)


def _hiding(folder: Path) -> set[str]:
    """Names of modules of a program that are not the folder's, which has a module of that name."""
    found = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    found = {name for name in found & set(sys.modules) if not name.startswith("__")}
    found -= {*sys.stdlib_module_names, "moetrace"}
    return {name for name in found if _place(name).parent != folder and not _INSTALLED & {*_place(name).parts}}


def _place(name: str) -> Path:
    """The file of a module, or the folder of a package."""
    module = sys.modules[name]
    places = [*getattr(module, "__path__", ()), getattr(module, "__file__", None) or "/"]
    return Path(places[0]).resolve()


def _with_parts(names: set[str]) -> list[tuple[str, ModuleType]]:
    """Modules of these names, and of packages their parts."""
    return [(name, module) for name, module in list(sys.modules.items()) if name.partition(".")[0] in names]
