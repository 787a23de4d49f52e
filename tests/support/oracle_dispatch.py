"""Who runs where, decided slowly and plainly (timing model, sections on dispatch)."""

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

from support.oracle_layer import OPTIMAL_LIMIT, Machine, Share, TimeLine, demand_order, less


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
    if kind not in ("balance", "optimal", "split"):
        raise ValueError(f"unknown dispatch {kind!r}")
    G: set[int] = set()
    for e in [e for e in order if e in resident] + [e for e in order if e not in resident]:
        now, then = moe_of(G), moe_of(G | {e})
        if less(then, now) or (e in resident and not less(now, then)):
            G = G | {e}
    return G


def share_one(
    m: Machine, layer: int, n: dict[int, int], G: set[int], resident, line_of: Callable[..., TimeLine], here, full: bool
) -> TimeLine:
    """Return the time line of `balance`'s G, or with one expert shared if that is less; here: of each active expert."""
    best = balanced = line_of(G)
    for e in demand_order(n):
        is_resident = e in resident
        if e in G and not (is_resident and less(balanced.T_home, balanced.T_gpu)):
            continue
        others, whole = line_of(G - {e}), line_of(G - {e}).T_home
        g = m.gpu_s(layer, e, n[e], False) - m.lone_start(m.gpu)
        d = m.home_s(layer, e, n[e], max(m.N, 1)) - m.lone_start(m.home)
        x, a = (whole - others.T_gpu - m.lone_start(m.gpu)) / (g + d), here[e]
        if x > a:
            w = m.W[layer, e] / m.B_l
            later = (whole - others.fetch_s - m.t_l - m.lone_start(m.gpu) + a * w) / (g + d + w)
            x = max(a, min(x, later)) if full else a
        x = min(x, 1.0)
        if x <= 0:
            continue
        line = line_of(G - {e}, share=Share(e, x, a))
        if less(line.moe, best.moe):
            best = line if x < 1 or not is_resident else line_of(G | {e})
    return best


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
