"""The oracle's state: sections 4 and 7 of the timing model (what the GPU keeps, and what moves early)."""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.oracle_entries import DONE_BYTES, Copy, Entry, Expert, given, splitmix64
from support.oracle_foresee import Foresight
from support.oracle_layer import PREFILL, Machine, OracleTrace, TimeLine, demand_order
from support.oracle_slots import layer_slots


def static_layers(policy: Any, m: Machine) -> range:
    """Return the MoE layers that `static-layers` keeps: the first or the last so many."""
    count = policy.gpu_layers
    return range(count) if policy.gpu_layers_end == "first" else range(m.L - count, m.L)


@dataclass
class Memory:
    """The GPU's expert copies and the prefetch queue."""

    trace: OracleTrace
    machine: Machine
    policy: Any
    residency: str  # "user" when scores come from a function
    demand: list[list[dict[int, int]]]  # n[e] of [step][layer]
    user_scores: Callable | None = None
    copies: dict[Expert, Copy] = field(default_factory=dict)
    touched: dict[Expert, int] = field(default_factory=dict)  # kept when the expert is evicted
    touches: int = 0
    score: dict[Expert, float] = field(default_factory=dict)  # of lfu, ewma, lfuda and user residencies; 0 if absent
    count: dict[Expert, float] = field(default_factory=dict)  # of lfuda
    gone: dict[int, list[float]] = field(default_factory=dict)  # of lfuda: scores of all that a pool evicted
    now: tuple[int, int] = (0, 0)  # (step, layer)
    wanted: dict[Expert, int] = field(default_factory=dict)
    admissions: int = 0
    hand: dict[int, int] = field(default_factory=dict)  # of Sieve: the number of the admission that it comes to next
    prompt_count: dict[int, Counter] = field(default_factory=dict)
    queue: list[Entry] = field(default_factory=list)
    moved_bytes: float = 0.0  # of this step
    completed: int = 0
    late: int = 0
    wasted: int = 0
    used: int = 0

    def __post_init__(self):
        m = self.machine
        self.demand_steps: dict[Expert, list[int]] = {}
        for step, layers in enumerate(self.demand):
            for layer, n in enumerate(layers):
                for e in n:
                    self.demand_steps.setdefault((layer, e), []).append(step)
        self.last_step: dict[int, int] = {}
        self.last_prefill: dict[int, int] = {}
        for step in range(self.trace.steps):
            for row in self.trace.rows_of(step):
                self.last_step[int(self.trace.request[row])] = step
                if self.trace.row_phase[row] == PREFILL:
                    self.last_prefill[int(self.trace.request[row])] = step
        self.shared = self.policy.scope != "layer" or self.residency == "foresee"  # all layers share the slots
        self.slots_of = layer_slots(self.trace, m, self.policy)
        self.foresight = Foresight(self.trace, m, self.policy) if self.residency == "foresee" else None
        if self.residency == "static-hindsight":
            self.keep_most({key: len(steps) for key, steps in self.demand_steps.items()})
        if not m.linked:
            self.copies = {(layer, e): Copy(False) for layer in range(m.L) for e in range(m.E)}
        elif self.residency == "static":
            for line in Path(self.policy.static).read_text().split():
                layer, e = map(int, line.split(","))
                if not self.room(layer):
                    raise ValueError(f"the static set does not fit: no room for expert {e} of layer {layer}")
                self.copies[layer, e] = Copy(False)
        elif self.residency == "static-layers":
            whole = ((layer, e) for layer in static_layers(self.policy, m) for e in range(m.E))
            self.copies = {key: Copy(False) for key in whole if m.W[key] > 0}  # some layers have fewer experts
            if len(self.copies) > m.slots:
                raise ValueError(f"the static layers do not fit: {len(self.copies)} experts, {m.slots} slots")

        self.began = 0  # step of the last cold start
        self.start = dict(self.copies), dict(self.wanted)

    def forget(self) -> None:
        """Be as before the first step; what was prefetched and not run is wasted."""
        self.wasted += sum(copy.prefetched and not copy.used for copy in self.copies.values())
        self.wasted += sum(entry.started for entry in self.queue)
        self.copies, self.wanted = dict(self.start[0]), dict(self.start[1])
        for of_experts in (self.touched, self.score, self.count, self.gone, self.hand, self.prompt_count):
            of_experts.clear()
        self.queue.clear()
        self.began = self.now[0] + 1

    # Capacity and victims

    def resident(self, layer: int) -> set[int]:
        return {e for (of, e) in self.copies if of == layer}

    def room(self, layer: int) -> bool:
        if self.shared:
            return len(self.copies) < self.machine.slots
        return len(self.resident(layer)) < self.slots_of[layer]

    def pool(self, layer: int) -> int:
        return layer if self.policy.scope == "layer" else 0

    def next_demand(self, key: Expert) -> tuple[float, int]:
        """Return the (step, layer) after now at which the expert is demanded next."""
        step, layer = self.now
        steps = self.demand_steps.get(key, [])
        later = bisect_right(steps, step if key[0] <= layer else step - 1)
        return (steps[later] if later < len(steps) else math.inf, key[0])

    def victim_key(self, key: Expert) -> tuple:
        """Return what sorts the victim first; ties: touched longest ago, then lower layer, then lower id."""
        if self.foresight:
            return (self.foresight.worth(key), *key)
        if self.residency in ("lfu", "lfu-window", "ewma", "lfuda", "user"):
            first: tuple = (self.score.get(key, 0.0),)
        elif self.residency == "belady":
            step, layer = self.next_demand(key)
            first = (-step, -layer if step < math.inf else 0)
        elif self.residency == "fifo":
            first = (self.copies[key].number,)
        elif self.residency == "lfu-in-cache":
            first = (self.copies[key].demands,)
        elif self.residency == "least-stale":
            first = (-((key[0] - self.now[1]) % self.machine.L or self.machine.L),)
        else:
            first = ()
        return (*first, self.touched.get(key, -1), *key)

    def admit(self, key: Expert, active: set[Expert], prefetched: bool) -> bool:
        """Admit if there is room or a victim that is not active; return whether it was."""
        if not self.room(key[0]):
            victims = [
                other
                for other in self.copies
                if (self.shared or other[0] == key[0])
                and other not in active
                and not (self.residency == "prefill" and other in self.wanted)
            ]
            if not victims:
                return False
            victim = self.sieved(key[0], victims) if self.residency == "sieve" else min(victims, key=self.victim_key)
            if self.foresight and self.foresight.worth(victim) >= self.foresight.worth(key):
                return False
            copy = self.copies.pop(victim)
            if self.residency == "lfuda":
                self.gone.setdefault(self.pool(key[0]), []).append(self.score.get(victim, 0.0))
                self.count[victim] = self.count.get(victim, 0.0) * given(self.policy.evicted_share, 0.5)
            self.wasted += copy.prefetched and not copy.used
        self.admissions += 1
        self.copies[key] = Copy(prefetched, number=self.admissions)
        return True

    def sieved(self, layer: int, victims: list[Expert]) -> Expert:
        """Return the first victim not visited, in the order of admission from the hand on, round and round."""
        pool = self.pool(layer)
        of_pool = {key: c for key, c in self.copies.items() if self.policy.scope != "layer" or key[0] == layer}
        queue = sorted((copy.number, key) for key, copy in of_pool.items())
        start = next((i for i, (number, _) in enumerate(queue) if number >= self.hand.get(pool, 0)), 0)
        at = start
        while True:
            number, key = queue[at % len(queue)]
            if key in victims:
                if not self.copies[key].visited:
                    break
                self.copies[key].visited = False
            at += 1
        # Behind the last one the hand begins again, even if another one is admitted until it moves.
        self.hand[pool] = number + 1 if at % len(queue) + 1 < len(queue) else 0
        return key

    # The link's spare time

    def flow(self, seconds: float) -> None:
        """Move the queue for that long, first entry first."""
        spare = seconds * self.machine.B_l
        for entry in self.queue:
            if not entry.complete:
                moved = min(entry.left, spare)
                spare -= moved
                self.move(entry, moved)
                if not entry.complete:
                    return

    def move(self, entry: Entry, moved: float) -> None:
        entry.left -= moved
        entry.moved += moved
        self.moved_bytes += moved
        self.completed += entry.complete

    def wait(self) -> float:
        """Wait until the queue is empty; return the seconds."""
        pending = [entry for entry in self.queue if not entry.complete]
        seconds = math.fsum(entry.left for entry in pending) / self.machine.B_l if pending else 0.0
        for entry in pending:
            self.move(entry, entry.left)
        return seconds

    def leave(self, entry: Entry) -> None:
        """Take an entry out of the queue without admitting it."""
        self.queue.remove(entry)
        self.wasted += entry.started

    def queued(self, key: Expert) -> Entry | None:
        return next((entry for entry in self.queue if entry.key == key), None)

    def admit_completed(self) -> None:
        """Admit what has arrived: immediately before a dense, when no expert is active."""
        for entry in [entry for entry in self.queue if entry.complete]:
            if self.admit(entry.key, set(), prefetched=True):
                self.queue.remove(entry)
            else:
                self.leave(entry)

    # The events of a layer

    def router_speaks(self, step: int, layer: int) -> None:
        self.now = (step, layer)
        kind, _, depth = self.policy.prefetch.partition(":")
        if kind == "oracle":
            self.look_ahead(step, layer, int(depth))
        for e in self.demand[step][layer]:
            entry = self.queued((layer, e))
            if (layer, e) not in self.copies and entry and entry.started and not entry.was_late:
                entry.was_late = True
                self.late += 1

    def look_ahead(self, step: int, layer: int, depth: int) -> None:
        for entry in [entry for entry in self.queue if entry.target < (step, layer)]:
            self.leave(entry)
        for ahead in range(1, depth + 1):
            to_step, to_layer = divmod(step * self.machine.L + layer + ahead, self.machine.L)
            if to_step >= self.trace.steps:
                return
            for e in demand_order(self.demand[to_step][to_layer]):
                key, target = (to_layer, e), (to_step, to_layer)
                drawn = splitmix64(self.policy.seed, to_step, to_layer, e) / 2**64 < self.policy.p
                if drawn and key not in self.copies:
                    entry = self.queued(key)
                    if entry:
                        entry.target = target  # later than the one it had
                    else:
                        self.queue.append(Entry(key, float(self.machine.W[key]), target=target))

    def arrived(self, key: Expert) -> float:
        entry = self.queued(key)
        return min(entry.moved / self.machine.W[key], 1.0) if entry else 0.0

    def dispatched(self, layer: int, line: TimeLine) -> None:
        """Note which copies are used, and which transfers a demand fetch overtakes."""
        for e in [*line.on_gpu, *([line.share.expert] if line.share else [])]:
            copy = self.copies.get((layer, e))
            if copy and copy.prefetched and not copy.used:
                copy.used = True
                self.used += 1
        for e in line.fetched:
            entry = self.queued((layer, e))
            if entry:
                self.leave(entry)
        entry = self.queued((layer, line.share.expert)) if line.share else None
        if entry and line.run_whole:  # what had arrived runs: it is not wasted
            self.queue.remove(entry)
        elif entry and line.streamed:  # what a share fetched of it has moved, but never all
            most = self.machine.W[entry.key] - 2 * DONE_BYTES
            entry.moved = max(entry.moved, min(entry.moved + line.streamed, most))
            entry.left = float(self.machine.W[entry.key]) - entry.moved
        if self.foresight:
            self.foresight.see(*self.now, self.demand[self.now[0]][layer])
            if self.policy.prefetch == "foresee":
                self.foresight.requeue(self, [(layer, e) for e in line.fetched + line.run_whole])

    def entry(self, key: Expert) -> Entry:
        return Entry(key, float(self.machine.W[key]))

    def layer_done(self, line: TimeLine, T: int) -> None:
        """Update scores, touch what is resident and offer what was fetched, then let `online` queue."""
        step, layer = self.now
        n = self.demand[step][layer]
        self.update_scores(layer, n, T)
        active = {(layer, e) for e in n}
        before = set(self.copies)
        for e in demand_order(n):
            key = (layer, e)
            if key in self.copies or (
                e in line.fetched + line.run_whole and self.keeps(key) and self.admit(key, active, False)
            ):
                self.touches += 1
                self.touched[key] = self.touches
                self.copies[key].demands += 1
                self.copies[key].visited = key in before
        kind, _, most = self.policy.prefetch.partition(":")
        if kind == "online":
            self.queue_online(layer, int(most))

    def keeps(self, key: Expert) -> bool:
        if self.residency in ("prefill", "static-hindsight"):
            return key in self.wanted
        return self.residency not in ("none", "static", "static-layers")

    def update_scores(self, layer: int, n: dict[int, int], T: int) -> None:
        experts = range(self.machine.E)
        if self.residency == "lfu":
            for e in n:
                self.score[layer, e] = self.score.get((layer, e), 0.0) + 1.0
        elif self.residency == "lfu-window":
            for e in experts:
                steps = self.demand_steps.get((layer, e), [])
                self.score[layer, e] = sum(max(self.now[0] - 48, self.began - 1) < at <= self.now[0] for at in steps)
        elif self.residency == "lfuda":
            age = max(self.gone.get(self.pool(layer), []), default=0.0)
            for e in n:
                self.count[layer, e] = min(self.count.get((layer, e), 0.0) + 1, given(self.policy.most_count, 12))
                self.score[layer, e] = age + self.count[layer, e]
        elif self.residency == "ewma":
            alpha = self.policy.alpha
            for e in experts:
                self.score[layer, e] = alpha * n.get(e, 0) / T + (1 - alpha) * self.score.get((layer, e), 0.0)
        elif self.user_scores:
            old = [self.score.get((layer, e), 0.0) for e in experts]
            new = self.user_scores(layer, [n.get(e, 0) for e in experts], T, old)
            self.score.update({(layer, e): float(new[e]) for e in experts})

    def queue_online(self, layer: int, most: int) -> None:
        """Queue the experts of this layer that score above its lowest resident; a free slot counts as score 0."""
        scores = {e: self.score.get((layer, e), 0.0) for e in range(self.machine.E)}
        residents = self.resident(layer)
        slots = [0.0] if self.room(layer) or not residents else []
        bar = min(slots + [scores[e] for e in residents])
        out = [e for e in scores if scores[e] > bar and e not in residents and not self.queued((layer, e))]
        for e in sorted(out, key=lambda e: (-scores[e], e))[:most]:
            self.queue.append(Entry((layer, e), float(self.machine.W[layer, e])))

    # The events of a step

    def step_done(self, step: int) -> None:
        """After the head: count the prompt, make `wanted` anew if a prefill has ended, halve the counts of `lfu`."""
        rows = self.trace.rows_of(step)
        for row in rows:
            if self.trace.row_phase[row] == PREFILL:
                count = self.prompt_count.setdefault(int(self.trace.request[row]), Counter())
                for layer, ids in enumerate(self.trace.experts[row].tolist()):
                    count.update((layer, e) for e in ids if e >= 0)
        ended = {
            int(self.trace.request[row]) for row in rows if self.last_prefill.get(int(self.trace.request[row])) == step
        }
        if self.residency == "prefill" and ended:
            alive = {request for request, last in self.last_step.items() if last > step}
            self.make_wanted(alive | ended)  # those just ended count even if they have no rows left
        half_life = self.policy.half_life
        if self.residency == "lfu" and half_life and (step + 1) % half_life == 0:
            self.score = {key: score * 0.5 for key, score in self.score.items()}

    def make_wanted(self, requests: set[int]) -> None:
        total: Counter = Counter()
        for request in requests:
            total.update(self.prompt_count.get(request, Counter()))
        self.keep_most(total)
        if self.policy.prefetch == "prefill":
            self.remake_queue()

    def keep_most(self, total: dict[Expert, int]) -> None:
        ranked = sorted(total, key=lambda key: (-total[key], *key))
        if self.policy.scope != "layer":
            chosen = ranked[: self.machine.slots]
        else:
            own = [[key for key in ranked if key[0] == layer] for layer in range(self.machine.L)]
            chosen = [key for keys, C in zip(own, self.slots_of, strict=True) for key in keys[:C]]
        self.wanted = {key: total[key] for key in chosen}

    def remake_queue(self) -> None:
        for entry in [entry for entry in self.queue if entry.key not in self.wanted]:
            self.leave(entry)
        kept = {entry.key: entry for entry in self.queue}
        missing = [key for key in self.wanted if key not in self.copies]
        missing.sort(key=lambda key: (key[0], -self.wanted[key], key[1]))
        self.queue = [kept.get(key) or Entry(key, float(self.machine.W[key])) for key in missing]

    def finish(self) -> None:
        """At the end: what was prefetched and never used is wasted; what is still in the queue is not counted."""
        self.wasted += sum(copy.prefetched and not copy.used for copy in self.copies.values())
