#!/usr/bin/env bash
# Numba's cache makes a program fail for good once the class of a named tuple has another name.
#
# Versions: numba 0.68.1, numpy 2.4.6, Python 3.11 or later.
# A function compiled with cache=True takes a NamedTuple. The class is renamed, which changes the source file: one would
# expect the function to be compiled again, as after any edit. Numba keeps in one file the types of all that it compiled,
# and unpickles them before it looks whether they are of this source. The class of the old name is no more, so every
# later run ends with an AttributeError, until somebody removes the cache's files.
# Seen: AttributeError: Can't get attribute 'Point' on the module.
# Who ships a package with cached kernels breaks it by a release that renames such a class.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'numba==0.68.1' 'numpy==2.4.6'
export NUMBA_CACHE_DIR="$folder/cache"
cat > "$folder/shapes.py" <<'PY'
from typing import NamedTuple

import numba


class Point(NamedTuple):
    x: float
    y: float


@numba.njit(cache=True)
def area(point):
    return point.x * point.y


def run():
    print(area(Point(2.0, 3.0)))
PY
cd "$folder"
venv/bin/python -c "import shapes; shapes.run()"
sed -i 's/Point/Corner/' shapes.py
if venv/bin/python -c "import shapes; shapes.run()" 2> error.txt; then
    echo "It compiles again: this has changed." >&2
    exit 1
fi
tail -n 1 error.txt
grep -q "AttributeError: Can't get attribute 'Point'" error.txt
