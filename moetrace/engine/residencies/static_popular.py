"""`static-popular`: the GPU keeps the experts that the whole trace demands most, from the start, as by a profile."""

from typing import TYPE_CHECKING

import numpy as np

from moetrace.engine.residency import keep_for_good
from moetrace.engine.static_room import room_of
from moetrace.engine.static_set import StaticRoom, most_demanded_keys
from moetrace.spec.choices import BY_TOUCH, Residency
from moetrace.spec.policy import PolicySpec

if TYPE_CHECKING:
    from moetrace.engine.decoded import Decoded
    from moetrace.engine.replay import State


def most_popular(policy: PolicySpec, room: StaticRoom) -> np.ndarray:
    """Return the experts that are demanded in the most steps, as many as the cache holds."""
    return most_demanded_keys(room)


def hold_most_demanded(policy: PolicySpec, state: "State", decoded: "Decoded") -> None:
    """Put them into the cache."""
    keep_for_good(state.cells, state.cache, most_popular(policy, room_of(state, decoded)))


RECORD = Residency(
    name="static-popular",
    meaning="the GPU keeps the experts that the whole trace demands most, from the start",
    order=BY_TOUCH,
    admits=False,
    begin=hold_most_demanded,
    keeps=most_popular,
    starts_full=True,
    knows_future=True,
    list_order=28,
)
