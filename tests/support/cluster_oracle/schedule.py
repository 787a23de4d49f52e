"""A list scheduler: tasks with what they wait for, resources that each serve a queue in order, one task at a time."""

import heapq
from dataclasses import dataclass, field

from support.cluster_oracle.figures import Span

Key = tuple[str, int, int, int]  # stage, layer, micro-batch, chunk


@dataclass
class Stages:
    """Seconds of the stages of one step: A and S [layer][batch], the others [layer][batch][chunk], K [layer]."""

    A: list[list[float]]
    S: list[list[float]]
    A2E: list[list[list[float]]]
    E: list[list[list[float]]]
    E2A: list[list[list[float]]]
    K: list[float] = field(default_factory=list)

    @property
    def layers(self) -> int:
        return len(self.A)

    @property
    def batches(self) -> int:
        return len(self.A[0])

    def chunks(self, batch: int) -> int:
        return len(self.E[0][batch])

    def seconds(self, key: Key) -> float:
        stage, layer, batch, chunk = key
        if stage == "K":
            return self.K[layer] if self.K else 0.0
        of_batch = getattr(self, stage)[layer][batch]
        return of_batch if stage in ("A", "S") else of_batch[chunk]


def waits_for(key: Key, stages: Stages, serial: bool) -> list[Key]:
    """The tasks that must have ended before this one starts; K is there in a serial schedule only."""
    stage, layer, batch, chunk = key
    if stage == "A":
        if layer == 0:
            return []
        back: list[Key] = [("E2A", layer - 1, batch, j) for j in range(stages.chunks(batch))]
        return [("S", layer - 1, batch, 0), *back, *([("K", layer - 1, 0, 0)] if serial else [])]
    if stage in ("S", "A2E"):
        return [("A", layer, batch, 0)]
    if stage == "E":
        return [("A2E", layer, batch, chunk)]
    if stage == "E2A":
        return [("E", layer, batch, chunk)]
    return [("E2A", layer, batch, 0)]


def queues_of(stages: Stages, colocated: bool, order: str, serial: bool) -> dict[str, list[Key]]:
    """What each resource serves, in which order."""
    queues: dict[str, list[Key]] = {}

    def add(resource: str, keys: list[Key]) -> None:
        queues.setdefault(resource, []).extend(keys)

    batches = range(stages.batches)
    for layer in range(stages.layers):
        pairs = [(i, j) for i in batches for j in range(stages.chunks(i))]
        if order == "aass":
            attention: list[Key] = [(stage, layer, i, 0) for stage in ("A", "S") for i in batches]
        else:
            attention = [(stage, layer, i, 0) for i in batches for stage in ("A", "S")]
        there, work, back = ([(stage, layer, i, j) for i, j in pairs] for stage in ("A2E", "E", "E2A"))
        if serial:
            add("ALL", [*attention, *there, *work, *back, ("K", layer, 0, 0)])
        elif colocated:
            add("GPU", [*attention, *work])
            add("NET", [*there, *back])
        else:
            add("AG", attention)
            add("A2E", there)
            add("EG", work)
            add("E2A", back)
    return queues


def run(stages: Stages, *, colocated: bool, order: str = "asas", serial: bool = False) -> list[Span]:
    """Run all tasks, event by event; return them in the order in which they start."""
    assert not serial or (stages.batches == 1 and stages.chunks(0) == 1), "serial is pipeline:1,1"
    queues = {name: list(reversed(queue)) for name, queue in queues_of(stages, colocated, order, serial).items()}
    busy: dict[str, Key] = {}
    ended: set[Key] = set()
    events: list[tuple[float, str]] = []  # a resource becomes free
    spans: list[Span] = []
    now = 0.0
    while True:
        for name, queue in queues.items():
            if queue and name not in busy and all(key in ended for key in waits_for(queue[-1], stages, serial)):
                key = queue.pop()
                busy[name] = key
                end = now + stages.seconds(key)
                spans.append(Span(*key, now, end))
                heapq.heappush(events, (end, name))
        if not events:
            break
        now, name = heapq.heappop(events)
        ended.add(busy.pop(name))
    assert not any(queues.values()), "a task waits for one that comes after it"
    return spans


def last_end(spans: list[Span]) -> float:
    return max((span.end_s for span in spans), default=0.0)
