"""Where compiled code is kept: in folders that nobody else may write to, as Numba unpickles what it finds there.

They lie in the folder that NUMBA_CACHE_DIR names, or in the user's cache, under a hash of the function's content: two
copies of the package, as a clone and an installed one, compile once. Nothing lies beside a source: that of a user's
function may be a stranger's.
"""

import contextlib
import glob
import hashlib
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

# Compiled functions that are kept, of the package and of users: an edit makes new ones. All commands need some 60.
_NEWEST = {"kernels": 512, "policies": 128}


def cache_of(function: Callable, fingerprint: str, own: bool) -> Any:
    """Return Numba's cache for a function.

    Args:
        function: what is compiled.
        fingerprint: of all that it holds.
        own: whether it is a user's, and not the package's.

    Returns:
        The object that a dispatcher takes as its ``_cache``.

    Raises:
        RuntimeError: no folder can be written.
    """
    found = _cache_class("policies" if own else "kernels")(function)
    found.fingerprint = fingerprint
    return found


def is_private(folder: str | Path) -> bool:
    """Whether a folder is this user's, and one that not everybody may write to."""
    if not hasattr(os, "getuid"):
        return True
    found = Path(folder).stat()
    return found.st_uid == os.getuid() and not found.st_mode & stat.S_IWOTH


@cache
def _fresh_folder() -> str:
    """Make a folder for this process, and say so."""
    folder = tempfile.TemporaryDirectory(prefix="moetrace-")
    _keep.append(folder)
    _say("there is no folder of yours to keep compiled code in, so each run compiles: set NUMBA_CACHE_DIR to one")
    return folder.name


_keep: list[Any] = []


@cache
def _say(sentence: str) -> None:
    if sys.stderr is not None:
        print(f"moetrace: note: {sentence}.", file=sys.stderr)


def _checked(folder: str, top: str) -> str:
    """Make a folder under ``top``, for this user only; raise OSError if it, or ``top``, is another's."""
    for each in (top, folder):
        Path(each).mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_private(each):
            raise PermissionError(f"{each} is another user's")
    tempfile.TemporaryFile(dir=folder).close()
    return folder


@cache
def _locators(kind: str) -> tuple[Any, ...]:
    """Return what finds a folder for a kind of functions: the first that does serves."""
    import numba.core.config
    from numba.core import caching
    from numba.misc.appdirs import AppDirs

    config: Any = numba.core.config
    # Numba before 0.62 has it as a private name.
    users: Any = getattr(caching, "UserWideCacheLocator", None) or vars(caching)["_UserWideCacheLocator"]

    def given_folder() -> str | None:
        """Return what NUMBA_CACHE_DIR names, if it may be used."""
        given = config.CACHE_DIR
        if given and Path(given).is_dir() and not is_private(given):
            _say(f"compiled code is not kept in {given}, which NUMBA_CACHE_DIR names, as others may write there")
            return None
        return given

    class Fresh(users):
        def get_cache_path(self) -> str:
            return _fresh_folder()

        def get_disambiguator(self) -> str:
            return f"{self.get_suitable_cache_subpath(self._py_file)[-8:]}-{self._lineno}"

    class Own(users):
        def __init__(self, py_func: Any, py_file: str) -> None:
            super().__init__(py_func, py_file)
            self._top = given_folder() or AppDirs(appname="moetrace", appauthor=False).user_cache_dir
            self._cache_path = str(Path(self._top) / kind)

        def ensure_cache_path(self) -> None:
            _ready_folder(self._cache_path, self._top)

    return Own, Fresh


@cache
def _runtime() -> Any:
    """Return Numba's runtime, all that the package's compiled code needs; None where Numba is not as we know it.

    Numba first loads all that lowers code: half of what a command takes, and only a compilation needs it. It does so
    itself when it compiles. A user's function may need more than the package's own.
    """
    try:
        from numba.core.runtime.nrt import rtsys
    except ImportError:
        return None
    return rtsys if hasattr(rtsys, "initialize") else None


@cache
def _cache_class(kind: str) -> Any:
    """Return the cache class of a kind of functions."""
    from numba.core import caching

    class Impl(caching.CompileResultCacheImpl):
        _locator_classes = _locators(kind)  # type: ignore[assignment]

    class KernelCache(caching.FunctionCache):
        """Numba's cache, which takes a named tuple for the same as long as its class has the same name.

        Each function and signature has files of its own. Numba has one index for all signatures of a function, and two
        processes that add to it at once may give two of them the same data file.
        """

        _impl_class = Impl
        fingerprint = ""

        def save_overload(self, sig: Any, data: Any) -> None:
            """Store the compiled code."""
            self._take_file(sig)
            super().save_overload(sig, data)

        def load_overload(self, sig: Any, target_context: Any) -> Any:
            """Find the compiled code; None without any, or for named tuples whose class has another name now.

            Numba unpickles the types of all that is in a file before it looks at the stamp.
            """
            self._take_file(sig)
            try:
                if kind == "kernels" and (runtime := _runtime()) is not None:
                    runtime.initialize(target_context)
                    with self._guard_against_spurious_io_errors():
                        return self._load_overload(sig, target_context)
                    return None
                return super().load_overload(sig, target_context)
            except (AttributeError, ImportError):
                self.flush()
                return None

        def _take_file(self, sig: Any) -> None:
            """Have the files of a signature; Numba's own lock is held."""
            held = f"{self.fingerprint} {sys.implementation.cache_tag} {sig} {[*_fields(getattr(sig, 'args', sig))]}"
            name = f"{self._py_func.__name__}-{hashlib.sha256(held.encode()).hexdigest()[:32]}"
            self._cache_file = _index_file(self.cache_path, name, self.fingerprint)

        def _index_key(self, sig: Any, codegen: Any) -> Any:
            """Add the names of the fields: compiled code knows of their order only."""
            return (*super()._index_key(sig, codegen), tuple(_fields(getattr(sig, "args", sig))))

    return KernelCache


def _index_file(folder: str, name: str, stamp: str) -> Any:
    from numba.core.caching import IndexDataCacheFile

    return IndexDataCacheFile(folder, name, stamp)


@cache
def _ready_folder(folder: str, top: str) -> None:
    """Prepare a folder under ``top`` for compiled code; raise OSError if that fails."""
    _remove_oldest(_checked(folder, top), _NEWEST[Path(folder).name])


def _remove_oldest(folder: str, newest: int) -> None:
    """Leave the newest compiled functions; another process may do the same."""
    files = []
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            if entry.name.endswith(".nbi"):
                files.append((entry.stat().st_mtime, entry.path))
    for _, path in sorted(files)[:-newest]:
        Path(path).unlink(missing_ok=True)
        for each in Path(folder).glob(f"{glob.escape(Path(path).stem)}.*.nbc"):
            each.unlink(missing_ok=True)


def _fields(types: Any) -> Iterator[tuple[str, ...]]:
    """Yield the names of the fields of all named tuples among types, and in them."""
    for each in types:
        if isinstance(fields := getattr(each, "fields", None), tuple):
            yield fields
        inner = getattr(each, "types", None) or getattr(getattr(each, "signature", None), "args", ())
        if isinstance(inner, tuple):
            yield from _fields(inner)
