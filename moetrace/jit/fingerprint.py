"""The dependencies of compiled code: its own lines, and the values of its globals when it was compiled.

Numba's cache notices an edit of the file that a kernel stands in. A compiled-in value may be defined anywhere: a
constant of a module that is imported by the module of a function that it calls.
"""

import dis
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np

_HERE = Path(__file__).parent
_NAMED = (type, ModuleType, FunctionType, BuiltinFunctionType, np.ufunc)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic)
# Functions of these packages change only with their versions, which are a part of the fingerprint.
_NO_FILES = ("<built in>", "<frozen ", "<__array_function__")  # and not "<string>", which is anybody's
_SETTLED = {*sys.stdlib_module_names, "numpy", "numba", "llvmlite"}


@cache
def room_fingerprint(*rooms: str) -> str:
    """Return the SHA-256 of every source file of rooms of the package (``"engine"``), with those of their folders.

    Args:
        rooms: names of folders of the package.

    Returns:
        64 hexadecimal digits.
    """
    package = _HERE.parent
    found = [path for room in rooms for path in sorted((package / room).rglob("*.py"))]
    return _files(package, *(path.relative_to(package).as_posix() for path in found))


@cache
def _files(folder: Path, *names: str) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode() + b"\0" + (folder / name).read_bytes() + b"\0")
    return digest.hexdigest()


def fingerprint_of(function: Callable, options: str = "") -> str | None:
    """Return a fingerprint of all that a compiled function holds: its code, and the globals that the code names.

    Functions among them are followed, in the file that they stand in, and so are kernels, modules and named tuples.

    Args:
        function: a kernel or a policy, as it was written.
        options: what else decides how it is compiled.

    Returns:
        64 hexadecimal digits; None if a value is of a kind whose content cannot be hashed, as an open file: such a
        function must be compiled in every process.
    """
    import numba

    ours = _files(_HERE, "compile.py", "dispatchers.py", "pipeline.py", "read_only.py", "addresses.py")
    parts = [ours, np.__version__, numba.__version__, options]
    try:
        parts += _describe_function(function, set())
    except (TypeError, ValueError):  # ValueError: of a cell without a content yet
        return None
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _describe(value: Any, seen: set[Any], attributes: tuple[str, ...]) -> Iterator[str]:
    """Yield the content of a value; of a module, the ``attributes`` that code names."""
    if hasattr(value, "targetoptions"):  # a kernel, or a function under @njit
        yield f"{sorted(value.targetoptions.items(), key=str)!r} {getattr(value, 'locals', None)!r}"
    value = getattr(value, "py_func", getattr(value, "_pyfunc", value))
    if isinstance(value, _PLAIN):
        yield f"{type(value).__name__} {value!r}"
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype} {value.shape} {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"
    elif isinstance(value, np.dtype):
        yield f"{value!r} {value.itemsize}"
    elif isinstance(value, tuple):
        yield f"tuple {len(value)}"
        for item in value:
            yield from _describe(item, seen, attributes)
    elif isinstance(value, type) and issubclass(value, tuple) and hasattr(value, "_fields"):
        yield f"{value.__qualname__} {vars(value)['_fields']}"
    elif _is_settled(value):
        yield str(getattr(value, "__qualname__", repr(value)))
    elif isinstance(value, ModuleType):
        if (id(value), attributes) not in seen:
            seen.add((id(value), attributes))
            for name in attributes:
                if hasattr(value, name):
                    yield from _describe(getattr(value, name), seen, attributes)
    elif isinstance(value, FunctionType):
        yield from _describe_function(value, seen)
    else:
        raise TypeError(f"cannot tell what {value!r} holds")


def _describe_function(function: Any, seen: set[Any]) -> Iterator[str]:
    if id(function) in seen:
        return
    seen.add(id(function))
    globals_named, attributes = _names(function.__code__)
    yield from _describe_code(function.__code__)
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    values = [function.__globals__[name] for name in globals_named if name in function.__globals__]
    for value in (*cells, *(function.__defaults__ or ()), *values):
        yield from _describe(value, seen, attributes)


def _describe_code(code: CodeType) -> Iterator[str]:
    """Yield a code object's instructions and constants, nested ones too."""
    yield f"{code.co_code.hex()} {code.co_names} {code.co_varnames}"
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _describe_code(constant)
        else:
            yield repr(constant)


@cache
def _names(code: CodeType) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of globals that a code object loads, and the names that it may ask a module for."""
    found, attributes = [], list(code.co_names)
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            found.append(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner, more = _names(constant)
            found += inner
            attributes += more
    return tuple(dict.fromkeys(found)), tuple(dict.fromkeys(attributes))


def _is_settled(value: Any) -> bool:
    """Whether a value is of Python, NumPy or Numba, whose versions say what it is."""
    if _home(value) not in _SETTLED:
        return False
    if isinstance(value, FunctionType):
        return _comes_with_python(value.__code__.co_filename)
    if isinstance(value, ModuleType):
        return _comes_with_python(getattr(value, "__file__", None) or "<built in>")
    return isinstance(value, _NAMED) or _home(type(value)) == "numba"


def _comes_with_python(file: str) -> bool:
    """Whether a file is of the standard library, NumPy or Numba; a user's module may be named as one of theirs."""
    path, (stdlib, *packages) = Path(file), _homes_of_settled()
    if path.is_relative_to(stdlib) and not {"site-packages", "dist-packages"} & {*path.relative_to(stdlib).parts}:
        return True
    return file.startswith(_NO_FILES) or any(path.is_relative_to(folder) for folder in packages)


@cache
def _homes_of_settled() -> list[Path]:
    import numba

    return [Path(os.__file__).parent, Path(np.__file__).parent, Path(numba.__file__).parent]


def _home(value: Any) -> str:
    """Return the top-level package that a module, function, class or object of a class comes from."""
    module = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return (module or type(value).__module__).partition(".")[0]
