"""`static-popular`: the GPU keeps what the whole trace demands most, from the start: a profile made beforehand."""

from typing import TYPE_CHECKING

import numpy as np

from moetrace.engine.residency import keep_for_good
from moetrace.engine.static_set import most_demanded
from moetrace.spec.choices import BY_TOUCH, Residency
from moetrace.spec.policy import PolicySpec

if TYPE_CHECKING:
    from moetrace.engine.decoded import Decoded
    from moetrace.engine.replay import State


def hold_most_demanded(policy: PolicySpec, state: "State", decoded: "Decoded") -> None:
    """Put the experts that are demanded in the most steps into the cache, as many as it holds."""
    count, cache = decoded.demand_count, state.cache
    wanted = most_demanded(count, np.ones_like(count), cache.capacity, len(cache.residents))
    keep_for_good(state.cells, cache, np.flatnonzero(wanted))


RECORD = Residency(
    name="static-popular",
    meaning="the GPU keeps what the whole trace demands most, from the start",
    order=BY_TOUCH,
    admits=False,
    begin=hold_most_demanded,
    starts_full=True,
    knows_future=True,
    list_order=28,
)
