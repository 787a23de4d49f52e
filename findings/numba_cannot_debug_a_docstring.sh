#!/usr/bin/env bash
# Numba cannot compile a function of nothing but a docstring as soon as line numbers are asked for.
#
# Versions: numba 0.68.1, numpy 2.4.6, Python 3.11 or later.
# A function whose body is only a docstring does nothing, and is a usual way to write a hook that does nothing. It
# compiles. With debug=True, NUMBA_DEBUGINFO=1 or NUMBA_ENABLE_PROFILING=1 Numba looks for the statement after the
# docstring, and raises IndexError from its own code, without a word of the function.
# Seen: None from the plain function, IndexError with debug=True; a `return` after the docstring mends it.
# It keeps whole programs from being profiled: one such function among a simulator's kernels is enough.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'numba==0.68.1' 'numpy==2.4.6'
cat > "$folder/hooks.py" <<'PY'
import numba


def nothing(values):
    """Leave all as it is."""


def returns(values):
    """Leave all as it is."""
    return


seen = {}
for function in (nothing, returns):
    for debug in (False, True):
        try:
            seen[function.__name__, debug] = repr(numba.njit(debug=debug)(function)(1))
        except IndexError as error:
            seen[function.__name__, debug] = f"IndexError: {error}"
        print(f"{function.__name__}, debug={debug}: {seen[function.__name__, debug]}")
assert seen.pop(("nothing", True)) == "IndexError: list index out of range", "this has changed"
assert set(seen.values()) == {"None"}, "this has changed"
PY
"$folder/venv/bin/python" "$folder/hooks.py"
