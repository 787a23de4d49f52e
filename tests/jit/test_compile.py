"""Kernels compile when they are first needed, once for each type, as parts of whoever names them."""

import gc
import importlib
import pkgutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import moetrace
from moetrace.jit import compile as compile_module
from moetrace.jit.compile import PURE_PYTHON, Kernel, kernel
from moetrace.jit.fingerprint import fingerprint_of

compiled = pytest.mark.skipif(PURE_PYTHON, reason="nothing is compiled")


@kernel
def doubled(x):
    """Return twice ``x``."""
    return x * 2


@kernel
def sum_of_doubled(values, first):
    """Return twice the sum of values, from ``first`` on."""
    total = 0
    for i in range(first, values.size):
        total += doubled(values[i])
    return total


@kernel(inline=False)
def fresh(size):
    """Return an array of ``size`` zeros."""
    return np.zeros(size, np.int64)


@kernel
def with_a_constant(values):
    """Call with a number that begins as a constant."""
    start, total = 0, 0
    while start < values.size:
        total += sum_of_doubled(values, start)
        start += 1
    return total


@pytest.mark.pure
def test_kernels_are_the_functions_that_they_look_like():
    values = np.arange(5)
    assert sum_of_doubled(values, 0) == 20
    assert with_a_constant(values) == sum(2 * values[i:].sum() for i in range(5))
    assert fresh(3).tolist() == [0, 0, 0]
    assert sum_of_doubled.__name__ == "sum_of_doubled" and "twice the sum" in sum_of_doubled.__doc__


@compiled
def test_a_part_compiles_once_for_numbers_and_constants():
    from moetrace.jit.dispatchers import entry

    entry(with_a_constant.py_func, {})(np.arange(5))  # not cached
    (signature,) = sum_of_doubled._part.signatures
    assert str(signature[1]) == "int64"


@compiled
def test_declared_types_are_the_only_ones():
    from numba import types

    declared = kernel(lambda x: x + 1, signature=lambda: types.int64(types.int64))
    assert declared(1) == 2
    with pytest.raises(TypeError):
        declared(np.zeros(3))


@compiled
@pytest.mark.parametrize("is_declared", [True, False])
def test_threads_compile_a_kernel_once(monkeypatch, is_declared):
    from numba import types

    made: list[object] = []
    make = compile_module._entry
    monkeypatch.setattr(compile_module, "_entry", lambda *arguments: made.append(make(*arguments)) or made[-1])
    signature = (lambda: types.int64(types.int64)) if is_declared else None
    shared = kernel(lambda x: x + 1, signature=signature)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(shared(1))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [2] * 8
    assert len(made) == len(shared.entry().signatures) == 1


def every_kernel() -> list[Kernel]:
    found = {}
    for room in ("jit", "engine", "analyze", "generators"):
        package = importlib.import_module(f"moetrace.{room}")
        for module in pkgutil.walk_packages(package.__path__, f"moetrace.{room}."):
            names = vars(importlib.import_module(module.name))
            found |= {id(value): value for value in names.values() if isinstance(value, Kernel)}
    return list(found.values())


@compiled
def test_every_kernel_of_the_package_has_a_fingerprint():
    """So none is compiled in every process."""
    kernels = every_kernel()
    assert len(kernels) > 100
    assert [each.__qualname__ for each in kernels if fingerprint_of(each.py_func) is None] == []


def test_declaring_kernels_loads_no_compiler():
    code = (
        "import sys, moetrace.engine.run, moetrace.engine.recording, moetrace.analyze.cache.hits, moetrace.generators;"
        "assert not {'numba', 'llvmlite'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_numba_is_imported_by_one_room(tmp_path):
    """A stranger's NUMBA_DISABLE_JIT decides what a kernel is, as it does for Numba itself."""
    code = "from moetrace.engine.layer import less; print(type(less).__name__, less(1.0, 2.0))"
    environment = {"PYTHONPATH": str(Path(moetrace.__file__).parents[1]), "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["function", "True"]


class _Unseen(NamedTuple):
    """A class whose type Numba has to look for."""

    x: int


@compiled
def test_types_are_not_looked_up_while_another_thread_compiles():
    """The table of types grew meanwhile: "RuntimeError: dictionary changed size during iteration"."""
    from numba.core.compiler_lock import global_compiler_lock

    found, entry = [], doubled.entry()
    looks_up = threading.Thread(target=lambda: found.append(entry.typeof_pyval(_Unseen(1))), daemon=True)
    with global_compiler_lock:
        looks_up.start()
        looks_up.join(0.1)
        assert looks_up.is_alive() and not found
    looks_up.join(60)
    assert [each.fields for each in found] == [("x",)]


@compiled
@pytest.mark.parametrize("was_enabled", [True, False])
def test_no_cycles_are_looked_for_while_a_kernel_compiles(monkeypatch, was_enabled):
    import moetrace.jit.dispatchers as dispatchers

    seen, heard = [], dispatchers.heard
    monkeypatch.setattr(dispatchers, "heard", lambda *call: (seen.append(gc.isenabled()), heard(*call))[1])
    before = gc.isenabled()
    (gc.enable if was_enabled else gc.disable)()
    try:
        assert kernel(lambda x: x + 2)(1) == 3
        after = gc.isenabled()
    finally:
        (gc.enable if before else gc.disable)()
    assert seen == [False] and after is was_enabled
