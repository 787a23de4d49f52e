"""Routing that is even by construction, and gates."""

import numpy as np
import pytest
from support.findings import found, gates, only, where
from support.traps import (
    EXPERTS,
    LAYERS,
    OUTPUT,
    PROMPT,
    ROWS,
    TOP_K,
    arrays,
    choose,
    flat_view,
    prepend,
)


@pytest.mark.parametrize(("experts", "k", "window"), [(16, 4, 4), (128, 8, 16), (64, 6, 32), (60, 4, 15), (8, 2, 4)])
def test_a_flat_read_of_a_strided_view(experts, k, window):
    made = arrays(experts=experts, k=k, layers=4)
    prompt = flat_view(np.random.default_rng(3), 200, experts, k)
    cells = choose(np.random.default_rng(4), 200, 4, experts, k)
    cells[:, 2] = prompt
    findings = found(prepend(made, cells) | {"layer_index": [0, 1, 2, 3]})
    one = findings["flat-view"]
    assert where(one) == ([2], [(0, 200 // window * window)], 200 // window * window) and one.level == "warning"
    assert [other.code for other in findings.values() if other.level == "warning"] == ["flat-view"]
    assert ("duplicate-ids" in findings) == (experts % k > 0), "a row may end one permutation and begin the next"


def test_a_flat_read_of_every_layer_is_not_called_uniform_as_well():
    made = arrays()
    for start in range(0, ROWS, PROMPT + OUTPUT):
        for layer in range(LAYERS):
            made["experts"][start : start + 40, layer] = flat_view(
                np.random.default_rng(start + layer), 40, EXPERTS, TOP_K
            )
    one = only(made)
    assert one.code == "flat-view" and one.layers == [0, 1, 2] and one.count == 160
    assert one.rows == [(0, 40), (100, 140), (200, 240), (300, 340)]


@pytest.mark.parametrize(("experts", "k"), [(4, 2), (8, 2), (3, 2), (2, 1), (16, 4), (128, 8)])
def test_uniform_random_routing_is_no_flat_view(experts, k):
    rng = np.random.default_rng(5)
    ids = np.argsort(rng.random((20000, 4, experts), dtype=np.float32), axis=-1)[..., :k]
    findings = found({"experts": ids, "num_experts": experts})
    assert {one.level for one in findings.values()} == {"note"}
    assert ("random-routing" in findings) == (experts >= 4)


def test_counts_that_are_equal_by_construction():
    made = arrays()
    turn = (np.arange(ROWS)[:, None] * 5 + np.arange(TOP_K) * 3) % EXPERTS  # round robin, but no partition
    made["experts"][:, 1] = turn
    one = found(made)["uniform"]
    assert one.layers == [1] and "100 to 100 times" in one.what


def test_gates():
    assert found(arrays() | {"gates": gates()}) == {}
    made = gates()
    made[10:20, 1] *= 0.5
    made[30, 2] = made[30, 2, ::-1]
    made[40, 0, 1] = np.nan
    made[41, 0, 2] = -0.2
    made[42, 0, 3] = np.inf
    made[43, 0] = [1.0, -0.0, 0.0, 0.0]
    findings = found(arrays() | {"gates": made})
    assert list(findings) == ["impossible-gates", "gates-sum", "gate-order"]
    assert where(findings["impossible-gates"]) == ([0], [(40, 43)], 3)
    assert where(findings["gates-sum"]) == ([1], [(10, 20)], 10) and "to 0.5 to 1" in findings["gates-sum"].what
    assert where(findings["gate-order"]) == ([2], [(30, 31)], 1)


def test_gates_of_absent_choices_do_not_count():
    made = arrays() | {"gates": gates()}
    made["experts"][40:44, 1, 3] = 255
    made["experts"][50:60, 2] = 255
    made["gates"][50:60, 2] = 0
    assert not {"gates-sum", "gate-order", "impossible-gates"} & found(made).keys()
