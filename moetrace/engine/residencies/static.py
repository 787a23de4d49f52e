"""`static`: the GPU keeps a given set, from the start and for good."""

from typing import TYPE_CHECKING

import numpy as np

from moetrace.engine.residency import keep_for_good
from moetrace.spec.choices import BY_TOUCH, Residency
from moetrace.spec.errors import UsageError
from moetrace.spec.policy import PolicySpec, load_static

if TYPE_CHECKING:
    from moetrace.engine.decoded import Decoded
    from moetrace.engine.replay import State


def hold_given(policy: PolicySpec, state: "State", decoded: "Decoded") -> None:
    """Put the experts of a CSV file into the cache; raise UsageError if they are more than it holds."""
    assert policy.static is not None
    layers, experts = state.cells.shape
    pairs = load_static(policy.static, layers, experts)
    pools, capacity = len(state.cache.residents), state.cache.capacity
    most = int(np.bincount(pairs[:, 0] if pools > 1 else np.zeros(len(pairs), np.int64), minlength=1).max())
    if most > capacity:
        place = "a layer" if pools > 1 else "all layers together"
        raise UsageError(
            f"Policy {policy.name}: {policy.static} holds {most} experts for {place}, but the GPU has {capacity} slots."
        )
    keep_for_good(state.cells, state.cache, pairs[:, 0] * experts + pairs[:, 1])


RECORD = Residency(
    name="static",
    meaning="the GPU keeps a given set",
    parameters=("static",),
    order=BY_TOUCH,
    admits=False,
    begin=hold_given,
    starts_full=True,
    list_order=20,
)
