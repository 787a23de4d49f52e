"""Who runs where, decided slowly and plainly (timing model, sections on dispatch)."""

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

from support.oracle_layer import OPTIMAL_LIMIT, Machine, demand_order, less


def dispatch(kind: str, order: list[int], resident: set[int], moe_of: Callable[[set[int]], float]) -> set[int]:
    """Return G; order is the active experts in demand order, moe_of(G) the layer's `moe` if G goes to the GPU."""
    if kind in ("ndp", "home"):
        return set()
    if kind == "gpu":
        return set(order)
    if kind == "hot":
        return least([set(order[:H]) for H in range(len(order) + 1)], moe_of)
    if kind == "optimal" and len(order) <= OPTIMAL_LIMIT:
        # combinations() goes by size, then lexicographically in demand order: the order in which ties are broken
        return least([set(G) for size in range(len(order) + 1) for G in combinations(order, size)], moe_of)
    if kind not in ("balance", "optimal"):
        raise ValueError(f"unknown dispatch {kind!r}")
    G: set[int] = set()
    for e in [e for e in order if e in resident] + [e for e in order if e not in resident]:
        now, then = moe_of(G), moe_of(G | {e})
        if less(then, now) or (e in resident and not less(now, then)):
            G = G | {e}
    return G


def dispatch_by_cost(
    policy: Any, m: Machine, layer: int, n: dict[int, int], T: int, resident: set[int], units
) -> tuple[set[int], set[int]]:
    """Return G and C of `in-place`, `fiddler` and `cheapest`, which look at each expert by itself."""
    if policy.dispatch == "in-place":
        gpu_rows = getattr(policy, "gpu_rows", None)
        all_on_gpu = gpu_rows is not None and gpu_rows <= T
        return {e for e in n if e in resident or all_on_gpu}, set()
    G: set[int] = set()
    C: set[int] = set()
    for e in demand_order(n):
        home_s = m.home_s(layer, e, n[e], len(units[e]))
        gpu_s = m.gpu_s(layer, e, n[e], e in resident) + (0.0 if e in resident else m.fetch_s(layer, e))
        if policy.dispatch == "fiddler":
            if e in resident or less(gpu_s, home_s):
                G.add(e)
            continue
        cpu_s = m.cpu_s(layer, e, n[e]) if m.cpu else math.inf
        best = min(gpu_s, cpu_s, home_s)
        if not less(best, gpu_s):
            G.add(e)
        elif not less(best, cpu_s):
            C.add(e)
    return G, C


def least(splits: list[set[int]], moe_of: Callable[[set[int]], float]) -> set[int]:
    """Return the first split that is not beaten by the best one."""
    times = [moe_of(G) for G in splits]
    best = min(times)
    return next(G for G, time in zip(splits, times, strict=True) if not less(best, time))
