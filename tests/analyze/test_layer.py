"""Each statistic of one layer against plain Python (naive_locality), on random rows with absent choices."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import naive_locality as naive

from moetrace.analyze.locality import coactivation, null, predict, request_spread, reuse, skew
from moetrace.analyze.locality.chosen_counts import count
from moetrace.analyze.locality.overlap import overlap

ABSENT = 65535


@st.composite
def layers(draw):
    """Draw requests (lists of rows, each a list of distinct experts), and k and E; contents come from a seed."""
    experts = draw(st.sampled_from([2, 5, 64, 65, 200, 300]), label="E")
    k = draw(st.integers(1, min(4, experts)), label="k")
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=6), label="rows of each request")
    absent = draw(st.sampled_from([0.0, 0.1, 0.5]), label="absent")
    rng = np.random.default_rng(draw(st.integers(0, 2**32), label="seed"))
    popularity = rng.dirichlet(np.full(experts, 0.3)) * 0.95 + 0.05 / experts
    drawn = [[rng.choice(experts, k, replace=False, p=popularity) for _ in range(n)] for n in lengths]
    kept = [[row[rng.random(k) >= absent].tolist() if rng.random() >= absent else [] for row in rows] for rows in drawn]
    return kept, k, experts


def as_ids(rows, k):
    ids = np.full((len(rows), k), ABSENT, np.uint16)
    for row, chosen in zip(ids, rows, strict=True):
        row[: len(chosen)] = chosen
    return ids


def flat(kept):
    return [row for rows in kept for row in rows]


def starts_of(kept):
    return np.cumsum([0, *map(len, kept[:-1])])


def same(found, expected, tolerance=1e-12):
    assert math.isnan(found) if expected is None else found == pytest.approx(expected, abs=tolerance)


def everything(ids):
    return np.arange(len(ids), dtype=np.int32)


def reuse_of(ids, experts, order=None):
    """Two layers of the same rows, so that they are taken together, and a third for which there is none."""
    found = reuse.no_reuse(3, experts)
    reuse.add_all(found, np.stack([ids, ids, ids]), everything(ids) if order is None else order)
    assert np.array_equal(found.stack[0], found.stack[1]) and np.array_equal(found.stack[0], found.stack[2])
    return found


@settings(deadline=None, max_examples=50)  # compiles
@given(layers())
def test_overlap_is_that_of_sets(layer):
    kept, k, experts = layer
    ids, lags = as_ids(flat(kept), k), np.array([1, 2, 3, 8, 64])
    found = overlap(ids, everything(ids), starts_of(kept), lags, experts)
    for lag, value in zip(lags, found, strict=True):
        same(value, naive.overlap(kept, lag))


@settings(deadline=None, max_examples=50)  # compiles
@given(layers(), st.integers(0, 9))
def test_overlap_of_an_order_is_that_of_rows_so_ordered(layer, seed):
    kept, k, experts = layer
    ids, starts, lags = as_ids(flat(kept), k), starts_of(kept), np.array([1, 2])
    first = np.repeat(starts, [len(rows) for rows in kept])
    for order in (null.within_requests(first, seed), null.globally(first, seed)):
        found = overlap(ids, order, starts, lags, experts)
        assert np.array_equal(found, overlap(ids[order], everything(ids), starts, lags, experts), equal_nan=True)


@settings(deadline=None, max_examples=50)  # compiles
@given(layers())
def test_hit_curve_is_an_lru_cache_of_every_capacity(layer):
    kept, k, experts = layer
    rows = flat(kept)
    curve = reuse.hit_curve(reuse_of(as_ids(rows, k), experts), 0)
    for capacity in {*range(1, min(experts, 12) + 1), experts}:
        if any(rows):
            same(curve[capacity - 1], naive.lru_hit_rate(rows, capacity))
        else:
            assert np.isnan(curve).all()


@settings(deadline=None, max_examples=50)  # compiles
@given(layers(), st.data())
def test_reuse_distances_are_those_looked_up_one_by_one(layer, data):
    kept, k, experts = layer
    rows = flat(kept)
    found, distances = reuse_of(as_ids(rows, k), experts), sorted(naive.reuse_distances(rows))
    assert found.distance[0][:31].tolist() == [distances.count(d) for d in range(31)]
    assert found.rows[0] == sum(map(bool, rows)) and found.accesses[0] == sum(map(len, rows))
    same(reuse.mean_distance(found, 0), sum(distances) / len(distances) if distances else None)
    share = data.draw(st.sampled_from([0.1, 0.5, 0.9, 0.99]))
    least = [d for d in distances if sum(other <= d for other in distances) >= share * len(distances) - 1e-9]
    same(reuse.quantile(found, 0, share), least[0] if least else None)
    same(reuse.share_within(found, 0, 4), sum(d <= 4 for d in distances) / len(distances) if distances else None)


@settings(deadline=None, max_examples=50)  # compiles
@given(layers(), st.integers(1, 7))
def test_reuse_does_not_depend_on_how_rows_are_cut(layer, size):
    kept, k, experts = layer
    ids = as_ids(flat(kept), k)
    whole, parts = reuse_of(ids, experts), reuse.no_reuse(3, experts)
    for start in range(0, len(ids), size):
        part = np.ascontiguousarray(np.stack([ids[start : start + size]] * 3))
        reuse.add_all(parts, part, everything(part[0]))
    assert all(np.array_equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.pure
def test_layers_taken_together_do_not_mix():
    rng = np.random.default_rng(0)
    ids = rng.permuted(np.tile(np.arange(6, dtype=np.uint16), (3, 40, 1)), axis=2)[:, :, :2].copy()
    together = reuse.no_reuse(3, 6)
    reuse.add_all(together, ids, everything(ids[0]))
    for layer in range(3):
        alone = reuse.no_reuse(1, 6)
        reuse.add(alone, 0, ids[layer], everything(ids[0]))
        assert np.array_equal(alone.stack[0], together.stack[layer])
        assert np.array_equal(alone.distance[0], together.distance[layer])


@settings(deadline=None, max_examples=50)  # compiles
@given(layers(), st.sampled_from([0, 1]))
def test_recall_is_naive_bayes_by_hand(layer, gap):
    kept, k, experts = layer
    rows = flat(kept)
    source = [row[::-1] for row in rows]  # another layer
    source = [[(e * 7 + 1) % experts for e in row] for row in source] if experts == 5 else source
    train, test = np.arange(gap, len(rows), 2), np.arange(gap + 1, len(rows), 2)
    pairs = [[(source[t - gap], rows[t]) for t in part] for part in (train, test)]
    found = predict.recall(as_ids(source, k), as_ids(rows, k), train, test, gap, experts)
    expected = naive.recall(*pairs, k, experts)
    if expected is None or not any(target for before, target in pairs[0] if before):
        assert np.isnan(found).all()
    else:
        assert expected[0] - 1e-9 <= found[0] <= expected[1] + 1e-9
        same(found[1], expected[2], 1e-9)


def test_equal_scores_share_the_places_that_are_left():
    ids = np.array([[0], [1], [2], [3]] * 10, np.uint16)
    nothing = np.full((40, 1), 4, np.uint16)  # a source that tells nothing
    assert predict.recall(nothing, ids, np.arange(20), np.arange(20, 40), 0, 8) == pytest.approx((0.25, 0.25))


def test_halves_are_requests_or_rows_if_requests_are_few():
    train, test = predict.halves(np.repeat([3, 5, 8, 9], 2))
    assert train.tolist() == [0, 1, 4, 5] and test.tolist() == [2, 3, 6, 7]
    train, test = predict.halves(np.repeat([3, 5], 3))
    assert train.tolist() == [0, 2, 4] and test.tolist() == [1, 3, 5]
    long = predict.halves(np.repeat(np.arange(8), 20_000))
    assert [part.size for part in long] == [predict.TRAIN_ROWS, predict.TEST_ROWS]
    assert not set(long[0] // 20_000) & set(long[1] // 20_000) and len(set(long[1] // 20_000)) == 4


@settings(deadline=None, max_examples=50)  # compiles
@given(layers())
def test_between_requests_and_sink_are_those_by_hand(layer):
    kept, k, experts = layer
    found = request_spread.between_requests(as_ids(flat(kept), k), starts_of(kept), experts)
    alive = sum(any(rows) for rows in kept)
    same(found, naive.between_requests(kept, experts) if alive > 1 else None, 1e-9)
    firsts = [rows[0] for rows in kept]
    if all(len(row) in (0, k) for row in firsts):
        same(request_spread.sink(as_ids(firsts, k), experts), naive.sink(firsts))


def test_no_correlation_of_independent_rows_however_long_requests_are():
    """The mean over many draws is 0; with one over the mean number of rows as chance's part it was 0.05."""
    rng = np.random.default_rng(2)
    lengths = np.unique(np.geomspace(2, 1941, 24).astype(int))
    starts, rows = np.cumsum([0, *lengths[:-1]]), int(lengths.sum())
    popularity = rng.dirichlet(np.full(16, 0.5))
    drawn = rng.choice(16, (60, rows, 1), p=popularity).astype(np.uint16)
    found = [request_spread.between_requests(ids, starts, 16) for ids in drawn]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found)) < 0.01


@settings(deadline=None, max_examples=50)  # compiles
@given(st.integers(2, 40), st.integers(1, 40))
def test_the_correlation_is_1_where_the_request_decides_all(requests, rows):
    """Up to what the R - 1 below the variance adds, whatever the length; of one row a request nothing is known."""
    ids = np.repeat(np.arange(requests, dtype=np.uint16) % 4, rows).reshape(-1, 1)
    found = request_spread.between_requests(ids, np.arange(requests) * rows, 4)
    assert math.isnan(found) if rows == 1 else found == pytest.approx(1 + 1 / ((requests - 1) * (1 - 1 / rows)))


@settings(deadline=None, max_examples=50)  # compiles
@given(layers())
def test_coactivation_counts_pairs(layer):
    kept, k, experts = layer
    rows = [row for row in flat(kept) if len(row) == k]
    real, _ = coactivation.coactivation(as_ids(flat(kept), k), experts, seed=0)
    lifts, chi2 = naive.coactivation(rows, experts) if rows else ([], None)
    same(real.chi2_over_dof, chi2, 1e-9)
    same(real.lift_p99, np.quantile(lifts, 0.99) if lifts else None, 1e-9)


def test_the_null_draws_what_the_layer_chooses_and_has_no_affinity():
    weight = np.array([40, 20, 20, 10, 5, 5])
    ids = coactivation.draw(np.cumsum(weight), 20_000, 2, np.random.default_rng(0))
    assert all(len(set(row)) == 2 for row in ids.tolist())
    assert np.bincount(ids[:, 0]) / 20_000 == pytest.approx(weight / 100, abs=0.015)
    both = np.mean((ids == 0).any(axis=1) & (ids == 1).any(axis=1))
    assert both == pytest.approx(0.4 * 0.2 / 0.6 + 0.2 * 0.4 / 0.8, abs=0.015)
    # Rows drawn like that are their own null, while pairs that always go together are not.
    real, chance = coactivation.coactivation(ids, 6, seed=1)
    assert real.chi2_over_dof == pytest.approx(chance.chi2_over_dof, rel=0.15)
    pairs = np.repeat(ids[:, :1] // 2 * 2, 2, axis=1) + np.array([0, 1], np.uint16)
    real, chance = coactivation.coactivation(pairs, 6, seed=1)
    assert real.chi2_over_dof > 5 * chance.chi2_over_dof


@settings(deadline=None, max_examples=50)  # compiles
@given(layers())
def test_counts_go_under_their_label(layer):
    kept, k, experts = layer
    rows, counts = flat(kept), np.zeros((2, experts), np.int64)
    label = np.arange(len(rows), dtype=np.uint8) % 2
    count(as_ids(rows, k), label, counts)
    for half in (0, 1):
        assert counts[half].tolist() == [sum(e in row for row in rows[half::2]) for e in range(experts)]


COUNTS = st.lists(st.integers(0, 1000), min_size=2, max_size=40).filter(any).map(np.array)


@given(COUNTS)
def test_skew_is_that_by_hand(counts):
    assert skew.gini(counts) == pytest.approx(naive.gini(counts.tolist()), abs=1e-9)
    ranked = sorted(counts.tolist(), reverse=True)
    assert skew.top_share(counts, 3) == pytest.approx(sum(ranked[:3]) / sum(ranked))
    assert skew.max_over_mean(counts) == pytest.approx(ranked[0] / (sum(ranked) / len(ranked)))


@given(COUNTS)
def test_no_exponent_is_likelier_than_the_fit(counts):
    fit = skew.zipf(counts)
    best = naive.zipf_likelihood(counts.tolist(), fit.exponent)
    for other in (fit.exponent - 0.01, fit.exponent + 0.01, 0.0, 1.0):
        if 0 <= other < 20:
            assert naive.zipf_likelihood(counts.tolist(), other) <= best + 1e-6
    assert 0 <= fit.misfit <= 1


@pytest.mark.parametrize("exponent", [0.0, 0.3, 0.8, 1.5])
def test_a_power_law_is_found_exactly(exponent):
    counts = 1e9 * np.arange(1, 65) ** -exponent
    fit = skew.zipf(np.random.default_rng(0).permutation(counts))
    assert fit.exponent == pytest.approx(exponent, abs=1e-6)
    assert fit.least_squares == pytest.approx(exponent, abs=1e-6) and fit.misfit < 1e-6


@given(COUNTS, st.integers(0, 2**32))
def test_skew_does_not_know_experts_by_name(counts, seed):
    other = np.random.default_rng(seed).permutation(counts)
    assert skew.zipf(other) == pytest.approx(skew.zipf(counts), nan_ok=True)
    assert skew.gini(other) == pytest.approx(skew.gini(counts))


def test_divergence_of_phases():
    assert skew.jsd_bits(np.array([1, 1, 0, 0]), np.array([0, 0, 3, 3])) == pytest.approx(1)
    assert skew.jsd_bits(np.array([2, 4]), np.array([1, 2])) == pytest.approx(0, abs=1e-12)
    # By hand: half of KL((1, 0) || (3/4, 1/4)), half of KL((1/2, 1/2) || (3/4, 1/4)).
    expected = (math.log2(4 / 3) + 0.5 * math.log2(2 / 3) + 0.5 * math.log2(2)) / 2
    assert skew.jsd_bits(np.array([5, 0]), np.array([3, 3])) == pytest.approx(expected)


def test_nothing_chosen_is_nan_and_uniform_is_zero():
    nothing = np.zeros(8, np.int64)
    assert all(map(math.isnan, (*skew.zipf(nothing), skew.gini(nothing), skew.top_share(nothing, 1))))
    assert math.isnan(skew.max_over_mean(nothing)) and math.isnan(skew.jsd_bits(nothing, nothing))
    uniform = np.full(8, 7)
    assert skew.gini(uniform) == pytest.approx(0) and skew.zipf(uniform).exponent == pytest.approx(0, abs=1e-6)
    assert math.isnan(skew.zipf(np.array([3])).exponent)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=10), st.integers(0, 99))
def test_shuffles_are_orders_that_keep_what_they_should(lengths, seed):
    first = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    within, globally = null.within_requests(first, seed), null.globally(first, seed)
    assert np.array_equal(first[within], first)
    assert sorted(within) == sorted(globally) == list(range(first.size))
    assert np.array_equal(within, null.within_requests(first, seed))
