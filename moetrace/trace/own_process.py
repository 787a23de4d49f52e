"""The attributes of a stranger's HDF5 file, read in a process of its own that is ended after a time limit.

Text of variable length, dense storage and old groups are what h5py writes by default, so such traces must be read. But
HDF5 follows their addresses without looking back: a file can keep it busy for ever, or make it end the process. A file
that the other process survives is safe here as well, since HDF5 takes the same steps again.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moetrace.spec.errors import MoetraceError
from moetrace.trace.plain import MAX_CHUNKS
from moetrace.trace.probe import Attributes
from moetrace.trace.schema import ATTRIBUTE_BYTES

TIME_LIMIT_S = 10.0  # some 0.2 s are enough, for a large file too
MEMORY_BYTES = 4 << 30  # of addresses: the packages reserve more than they use
# The other process imports h5py from the same sys.path as this one. Its empty entry, the current folder, is left out: a
# stranger's h5py.py might lie there. -I and -S keep Python from adding to the path and from reading PYTHON* variables.
_PROGRAM = "import runpy, sys; sys.path[:] = sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"


def attributes_apart(
    path: Path, root: Iterable[str], paths: Iterable[str], names: Iterable[str]
) -> dict[str, Attributes]:
    """Open an HDF5 file in another process; return the attributes `root` of its root "/", and `names` of each dataset.

    Raises MoetraceError if HDF5 does not come to an end, or ends the process.
    """
    task = {
        "file": str(path),
        "root": list(root),
        "paths": list(paths),
        "names": list(names),
        "most_bytes": ATTRIBUTE_BYTES,
        "most_chunks": MAX_CHUNKS,
        "cpu_s": int(TIME_LIMIT_S) + 1,
        "memory_bytes": MEMORY_BYTES,
    }
    program = Path(__file__).with_name("probe.py")
    command = [sys.executable, "-I", "-S", "-c", _PROGRAM, str(program), *filter(None, sys.path)]
    quiet = {"OPENBLAS_NUM_THREADS": "1", "HDF5_PLUGIN_PRELOAD": "::"}  # the second: no plug-ins
    try:
        done = subprocess.run(
            command,
            input=json.dumps(task).encode(),
            capture_output=True,
            timeout=TIME_LIMIT_S,
            env=os.environ | quiet,
            check=True,
        )
        return _attributes(json.loads(done.stdout))
    except subprocess.TimeoutExpired:
        why = f"HDF5 did not come to an end within {TIME_LIMIT_S:g} s"
    except subprocess.CalledProcessError as error:
        why = f"HDF5 ended with {f'signal {-error.returncode}' if error.returncode < 0 else f'code {error.returncode}'}"
    except (OSError, ValueError) as error:
        why = f"the process that looks at it failed: {error}"
    raise MoetraceError(f"{path} can't be read as HDF5: {why}. Get it from its origin again.")


def _attributes(answer: Any) -> dict[str, Attributes]:
    return {path: {name: (kind, value) for name, (kind, value) in of.items()} for path, of in answer.items()}
