"""The lines of the replay, compiled for a policy that foresees and for a tape, which cost the others nothing."""

from functools import cache
from typing import Any

import numpy as np

from moetrace.engine.foresight import Foresight, foresight_of
from moetrace.engine.replay import replay_batch, replay_signature
from moetrace.engine.schedule import Requests
from moetrace.engine.tape import new_tape
from moetrace.jit.compile import kernel
from moetrace.spec.policy import PolicySpec

_lines = getattr(replay_batch, "py_func", replay_batch)
_record: Any = kernel(_lines, signature=lambda: replay_signature(None, new_tape(1, 1)))
_foresee: Any = kernel(_lines, signature=lambda: replay_signature(_smallest(), None))
_foresee_and_record: Any = kernel(_lines, signature=lambda: replay_signature(_smallest(), new_tape(1, 1)))


def variant(foresees: bool, records: bool) -> Any:
    """Return the replay for a lane."""
    return (_foresee_and_record if foresees else _record) if records else _foresee if foresees else replay_batch


@cache
def _smallest() -> Foresight:
    none = np.zeros(0, np.int64)
    return foresight_of(PolicySpec(name=""), Requests(*[none] * 9), 1, 1, 1)
