"""The list schedule of a cluster's stages: FinDEP's closed form, and what must hold of any stage times."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrace.engine.cluster.fabric import CUT, FABRIC
from moetrace.engine.cluster.layer_stages import new_stages
from moetrace.engine.cluster.order import add_layer, begin_step, new_agenda
from moetrace.engine.state import records
from moetrace.jit.compile import kernel

SECONDS = st.floats(1e-6, 1.0)


@kernel(inline=False)
def run_layers(gpus, cut, stages, sends, agenda, layers):
    """Return when the last of ``layers`` equal layers ends."""
    begin_step(agenda)
    for _ in range(layers):
        add_layer(gpus[0], cut[0], stages, sends, agenda)
    return agenda.free[0].last


def end_s(times, layers, *, colocated=False, aass=False, sends=1.0):
    """The end of layers whose stages take these seconds: attention [r1], shared [r1], and three of [r1, r2]."""
    attention, shared, dispatch, experts, combine = map(np.asarray, times)
    gpus, cut = records(1, FABRIC), records(1, CUT)
    gpus["colocated"], cut["attention_first"] = colocated, aass
    stages = new_stages(*dispatch.shape, np.ones(1))
    stages.all_rows[:], stages.rows[:] = 1, 1
    for mine, given_s in zip(stages[2:7], (attention, shared, dispatch, experts, combine), strict=True):
        mine[:] = given_s
    return run_layers(gpus, cut, stages, sends, new_agenda(*dispatch.shape), layers)


@settings(deadline=None, max_examples=200)
@given(
    parts=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    layers=st.integers(1, 12),
    times=st.tuples(SECONDS, st.floats(0, 1.0), SECONDS, SECONDS),
)
def test_equal_loads_are_findeps_closed_form(parts, layers, times):
    r1, r2 = parts
    a, s, t, e = times
    found = end_s((np.full(r1, a), np.full(r1, s), np.full(parts, t), np.full(parts, e), np.full(parts, t)), layers)
    x, y = a + s, max(e, t)
    f, g = max(x, r2 * y), a + 2 * t + e + (r2 - 1) * y
    assert found == pytest.approx((layers - 1) * max(g, r1 * f) + max(x, g) + (r1 - 1) * f, rel=1e-9)


@st.composite
def drawn_times(draw):
    r1, r2 = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    numbers = st.lists(st.floats(0, 1.0), min_size=r1 * r2, max_size=r1 * r2)
    ones = st.lists(st.floats(0, 1.0), min_size=r1, max_size=r1)
    return (draw(ones), draw(ones), *(np.reshape(draw(numbers), (r1, r2)) for _ in range(3)))


@settings(deadline=None)
@given(times=drawn_times(), layers=st.integers(1, 5), colocated=st.booleans(), aass=st.booleans())
def test_a_schedule_is_between_its_longest_resource_and_everything_in_turn(times, layers, colocated, aass):
    attention, shared, dispatch, experts, combine = (layers * float(np.sum(each)) for each in times)
    found = end_s(times, layers, colocated=colocated, aass=aass)
    if colocated:
        resources = (attention + shared + experts, dispatch + combine)
    else:
        resources = (attention + shared, dispatch, experts, combine)
    assert max(resources) * (1 - 1e-9) <= found <= sum(resources) * (1 + 1e-9)
    free = end_s(times, layers, colocated=colocated, aass=aass, sends=0.0)
    assert free <= found * (1 + 1e-12)
    assert end_s(times, layers + 1, colocated=colocated, aass=aass) >= found * (1 - 1e-12)


def test_colocated_gpus_do_one_thing_at_a_time():
    """Two micro-batches by hand: A 1, E 2, transfers 3; while one is on the wire the other is attended."""
    ones = np.ones((2, 1))
    found = end_s((np.ones(2), np.zeros(2), 3 * ones, 2 * ones, 3 * ones), 1, colocated=True)
    # A0 0-1, A1 1-2; to the experts 1-4 and 4-7; E0 4-6, E1 7-9; back 7-10 and 10-13.
    assert found == pytest.approx(13)
    apart = end_s((np.ones(2), np.zeros(2), 3 * ones, 2 * ones, 3 * ones), 1)
    # With wires of its own the way back of the first begins at 6, and of the second at 9.
    assert apart == pytest.approx(12)


@settings(deadline=None, max_examples=20)
@given(times=drawn_times())
def test_attention_of_all_first_is_what_it_says(times):
    """With shared experts that take no time both orders are the same."""
    plain = (times[0], np.zeros(len(times[1])), *times[2:])
    assert end_s(plain, 3) == pytest.approx(end_s(plain, 3, aass=True), rel=1e-12)
