"""`static-hindsight`: the GPU keeps what the whole trace demands most, once it was fetched."""

from typing import TYPE_CHECKING

import numpy as np

from moetrace.engine.static_set import keep_only, most_demanded
from moetrace.spec.choices import BY_TOUCH, CachePolicy, Residency
from moetrace.spec.policy import PolicySpec

if TYPE_CHECKING:
    from moetrace.engine.decoded import Decoded
    from moetrace.engine.replay import State


def keep_most_demanded(policy: PolicySpec, state: "State", decoded: "Decoded") -> None:
    """Count the demands of the whole trace, and let only those of the greatest counts be kept."""
    count, cache = decoded.demand_count, state.cache
    keep_only(state.cells, most_demanded(count, np.ones_like(count), cache.capacity, len(cache.residents)))


RECORD = Residency(
    name="static-hindsight",
    meaning="the GPU keeps what the whole trace demands most, once fetched",
    order=BY_TOUCH,
    admits=False,
    begin=keep_most_demanded,
    knows_future=True,
    cache=CachePolicy(
        replays="moetrace.analyze.cache.kernels.replays:static_hindsight",
        totals=True,
        list_order=100,
    ),
    list_order=30,
)
