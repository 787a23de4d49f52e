"""`pipeline:auto`: how steps are cut, and in which order, by a trial on the first steps of each phase."""

import numpy as np

from moetrace.engine.cluster.cluster_books import CLUSTER_STEP, new_books
from moetrace.engine.cluster.cluster_replay import replay_cluster
from moetrace.engine.cluster.fabric import Fabric
from moetrace.engine.cluster.placed import PlacedCopies
from moetrace.engine.decoded import Decoded
from moetrace.engine.layer import SAME
from moetrace.engine.state import new_steps
from moetrace.spec.cluster_policy import PLAN_STEPS
from moetrace.spec.policy import PolicySpec
from moetrace.trace.schema import PHASE_NAMES

TRIED = (1, 2, 4, 8)  # micro-batches, and chunks of each


def best_cut(decoded: Decoded, fabric: Fabric, copies: PlacedCopies, policy: PolicySpec, requests: int) -> np.ndarray:
    """Return CUT [3]: of each phase, what makes the sum of its first ``plan_steps`` steps least.

    Ties go to fewer micro-batches, then fewer chunks, then `asas`. The placement is that of step 0. A phase that the
    trace does not have keeps one part.
    """
    cuts = [(r1, r2, first) for r1 in TRIED for r2 in TRIED for first in (0, 1)]
    spent_s = np.zeros((len(PHASE_NAMES), len(cuts)))
    for batch, steps in decoded.first_batches(policy.plan_steps or PLAN_STEPS):
        for i, cut in enumerate(cuts):
            tried = fabric._replace(cut=fabric.cut.copy())
            tried.cut["micro_batches"], tried.cut["chunks"], tried.cut["attention_first"] = cut
            log = new_steps(len(batch.steps.rows), CLUSTER_STEP)
            books = new_books(tried, copies.gpu.shape[1], requests, cut[:2], log)
            for s in steps.tolist():
                replay_cluster(batch, tried, copies, books, s, s + 1, np.inf)
                spent_s[batch.steps.phase[s], i] += log["duration_s"][s]
    chosen = fabric.cut.copy()
    for phase in range(len(PHASE_NAMES)):
        best = 0
        for i in range(1, len(cuts)):
            if spent_s[phase, i] < spent_s[phase, best] * SAME:
                best = i
        for field, number in zip(("micro_batches", "chunks", "attention_first"), cuts[best], strict=True):
            chosen[field][phase] = number
    return chosen
