"""The data from which a residency with a fixed set chooses it."""

from typing import TYPE_CHECKING

import numpy as np

from moetrace.engine.static_set import StaticRoom

if TYPE_CHECKING:
    from moetrace.engine.decoded import Decoded
    from moetrace.engine.replay import State


def room_of(state: "State", decoded: "Decoded", counts: bool = True) -> StaticRoom:
    """Return the room that a replay has; `counts` says whether the demands of the trace are looked at.

    Experts that live in remote functions (`tiers/tier_remote.py`) do not exist here.
    """
    exists = state.queue.weight_bytes.reshape(state.cells.shape) > 0
    count = np.where(exists.ravel(), decoded.demand_count, 0) if counts else np.zeros(exists.size, np.int64)
    return StaticRoom(exists, state.cache.capacity, len(state.cache.residents), count)
