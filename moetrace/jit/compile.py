"""How kernels are compiled: when first needed, without the GIL or bounds checks, cached, and never stale."""

import contextlib
import functools
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from moetrace.jit.dispatchers import entry, part
from moetrace.jit.fingerprint import fingerprint_of
from moetrace.jit.kernel_cache import cache_of

if TYPE_CHECKING:
    from numba.core.dispatcher import Dispatcher

# NUMBA_DISABLE_JIT=1: kernels are what they look like. Numba reads the same variable, but takes 0.3 s to import.
PURE_PYTHON = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")


def kernel(
    function: Callable | None = None,
    *,
    signature: Callable[[], Any] | None = None,
    inline: bool = True,
    checked: bool = False,
) -> Any:
    """Declare a kernel: usable as ``@kernel`` or ``@kernel(inline=False)``. Nothing is compiled, nor Numba imported.

    Division by zero follows IEEE 754 and array bounds are not checked, unless the kernel is ``checked``: its inputs
    were checked before. Where no folder can be written the kernel works uncached.

    Args:
        function: the kernel. Its globals may be constants, named tuples, NumPy's functions and other kernels.
        signature: returns the types that it is compiled for, and no others; by default, those of its first call.
        inline: within other kernels it becomes a part of its caller and counts no references to arrays, so it may not
            make any: with calls and counts, the replay of a layer at batch 1 took 9 times as long, passing the
            state's arrays around.
        checked: for a user's function: check array bounds, let a division by zero raise, and keep what it compiles to
            in the user's own cache.

    Returns:
        A `Kernel`; the function itself where NUMBA_DISABLE_JIT is set.
    """
    if function is None:
        return functools.partial(kernel, signature=signature, inline=inline, checked=checked)
    return function if PURE_PYTHON else Kernel(function, signature, inline, checked)


class Kernel:
    """A function that Numba compiles when it is first called from Python, or by a kernel that is compiled itself.

    Attributes:
        py_func: the function as it was written.
    """

    def __init__(self, function: Callable, signature: Callable[[], Any] | None, inline: bool, checked: bool) -> None:
        functools.update_wrapper(self, function)
        self.py_func = function
        self._signature, self._inline, self._checked = signature, inline, checked
        self._entry: Dispatcher | None = None
        self._part: Any = None
        # Who compiles holds the first one, then Numba's own lock, then the second one of each kernel that is named.
        self._entry_lock, self._part_lock = threading.Lock(), threading.Lock()

    def __call__(self, *arguments: Any) -> Any:
        """Run the kernel, compiled or fetched from the cache if it has not been yet."""
        entry = self._entry
        return (self.entry() if entry is None else entry)(*arguments)

    def entry(self) -> "Dispatcher":
        """Return the dispatcher that Python calls, compiled or fetched from the cache if the types are declared."""
        with self._entry_lock:
            if self._entry is None:
                entry = _entry(self.py_func, self._inline, self._checked)
                if self._signature is not None:
                    entry.compile(self._signature())
                    entry.disable_compile()
                self._entry = entry
            return self._entry

    @property
    def stats(self) -> Any:
        """Numba's counts of compiled functions, and of those found in the cache."""
        return self.entry().stats

    @property
    def targetoptions(self) -> dict[str, Any]:
        """How it is compiled as a part of other kernels."""
        return _options(self._inline, self._checked) | {"forceinline": self._inline}

    @property
    def _numba_type_(self) -> Any:
        """The Numba type of this where another kernel names it."""
        with self._part_lock:
            if self._part is None:
                self._part = part(self.py_func, self.targetoptions)
            return self._part._numba_type_


def compile_now(*kernels: Any) -> None:
    """Compile kernels whose types are declared, or fetch them from the cache."""
    for each in kernels:
        if isinstance(each, Kernel):
            each.entry()


def _options(inline: bool, checked: bool) -> dict[str, Any]:
    error_model = "python" if checked else "numpy"
    return {"nogil": True, "error_model": error_model, "boundscheck": checked, "_nrt": not inline}


def _entry(function: Callable, inline: bool, checked: bool) -> "Dispatcher":
    options = _options(inline, checked)
    dispatcher = entry(function, options)
    fingerprint = fingerprint_of(function, repr(options))
    if fingerprint is not None:
        with contextlib.suppress(RuntimeError):  # no folder can be written
            dispatcher._cache = cache_of(function, fingerprint, checked)
    return dispatcher
