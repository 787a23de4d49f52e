"""Traces of a sweep in other batches: each is rebatched once, and kept."""

import hashlib
import shutil
import tempfile
import weakref
from pathlib import Path

from moetrace.batch.cell import Traces
from moetrace.batch.grid import Point
from moetrace.jit.fingerprint import room_fingerprint
from moetrace.spec.errors import MoetraceError
from moetrace.spec.ordinary_file import is_folder
from moetrace.trace import Trace
from moetrace.trace.rebatch import rebatch
from moetrace.version import __version__

FOLDER = "batched"


class Rebatched:
    """Traces by their path and batch, in the folder of a sweep; without one, for as long as this lives."""

    def __init__(self, traces: Traces, folder: Path | None) -> None:
        """Write nothing yet; `folder` is the sweep's, and may be a stranger's."""
        self._traces, self._folder = traces, folder
        self._here: Path | None = None  # a temporary folder
        self._found: dict[tuple[str, int], str] = {}

    def placed(self, point: Point) -> Point:
        """Return the point with the trace in its batch; unchanged if it names no batch.

        Raises MoetraceError if the trace cannot be read, or that of the batch not be written.
        """
        batch = point.values.get("batch")
        if batch is None:
            return point
        path = str(point.values["trace"])
        if (path, batch) not in self._found:
            self._found[path, batch] = self._rebatched(path, batch)
        return point._replace(values=point.values | {"trace": self._found[path, batch]})

    def _rebatched(self, path: str, batch: int) -> str:
        trace, sha256 = self._traces.get(path)
        facts = [sha256, str(batch), __version__, room_fingerprint("trace")]
        file = self._target() / f"{hashlib.sha256(' '.join(facts).encode()).hexdigest()[:32]}.h5"
        if not _is_that(file, batch):
            if trace.path is None:
                raise MoetraceError(f"{trace.shown} is not a file, so it cannot be rebatched.")
            rebatch(trace.path, file, batch=batch)
        return str(file)

    def _target(self) -> Path:
        """The folder of rebatched traces, which is no link that would lead writes elsewhere."""
        if self._folder is None:
            if self._here is None:
                self._here = Path(tempfile.mkdtemp(prefix="moetrace-"))
                weakref.finalize(self, shutil.rmtree, self._here, ignore_errors=True)
            return self._here
        target = self._folder / FOLDER
        target.mkdir(exist_ok=True)
        if not is_folder(target):
            raise MoetraceError(f"{target} is a symbolic link, and a sweep writes inside its folder only: remove it.")
        return target


def _is_that(file: Path, batch: int) -> bool:
    """Whether a file is a trace in that batch; a replay compares its content with its hashes."""
    if file.is_symlink() or not file.is_file():
        return False
    try:
        with Trace.open(file) as trace:
            return trace.source.get("parameters") == {"batch": batch, "chunk": None, "order": "arrival"}
    except MoetraceError:
        return False
