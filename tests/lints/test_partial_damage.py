"""Rows that stand several times, and layers that stand still or are copies; what resembles them is not called so."""

import numpy as np
import pytest
from support.findings import codes, found, warned
from support.traps import EXPERTS, choose, requests


@pytest.mark.parametrize("times", [2, 4])
@pytest.mark.parametrize("together", [False, True], ids=["one by one", "batch"])
def test_rows_that_stand_several_times(times, together):
    made = requests(4, 40, 60)
    if together:  # requests decode together, and each pass stands several times
        made = {"experts": choose(np.random.default_rng(1), 400), "num_experts": EXPERTS, "request": np.arange(400) % 4}
        at = np.arange(400).reshape(-1, 1, 4).repeat(times, axis=1).ravel()
    else:
        at = np.arange(400).repeat(times)
    made = {name: np.asarray(made[name])[at] for name in ("experts", "request")} | {"num_experts": EXPERTS}
    one = found(made)["doubled-rows"]
    assert one.count >= 0.95 * 400 * times and f"stand {times} times" in one.what


def test_short_outputs_that_stand_still_in_every_request():
    made = requests(60, 6, 6, 11)
    for at in range(60):
        made["experts"][12 * at + 6 : 12 * at + 12] = made["experts"][12 * at + 6]
    one = found(made)["repeated-rows"]
    assert one.count == 360 and one.rows[:2] == [(6, 12), (18, 24)] and "in runs of 4 or more" in one.what
    assert "doubled-rows" not in codes(made)


@pytest.mark.parametrize("stays", [0.3, 0.6, 0.9])
def test_a_router_that_sticks_is_not_doubled_and_its_requests_do_not_end_still(stays):
    rng = np.random.default_rng(4)
    made = requests(40, 10, 20, 12)
    begins = np.arange(1200) % 30 == 0
    latest = np.maximum.accumulate(np.where((rng.random(1200) < stays) & ~begins, 0, np.arange(1200)))
    made["experts"] = made["experts"][latest]
    assert not {"doubled-rows", "repeated-rows", "stuck-layer"} & codes(made)


# Layers that stand still, or are copies.


@pytest.mark.parametrize(
    ("start", "stop", "layers"),
    [(500, 1000, [2]), (200, 400, range(1, 8)), (600, 640, range(4)), (0, 400, [0, 7])],
)
@pytest.mark.parametrize("size", [2000, 1 << 20])
def test_layers_that_stand_still_for_a_while(start, stop, layers, size, monkeypatch):
    monkeypatch.setattr("moetrace.lints.piece.BLOCK_BYTES", size)
    ids = choose(np.random.default_rng(8), 1000, 8, 64, 6)
    ids[start:stop, list(layers)] = np.arange(6)
    one = found({"experts": ids, "num_experts": 64})["stuck-layer"]
    assert one.layers == list(layers) and one.count in (stop - start, stop - start + 1)
    assert one.rows[0][0] in (start - 1, start) and one.rows[-1][1] == stop


def test_words_that_repeat_in_first_layers_and_warm_up_are_not_stuck():
    ids = choose(np.random.default_rng(8), 1000, 8, 64, 6)
    ids[100:300, :2] = ids[100, :2]  # in these layers the choices depend only on the token
    assert not warned({"experts": ids, "num_experts": 64})
    ids[:400] = ids[0]
    ids[400, 3] = ids[0, 3]
    assert warned({"experts": ids, "num_experts": 64}) == {"warm-up"}


def test_a_layer_that_is_a_copy_of_its_neighbour():
    ids = choose(np.random.default_rng(8), 1000, 8, 64, 6)
    ids[:, 3] = ids[:, 2]
    one = found({"experts": ids, "num_experts": 64})["copied-layer"]
    assert one.layers == [2, 3] and one.count == 512
    ids[::9, 3] = (ids[::9, 2] + 1) % 64
    assert "copied-layer" not in codes({"experts": ids, "num_experts": 64})
