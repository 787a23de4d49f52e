"""Decisions of a whole trace, block by block in a file without a name: memory does not grow with the trace."""

import tempfile
import weakref
from collections.abc import Iterator

import numpy as np

from moetrace.engine.against_optimal import DECISION, Regret, with_room
from moetrace.engine.replay import Batch
from moetrace.spec.errors import MoetraceError

SLICE = 1 << 16  # decisions that are read at a time


class DecisionLog:
    """The decisions of one policy, in the order of step, layer and demand."""

    def __init__(self) -> None:
        """Begin with none."""
        try:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  closed when nobody has the log any more
        except OSError as error:
            raise _refused(error) from error
        weakref.finalize(self, self._file.close)

    def begin(self, regret: Regret, batch: Batch, layers: int) -> Regret:
        """Return the books with room for the decisions of a block."""
        start = batch.demand.start
        return with_room(regret, int(start[len(batch.steps.rows) * layers] - start[0]))

    def end(self, regret: Regret) -> None:
        """Keep the records of the block."""
        made = regret.decisions.made[: regret.decisions.ends[0]]
        try:
            self._file.write(np.ascontiguousarray(made).view(np.uint8).data)
            self._file.flush()
        except OSError as error:
            raise _refused(error) from error

    def slices(self) -> Iterator[np.ndarray]:
        """Yield all decisions so far, DECISION [n] at a time."""
        self._file.seek(0)
        while data := self._file.read(SLICE * DECISION.itemsize):
            yield np.frombuffer(data, DECISION)


def _refused(error: OSError) -> MoetraceError:
    return MoetraceError(
        f"the decisions could not be kept in a temporary file: {error.strerror or error}; make room in "
        f"{tempfile.gettempdir()}, or set TMPDIR to another folder."
    )
