"""Generated traces: distribution against a slow Gumbel top-k, schedule against a plain loop, reproducibility."""

import json
import os
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrace.generators import BatchSchedule, ZipfDrawer, generate, generate_trace
from moetrace.spec import load_model
from moetrace.spec.errors import UsageError
from moetrace.spec.model import Model
from moetrace.trace import Trace


def a_model(layers=3, experts=8, top_k=2):
    return Model(
        name="small",
        moe_layers=layers,
        experts=experts,
        top_k=top_k,
        hidden=64,
        expert_intermediate=32,
        weight_bits=16,
        dense_weight_bits=16,
        dense_params_per_layer=1000,
        once_params=1000,
        kv_bytes_per_token_layer=128,
    )


def draw_ranks(model, zipf, stick=0.0, seed=0, requests=1, length=1000):
    """Ranks int [requests, length, layers, top_k] of requests drawn one after another."""
    drawer = ZipfDrawer(model, zipf, stick, seed)
    request = np.repeat(np.arange(requests, dtype=np.int32), length)
    position = np.tile(np.arange(length, dtype=np.int32), requests)
    experts = drawer.draw(request, position).reshape(requests, length, model.moe_layers, model.top_k)
    rank_of_expert = np.argsort(drawer.tables.expert_of_rank, axis=1)
    return rank_of_expert[np.arange(model.moe_layers)[:, None], experts]


def gumbel_top_k(experts, top_k, zipf, draws):
    """Ranks int [draws, top_k], best first: log-popularity plus Gumbel noise, sorted."""
    log_popularity = -zipf * np.log(np.arange(1, experts + 1))
    noise = np.random.default_rng(1).gumbel(size=(draws, experts))
    return np.argsort(-(log_popularity + noise), axis=1)[:, :top_k]


CASES = [(8, 2, 0.0), (8, 2, 0.6), (8, 8, 0.6), (64, 6, 0.8), (128, 8, 0.6), (300, 8, 1.2)]
MOSTLY_SCANS = [(8, 6, 2.0), (12, 12, 1.5), (16, 5, 8.0), (32, 4, 6.0), (128, 8, 3.0)]


@pytest.mark.parametrize(("experts", "top_k", "zipf"), CASES + MOSTLY_SCANS)
def test_every_slot_is_distributed_as_gumbel_top_k(experts, top_k, zipf):
    ours = draw_ranks(a_model(4, experts, top_k), zipf, length=5000).reshape(-1, top_k)
    theirs = gumbel_top_k(experts, top_k, zipf, 20_000)
    for slot in range(top_k):
        a, b = (np.bincount(ranks[:, slot], minlength=experts) for ranks in (ours, theirs))
        # Two samples of equal size: (a - b)^2 / (a + b) is chi-square distributed. Rare ranks are counted together.
        rare = a + b < 20
        a, b = (np.append(counts[~rare], counts[rare].sum()) for counts in (a, b))
        chi_square = ((a - b) ** 2 / np.maximum(a + b, 1)).sum()
        assert chi_square < len(a) + 5 * np.sqrt(2 * len(a)), slot


def test_ordered_pairs_have_their_exact_probability():
    weight = np.arange(1, 9) ** -0.6
    weight /= weight.sum()
    ranks = draw_ranks(a_model(4), 0.6, length=25_000).reshape(-1, 2)
    counts = np.bincount(ranks[:, 0] * 8 + ranks[:, 1], minlength=64)
    pairs = list(permutations(range(8), 2))
    expected = np.array([weight[i] * weight[j] / (1 - weight[i]) for i, j in pairs]) * len(ranks)
    observed = np.array([counts[i * 8 + j] for i, j in pairs])
    assert ((observed - expected) ** 2 / expected).sum() < 56 + 5 * np.sqrt(2 * 56)


@given(
    experts=st.integers(1, 300),
    share=st.floats(0, 1),
    zipf=st.floats(0, 20),
    stick=st.floats(0, 1),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=60, deadline=None)
def test_ids_are_distinct_and_exist(experts, share, zipf, stick, seed):
    top_k = max(1, round(share * min(experts, 16)))
    ids = np.sort(draw_ranks(a_model(2, experts, top_k), zipf, stick, seed, requests=2, length=9), axis=-1)
    assert ids.min() >= 0
    assert ids.max() < experts
    assert (ids[..., 1:] > ids[..., :-1]).all()


@pytest.mark.parametrize("stick", [0.0, 0.3, 0.7, 1.0])
def test_stick_keeps_its_share_of_the_previous_row(stick):
    # 8 of 16000 uniform experts: a dropped one hardly ever comes back, so the overlap is the kept share.
    ranks = draw_ranks(a_model(2, 16_000, 8), 0.0, stick, requests=20, length=200)
    overlap = (ranks[:, 1:, :, :, None] == ranks[:, :-1, :, None, :]).any(axis=-1).mean()
    assert overlap == pytest.approx(stick, abs=0.01)
    first = ranks[:, 0].reshape(20, -1)
    assert len(np.unique(first[:, 0])) > 15, "a request starts with its own experts, not with its predecessor's"


def test_kept_experts_are_an_independent_choice():
    ranks = draw_ranks(a_model(2, 16_000, 4), 0.0, 0.5, length=4000)
    kept = (ranks[0, 1:, :, :, None] == ranks[0, :-1, :, None, :]).any(axis=2)  # which old slots stay
    sizes = np.bincount(kept.sum(axis=-1).ravel(), minlength=5) / kept[..., 0].size
    assert sizes == pytest.approx([1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16], abs=0.02)


def test_each_layer_has_its_own_permutation():
    tables = ZipfDrawer(a_model(6, 64, 4), 0.6, 0.0, 3).tables
    assert (np.sort(tables.expert_of_rank, axis=1) == np.arange(64)).all()
    assert len(np.unique(tables.expert_of_rank, axis=0)) == 6
    assert (tables.expert_of_rank != ZipfDrawer(a_model(6, 64, 4), 0.6, 0.0, 4).tables.expert_of_rank).any()


def plain_steps(requests, prompt, output, batch):
    """The schedule as a user would tell it: a list of (phase, [(request, position), ...])."""
    waiting, running, steps = list(range(requests)), [], []
    while waiting or running:
        while waiting and len(running) < batch:
            request = waiting.pop(0)
            if prompt:
                steps.append((0, [(request, position) for position in range(prompt)]))
            running.append([request, prompt])
        if output:
            steps.append((1, [tuple(row) for row in running]))
        for row in running:
            row[1] += 1
        running = [row for row in running if row[1] < prompt + output]
    return steps


@given(
    requests=st.integers(1, 9),
    prompt=st.integers(0, 5),
    output=st.integers(0, 5),
    batch=st.integers(1, 10),
    rows=st.integers(1, 40),
)
def test_schedule_is_continuous_batching(requests, prompt, output, batch, rows):
    if prompt + output == 0:
        return
    schedule = BatchSchedule(requests, prompt, output, batch)
    steps = []
    for block in schedule.blocks(rows):
        first = 0
        assert len(block.step_rows) == 1 or block.step_rows.sum() <= rows
        for count, phase in zip(block.step_rows, block.phase, strict=True):
            part = slice(first, first + count)
            steps.append((phase, list(zip(block.request[part], block.position[part], strict=True))))
            first += count
        assert first == len(block.request) == len(block.position)
    assert steps == plain_steps(requests, prompt, output, batch)
    assert len(steps) == schedule.steps
    assert sum(len(step) for _, step in steps) == schedule.rows


def test_block_size_does_not_change_the_draws():
    model, schedule = a_model(3, 16, 4), BatchSchedule(5, 7, 6, 2)
    drawn = []
    for rows in (1, 5, 1000):
        drawer = ZipfDrawer(model, 0.6, 0.5, 0, slots=2)
        drawn.append(np.concatenate([drawer.draw(b.request, b.position) for b in schedule.blocks(rows)]))
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] == drawn[2]).all()


def test_batch_does_not_change_what_a_request_draws():
    by_batch = []
    for batch in (1, 3):
        trace = generate_trace(a_model(), requests=5, prompt=4, output=3, batch=batch, stick=0.5)
        (block,) = trace.blocks(rows=1000)
        by_batch.append(block.experts[np.lexsort((block.position, block.request))])
    assert (by_batch[0] == by_batch[1]).all()


def test_file_holds_the_trace_and_says_where_it_is_from(tmp_path):
    arguments = {"requests": 3, "prompt": 5, "output": 4, "batch": 2, "zipf": 0.6, "stick": 0.25, "seed": 7}
    generate(tmp_path / "a.h5", a_model(), **arguments)
    in_memory = generate_trace(a_model(), **arguments)
    with Trace.open(tmp_path / "a.h5") as trace:
        assert (trace.model, trace.rows, trace.steps, trace.layers) == ("small", 27, 3 + 8, 3)
        assert trace.phase.tolist() == [0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1]
        assert trace.source["parameters"] == arguments
        assert trace.source["generator"] == "zipf"
        assert json.dumps(trace.source, sort_keys=True) == json.dumps(in_memory.source, sort_keys=True)
        for ours, theirs in zip(trace.blocks(), in_memory.blocks(), strict=True):
            assert (ours.experts == theirs.experts).all()
            assert (ours.request == theirs.request).all()
            assert (ours.position == theirs.position).all()
            assert (ours.offset == theirs.offset).all()


def test_same_arguments_same_bytes_other_seed_other_bytes(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        generate(tmp_path / name, a_model(), requests=2, prompt=3, output=20, seed=seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_ids_are_uint16_beyond_255_experts():
    for experts, dtype in ((255, np.uint8), (256, np.uint16)):
        assert ZipfDrawer(a_model(1, experts, 2), 0.6, 0.0, 0).draw(*np.zeros((2, 1), np.int32)).dtype == dtype


def test_progress_counts_all_rows(tmp_path):
    seen = []
    generate(tmp_path / "a.h5", load_model("mixtral-8x7b"), requests=2, prompt=3, output=4, progress=seen.append)
    assert sum(seen) == 14


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"requests": 0}, "requests"),
        ({"prompt": -1}, "prompt"),
        ({"output": 2**31}, "output"),
        ({"prompt": 0, "output": 0}, "prompt and output"),
        ({"prompt": 2**30, "output": 2**30}, "prompt and output"),
        ({"batch": 0}, "batch"),
        ({"zipf": -0.1}, "zipf"),
        ({"zipf": float("nan")}, "zipf"),
        ({"zipf": float("inf")}, "zipf"),
        ({"stick": 1.5}, "stick"),
        ({"stick": float("nan")}, "stick"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
    ],
)
def test_values_without_sense_are_refused_by_name(tmp_path, wrong, name):
    with pytest.raises(UsageError, match=f"^{name} "):
        generate(tmp_path / "a.h5", a_model(), **{"requests": 1, "prompt": 1, "output": 1} | wrong)
    assert not list(tmp_path.iterdir())


def test_more_choices_than_experts_are_refused(tmp_path):
    with pytest.raises(UsageError, match="top_k"):
        generate(tmp_path / "a.h5", a_model(1, 8, 9), requests=1, prompt=1, output=1)


def test_same_draws_without_jit():
    code = (
        "import numpy as np; from test_generate import a_model, draw_ranks;"
        "print(draw_ranks(a_model(2, 8, 6), 2.0, 0.5, seed=2**63 - 1, requests=2, length=20).ravel().tolist())"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1", "PYTHONPATH": path}
    plain = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert plain.returncode == 0, plain.stderr
    compiled = draw_ranks(a_model(2, 8, 6), 2.0, 0.5, seed=2**63 - 1, requests=2, length=20)
    assert json.loads(plain.stdout) == compiled.ravel().tolist()
