"""Dense and unequal layers, padding and unused slots."""

import numpy as np
import pytest
from support.findings import found, only, where
from support.traps import (
    LAYERS,
    OUTPUT,
    PROMPT,
    REQUESTS,
    ROWS,
    arrays,
)


@pytest.mark.parametrize("k", [1, 4])
def test_a_zero_plane_is_a_dense_layer(k):
    made = arrays(k=k)
    made["experts"][:, 1] = 0
    one = only(made | {"layer_index": [0, 1, 2]})
    assert one.code == "dense-layer" and where(one) == ([1], [], 1) and one.fix == "--drop-dense"
    assert one.what == "1 of 3 layers did not route: 1 of zeros only."
    assert ("refuses" in one.effect) == (k > 1)


def test_dense_layers_of_all_kinds():
    made = arrays(layers=5)
    made["experts"][:, 0] = 255
    made["experts"][:, 2] = [3, 9, 1, 0]
    made["experts"][:, 4] = 0
    one = found(made)["dense-layer"]
    assert where(one) == ([0, 2, 4], [], 3)
    assert one.what.endswith("1 without any choice, 1 of zeros only, 1 with the same choice in every row.")
    assert list(found(made)) == ["dense-layer"]


def test_a_layer_that_begins_with_zeros_is_not_dense(monkeypatch):
    monkeypatch.setattr("moetrace.lints.piece.BLOCK_BYTES", 12 * 100)
    made = arrays()
    made["experts"][:150, 1] = 0
    one = only(made)
    assert one.code == "duplicate-ids" and one.layers == [1] and one.count == 150
    assert one.rows[0][0] == 0 and one.rows[-1][1] == 150


def test_the_last_layer_of_a_llama_cpp_prompt():
    made = arrays()
    rows = np.flatnonzero(np.arange(ROWS) % (PROMPT + OUTPUT) < PROMPT - 1)
    made["experts"][rows, -1] = 255
    one = only(made)
    expected = [(100 * request, 100 * request + PROMPT - 1) for request in range(REQUESTS)]
    assert one.code == "absent-rows" and where(one) == ([LAYERS - 1], expected, 4 * (PROMPT - 1))


@pytest.mark.parametrize(("row", "layer"), [(0, 0), (50, LAYERS - 1)], ids=["another layer", "decode"])
def test_unequal_layers(row, layer):
    made = arrays()
    made["experts"][row : row + 30, layer] = 255
    one = only(made)
    assert one.code == "unequal-layers" and where(one) == ([layer], [(row, row + 30)], 30)
    assert one.what == "Layers differ in length: they routed 370 to 400 of 400 rows."


def test_padding_rows():
    made = arrays()
    made["experts"][20:35] = 255
    made["experts"][390:] = 255
    one = only(made)
    assert one.code == "empty-rows" and where(one) == (None, [(20, 35), (390, 400)], 25)


def test_a_run_of_padding_is_not_a_run_of_repeated_rows():
    made = arrays()
    made["experts"][20:80] = 255
    assert only(made).code == "empty-rows"


def test_slots_that_no_cell_uses_and_cells_that_lack_some():
    made = arrays()
    made["experts"] = np.concatenate([made["experts"], np.full((ROWS, LAYERS, 2), 255)], axis=2)
    one = only(made)
    assert one.code == "unused-slots" and one.count == 2 and one.what == "No cell holds more than 4 of 6 ids."
    made = arrays()
    made["experts"][40:44, 1, 3] = 255
    one = only(made)
    assert one.code == "partial-cells" and where(one) == ([1], [(40, 44)], 4)
