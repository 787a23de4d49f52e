"""The state and records of a replay of a cluster: the logs, the clock, and room for one step."""

from typing import Any, NamedTuple

import numpy as np

from moetrace.engine.cluster.fabric import Fabric
from moetrace.engine.cluster.layer_stages import LayerStages, new_stages
from moetrace.engine.cluster.order import Agenda, new_agenda
from moetrace.engine.cluster.routes import Routes, new_routes
from moetrace.engine.state import LAYER, STEP, TALLY, UNIT, Log, records

# Seconds that the stages of a step, or of a layer, take in all, and what goes over the wire.
STAGE_FIELDS = ("attention_s", "dispatch_s", "experts_s", "combine_s", "network_bytes")
TAXES = ("launch_tax_s", "locality_tax_s", "barrier_tax_s")
STEP_FIELDS = (*STAGE_FIELDS, "pause_s", "exposed_s", "moved_bytes", "imbalance_rows", *TAXES)
_COUNTS = [("distinct", np.int64), ("routed", np.int64)]  # GPUs that rows stand on, and rows, over the layers
CLUSTER_STEP = np.dtype([*STEP.descr, *((name, np.float64) for name in STEP_FIELDS), *_COUNTS])
CLUSTER_LAYER = np.dtype(
    [*LAYER.descr, *((name, np.float64) for name in (*STAGE_FIELDS, "imbalance_rows_sum")), *_COUNTS]
)
# When the step at hand begins; the share of the bandwidth beside a migration; what the next step waits for; of the
# requests' rows seen so far, a number.
CLOCK = np.dtype(
    [(name, np.float64) for name in ("now_s", "slowed", "most_into", "moved_bytes")]
    + [(name, np.int64) for name in ("pauses", "plans", "seen")]
)


# Sums over the steps.
_SUMS = ("head_s", "overhead_s", *(name for name in STEP_FIELDS if name != "imbalance_rows"))
TOTAL = np.dtype([(name, np.float64) for name in _SUMS] + _COUNTS)


class Contexts(NamedTuple):
    """The part of a step in which each request was last seen, and its highest position + 1 there."""

    seen: np.ndarray  # int64 [requests]
    tokens: np.ndarray  # int64 [requests]


class Books(NamedTuple):
    """All that a replay writes."""

    log: Log
    clock: Any  # CLOCK [1]
    total: Any  # TOTAL [1]
    routes: Routes
    stages: LayerStages
    agenda: Agenda
    free_agenda: Agenda  # of the same step with transfers that take no time
    contexts: Contexts


def new_books(fabric: Fabric, copies: int, requests: int, parts: tuple[int, int], steps: np.ndarray) -> Books:
    """Return books of nothing yet; ``copies`` of a layer at most, ``parts`` of a step (r1, r2) at most."""
    gpus = fabric.gpus[0]
    attention, experts, colocated = (int(gpus[name]) for name in ("attention", "experts", "colocated"))
    layers, num_experts = fabric.machine.weight_bytes.shape
    units = experts + 2 if colocated else attention + experts + 4
    log = Log(steps, records(layers, CLUSTER_LAYER), records(units, UNIT), records(1, TALLY), np.zeros(1, np.int64))
    clock = records(1, CLOCK)
    clock["slowed"] = 1.0
    return Books(
        log,
        clock,
        records(1, TOTAL),
        new_routes(copies, num_experts, experts, int(gpus["nodes"])),
        new_stages(*parts, fabric.slowness),
        new_agenda(*parts),
        new_agenda(*parts),
        Contexts(np.zeros(max(requests, 1), np.int64), np.zeros(max(requests, 1), np.int64)),
    )
