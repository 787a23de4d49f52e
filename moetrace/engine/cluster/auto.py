"""`pipeline:auto`: how steps are cut, and in which order, by a trial on the first steps of each phase."""

import numpy as np

from moetrace.engine.cluster.cluster_books import CLUSTER_STEP, new_books
from moetrace.engine.cluster.cluster_replay import replay_cluster
from moetrace.engine.cluster.fabric import CUT_FIELDS, Fabric, may_be_apart
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

    Ties go to fewer micro-batches, then fewer chunks, then shared experts with the attention, then `asas`. The
    placement is that of step 0. A phase that the trace does not have keeps one part.
    """
    stages = [(0, 0)] if policy.shared != "apart" else []  # with the attention both orders are the same
    if may_be_apart(fabric):
        stages += [(0, 1), (1, 1)]
    cuts = [(r1, r2, first, apart) for r1 in TRIED for r2 in TRIED for first, apart in stages or [(0, 0)]]
    spent_s = np.zeros((len(PHASE_NAMES), len(cuts)))
    for batch, steps in decoded.first_batches(policy.plan_steps or PLAN_STEPS):
        for i, cut in enumerate(cuts):
            tried = fabric._replace(cut=fabric.cut.copy())
            for name, number in zip(CUT_FIELDS, cut, strict=True):
                tried.cut[name] = number
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
        for name, number in zip(CUT_FIELDS, cuts[best], strict=True):
            chosen[name][phase] = number
    return chosen
