"""What a prompt's end changes, in the cache and in the queue, beside the timing model's words for it (section 7)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrace.engine.prefetch import (
    COMPLETE,
    DONE_BYTES,
    HEAD,
    TAIL,
    admit_complete,
    empty_queue,
    flow,
    leave,
    note_late,
)
from moetrace.engine.prompt import make_wanted, prompts_of, queue_wanted
from moetrace.engine.residency import Cache, empty_cache, empty_cells, keep_for_good, touch_and_admit
from moetrace.engine.state import ACTIVE, GROUP, ON_GPU, OWN, TALLY, records
from moetrace.engine.view import LayerScratch
from moetrace.spec.choices import BY_TOUCH


class Engine:
    """The parts of a replay that a prompt's end reads and writes."""

    def __init__(self, weight_bytes: np.ndarray, capacity: np.ndarray, all_resident: bool):
        layers, experts = weight_bytes.shape
        none = np.zeros(0, np.int64)
        self.cells = empty_cells(layers, experts, False)
        self.cache = empty_cache(layers, experts, capacity.size, capacity, BY_TOUCH)
        self.queue, self.prompts = empty_queue(weight_bytes), prompts_of(none, none, none, layers * experts)
        self.tally = records(1, TALLY)
        own, groups = records(layers, OWN), records(1, GROUP)
        room = np.zeros(experts, np.int64), np.zeros(experts, np.uint8)
        self.scratch = LayerScratch(records(experts, ACTIVE), groups, *room, own, np.zeros(layers, np.int64))
        if all_resident:
            keep_for_good(self.cells, self.cache, np.arange(layers * experts))

    def end_prompt(self, total: np.ndarray) -> None:
        self.prompts.total[:] = total
        make_wanted(self.cells, self.cache, self.prompts.total)
        queue_wanted(self.queue, self.cells, self.cache, self.prompts, self.tally)

    def run_layer(self, layer: int, chosen: list[int]) -> None:
        """Run experts on the GPU. Those that are missing are fetched, and leave the queue; queued others are late."""
        first, missing = layer * self.cells.shape[1], 0
        for i, e in enumerate(chosen):
            self.scratch.active["expert"][i], self.scratch.plan[i] = e, ON_GPU
            self.scratch.active["resident"][i] = self.cache.resident[first + e]
            missing += int(self.cache.resident[first + e] == 0)
            if self.queue.place[first + e] >= 0:
                leave(self.queue, first + e)
        touch_and_admit(self.cells, self.cache, layer, len(chosen), self.scratch, missing, self.tally)
        for key in range(first, first + self.cells.shape[1]):
            note_late(self.queue, key)

    def entries(self) -> list[tuple[int, float, int]]:
        """The queue: keys, bytes that have moved, and whether they were late."""
        queue = self.queue
        keys = [
            int(queue.key[at]) for at in range(queue.ends[HEAD], queue.ends[TAIL]) if queue.place[queue.key[at]] == at
        ]
        assert sorted(keys) == np.flatnonzero(queue.place >= 0).tolist()
        return [(key, float(queue.moved_bytes[key]), int(queue.late[key])) for key in keys]


def most_frequent(total: np.ndarray, capacity: np.ndarray) -> set[int]:
    span, wanted = total.size // capacity.size, set()
    for pool, most in enumerate(capacity.tolist()):
        keys = [key for key in range(pool * span, (pool + 1) * span) if total[key] > 0]
        wanted |= set(sorted(keys, key=lambda key: (-total[key], key))[:most])
    return wanted


def rings(cache: Cache) -> list[list[int]]:
    """The experts of each pool that may be evicted, the first to go first; the same backwards."""
    found = []
    for end in range(cache.resident.size, cache.after.size):
        forth, back = [int(cache.after[end])], [int(cache.before[end])]
        while forth[-1] != end:
            forth.append(int(cache.after[forth[-1]]))
        while back[-1] != end:
            back.append(int(cache.before[back[-1]]))
        assert forth[:-1] == back[-2::-1]
        found.append(forth[:-1])
    return found


def check_after(engine: Engine, before: list, wasted: int, capacity: np.ndarray) -> None:
    """Compare everything after a prompt's end with what section 7 says of it; ``before`` it, these were queued."""
    cells, cache, total = engine.cells, engine.cache, engine.prompts.total
    wanted, experts = most_frequent(total, capacity), cells.shape[1]
    resident = set(np.flatnonzero(cache.resident).tolist())
    assert set(np.flatnonzero(cache.wanted).tolist()) == wanted
    for key in range(total.size):
        cell = cells[key // experts, key % experts]
        assert cell["score"] == (np.inf if key in wanted else 0.0)
        assert key in resident or bool(cell["admit"]) == (key in wanted)
    span = total.size // capacity.size
    by_age = sorted(resident - wanted, key=lambda key: (cache.touched[key], key))
    assert rings(cache) == [[key for key in by_age if key // span == pool] for pool in range(capacity.size)]
    assert {key for key in range(total.size) if cache.after[key] >= 0} == resident - wanted
    kept = {key: (moved, late) for key, moved, late in before if moved > 0}
    missing = sorted(wanted - resident, key=lambda key: (key // experts, -total[key], key))
    after = engine.entries()
    assert after == [(key, *kept.get(key, (0.0, 0))) for key in missing]
    complete = [key for key, moved, _ in after if engine.queue.weight_bytes[key] - moved <= DONE_BYTES]
    assert engine.queue.ends[COMPLETE] == len(complete)
    assert (engine.queue.moved_bytes[engine.queue.place < 0] == 0).all()
    lost = [key for key, moved, _ in before if key not in wanted and moved > DONE_BYTES]
    assert engine.tally["wasted"][0] - wasted == len(lost)


@pytest.mark.pure
@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    layers=st.integers(1, 4),
    experts=st.integers(1, 9),
    shares=st.booleans(),
    highest=st.sampled_from([1, 2, 4, 2**40]),
    all_resident=st.sampled_from([False, False, False, True]),
)
def test_a_prompts_end_changes_what_the_timing_model_says(seed, layers, experts, shares, highest, all_resident):
    random = np.random.default_rng(seed)
    weight_bytes, cells = random.choice([1.0, 2.0, 3.5], (layers, experts)), layers * experts
    capacity = random.integers(0, (cells if shares else experts) + 1, 1 if shares else layers)
    if all_resident:
        capacity[:] = cells if shares else experts
    engine = Engine(weight_bytes, capacity, all_resident)
    for _ in range(6):
        before, wasted = engine.entries(), int(engine.tally["wasted"][0])
        engine.end_prompt(random.integers(0, highest + 1, cells) * random.integers(0, 2, cells))
        check_after(engine, before, wasted, capacity)
        budget_bytes = random.choice([0.0, DONE_BYTES / 2, 0.7, 2.0, 9.0])
        for _ in range(random.integers(0, 8)):
            flow(engine.queue, budget_bytes)
            admit_complete(engine.queue, engine.cells, engine.cache, engine.tally)
            chosen = random.permutation(experts)[: random.integers(experts + 1)]
            engine.run_layer(int(random.integers(layers)), chosen.tolist())
        flow(engine.queue, budget_bytes)
