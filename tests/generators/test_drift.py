"""Traces whose popularity drifts: how it moves, that its shape stays, and that blocks change nothing."""

from itertools import pairwise

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrace.generators import Profile, ZipfDrawer, generate, generate_trace, load_profile
from moetrace.generators.drift import MOST_MOVES, Drift
from moetrace.spec import Model, load_model
from moetrace.spec.errors import UsageError
from moetrace.trace import Trace


def a_model(layers: int, experts: int, top_k: int) -> Model:
    return load_model("tiny-olmoe", {"moe_layers": layers, "experts": experts, "top_k": top_k, "name": "small"})


def ranks_at(drift: Drift, step: int) -> np.ndarray:
    """Rank of each expert in a step, int [layers, experts]."""
    ((_, expert_of_rank),) = drift.parts(step, np.array([1]))
    return np.argsort(expert_of_rank, axis=1)


def steps_of(trace: Trace) -> list[np.ndarray]:
    """Experts of each step, [rows, layers, k]."""
    (block,) = trace.blocks(rows=trace.rows)
    return np.split(block.experts, block.offset[1:-1])


@given(steps=st.integers(1, 3000), first=st.integers(0, 10_000), away=st.floats(0, 2), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=60, deadline=None)
def test_ranks_of_two_steps_correlate_less_the_farther_they_are_apart(steps, first, away, seed):
    drift, distance = Drift(steps, seed, 4, 2000), round(away * steps)
    one = ranks_at(drift, first)
    other = ranks_at(drift, first + distance)
    assert (np.sort(one, axis=1) == np.arange(2000)).all()
    found = np.corrcoef(one.ravel(), other.ravel())[0, 1]  # of ranks: Spearman's, 6/pi asin(rho/2) of normal scores
    moves = min(steps, MOST_MOVES)
    share = (first + distance) * moves // steps - first * moves // steps
    rho = max(0.0, 1 - share / moves)
    assert found == pytest.approx(6 / np.pi * np.arcsin(rho / 2), abs=0.05)
    assert distance < steps or rho == 0.0
    assert abs(rho - max(0.0, 1 - distance / steps)) <= 1 / moves


@given(
    zipf=st.floats(0, 3),
    drift=st.integers(1, 40),
    prompt=st.integers(0, 4),
    batch=st.integers(1, 4),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=30, deadline=None)
def test_the_law_of_popularity_stays(zipf, drift, prompt, batch, seed):
    asked = {"requests": 5, "prompt": prompt, "output": 12, "batch": batch, "zipf": zipf, "stick": 0.0, "seed": seed}
    model = a_model(2, 16, 3)
    still, moving = generate_trace(model, **asked), generate_trace(model, **asked, drift=drift)
    of_rank = Drift(drift, seed, 2, 16)
    fixed = np.argsort(ZipfDrawer(model, zipf, 0.0, seed).tables.expert_of_rank, axis=1)
    layer = np.arange(2)[:, None]
    for step, (a, b) in enumerate(zip(steps_of(still), steps_of(moving), strict=True)):
        assert (fixed[layer, a] == ranks_at(of_rank, step)[layer, b]).all()


@pytest.mark.parametrize("stick", [0.0, 0.7])
def test_a_row_keeps_experts_and_not_ranks(stick):
    model = a_model(2, 16_000, 8)
    trace = generate_trace(model, requests=20, prompt=0, output=60, batch=20, zipf=0.0, stick=stick, drift=3)
    steps = steps_of(trace)
    kept = [(after[:, :, :, None] == before[:, :, None, :]).any(axis=-1).mean() for before, after in pairwise(steps)]
    assert np.mean(kept) == pytest.approx(stick, abs=0.02)


def test_blocks_change_nothing_and_the_file_says_it(tmp_path, monkeypatch):
    asked = {"requests": 5, "prompt": 3, "output": 9, "batch": 2, "stick": 0.5, "drift": 4, "seed": 3}
    in_memory = generate_trace(a_model(3, 8, 2), **asked)
    monkeypatch.setattr("moetrace.generators.fill.BLOCK_BYTES", 20)
    generate(tmp_path / "a.h5", a_model(3, 8, 2), **asked)
    with Trace.open(tmp_path / "a.h5") as trace:
        assert trace.source["parameters"]["drift"] == 4
        assert all((a == b).all() for a, b in zip(steps_of(trace), steps_of(in_memory), strict=True))
    still = generate_trace(a_model(3, 8, 2), **asked | {"drift": None})
    assert "drift" not in still.source["parameters"]
    assert any((a != b).any() for a, b in zip(steps_of(still), steps_of(in_memory), strict=True))


def small_profile() -> Profile:
    whole = load_profile("tiny-olmoe")
    return msgspec.structs.replace(whole, layers=2, skew=whole.skew[:2], model="small")


def test_a_profile_drifts_and_stays_as_skewed():
    asked = {"requests": 200, "prompt": 0, "output": 12, "batch": 200, "profile": small_profile()}
    still, moving = (steps_of(generate_trace(**asked, drift=drift)) for drift in (None, 8))

    def shares(experts):  # of each layer's experts, in the order of their ids
        number = small_profile().experts
        return [np.bincount(experts[:, layer].ravel(), minlength=number) / experts[:, 0].size for layer in (0, 1)]

    for step in (1, 5, 11):  # a request begins with what `sink` says
        a, b = (np.sort(shares(steps[step]), axis=1)[:, ::-1][:, :8].sum() for steps in (still, moving))
        assert b == pytest.approx(a, rel=0.1)
    like = [np.corrcoef(np.ravel(shares(steps[1])), np.ravel(shares(steps[10])))[0, 1] for steps in (still, moving)]
    assert like[0] > 0.9 and abs(like[1]) < 0.4


@pytest.mark.parametrize("wrong", [0, -3, 2**31])
def test_no_number_of_steps_is_refused(tmp_path, wrong):
    with pytest.raises(UsageError, match=rf"^drift is {wrong}: give a whole number of steps from 1 .*\.$"):
        generate(tmp_path / "a.h5", a_model(3, 8, 2), requests=1, prompt=1, output=1, drift=wrong)
    assert not list(tmp_path.iterdir())
