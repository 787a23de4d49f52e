#!/usr/bin/env bash
# Numba compiles a function for a constant that is never passed to it.
#
# Versions: numba 0.68.1, numpy 2.4.6, Python 3.11 or later.
# A counter starts as `end = 0` and grows in a loop; a jitted function is called with it. One would expect one
# compilation, for int64. Type inference asks while it knows of the 0 only: the function is compiled for
# Literal[int](0), then once more for int64, and only the second one is called. Each level of calls below does so again.
# Seen: two signatures for `leaf` and for `middle`.
# It costs a program of many small kernels a good part of its first compilation; an argument that comes from an array,
# as `end = ends[0]`, is compiled for once.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'numba==0.68.1' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import numba
import numpy as np


@numba.njit
def leaf(values, end):
    return values[end]


@numba.njit
def middle(values, end):
    return leaf(values, end)


@numba.njit
def from_a_constant(values):
    end, total = 0, 0
    while end < values.size:
        total += middle(values, end)
        end += 1
    return total


assert from_a_constant(np.arange(5)) == 10
for function in (leaf, middle):
    integers = [str(signature[1]) for signature in function.signatures]
    print(f"{function.__name__}: compiled for {' and '.join(integers)}")
    assert integers == ["Literal[int](0)", "int64"], "this has changed"
PY
