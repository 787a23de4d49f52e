"""Running a policy's Python file: what runs is what its text says, and nothing that was compiled from another one."""

import contextlib
import hashlib
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader, SourcelessFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from moetrace.spec.errors import MoetraceError
from moetrace.spec.load import MAX_FILE_BYTES
from moetrace.spec.ordinary_file import read_ordinary


def run_file(path: Path) -> ModuleType:
    """Run a Python file as a module of its own and return it.

    A file in a `__pycache__` beside it is neither read nor written, be it of this file or of a module that it imports
    from its own folder. What it prints goes to stderr.

    Raises:
        MoetraceError: It cannot be read, or does not run.
    """
    source = read_ordinary(path, MAX_FILE_BYTES)
    name = f"moetrace_policy_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    try:
        with _imports_from_source(path.resolve().parent), contextlib.redirect_stdout(sys.stderr):
            exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        sys.modules.pop(name, None)  # others may look into the files of all modules, as Hypothesis does
        if isinstance(error, MoetraceError) or not isinstance(error, Exception | SystemExit):
            raise
        raise MoetraceError(f"{path} does not run: {type(error).__name__}: {' '.join(str(error).split())}.") from error
    return module


class _Source(SourceFileLoader):
    """Compiles a module's text each time; what is in `__pycache__` may be of another text."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


class _Finder(MetaPathFinder):
    """Finds what Python's own finder does; what lies in the folder is loaded from its source."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
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
def _imports_from_source(folder: Path) -> Iterator[None]:
    finder = _Finder(folder)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
