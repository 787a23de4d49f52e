"""Plans: EPLB and the longest-first rule against plain Python, what must hold of any plan, and what moves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle_balance as oracle

from moetrace.analyze.balance.plans import (
    Plan,
    Tier,
    check_placement,
    copies_of,
    is_made_from_loads,
    make_plan,
    moved_bytes,
)
from moetrace.engine.eplb import eplb_plan
from moetrace.engine.placement import group_of_expert
from moetrace.spec.choices import planned_placements
from moetrace.spec.errors import UsageError

SHAPES = st.sampled_from(
    # experts, slots, units, nodes, groups
    [
        (4, 4, 2, 1, 1),
        (6, 8, 4, 1, 1),
        (12, 16, 8, 2, 4),
        (8, 16, 4, 4, 4),
        (8, 8, 8, 2, 4),
        (5, 12, 3, 1, 5),
        (1, 4, 2, 1, 1),
    ]
)
KINDS = st.sampled_from([1, 4, 1000])  # many ties, some, few


def loads_of(seed, most, layers, experts):
    return np.random.default_rng(seed).integers(0, most + 1, (layers, experts))


@pytest.mark.pure
def test_the_example_of_eplb_s_readme():
    loads = np.array(
        [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
    )
    assert eplb_plan(loads, 16, 8, nodes=2, groups=4).tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32), most=KINDS, shape=SHAPES)
def test_eplb_agrees_with_plain_python(seed, most, shape):
    experts, slots, units, nodes, groups = shape
    # Sums of shares such as 1/3 may tie exactly but not as floats. Loads that are multiples of 60 have exact shares.
    loads = 60 * loads_of(seed, most, 2, experts) * (1 if slots - experts < 6 else 14)
    plan = eplb_plan(loads, slots, units, nodes, groups)
    assert plan.tolist() == [oracle.eplb(row, slots, units, nodes, groups) for row in loads]


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    most=KINDS,
    nodes=st.integers(1, 3),
    groups=st.integers(1, 3),  # of a node
    size=st.integers(1, 6),  # of a group
    units=st.integers(1, 4),  # of a node
    room=st.integers(0, 3),  # slots of a unit beyond the fewest
)
def test_eplb_of_any_loads_is_that_of_floats(seed, most, nodes, groups, size, units, room):
    """Thirds and fifths of loads tie, or nearly do: the plan is the one that sums of float64 make."""
    experts, fewest = nodes * groups * size, -(-groups * size // units)
    slots = nodes * units * (fewest + room)
    loads = loads_of(seed, most, 2, experts)
    plan = eplb_plan(loads, slots, nodes * units, nodes, nodes * groups)
    expected = [oracle.eplb(row, slots, nodes * units, nodes, nodes * groups, float) for row in loads]
    assert plan.tolist() == expected


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), most=KINDS, shape=SHAPES)
def test_every_expert_has_a_slot_and_units_have_equally_many(seed, most, shape):
    experts, slots, units, nodes, groups = shape
    loads = loads_of(seed, most, 3, experts)
    tier = Tier(units, slots - experts, nodes, groups)
    for placement in ("eplb", *(["eplb-hierarchical"] if nodes > 1 else [])):
        check_placement(placement, tier, experts)
        plan = make_plan(placement, tier, loads.shape, loads)
        assert plan.expert_of_slot.shape == (3, units, slots // units) and (plan.slots == slots).all()
        assert all(set(held.ravel()) == set(range(experts)) for held in plan.expert_of_slot)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), shape=SHAPES)
def test_names_of_experts_do_not_matter_where_nothing_ties(seed, shape):
    experts, slots, units, _, _ = shape
    rng = np.random.default_rng(seed)
    loads = rng.permutation(2 ** np.arange(experts) * 1009 + 1)[None]
    name = rng.permutation(experts)
    renamed = np.empty_like(loads)
    renamed[0, name] = loads[0]

    def weights(plan, loads):
        copies = np.bincount(plan[0], minlength=experts)
        return np.sort((loads[0] / copies)[plan[0]].reshape(units, -1).sum(1))

    one, other = eplb_plan(loads, slots, units), eplb_plan(renamed, slots, units)
    if slots > units and np.unique(loads[0] / np.bincount(one[0], minlength=experts)).size == experts:
        assert np.allclose(weights(one, loads), weights(other, renamed), rtol=1e-12)
    assert np.array_equal(np.bincount(one[0], minlength=experts), np.bincount(other[0], minlength=experts)[name])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), most=KINDS, units=st.integers(1, 5))
def test_longest_first_is_the_replay_s_and_within_its_guarantee(seed, most, units):
    loads = loads_of(seed, most, 2, 6)
    plan = make_plan("ep-lpt", Tier(units), loads.shape, loads)
    of_unit = group_of_expert("ep-lpt", 2, 6, units, 1, loads.astype(float))
    for layer in range(2):
        assert of_unit[layer].tolist() == oracle.lpt(loads[layer], units)
        held = [[e for e in row if e >= 0] for row in plan.expert_of_slot[layer].tolist()]
        assert all(of_unit[layer, e] == u for u, row in enumerate(held) for e in row) and sum(map(len, held)) == 6
    if units <= 3:  # Graham 1969: at most 4/3 - 1/(3 N) of the best
        held = [[e for e in row if e >= 0] for row in plan.expert_of_slot[0].tolist()]
        most_rows = max(sum(int(loads[0, e]) for e in row) for row in held)
        best, _ = oracle.best_possible(loads[0].tolist(), units, 6, lambda e, n: 0.0)
        assert most_rows <= (4 / 3 - 1 / (3 * units)) * best + 1e-9


@pytest.mark.parametrize("placement", ["ep", "ep-block", "tp", "tp:2", "tp:1"])
def test_fixed_placements_are_those_of_the_replay(placement):
    plan = make_plan(placement, Tier(6), (2, 10))
    share = {"tp": 6, "tp:2": 2}.get(placement, 1)
    groups = group_of_expert(placement, 2, 10, 6, share)
    assert plan.share == share and plan.bins == 6 // share
    copies = copies_of(plan, 10)
    for layer in range(2):
        assert copies.start[layer].tolist() == list(range(11))
        assert copies.bin[layer, :10].tolist() == groups[layer].tolist()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_copies_and_what_moves(seed):
    rng = np.random.default_rng(seed)
    size = rng.integers(1, 50, (2, 5))
    old, new = (Plan(1, rng.integers(-1, 5, (2, 3, 4)).astype(np.int32)) for _ in range(2))
    expected = [
        sum(
            int(size[layer, e])
            for u in range(3)
            for e in set(new.expert_of_slot[layer, u].tolist()) - set(old.expert_of_slot[layer, u].tolist()) - {-1}
        )
        for layer in range(2)
    ]
    assert moved_bytes(old, new, size).tolist() == expected
    assert moved_bytes(new, new, size).tolist() == [0, 0]
    copies = copies_of(new, 5)
    for layer in range(2):
        for e in range(5):
            bins = copies.bin[layer, copies.start[layer, e] : copies.start[layer, e + 1]].tolist()
            assert bins == [u for u in range(3) for x in new.expert_of_slot[layer, u] if x == e]


def test_default_slots():
    assert Tier(8).slots(64) == 72 and Tier(6).slots(32) == 42 and Tier(4, 0).slots(32) == 32
    assert Tier(36, 32).slots(256) == 288


@pytest.mark.parametrize(
    ("placement", "tier", "experts", "sentence"),
    [
        (
            "best",
            Tier(2),
            4,
            "no placement 'best'; known are ep, ep-block, ep-lpt, eplb, eplb-hierarchical, tp and tp:g",
        ),
        ("ep:2", Tier(2), 4, "no placement 'ep:2'"),
        ("tp:3", Tier(4), 4, "'tp:3' wants groups of a size that divides the 4 units"),
        ("tp:", Tier(4), 4, "'tp:' wants groups"),
        ("tp:0", Tier(4), 4, "'tp:0' wants groups"),
        ("ep", Tier(0), 4, "units are 0: give 1 to 4096"),
        ("ep", Tier(99999), 4, "units are 99999"),
        ("eplb", Tier(3, 1), 4, "5 slots, which 3 units cannot share equally: give 2 redundant ones"),
        ("eplb", Tier(3, -1), 4, "redundant experts are -1: give 0 to"),
        ("eplb", Tier(1, 10**9), 4, "redundant experts are 1000000000"),
        ("eplb-hierarchical", Tier(4, 0, 3, 3), 4, "cannot share 4 units among 3 nodes"),
        ("eplb-hierarchical", Tier(2, 0, 2, 3), 6, "cannot share 3 groups among 2 nodes equally"),
        ("eplb-hierarchical", Tier(4, 2, 2, 4), 6, "cannot share 6 experts among 4 groups equally"),
    ],
)
def test_impossible_placements_are_refused(placement, tier, experts, sentence):
    with pytest.raises(UsageError, match=sentence):
        check_placement(placement, tier, experts)


def test_all_placements_are_named():
    made_from_loads = [name for name in planned_placements() if is_made_from_loads(name)]
    assert made_from_loads == ["ep-lpt", "eplb", "eplb-hierarchical"]
