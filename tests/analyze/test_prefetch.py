"""Prefetch predictors: against a slow simulator, and what must hold of any."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle_cache

from moetrace.analyze.cache.hits import cache_hits
from moetrace.analyze.prefetch.value import PREDICTORS, predictors, prefetch_value
from moetrace.generators import generate_trace
from moetrace.spec import load_model, load_system
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace import Trace

LAYERS, EXPERTS = 3, 7


def some_trace(seed: int, steps: int = 30, most: int = 3) -> dict:
    rng = np.random.default_rng(seed)
    step_rows = rng.integers(1, most + 1, steps)
    rows = int(step_rows.sum())
    ids = oracle_cache.random_routing(rng, rows, LAYERS, EXPERTS, 2)
    phase = rng.integers(0, 3, steps)
    return {
        "experts": ids,
        "num_experts": EXPERTS,
        "request": rng.integers(0, 5, rows),
        "steps": step_rows,
        "phase": phase,
        "row_phase": np.minimum(np.repeat(phase, step_rows), 1),
        "recorded": np.where(ids == 255, 255, rng.integers(0, 3, ids.shape)),
        "expert_bytes": rng.integers(1, 30, (LAYERS, EXPERTS)),
    }


def following(given: dict, ahead: int) -> np.ndarray:
    """How often each expert follows each of the layer before, for requests of even and odd numbers, as a share."""
    count = np.zeros((2, LAYERS, EXPERTS, EXPERTS), np.float32)
    for ids, request in zip(given["experts"], given["request"], strict=True):
        for layer in range(ahead, LAYERS):
            for before in ids[layer - ahead][ids[layer - ahead] != 255]:
                for now in ids[layer][ids[layer] != 255]:
                    count[request % 2, layer, before, now] += 1
    return count / np.maximum(count.sum(3, keepdims=True), 1)


def best(score, most: int) -> list[int]:
    return [e for e in sorted(range(EXPERTS), key=lambda e: (-score[e], e)) if score[e] > 0][:most]


def simulate(given: dict, predictor: str, capacity: int, most: int, ahead: int) -> list[int]:
    """named, correct, demanded, misses, covered misses, prefetched and wasted bytes; without a system."""
    steps = given["steps"]
    events = oracle_cache.events(given["experts"], steps, given["phase"], 255, False, given["recorded"])
    hits = iter(oracle_cache.replay(events, "lru", capacity, np.ones((LAYERS, EXPERTS))))
    first = np.concatenate([[0], np.cumsum(steps)])
    share = following(given, ahead)
    last: dict[int, list[int]] = {}
    used = np.zeros((LAYERS, EXPERTS))
    totals = [0] * 7
    touched: list[tuple[int, int]] = []  # keys, those touched longest ago first
    resident: set[tuple[int, int]] = set()
    for number, event in enumerate(events):
        step, layer = divmod(number, LAYERS)
        demanded = [access.key[1] for access in event]
        if layer == 0 and predictor == "ewma":
            used *= 0.7
        names = {
            "last-token": last.get(layer, [])[:most],
            "frequency": best(used[layer], most),
            "ewma": best(used[layer], most),
            "recorded": [access.key[1] for access in event if access.recorded == 2],
        }.get(predictor)
        if predictor == "transition":
            score = np.zeros(EXPERTS)
            for row in range(first[step], first[step + 1]):
                for before in given["experts"][row, layer - ahead] if layer >= ahead else []:
                    if before != 255:
                        score += share[1 - given["request"][row] % 2, layer, before]
            names = best(score, most)
        if event:
            fetched = {e for e in names if (layer, e) not in resident}
            misses = [e for e in demanded if not next(hits)]
            assert misses == [e for e in demanded if (layer, e) not in resident]
            size = given["expert_bytes"][layer]
            bytes_of = [sum(int(size[e]) for e in group) for group in (fetched, fetched - set(demanded))]
            correct, covered = set(names) & set(demanded), set(names) & set(misses)
            found = [len(names), len(correct), len(demanded), len(misses), len(covered), *bytes_of]
            totals = [a + b for a, b in zip(totals, found, strict=True)]
            # The cache's content afterwards, if the event fits.
            keys = [(layer, e) for e in demanded]
            touched = [key for key in touched if key not in keys] + keys
            resident = set(touched[-capacity:])
        last[layer] = demanded[::-1]
        for expert in demanded:
            used[layer, expert] += 1
    return totals


def test_transitions_are_counted_beyond_what_a_float_holds():
    count = np.full((2, 2, 3, 3), 1 << 24, np.uint32)
    ids = np.array([[[0], [2]], [[0], [2]], [[1], [255]]], np.uint8)
    predictors.learn_transitions(count, ids, np.array([0, 0, 1], np.uint8), 255, 1)
    assert count[0, 1, 0, 2] == (1 << 24) + 2 and int(count.sum(dtype=np.int64)) == (36 << 24) + 2


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    predictor=st.sampled_from([name for name in PREDICTORS if name != "oracle"]),
    capacity=st.integers(6, 21),  # the largest event fits
    most=st.integers(1, 7),
    ahead=st.integers(1, 3),
    rows=st.sampled_from([3, None]),
)
def test_predictors_agree_with_the_oracle(seed, predictor, capacity, most, ahead, rows):
    given = some_trace(seed)
    trace = Trace.from_arrays(**given)
    blocks = trace.blocks
    trace.blocks = lambda *_, **__: blocks(rows=rows)
    found = prefetch_value(trace, capacity, [predictor], most=most, ahead=ahead).row(0, named=True)
    named, correct, demanded, misses, covered, fetched, wasted = simulate(given, predictor, capacity, most, ahead)
    columns = ("named", "demanded", "misses", "covered_misses", "prefetched_bytes", "wasted_bytes")
    assert [found[c] for c in columns] == [named, demanded, misses, covered, fetched, wasted]
    assert found["recall"] == pytest.approx(correct / demanded)
    known = named and predictor != "recorded"
    assert found["precision"] == (pytest.approx(correct / named) if known else None)
    assert found["timely_hits"] is None
    assert found["displaced"] == (pytest.approx(covered / misses) if misses else None)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_misses_are_those_of_the_cache(scope):
    trace = generate_trace("tiny-olmoe", requests=4, prompt=3, output=60, batch=2)
    frame = prefetch_value(trace, 60, scope=scope)
    lru = cache_hits(trace, [60], ["lru"], scope=scope)
    for phase in lru["phase"].to_list():
        row = lru.filter(phase=phase).row(0, named=True)
        assert set(frame.filter(phase=phase)["misses"]) == {row["accesses"] - row["hits"]}
        assert set(frame.filter(phase=phase)["demanded"]) == {row["accesses"]}


@pytest.mark.parametrize("recall", [0.0, 0.3, 1.0])
def test_the_oracle_names_demanded_experts(recall):
    trace = generate_trace("tiny-olmoe", requests=4, prompt=3, output=100)
    row = prefetch_value(trace, 60, ["oracle"], recall=recall, seed=3).row(0, named=True)
    assert abs(row["recall"] - recall) < 0.01 and row["wasted_bytes"] == 0
    assert row["precision"] == (1 if recall else None)
    assert abs(row["displaced"] - recall) < 0.03


def test_computing_hides_fetches_that_arrive_in_time():
    """One layer's computing hides as many fetches as fit into it, on a machine whose link is as quick as its memory."""
    trace = generate_trace("tiny-olmoe", requests=2, prompt=2, output=40)
    slow, model = load_system("rtx4090-offload"), load_model("tiny-olmoe")
    assert slow.link is not None
    overrides = {"link.bandwidth_gb_s": slow.gpu.bytes_s / 1e9, "link.latency_us": 0}
    quick = load_system("rtx4090-offload", overrides)
    ideal = prefetch_value(trace, 60, ["oracle"], recall=1, model=model).row(0, named=True)
    found = prefetch_value(trace, 60, ["oracle"], recall=1, model=model, system=quick).filter(phase="decode")
    row = found.row(0, named=True)
    assert row["timely_hits"] == row["covered_misses"], "as many are named as were computed, and there is the rest"
    none = load_system("rtx4090-offload", {"link.bandwidth_gb_s": 1e-6})
    row = prefetch_value(trace, 60, ["oracle"], recall=1, model=model, system=none).row(0, named=True)
    assert row["timely_hits"] == 0 and row["prefetched_bytes"] == 0 and row["covered_misses"] == ideal["covered_misses"]
    some = prefetch_value(trace, 60, model=model, system="rtx4090-offload")
    assert (some["timely_hits"] <= some["covered_misses"]).all()
    assert (some["wasted_bytes"] <= some["prefetched_bytes"]).all()


def test_a_link_that_is_busy_makes_the_next_ones_wait():
    """By hand: layers that compute 1 s, fetches of 1.5 s, one expert demanded by each layer, and none resident."""
    experts = np.array([[[i % 3], [i % 3]] for i in range(9)])
    trace = Trace.from_arrays(experts, num_experts=3, expert_bytes=np.array([10, 10]))
    gpu = {"gpu.launch_us": 0, "gpu.bandwidth_gb_s": 20e-9, "gpu.memory_efficiency": 1}
    link = {"link.bandwidth_gb_s": 10 / 1.5 * 1e-9, "link.latency_us": 0}
    system = load_system("rtx4090-offload", gpu | link)
    model = load_model("mixtral-8x7b", {"moe_layers": 2, "experts": 3, "dense_params_per_layer": 10, "top_k": 1})
    model = load_model(model, {"dense_weight_bits": 8})
    found = {}
    for ahead in (1, 2):
        frame = prefetch_value(trace, 1, ["oracle"], recall=1, ahead=ahead, model=model, system=system)
        found[ahead] = frame["timely_hits"][0]
    # 2 ahead: asked for at 0 s, the third layer's arrives at 1.5 of 2 s; the next one would at 3.0 of 3; then the link
    # is behind: 4.5 of 4 is not begun, so that it is free again at 3 s, for the one that is asked for at 3 s.
    assert found[1] == 0
    ends, free = 0, 0.0
    for layer in range(2, 18):
        arrives = max(free, layer - 2) + 1.5
        if arrives <= layer:
            free, ends = arrives, ends + 1
    assert found[2] == ends == 11


def test_a_small_expert_arrives_after_a_large_one_that_would_not():
    """By hand: layers that compute 1 s and more; fetches of 10 s and of half a second, named in this order."""
    experts = np.array([[[0, 1], [0, 1]]] * 9)
    trace = Trace.from_arrays(experts, num_experts=2, expert_bytes=np.array([[100, 5], [100, 5]]))
    gpu = {"gpu.launch_us": 0, "gpu.bandwidth_gb_s": 115e-9, "gpu.memory_efficiency": 1}
    system = load_system("rtx4090-offload", gpu | {"link.bandwidth_gb_s": 10e-9, "link.latency_us": 0})
    model = load_model("mixtral-8x7b", {"moe_layers": 2, "experts": 2, "dense_params_per_layer": 10, "top_k": 1})
    model = load_model(model, {"dense_weight_bits": 8})
    frame = prefetch_value(trace, 2, ["oracle"], recall=1, model=model, system=system)
    assert frame["misses"][0] == 36 and frame["timely_hits"][0] == 17, "all small ones but the first layer's"
    assert frame["prefetched_bytes"][0] == 17 * 5 and frame["wasted_bytes"][0] == 0


def test_transitions_come_from_other_requests():
    one = prefetch_value(generate_trace("tiny-olmoe", requests=1, prompt=2, output=9), 60, ["transition"])
    assert one["named"][0] == 0 and one["precision"][0] is None
    experts = np.tile(np.array([[[0], [3]], [[1], [4]]]), (10, 1, 1))  # 3 follows 0, and 4 follows 1
    trace = Trace.from_arrays(experts, num_experts=5, request=np.repeat([0, 1], 10))
    row = prefetch_value(trace, 2, ["transition"]).row(0, named=True)
    assert (row["named"], row["demanded"], row["recall"]) == (20, 40, 0.5)


def test_impossible_arguments_are_refused():
    given = some_trace(0)
    trace = Trace.from_arrays(**given)
    for arguments, sentence in (
        ({"names": ["magic"]}, "no predictor 'magic'; known are last-token"),
        ({"ahead": 4}, "cannot be named 4 layers ahead: give 1 to 3"),
        ({"most": 0}, "cannot name 0 experts"),
        ({"recall": 2}, "recall is 2, but must be"),
        ({"scope": "step"}, "no scope 'step'"),
        ({"system": "rtx4090-offload"}, "--system needs the model"),
        ({"system": "rtx4090-offload", "model": "mixtral-8x7b"}, "name the right one with --model"),
        ({"system": "jetson-orin"}, "has no link"),
        ({"capacity": "3 apples"}, "neither a number"),
    ):
        with pytest.raises(UsageError, match=sentence):
            prefetch_value(trace, **({"capacity": 5} | arguments))
    del given["recorded"]
    with pytest.raises(MoetraceError, match="has no /recorded/resident"):
        prefetch_value(Trace.from_arrays(**given), 5, ["recorded"])
    given["experts"][40, 1] = [3, 9]
    with pytest.raises(MoetraceError, match="/experts row 40, layer entry 1 holds the id 9, but the model has 7"):
        prefetch_value(Trace.from_arrays(**given), 5)
    many = Trace.from_arrays(np.zeros((1, 3, 1), np.uint16), num_experts=20000)
    with pytest.raises(MoetraceError, match="too many for a table of transitions"):
        prefetch_value(many, 5)
