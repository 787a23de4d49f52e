"""Where compiled code is kept: in folders that nobody else may write to, as Numba unpickles what it finds there.

What the package compiles lies where Numba keeps such things: in the folder that NUMBA_CACHE_DIR names, beside the
source, or in the user's cache. What a user's function compiles to never lies beside its file, which may be a
stranger's: it goes to a folder of the user's, by a name that is made of the function's content.
"""

import contextlib
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

_NEWEST = 128  # compiled functions of users that are kept: an edit makes a new one


def cache_of(function: Callable, fingerprint: str, own: bool) -> Any:
    """Return Numba's cache for a function, with the fingerprint as a part of what makes an entry stale.

    Args:
        function: what is compiled.
        fingerprint: of all that it holds.
        own: whether it is a user's, and not the package's.

    Returns:
        What a dispatcher takes as its ``_cache``.

    Raises:
        RuntimeError: no folder can be written.
    """
    found = _cache_classes()[own](function)
    if own:
        found._cache_file = _index_file(found.cache_path, f"{function.__name__}-{fingerprint[:32]}", fingerprint)
    else:
        found._cache_file._source_stamp = (found._cache_file._source_stamp, fingerprint)
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
def _locators() -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return what finds a folder for the package's kernels, and for users' functions: the first that does serves."""
    import numba.core.config
    from numba.core import caching
    from numba.misc.appdirs import AppDirs

    config: Any = numba.core.config

    def given_folder() -> str | None:
        """Return what NUMBA_CACHE_DIR names, if it may be used."""
        given = config.CACHE_DIR
        if given and Path(given).is_dir() and not is_private(given):
            _say(f"compiled code is not kept in {given}, which NUMBA_CACHE_DIR names, as others may write there")
            return None
        return given

    class Given(caching.UserProvidedCacheLocator):
        def ensure_cache_path(self) -> None:
            _checked(self.get_cache_path(), config.CACHE_DIR)

        @classmethod
        def from_function(cls, py_func: Any, py_file: str) -> Any:
            return super().from_function(py_func, py_file) if given_folder() else None

    class InTree(caching.InTreeCacheLocator):
        def ensure_cache_path(self) -> None:
            Path(self.get_cache_path()).mkdir(exist_ok=True)
            _checked(self.get_cache_path(), self.get_cache_path())

    class UserWide(caching.UserWideCacheLocator):
        def ensure_cache_path(self) -> None:
            _checked(self.get_cache_path(), str(Path(self.get_cache_path()).parent))

    class Fresh(caching.UserWideCacheLocator):
        def get_cache_path(self) -> str:
            return _fresh_folder()

        def get_disambiguator(self) -> str:
            return f"{self.get_suitable_cache_subpath(self._py_file)[-8:]}-{self._lineno}"

    class Own(caching.UserWideCacheLocator):
        def __init__(self, py_func: Any, py_file: str) -> None:
            super().__init__(py_func, py_file)
            self._top = given_folder() or AppDirs(appname="moetrace", appauthor=False).user_cache_dir
            self._cache_path = str(Path(self._top) / "policies")

        def ensure_cache_path(self) -> None:
            _remove_oldest(_checked(self._cache_path, self._top))

    return (Given, InTree, UserWide, Fresh), (Own, Fresh)


@cache
def _cache_classes() -> tuple[Any, Any]:
    """Return the cache classes of the package's kernels, and of users' functions."""
    from numba.core import caching

    class Impl(caching.CompileResultCacheImpl):
        _locator_classes = _locators()[0]  # type: ignore[assignment]

    class OwnImpl(caching.CompileResultCacheImpl):
        _locator_classes = _locators()[1]  # type: ignore[assignment]

    class KernelCache(caching.FunctionCache):
        """Numba's cache, which takes a named tuple for the same as long as its class has the same name."""

        _impl_class = Impl

        def load_overload(self, sig: Any, target_context: Any) -> Any:
            """Find what was compiled; None if nothing was, or for named tuples whose class has another name now.

            Numba unpickles the types of all that is in a file before it looks at the stamp.
            """
            try:
                return super().load_overload(sig, target_context)
            except (AttributeError, ImportError):
                self.flush()
                return None

        def _index_key(self, sig: Any, codegen: Any) -> Any:
            """Add the names of the fields: compiled code knows of their order only."""
            return (*super()._index_key(sig, codegen), tuple(_fields(getattr(sig, "args", sig))))

    class OwnCache(KernelCache):
        """The same for users' functions."""

        _impl_class = OwnImpl

    return KernelCache, OwnCache


def _index_file(folder: str, name: str, stamp: str) -> Any:
    from numba.core.caching import IndexDataCacheFile

    return IndexDataCacheFile(folder, name, stamp)


def _remove_oldest(folder: str) -> None:
    """Leave the newest of users' compiled functions; another process may do the same."""
    files = []
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            if entry.name.endswith(".nbi"):
                files.append((entry.stat().st_mtime, entry.path))
    for _, path in sorted(files)[:-_NEWEST]:
        for each in (Path(path), Path(path.removesuffix(".nbi") + ".1.nbc")):
            each.unlink(missing_ok=True)


def _fields(types: Any) -> Iterator[tuple[str, ...]]:
    """Yield the names of the fields of all named tuples among types, and in them."""
    for each in types:
        if isinstance(fields := getattr(each, "fields", None), tuple):
            yield fields
        inner = getattr(each, "types", None) or getattr(getattr(each, "signature", None), "args", ())
        if isinstance(inner, tuple):
            yield from _fields(inner)
