"""`ProfileDrawer`: against a slow NumPy reference of the same model, and what must not change what a row draws."""

import json
import os
import subprocess
import sys

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.imitation import a_profile, reference, rows_of

from moetrace.generators import BatchSchedule, ProfileDrawer, generate_trace
from moetrace.generators.imitate import popularity
from moetrace.spec.errors import UsageError


def described(experts, count):
    """Means by which the two can be told apart: popularity [L, E], overlaps at lags, within a row, between requests."""
    chosen = (experts[..., None] == np.arange(count)).any(axis=3).astype(float)  # [R, T, L, E]
    k = experts.shape[3]
    lags = [(chosen[:, lag:] * chosen[:, :-lag]).sum(axis=3).mean() / k for lag in (1, 2, 5)]
    mean = chosen.mean(axis=1)
    between = (mean.var(axis=0)).sum(axis=1).mean()
    pairs = np.einsum("rtle,rtlf->lef", chosen, chosen) / chosen[..., 0, 0].size
    layers = np.einsum("rte,rtf->ef", chosen[:, :, 0], chosen[:, :, 1]) / chosen[..., 0, 0].size
    return chosen.mean(axis=(0, 1)), np.array(lags), between, pairs, layers


def test_distribution_is_the_references():
    profile = a_profile(sink=0.0, vocabulary=3000, token_zipf=0.3)
    requests, length, prompt = 3000, 20, 10
    request, position = rows_of(requests, length)
    drawer = ProfileDrawer(profile, 3, prompt=prompt, slots=requests)
    ours = drawer.draw(request, position).reshape(requests, length, profile.layers, profile.top_k)
    theirs = reference(profile, drawer.tables, np.random.default_rng(1), requests, length, prompt)
    for phase in (slice(0, prompt), slice(prompt, None)):
        one, other = described(ours[:, phase], 16), described(theirs[:, phase], 16)
        # Neither the tokens nor any draw are the same: tolerances of about four standard errors.
        for name, tolerance, a, b in zip(
            ("popularity", "overlap", "between requests", "pairs", "layers"),
            (0.025, 0.008, 0.015, 0.02, 0.02),
            one,
            other,
            strict=True,
        ):
            assert np.abs(a - b).max() < tolerance, (name, phase)


def test_popularity_is_the_profiles():
    profile = a_profile(4, 32, 4, dimensions=10, skew=[0.2, 0.5, 0.8, 0.0], curve=[2.0, 0.7, 0.1, -0.6, -2.2])
    request, position = rows_of(4000, 2)
    drawn = ProfileDrawer(profile, 0, prompt=1, slots=4000).draw(request, position, np.ones(8000, np.uint8))
    wanted = popularity(profile, 0)[1]
    for layer in range(4):
        found = np.bincount(drawn[position == 1][:, layer].ravel(), minlength=32) / (4000 * 4)
        assert np.abs(np.log(found / wanted[layer])).mean() < 0.12
    assert np.allclose(wanted[3], 1 / 32)
    assert (np.diff(np.sort(wanted[0])) > 0).all()


def test_phases_differ_as_much_as_the_profile_says():
    same, other = popularity(a_profile(phase=0.0), 0), popularity(a_profile(phase=1.0), 0)
    assert (same[0] == same[1]).all()
    assert abs(np.corrcoef(other[0].ravel(), other[1].ravel())[0, 1]) < 0.5


@given(
    experts=st.integers(2, 40),
    layers=st.integers(1, 3),
    dimensions=st.integers(2, 12),
    seed=st.integers(0, 2**63 - 1),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_choices_are_distinct_and_possible(experts, layers, dimensions, seed, data):
    top_k = data.draw(st.integers(1, experts))
    profile = a_profile(layers, experts, top_k, dimensions=dimensions, phase=data.draw(st.sampled_from([0.0, 0.5])))
    drawn = ProfileDrawer(profile, seed, prompt=2, slots=3).draw(*rows_of(3, 6))
    assert drawn.shape == (18, layers, top_k)
    assert drawn.max() < experts
    ordered = np.sort(drawn, axis=2)
    assert (ordered[:, :, 1:] != ordered[:, :, :-1]).all()
    assert (ProfileDrawer(profile, seed, prompt=2, slots=3).draw(*rows_of(3, 6)) == drawn).all()


def test_ids_are_uint16_beyond_255_experts():
    profile = a_profile(1, 300, 4, phase=0.0)
    drawn = ProfileDrawer(profile, 0, slots=1).draw(*rows_of(1, 200))
    assert drawn.dtype == np.uint16
    assert drawn.max() > 255


def test_block_size_does_not_change_the_draws():
    schedule, drawn = BatchSchedule(5, 7, 6, 2), []
    for rows in (1, 5, 1000):
        drawer = ProfileDrawer(a_profile(), 0, prompt=7, slots=2)
        drawn.append(np.concatenate([drawer.draw(block.request, block.position) for block in schedule.blocks(rows)]))
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] == drawn[2]).all()


def test_neither_batch_nor_length_changes_what_a_request_draws():
    drawn = []
    for batch, requests, output in ((1, 5, 6), (3, 5, 6), (4, 9, 20)):
        trace = generate_trace(profile=a_profile(), requests=requests, prompt=4, output=output, batch=batch)
        request, position = (trace.read(name, 0, trace.rows) for name in ("request", "position"))
        keep = np.lexsort((position, request))
        keep = keep[(request[keep] < 5) & (position[keep] < 10)]
        drawn.append(trace.read("experts", 0, trace.rows)[keep])
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] == drawn[2]).all()


def test_other_seed_other_draws():
    first, second = (ProfileDrawer(a_profile(), seed, slots=2).draw(*rows_of(2, 30)) for seed in (0, 1))
    assert (first != second).mean() > 0.5


def test_sink_rows_of_all_requests_are_alike():
    request, position = rows_of(40, 2)
    for sink in (1.0, 0.0):
        drawn = ProfileDrawer(a_profile(sink=sink), 0, slots=40).draw(request, position)
        assert (drawn[position == 0] == drawn[0]).all() == bool(sink)
        assert not (drawn[position == 1] == drawn[1]).all()


def test_more_experts_of_the_same_logits():
    few = ProfileDrawer(a_profile(), 0, slots=2).draw(*rows_of(2, 20))
    many = ProfileDrawer(a_profile(), 0, slots=2, top_k=5).draw(*rows_of(2, 20))
    assert (many[:, :, :3] == few).all()


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_impossible_seed_is_refused(seed):
    with pytest.raises(UsageError, match="seed"):
        ProfileDrawer(a_profile(), seed)


def test_same_draws_without_jit():
    code = (
        "from support.imitation import a_profile, rows_of; from moetrace.generators import ProfileDrawer;"
        "print(ProfileDrawer(a_profile(2, 6, 2, dimensions=3), 2**63 - 1, prompt=4, slots=2)"
        ".draw(*rows_of(2, 8)).ravel().tolist())"
    )
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    plain = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert plain.returncode == 0, plain.stderr
    compiled = ProfileDrawer(a_profile(2, 6, 2, dimensions=3), 2**63 - 1, prompt=4, slots=2).draw(*rows_of(2, 8))
    assert json.loads(plain.stdout) == compiled.ravel().tolist()


def test_digest_covers_every_field():
    profile = a_profile()
    assert profile.sha256 == a_profile().sha256
    assert msgspec.structs.replace(profile, depth=0.81).sha256 != profile.sha256
