"""Who runs where (section E), by trying and timing: every decision compares the time line that it would get."""

import math
from collections.abc import Callable
from itertools import combinations, product
from typing import NamedTuple

from support.oracle_dispatch import least
from support.oracle_layer import less
from support.tiers_oracle.line import Line, Situation, streamed_end, time_line
from support.tiers_oracle.link import View
from support.tiers_oracle.machine import Plain, Tiers

ASSIGNMENTS = 2**20  # that `optimal` goes through at most


class Places(NamedTuple):
    """Who does not stay at home."""

    G: frozenset[int]
    C: frozenset[int]


HOME_FOR_ALL = Places(frozenset(), frozenset())


def put(places: Places, e: int, device: str) -> Places:
    """Move an expert to a device."""
    G, C = places.G - {e}, places.C - {e}
    return Places(G | {e} if device == "gpu" else G, C | {e} if device == "cpu" else C)


def gpu_cost_s(m: Tiers, s: Situation, view: View, e: int) -> float:
    """Return the own cost on the GPU: of a miss, the end of a lone fetched expert."""
    if e in s.resident:
        return m.gpu_s(s.layer, e, s.n[e], True)
    fetch_s = view.fetch(s.layer, e, s.units[e]).body_s + m.t_l
    return streamed_end(0.0, 0.0, fetch_s, m.gpu_s(s.layer, e, s.n[e], False), m.stream)


def home_cost_s(m: Tiers, s: Situation, e: int) -> float:
    """Return the own cost at home: a shard's seconds."""
    return m.home_s(s.layer, e, s.n[e], max(len(s.units[e]), 1)) if m.home else math.inf


def costs(m: Tiers, s: Situation, view: View, e: int) -> dict[str, float]:
    """Return the own cost on each device, in the order of ties."""
    cpu_s = m.cpu_cost_s(s.layer, e, s.n[e], s.units[e]) if m.cpu else math.inf
    return {"gpu": gpu_cost_s(m, s, view, e), "cpu": cpu_s, "home": home_cost_s(m, s, e)}


def cheapest(m: Tiers, s: Situation, view: View) -> Places:
    places = HOME_FOR_ALL
    for e in s.order:
        own = costs(m, s, view, e)
        best = min(own.values())
        places = put(places, e, next(device for device, cost in own.items() if not less(best, cost)))
    return places


class Resource(NamedTuple):
    """Something that ends, and the experts on it with what each costs there."""

    device: str
    end: float
    own: dict[int, float]


def resources(m: Tiers, s: Situation, view: View, line: Line) -> list[Resource]:
    """Return the GPU, the CPU and each unit, in the order of ties."""
    found = [Resource("gpu", line.T_gpu, {e: gpu_cost_s(m, s, view, e) for e in line.on_gpu})]
    if m.cpu:
        own = {e: m.cpu_cost_s(s.layer, e, s.n[e], s.units[e]) for e in line.on_cpu}
        found.append(Resource("cpu", line.cpu.T, own))
    for u in range(m.N):
        own = {e: home_cost_s(m, s, e) for e in line.at_home if u in s.units[e]}
        found.append(Resource("home", line.ends[u], own))
    return found


def first_largest(values: dict) -> object:
    """Return the key of the largest value, the first of equal ones."""
    largest = max(values.values())
    return next(key for key, value in values.items() if not less(value, largest))


def bottleneck(m: Tiers, s: Situation, view: View) -> Places:
    places = cheapest(m, s, view)
    while True:
        line = time_line(m, s, view, *places)
        every = resources(m, s, view, line)
        last = every[first_largest({i: resource.end for i, resource in enumerate(every)})]
        if not last.own:
            return places
        e = first_largest(last.own)
        devices = ["gpu", *(["cpu"] if m.cpu else []), *(["home"] if m.home else [])]
        moved = {d: time_line(m, s, view, *put(places, e, d)).moe for d in devices if d != last.device}
        if not moved:
            return places
        best = min(moved.values())
        if not less(best, line.moe):
            return places
        places = put(places, e, next(d for d, moe in moved.items() if not less(best, moe)))


def balance(s: Situation, moe_of: Callable[[Places], float]) -> Places:
    places = HOME_FOR_ALL
    for e in [e for e in s.order if e in s.resident] + [e for e in s.order if e not in s.resident]:
        then = put(places, e, "gpu")
        now_s, then_s = moe_of(places), moe_of(then)
        if less(then_s, now_s) or (e in s.resident and not less(now_s, then_s)):
            places = then
    return places


def halo(s: Situation, moe_of: Callable[[Places], float]) -> Places:
    """Move experts to the GPU, those of most gate mass first, unless the layer gets slower."""
    places = HOME_FOR_ALL
    for e in sorted(s.order, key=lambda e: -s.mass[e]):
        then = put(places, e, "gpu")
        if not less(moe_of(places), moe_of(then)):
            places = then
    return places


def is_exhaustive(m: Tiers, active: int) -> bool:
    """Whether `optimal` goes through all assignments."""
    devices = 1 + (m.home is not None) + (m.cpu is not None)
    return devices**active <= ASSIGNMENTS


def optimal(m: Tiers, s: Situation, moe_of: Callable[[Places], float]) -> Places:
    """Return the best of all assignments: fewest away from home, then the first in demand order, GPU before CPU."""
    if m.home is None:
        return Places(frozenset(s.order), frozenset())
    if not is_exhaustive(m, len(s.order)):
        return balance(s, moe_of)
    away = ["gpu", "cpu"] if m.cpu else ["gpu"]
    every = []
    for size in range(len(s.order) + 1):
        for experts in combinations(s.order, size):
            for devices in product(away, repeat=size):
                G = frozenset(e for e, device in zip(experts, devices, strict=True) if device == "gpu")
                every.append(Places(G, frozenset(experts) - G))
    return least(every, moe_of)


def hottest(m: Tiers, view: View, active: int) -> int:
    """Return H of `hot:ratio`."""
    B_home = m.N * m.home.B
    return math.ceil((1 - 1e-12) * active * view.held() / (view.held() + B_home))


def choose(m: Tiers, policy: Plain, s: Situation, view: View, kind: str) -> Places:
    """Return who does not stay at home."""
    order = s.order

    def moe_of(places: Places) -> float:
        return time_line(m, s, view, *places).moe

    if kind in ("home", "ndp"):
        return HOME_FOR_ALL
    if kind == "gpu":
        return Places(frozenset(order), frozenset())
    if kind == "hot":
        return least([Places(frozenset(order[:H]), frozenset()) for H in range(len(order) + 1)], moe_of)
    if kind == "hot:ratio":
        return Places(frozenset(order[: hottest(m, view, len(order))]), frozenset())
    if kind == "balance":
        return balance(s, moe_of)
    if kind == "halo":
        return halo(s, moe_of)
    if kind == "optimal":
        return optimal(m, s, moe_of)
    if kind == "cheapest":
        return cheapest(m, s, view)
    if kind == "bottleneck":
        return bottleneck(m, s, view)
    if kind == "in-place":
        everything = policy.gpu_rows is not None and policy.gpu_rows <= s.T
        return Places(frozenset(e for e in order if e in s.resident or everything), frozenset())
    if kind == "fiddler":
        won = [e for e in order if e in s.resident or less(gpu_cost_s(m, s, view, e), home_cost_s(m, s, e))]
        return Places(frozenset(won), frozenset())
    raise ValueError(f"unknown dispatch {kind!r}")
