"""A slow, obvious cache simulator: dicts and lists, a scan for every victim; it shares no code with the kernels."""

from fractions import Fraction
from typing import NamedTuple

import numpy as np


class Access(NamedTuple):
    phase: int  # of its step
    layer: int
    key: tuple[int, int]  # layer, expert
    recorded: int  # 255 = not
    step: int
    share: float = 0.0  # of the step's rows
    rows: tuple[int, ...] = ()  # that chose it


def events(experts, steps, phases, absent: int, sequential: bool, recorded=None) -> list[list[Access]]:
    """The accesses of a trace: each list is demanded at once; experts [rows, layers, k], steps = rows of each."""
    found = []
    first = 0
    for step, (rows, phase) in enumerate(zip(steps, phases, strict=True)):
        for layer in range(experts.shape[1]):
            choices = []
            for row in range(first, first + rows):
                for slot in range(experts.shape[2]):
                    expert = int(experts[row, layer, slot])
                    if expert != absent:
                        record = 255 if recorded is None else int(recorded[row, layer, slot])
                        choices.append(Access(phase, layer, (layer, expert), record, step, 1 / rows, (row,)))
            if sequential:
                found += [[choice] for choice in choices]
            else:
                keys = [choice.key for choice in choices]
                ordered = [key for i, key in enumerate(keys) if key not in keys[i + 1 :]]  # by their last choice
                first_choices = [next(choice for choice in choices if choice.key == key) for key in ordered]
                who = {key: tuple(choice.rows[0] for choice in choices if choice.key == key) for key in ordered}
                found.append([c._replace(share=len(who[c.key]) / rows, rows=who[c.key]) for c in first_choices])
        first += rows
    return found


def sieve(demands: list[list[Access]], budget: int, weight, check=lambda resident: None) -> list[bool]:
    """Whether each access hits under Sieve: a list from what was admitted first on, and a hand, a place in it."""
    queue: list[tuple] = []
    visited: dict[tuple, bool] = {}
    hand, hits = 0, []
    for event in demands:
        demanded = [access.key for access in event]
        hit = [key in queue for key in demanded]
        visited |= {key: True for key in demanded if key in queue}
        for key in demanded:
            if key in queue or weight[key] > budget:
                continue
            while sum(int(weight[k]) for k in queue) + weight[key] > budget and set(queue) - set(demanded):
                while True:
                    hand %= len(queue)
                    if queue[hand] not in demanded and not visited[queue[hand]]:
                        break
                    if queue[hand] not in demanded:
                        visited[queue[hand]] = False
                    hand += 1
                # After the last one, the hand starts again: even if another one is admitted until it moves.
                at_end = hand == len(queue) - 1
                del queue[hand]
                hand = 0 if at_end else hand
            if sum(int(weight[k]) for k in queue) + weight[key] <= budget:
                queue.append(key)
                visited[key] = False
            check(set(queue))
        hits += hit
    return hits


def lfuda(demands: list[list[Access]], budget: int, weight, check=lambda resident: None) -> list[bool]:
    """Whether each access hits under LFUDA: exact counts and ages, and the history of all that was ever evicted."""
    resident: dict[tuple, Fraction] = {}  # with its score
    count: dict[tuple, Fraction] = {}
    touched: dict[tuple, int] = {}
    evicted = [Fraction(0)]  # scores
    hits, now = [], 0
    for event in demands:
        demanded = [access.key for access in event]
        hits += [key in resident for key in demanded]
        count |= {key: min(count.get(key, Fraction(0)) + 1, Fraction(12)) for key in demanded}
        score = {key: max(evicted) + count[key] for key in demanded}
        resident |= {key: score[key] for key in demanded if key in resident}
        for key in demanded:
            if key in resident or weight[key] > budget:
                continue
            while sum(int(weight[k]) for k in resident) + weight[key] > budget and set(resident) - set(demanded):
                victim = min(set(resident) - set(demanded), key=lambda key: (resident[key], touched[key]))
                evicted.append(resident.pop(victim))
                count[victim] /= 2
            if sum(int(weight[k]) for k in resident) + weight[key] <= budget:
                resident[key] = score[key]
            check(set(resident))
        touched |= {key: number for number, key in enumerate(demanded, now)}
        now += len(event)
    return hits


def static(demands: list[list[Access]], policy: str, budget: int, weight, phases) -> list[bool]:
    """Whether each access hits if a set is kept from first accesses on; phases are those of all steps."""
    resident: set[tuple] = set()
    count: dict[tuple, int] = {}

    def most_frequent() -> set[tuple]:
        wanted: set[tuple] = set()
        for key in sorted(count, key=lambda key: (-count[key], key)):
            if sum(int(weight[k]) for k in wanted) + weight[key] <= budget:
                wanted.add(key)
        return wanted

    if policy == "static-hindsight":
        for access in (access for event in demands for access in event):
            count[access.key] = count.get(access.key, 0) + 1
    wanted = most_frequent()
    before, hits = 0, []
    for event in demands:
        for access in event:
            ends = [step for step in range(before + 1, access.step + 1) if phases[step - 1] == 0 != phases[step]]
            if policy == "static-prefill" and ends:
                wanted = most_frequent()
                resident &= wanted
            before = access.step
            hits.append(access.key in resident)
            if access.key in wanted:
                resident.add(access.key)
            if policy == "static-prefill" and access.phase == 0:
                count[access.key] = count.get(access.key, 0) + len(access.rows)
    return hits


def replay(
    demands: list[list[Access]], policy: str, budget: int, weight, check=lambda resident: None, phases=()
) -> list[bool]:
    """Whether each access hits, in a cache of `budget`; weight[layer, expert]. `check` sees the residents each time."""
    if policy == "sieve":
        return sieve(demands, budget, weight, check)
    if policy.startswith("static"):
        return static(demands, policy, budget, weight, phases)
    if policy == "lfuda":
        return lfuda(demands, budget, weight, check)
    order = [access.key for event in demands for access in event]
    uses: dict[tuple, list[int]] = {}
    for number, key in enumerate(order):
        uses.setdefault(key, []).append(number)
    resident: set[tuple] = set()
    touched: dict[tuple, int] = {}
    ever: dict[tuple, int] = {}
    shares: dict[tuple, list[tuple[int, float]]] = {}
    since_admitted: dict[tuple, int] = {}
    admitted: dict[tuple, int] = {}
    admissions: list[tuple] = []
    now = 0  # number of the first access of the event

    def used() -> int:
        return sum(int(weight[key]) for key in resident)

    def next_use(key) -> float:
        return next((number for number in uses[key] if number > touched[key]), float("inf"))

    def ewma(key) -> float:
        """Step by step, as sums of powers would round otherwise; a layer's scores change when it comes."""
        score = 0.0
        for step in range(event[0].step + (key[0] <= event[0].layer)):
            score *= 0.7
            score += sum(share for at, share in shares[key] if at == step)
        return round(score, 12)

    def recent(key) -> int:
        """In how many of the last 48 visits of its layer it was accessed."""
        last = event[0].step - (key[0] > event[0].layer)
        return len({step for step, _ in shares[key] if step > last - 48})

    def eviction_order(key):
        """The least goes first."""
        return {
            "lru": lambda: touched[key],
            "fifo": lambda: admitted[key],
            "lfu": lambda: (ever[key], touched[key]),
            "lfu-window": lambda: (recent(key), touched[key]),
            "lfu-in-cache": lambda: (since_admitted[key], touched[key]),
            "ewma": lambda: (ewma(key), touched[key]),
            "least-stale": lambda: (-((key[0] - event[0].layer) % weight.shape[0] or weight.shape[0]), touched[key]),
            "belady": lambda: (-next_use(key), touched[key]),
        }[policy]()

    hits = []
    for event in demands:
        demanded = [access.key for access in event]
        hit = [key in resident for key in demanded]
        accesses_of = {access.key: access for access in event}
        for key, was_resident in zip(demanded, hit, strict=True):
            ever[key] = ever.get(key, 0) + 1
            shares.setdefault(key, []).append((event[0].step, 0.3 * accesses_of[key].share))
            since_admitted[key] = since_admitted[key] + 1 if was_resident else 1
        for key in demanded:
            if key in resident or weight[key] > budget:
                continue
            while used() + weight[key] > budget and resident - set(demanded):
                resident.remove(min(resident - set(demanded), key=eviction_order))
            if used() + weight[key] <= budget:
                resident.add(key)
                admitted[key] = len(admissions)
                admissions.append(key)
            check(resident)
        for number, key in enumerate(demanded, now):
            touched[key] = number
        now += len(event)
        hits += hit
    return hits


def random_routing(rng: np.random.Generator, rows: int, layers: int, experts: int, top_k: int) -> np.ndarray:
    """Skewed, distinct ids [rows, layers, top_k], some of them absent (255)."""
    popularity = rng.random((1, layers, experts)) ** 2
    ids = np.argsort(rng.random((rows, layers, experts)) - popularity, axis=2)[:, :, :top_k].astype(np.uint8)
    ids[rng.random(ids.shape) < 0.1] = 255
    return ids
