"""Sinks, requests that are the same, templates and periods."""

import numpy as np
from support.findings import found, only, where
from support.traps import (
    EXPERTS,
    LAYERS,
    ROWS,
    arrays,
    choose,
)


def many_requests(requests: int, rows: int, seed: int = 0) -> dict:
    experts = choose(np.random.default_rng(seed), requests * rows)
    phase = np.tile([0, *[1] * (rows // 2)], requests)
    steps = np.tile([rows - rows // 2, *[1] * (rows // 2)], requests)
    request = np.repeat(np.arange(requests), rows)
    return {"experts": experts, "num_experts": EXPERTS, "request": request, "steps": steps, "phase": phase}


def test_a_sink_at_position_0():
    made = many_requests(20, 80)
    assert found(made) == {}
    made["experts"][::80, 1:] = [3, 4, 8, 1]
    made["experts"][0, 2] = [1, 8, 3, 4]  # the order of slots does not matter
    made["experts"][80, 2] = [5, 8, 3, 4]
    one = only(made)
    assert one.code == "position-0-sink" and one.layers == [1, 2] and one.count == 20
    assert one.rows[:2] == [(0, 1), (80, 81)] and len(one.rows) == 16 and "95% or more of 20 requests" in one.what


def test_few_requests_show_no_sink():
    made = many_requests(7, 80)
    made["experts"][::80] = [3, 4, 8, 1]
    assert found(made) == {}


def test_requests_that_are_the_same():
    made = many_requests(10, 80)
    made["experts"][4 * 80 : 5 * 80] = made["experts"][80 : 2 * 80]
    made["experts"][9 * 80 :] = made["experts"][80 : 2 * 80]
    one = only(made)
    assert one.code == "identical-requests" and where(one) == (None, [(320, 321), (720, 721)], 2)
    assert "2 of 10 requests (160 rows)" in one.what


def test_requests_that_decode_together_are_followed(monkeypatch):
    made = many_requests(10, 80)
    made["experts"][4 * 80 : 5 * 80] = made["experts"][80 : 2 * 80]
    order = np.lexsort([made["request"], np.tile(np.arange(80), 10)])  # row after row, each of another request
    woven = {"experts": made["experts"][order], "num_experts": EXPERTS, "request": made["request"][order]}
    for size in (1 << 20, 1000):
        monkeypatch.setattr("moetrace.lints.piece.BLOCK_BYTES", size)
        findings = found(woven)
        assert list(findings) == ["identical-requests", "decode-only"]
        assert where(findings["identical-requests"]) == (None, [(4, 5)], 1)


def test_templates_that_requests_share():
    made = many_requests(10, 80)
    for request in range(1, 10):
        made["experts"][request * 80 + request : request * 80 + request + 20] = made["experts"][:20]
    one = only(made)
    assert one.code == "repeated-template" and one.level == "note" and one.count == 10 * 13
    assert one.rows == [(81 * i, 20 + 81 * i) for i in range(10)] and "18% of the stretches of 8 rows" in one.what


def test_many_stretches_are_sampled(monkeypatch):
    monkeypatch.setattr("moetrace.lints.templates.MAX_WINDOWS", 64)
    made = many_requests(10, 80)
    for request in range(1, 10):
        made["experts"][request * 80 : request * 80 + 40] = made["experts"][:40]
    one = found(made)["repeated-template"]
    assert 0.1 < float(one.what.split("%")[0]) / 100 < 0.7


def test_overlap_that_is_periodic():
    rng = np.random.default_rng(0)
    made = many_requests(4, 200)
    for row in range(800):
        if row % 200 >= 16:
            same = rng.random(LAYERS) < 0.2
            made["experts"][row, same] = made["experts"][row - 16, same]
    one = only(made)
    assert one.code == "periodic-overlap" and one.count == 16 and one.layers == [0, 1, 2]


def test_requests_rows_and_phases():
    made = arrays()
    assert found(made | {"request": np.zeros(ROWS, int)}).keys() == {"single-request"}
    assert found(made | {"phase": made["phase"] * 0}).keys() == {"prefill-only"}
    assert found(made | {"phase": made["phase"] * 0 + 1}).keys() == {"decode-only"}
    position = np.tile(np.arange(100), 4)
    position[250:] += 7
    assert where(only(made | {"position": position})) == (None, [(250, 251)], 1)
    few = {name: value for name, value in made.items() if name != "steps" and name != "phase"}
    few |= {"experts": made["experts"][:60], "request": np.arange(60) // 30, "steps": [30, 30], "phase": [0, 1]}
    assert only(few).what == "In 60 rows an expert is chosen 15.0 times a layer on average."


def test_one_row_is_one_row():
    for phase, word in ((0, "prefill"), (1, "decode")):
        made = found({"experts": choose(np.random.default_rng(0), 1), "num_experts": EXPERTS, "phase": [phase]})
        assert made[f"{word}-only"].what == f"The only row is {word}."
        assert made["short"].what.startswith("In 1 row an expert is chosen ")
