"""Fits: moments are the statistics of `locality`, and a fit to a generated trace finds a profile that acts alike."""

import msgspec
import numpy as np
import pytest
from support.imitation import a_profile

from moetrace.analyze.locality.measure import locality
from moetrace.generators import generate_trace
from moetrace.generators.fit import MOMENTS, fit_profile, moments, take_sample
from moetrace.generators.least_squares import least_squares
from moetrace.spec.errors import MoetraceError
from moetrace.trace import Trace

PROFILE = a_profile(2, 16, 3, phase=0.2, dimensions=8, request=0.15, slow=0.2, fast=0.3)


def a_trace(profile=PROFILE, requests=24, prompt=20, output=60, seed=5, batch=4):
    return generate_trace(profile=profile, requests=requests, prompt=prompt, output=output, seed=seed, batch=batch)


def measured(trace):
    return dict(zip(MOMENTS, moments(take_sample(trace), trace.num_experts), strict=True))


def test_moments_are_those_of_locality():
    trace = a_trace()
    found = measured(trace)
    summary = locality(trace, lags=(1, 4, 16, 64), pairs=False)
    layers = summary.layers
    for moment, column in (("gini", "gini"), ("next_layer_recall", "next_layer_recall"), ("icc", "icc")):
        assert found[moment] == pytest.approx(layers[column].mean())
    assert found["phase_jsd"] == pytest.approx(layers["phase_jsd"].mean())
    overlaps = summary.overlap.group_by("lag").mean().sort("lag")["overlap"].to_list()
    assert [found[f"overlap_{lag}"] for lag in (1, 4, 16, 64)] == pytest.approx(overlaps)


def test_lru_is_that_of_one_request_after_another():
    trace = a_trace(requests=3, prompt=0, output=40)
    hits, accesses = 0, 0
    experts, request = (trace.read(name, 0, trace.rows) for name in ("experts", "request"))
    for layer in range(trace.layers):
        cache: list[int] = []
        for row in experts[np.argsort(request, kind="stable"), layer]:
            for expert in row.tolist():
                hits += expert in cache
                accesses += 1
                cache = [*[other for other in cache if other != expert][-3:], expert]
    assert measured(trace)["lru_e4"] == pytest.approx(hits / accesses)


def test_fit_recovers_the_statistics():
    trace = a_trace()
    profile = fit_profile(trace, name="again", seed=1)
    assert (profile.name, profile.model, profile.layers, profile.experts, profile.top_k) == ("again", "small", 2, 16, 3)
    assert profile.sink == 1.0
    wanted = measured(trace)
    ours = [measured(a_trace(profile, seed=seed)) for seed in range(6)]
    for moment, tolerance in {"gini": 0.12, "next_layer_recall": 0.12, "lru_e8": 0.12, "lru_e4": 0.1}.items():
        assert np.mean([each[moment] for each in ours]) == pytest.approx(wanted[moment], rel=tolerance), moment
    for lag in (1, 4, 16, 64):
        found = np.mean([each[f"overlap_{lag}"] for each in ours])
        assert found == pytest.approx(wanted[f"overlap_{lag}"], rel=0.1), lag
    assert profile == fit_profile(trace, name="again", seed=1)


def test_tokens_are_measured_where_there_are_any():
    trace = a_trace()
    token = np.random.default_rng(0).integers(0, 7, trace.rows)
    rows = {name: trace.read(name, 0, trace.rows) for name in ("request", "position")}
    experts = trace.read("experts", 0, trace.rows)
    with_tokens = Trace.from_arrays(
        experts, num_experts=16, model="small", steps=np.diff(trace.offset), phase=trace.phase, token=token, **rows
    )
    profile = fit_profile(with_tokens, sample_rows=400)
    assert profile.vocabulary == 7
    assert profile.token < 0.1  # these tokens say nothing about the experts


def test_single_request_with_absent_choices():
    trace = a_trace(requests=1, prompt=30, output=60)
    experts = trace.read("experts", 0, trace.rows)
    experts[:29, 1] = 255
    profile = fit_profile(Trace.from_arrays(experts, num_experts=16, model="one"))
    assert profile.request == 0.1
    assert profile.phase == 0.0  # all rows are of one phase


def test_nothing_chosen_at_all():
    profile = fit_profile(Trace.from_arrays(np.full((80, 2, 3), 255, np.uint8), num_experts=16, model="none"))
    assert profile.sink == 0.0
    assert a_trace(profile).rows == 24 * 80


def test_progress_says_how_far_the_fit_is_off():
    told = []
    fit_profile(a_trace(requests=4), progress=told.append)
    assert len(told) > 10
    assert all("off by" in text for text in told)


def test_a_trace_that_cannot_be_fitted_is_refused_in_one_sentence():
    with pytest.raises(MoetraceError, match="a fit needs 64 rows"):
        fit_profile(a_trace(requests=1, prompt=0, output=63))
    one = msgspec.structs.replace(PROFILE, experts=16)
    bad = a_trace(one, requests=2).read("experts", 0, 160)
    bad[7, 1, 0] = 200
    with pytest.raises(MoetraceError, match="row 7"):
        fit_profile(Trace.from_arrays(bad, num_experts=16))


def test_all_experts_of_a_layer_can_be_chosen():
    experts = np.tile(np.arange(4, dtype=np.uint8), (100, 2, 1))
    profile = fit_profile(Trace.from_arrays(experts, num_experts=4, model="all"))
    assert a_trace(profile).top_k == 4


def test_least_squares_finds_a_minimum():
    def residuals(x):
        return np.array([np.exp(x[0]) - 2, x[1] * x[0] - 1, 0.1 * (x[1] - 3)])

    found = least_squares(residuals, np.array([0.0, 0.0]), 50)
    best = min(
        (float((residuals(np.array([a, b])) ** 2).sum()), a, b)
        for a in np.linspace(0.5, 0.9, 81)
        for b in np.linspace(1, 2, 101)
    )
    assert (residuals(found) ** 2).sum() < best[0] + 0.01
