"""A machine's parts beside GPU, home and a plain link, in the numbers that kernels need."""

from typing import Any, NamedTuple

import numpy as np

from moetrace.engine.machine import DEVICE
from moetrace.engine.state import records

# Values of `stream` and the chunks, otherwise a number of parts: no limit, and the best number.
NO_LIMIT, AUTO = 0, 0
MOST_CHUNKS = 64
NO_GROUP = -1
# Rows of the unit log behind the groups of units.
CPU_ROW, DISK_ROW, REMOTE_ROW, MORE_ROWS = 0, 1, 2, 3

TERM = np.dtype(
    [
        ("stream", np.int64),  # parts in which a fetched expert arrives and is computed; NO_LIMIT
        ("home_chunks", np.int64),  # parts of the exchange with home; AUTO
        ("cpu_chunks", np.int64),
        ("home_command_s", np.float64),  # that a further chunk costs
        ("cpu_command_s", np.float64),
        ("cpu_layer_s", np.float64),  # that the CPU adds once a layer
        ("units", np.int64),
        ("all_group", np.int64),  # the group that is all units together, beside groups of one; NO_GROUP
        ("has_cpu", np.int64),  # 1: a CPU runs experts beside the units
        ("sends_once", np.int64),  # 1: a row goes to the units once, however many of them need it
        ("all_s_per_byte", np.float64),  # reading from outside an expert spread over units; 0 = as fast as the reader
        ("one_s_per_byte", np.float64),  # reading from outside an expert that one unit holds
        ("contends", np.int64),  # 1: such reads keep units busy
        ("evict_s", np.float64),  # that an admission adds which evicts
        ("has_disk", np.int64),
        ("link_bytes_s", np.float64),  # for dispatch `hot:ratio`
        ("home_bytes_s", np.float64),  # that all of home reads together
        ("remote_s", np.float64),  # that the layer at hand waits for remote functions
    ]
)
# Fields of the layer at hand beside `layer.Timeline`; seconds after the router's word.
BESIDE = np.dtype(
    [
        (name, np.float64)
        for name in (
            "evict_s",  # that the layer began with
            "home_begin_s",  # when the first rows are there; above a disk the first expert may not be
            "home_end_s",
            "home_back_s",  # activations from the units; to them: `Timeline.act_s`
            "cpu_s",  # busy
            "cpu_act_s",  # activations to the CPU
            "cpu_back_s",  # and from it
            "cpu_act_bytes",  # one way
            "cpu_begin_s",
            "cpu_end_s",
        )
    ]
)
# Counts of a replay on such a machine, beside the log.
TIER_TALLY = np.dtype(
    [
        ("now_s", np.float64),  # since the start of the replay: when the layer at hand begins
        ("evictions_paid", np.int64),  # whose seconds are in a layer
        ("evict_s", np.float64),
    ]
)


class RemoteTimes(NamedTuple):
    """Seconds that the layers of a block wait for remote functions (`tier_remote.py`)."""

    first_step: int
    seconds: np.ndarray  # float64 [steps, L]
    cold_s: float  # of the cold start, with which the first step begins


class Tiers(NamedTuple):
    """A machine's parts beside GPU, home and a plain link."""

    term: Any  # TERM [1]
    cpu: Any  # DEVICE [1], beside units
    tally: Any  # TIER_TALLY [1]
    beside: Any  # BESIDE [1]
    host: Any = None  # `tier_host.HostMemory`, above a disk
    layout: Any = None  # tier_layout.Layout: of experts that move between layouts
    transfers: Any = None  # `tier_link.Transfers`, of a link that loses packets or changes its rate
    remote: Any = None  # RemoteTimes, where experts live in remote functions


def without_disk(tiers: Tiers | None) -> Tiers | None:
    """Return the same machine with all experts in host memory."""
    if tiers is None or tiers.host is None:
        return tiers
    term = tiers.term.copy()
    term["has_disk"] = 0
    return tiers._replace(term=term, host=None)


def new_tiers(units: int) -> Tiers:
    """Return tiers that add nothing: the replay then gives version 1's figures."""
    term = records(1, TERM)
    term["stream"] = term["home_chunks"] = term["cpu_chunks"] = 1
    term["units"], term["all_group"] = units, NO_GROUP
    return Tiers(term, records(1, DEVICE), records(1, TIER_TALLY), records(1, BESIDE))
