"""Warm-up and repeated rows: found where they are, and not where rows are equal by chance."""

import numpy as np
import pytest
from support.findings import found, only, where
from support.traps import (
    EXPERTS,
    arrays,
    choose,
    prepend,
)


@pytest.mark.parametrize("rows", [32, 2048, 16640])
def test_warm_up(rows):
    cell = choose(np.random.default_rng(1), 1)
    findings = found(prepend(arrays(), np.repeat(cell, rows, axis=0)))
    assert where(findings["warm-up"]) == (None, [(0, rows)], rows)
    assert findings["warm-up"].fix == "--drop-warmup" and list(findings) == ["warm-up"]


@pytest.mark.parametrize(("rows", "codes"), [(7, []), (31, ["repeated-rows"])])
def test_a_short_run_at_the_begin_is_no_warm_up(rows, codes):
    cell = choose(np.random.default_rng(1), 1)
    assert list(found(prepend(arrays(), np.repeat(cell, rows, axis=0)))) == codes


def test_warm_up_in_several_stages_and_of_several_sources():
    one, two = choose(np.random.default_rng(1), 2)
    first = np.r_[[one] * 300, [two] * 40]
    made = prepend(arrays(), first)
    later = slice(340 + 200, 340 + 250)
    made["experts"][later] = one
    assert where(found(made)["warm-up"]) == (None, [(0, 340), (540, 590)], 390)


@pytest.mark.parametrize("sources", [2, 9, 10, 40])
def test_warm_up_of_however_many_sources(sources):
    rng = np.random.default_rng(1)
    warm, text = np.repeat(choose(rng, 1), 400, axis=0), choose(rng, 600)
    made = arrays(1000 * sources)
    made["experts"] = np.concatenate([warm, text] * sources)
    made |= {"request": np.repeat(np.arange(sources), 1000), "steps": [1000] * sources, "phase": [0] * sources}
    ranges = [(1000 * source, 1000 * source + 400) for source in range(sources)]
    assert where(found(made)["warm-up"]) == (None, ranges[:16], 400 * sources)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("runs", [1, 12, 40])
def test_runs_of_other_choices_each_are_repetitions_however_many(runs, layers):
    rng = np.random.default_rng(5)
    cells, text = choose(rng, runs, layers), choose(rng, 300 * runs, layers)
    between = np.split(text, runs)
    parts = [
        part for cell, rest in zip(cells, between, strict=True) for part in (rest, np.repeat([cell], 2048, axis=0))
    ]
    one = found({"experts": np.concatenate(parts), "num_experts": EXPERTS})["repeated-rows"]
    assert one.count == 2048 * runs and one.rows[0] == (300, 2348)


def test_short_runs_of_one_length_hide_no_warm_up():
    rng = np.random.default_rng(5)
    text = np.concatenate([np.repeat(choose(rng, 1), 24 if at % 40 == 0 else 1, axis=0) for at in range(480)])
    experts = np.concatenate([np.repeat(choose(rng, 1), 4096, axis=0), text])
    assert found({"experts": experts, "num_experts": EXPERTS})["warm-up"].rows == [(0, 4096)]


@pytest.mark.parametrize("seed", range(5))
def test_parts_that_repeat_more_than_others_by_chance_are_no_repetition(seed):
    rng, rows = np.random.default_rng(seed), 20_000
    stays = (rng.random(rows) < 0.92) & (np.arange(rows) >= rows // 2)
    latest = np.maximum.accumulate(np.where(stays, 0, np.arange(rows)))
    assert np.bincount(latest).max() >= 48
    found_codes = found({"experts": choose(rng, rows)[latest], "num_experts": EXPERTS}).keys()
    assert not {"warm-up", "repeated-rows"} & found_codes


def test_repeated_rows_elsewhere():
    made = arrays()
    made["experts"][210:260] = made["experts"][210]
    one = only(made)
    assert one.code == "repeated-rows" and where(one) == (None, [(210, 260)], 50) and one.fix


def test_runs_cross_pieces(monkeypatch):
    cell = choose(np.random.default_rng(1), 1)
    made = prepend(arrays(), np.repeat(cell, 500, axis=0))
    made["experts"][710:760] = made["experts"][710]
    whole = found(made)
    for size in (100, 1000, 4321):
        monkeypatch.setattr("moetrace.lints.piece.BLOCK_BYTES", size)
        assert found(made) == whole


def test_rows_that_are_equal_by_chance_are_no_repetition():
    rng = np.random.default_rng(0)
    experts = np.where(rng.random((4000, 1, 1)) < 0.8, 0, 1)  # runs of 32 and more are expected
    assert found({"experts": experts, "num_experts": 2}).keys() == {"single-request", "decode-only"}
