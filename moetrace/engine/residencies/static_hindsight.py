"""`static-hindsight`: the GPU keeps what the whole trace demands most, once it was fetched."""

from typing import TYPE_CHECKING

import numpy as np

from moetrace.engine.static_room import room_of
from moetrace.engine.static_set import StaticRoom, keep_only, most_demanded_keys
from moetrace.spec.choices import BY_TOUCH, CachePolicy, Residency
from moetrace.spec.policy import PolicySpec

if TYPE_CHECKING:
    from moetrace.engine.decoded import Decoded
    from moetrace.engine.replay import State


def worth_most(policy: PolicySpec, room: StaticRoom) -> np.ndarray:
    """Return the experts that are demanded in the most steps, as many as the cache holds."""
    return most_demanded_keys(room)


def keep_most_demanded(policy: PolicySpec, state: "State", decoded: "Decoded") -> None:
    """Count the demands of the whole trace, and let only those of the greatest counts be kept."""
    wanted = np.zeros(state.cells.size, np.uint8)
    wanted[worth_most(policy, room_of(state, decoded))] = 1
    keep_only(state.cells, wanted)


RECORD = Residency(
    name="static-hindsight",
    meaning="the GPU keeps the experts that the whole trace demands most, once fetched",
    order=BY_TOUCH,
    admits=False,
    begin=keep_most_demanded,
    keeps=worth_most,
    knows_future=True,
    cache=CachePolicy(
        replays="moetrace.analyze.cache.kernels.replays:static_hindsight",
        totals=True,
        list_order=100,
    ),
    list_order=30,
)
