"""Small traces for caches, and what the slow simulator makes of them."""

import numpy as np
import polars as pl

from moetrace.spec.choices import cache_policies
from support import oracle_cache

PHASES = ("prefill", "decode", "mixed")
EXPERTS = 7
# The others are held against libcachesim.
POLICIES = cache_policies()
ONE_AT_A_TIME = [name for name, policy in POLICIES.items() if policy.one_at_a_time]
GENERAL = [name for name in POLICIES if name not in ONE_AT_A_TIME]
KIB = 1 << 10


def small_trace(seed: int, steps: int = 30, layers: int = 3, most: int = 3, equal: bool = False) -> dict:
    """Arguments of `Trace.from_arrays`: absent ids, unequal sizes, batches, all phases, records."""
    rng = np.random.default_rng(seed)
    step_rows = rng.integers(1, most + 1, steps)
    rows = int(step_rows.sum())
    ids = oracle_cache.random_routing(rng, rows, layers, EXPERTS, 2)
    phase = rng.integers(0, 3 if most > 1 else 2, steps)
    recorded = np.where(ids == 255, 255, rng.integers(0, 3, ids.shape))
    return {
        "experts": ids,
        "num_experts": EXPERTS,
        "request": np.zeros(rows, int),
        "steps": step_rows,
        "phase": phase,
        "row_phase": np.minimum(np.repeat(phase, step_rows), 1),
        "recorded": recorded,
        "expert_bytes": np.full((layers, EXPERTS), 8) if equal else rng.integers(1, 30, (layers, EXPERTS)),
    }


def oracle_frame(given: dict, policy: str, budget: int, scope: str, sequential: bool, in_experts: bool) -> dict:
    """Hits, missed bytes, agreement and what was wholly resident, of each phase, by the slow simulator."""
    layers = given["experts"].shape[1]
    demands = oracle_cache.events(
        given["experts"], given["steps"], given["phase"], 255, sequential, given.get("recorded")
    )
    size = given["expert_bytes"]
    weight = np.ones_like(size) if in_experts else size
    pools = [None] if scope == "global" else range(layers)
    totals, made, lacking = {}, {}, {}
    for pool in pools:
        own = [event for event in demands if event and (pool is None or event[0].layer == pool)]
        share = budget if pool is None else budget // layers

        def check(resident, share=share):
            assert sum(int(weight[key]) for key in resident) <= share

        hits = oracle_cache.replay(own, policy, share, weight, check, given["phase"])
        for access, hit in zip((access for event in own for access in event), hits, strict=True):
            for phase in ("all", PHASES[access.phase]):
                t = totals.setdefault(phase, [0, 0, 0, 0, 0, 0])
                of = {("row", row) for row in access.rows} | {("step", access.step)}
                made.setdefault(phase, set()).update(of)
                lacking.setdefault(phase, set()).update(() if hit else of)
                t[0] += 1
                t[1] += hit
                t[2] += 0 if hit else int(size[access.key])
                t[3] += access.recorded != 255
                t[4] += access.recorded != 255 and hit == (access.recorded > 0)
                t[5] += access.recorded != 255 and access.recorded > 0

    def whole(phase, what):
        all_of = {each for each in made[phase] if each[0] == what}
        return len(all_of - lacking[phase]) / len(all_of)

    return {
        phase: [*t[:3], *(n / t[3] if t[3] else None for n in t[4:]), whole(phase, "row"), whole(phase, "step")]
        for phase, t in totals.items()
    }


def frame_of(frame: pl.DataFrame) -> dict:
    columns = ["accesses", "hits", "missed_bytes", "recorded_agreement", "recorded_hit_rate"]
    columns += ["all_resident_rows", "all_resident_steps"]
    return {row["phase"]: [row[column] for column in columns] for row in frame.iter_rows(named=True) if row["accesses"]}
