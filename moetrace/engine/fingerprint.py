"""What compiled code depends on: beside its own lines, whatever its globals were when it was compiled."""

import hashlib
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np

HERE = Path(__file__).parent
_PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic)
# What these packages bring changes with their versions alone, and Numba's own cache knows its version.
_SETTLED = {*sys.stdlib_module_names, "numpy", "numba", "llvmlite", "moetrace"}


@cache
def engine_fingerprint() -> str:
    """Return the SHA-256 of every source file of the engine.

    Numba's own cache notices an edit of the file that a kernel stands in, not of the files whose functions were
    compiled into it; with this as a part of the key no kernel outlives an edit anywhere in the engine.
    """
    return folder_fingerprint(HERE)


def fingerprint_beside(function: Callable) -> str:
    """Return the fingerprint of a kernel of moetrace: of the engine, and of the folder that the kernel stands in."""
    folder = Path(function.__code__.co_filename).parent
    return engine_fingerprint() if folder == HERE else f"{engine_fingerprint()} {folder_fingerprint(folder)}"


@cache
def folder_fingerprint(folder: Path) -> str:
    """Return the SHA-256 of the Python files of a folder, without those in folders of its own."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def fingerprint_of(function: Callable) -> str | None:
    """Return the fingerprint of a function: of the engine, and of the values of the globals that the code names.

    Functions among them are followed, whatever file they stand in, and so are modules. None if a value is of a kind
    whose content cannot be told: then the function had better be compiled in every process.
    """
    parts = [engine_fingerprint(), np.__version__]
    try:
        _follow(function, parts, set())
    except TypeError:
        return None
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _follow(value: Any, parts: list[str], seen: set[int], names: tuple[str, ...] = ()) -> None:
    value = getattr(value, "py_func", value)
    if isinstance(value, _PLAIN):
        parts.append(f"{type(value).__name__} {value!r}")
    elif isinstance(value, np.ndarray):
        parts.append(f"{value.dtype} {value.shape} {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}")
    elif id(value) in seen:
        return
    elif isinstance(value, tuple):
        for item in value:
            _follow(item, parts, seen, names)
    elif _home(value) in _SETTLED:
        parts.append(str(getattr(value, "__qualname__", value)))
    elif isinstance(value, ModuleType):
        for name in names:
            if hasattr(value, name):
                _follow(getattr(value, name), parts, seen, names)
    elif isinstance(value, FunctionType):
        seen.add(id(value))
        _follow_code(value, parts, seen)
    else:
        raise TypeError(f"cannot tell what {value!r} holds")


def _follow_code(function: FunctionType, parts: list[str], seen: set[int]) -> None:
    names = _describe(function.__code__, parts)
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    values = [function.__globals__[name] for name in names if name in function.__globals__]
    for value in (*cells, *(function.__defaults__ or ()), *values):
        _follow(value, parts, seen, names)


def _describe(code: CodeType, parts: list[str]) -> tuple[str, ...]:
    """Note a code object's instructions and constants, nested ones too; return the names in it."""
    parts.append(f"{code.co_code.hex()} {code.co_names} {code.co_varnames}")
    names = code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names += _describe(constant, parts)
        else:
            parts.append(repr(constant))
    return names


def _home(value: Any) -> str:
    """Return the top-level package that a module, function, class or object of a class comes from."""
    module = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return (module or type(value).__module__).partition(".")[0]
