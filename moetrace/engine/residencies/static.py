"""`static`: the GPU keeps a given set, from the start and for good."""

from typing import TYPE_CHECKING

import numpy as np

from moetrace.engine.residency import keep_for_good
from moetrace.engine.static_room import room_of
from moetrace.engine.static_set import StaticRoom
from moetrace.spec.choices import BY_TOUCH, Residency
from moetrace.spec.errors import UsageError
from moetrace.spec.policy import PolicySpec
from moetrace.spec.policy_files import load_static

if TYPE_CHECKING:
    from moetrace.engine.decoded import Decoded
    from moetrace.engine.replay import State


def given(policy: PolicySpec, room: StaticRoom) -> np.ndarray:
    """Return the experts of a CSV file; raise UsageError if they are more than the cache holds."""
    assert policy.static is not None
    layers, experts = room.exists.shape
    pairs = load_static(policy.static, layers, experts)
    held = np.bincount(pairs[:, 0] if room.pools > 1 else np.zeros(len(pairs), np.int64), minlength=room.pools)
    if (held > room.capacity).any():
        full = int(np.argmax(held - room.capacity))
        place = "a layer" if room.pools > 1 else "all layers together"
        raise UsageError(
            f"Policy {policy.name}: {policy.static} holds {held[full]} experts for {place}, but the GPU has "
            f"{room.capacity[full]} slots."
        )
    return pairs[:, 0] * experts + pairs[:, 1]


def hold_given(policy: PolicySpec, state: "State", decoded: "Decoded") -> None:
    """Put the experts of the file into the cache."""
    room = room_of(state, decoded, counts=False)
    keys = given(policy, room)
    keep_for_good(state.cells, state.cache, keys[room.exists.ravel()[keys]])


RECORD = Residency(
    name="static",
    meaning="the GPU keeps a given set",
    parameters=("static",),
    order=BY_TOUCH,
    admits=False,
    begin=hold_given,
    keeps=given,
    starts_full=True,
    list_order=20,
)
