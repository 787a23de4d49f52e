"""What public reports show that captures hold: each is found; what resembles it, but is sound, is not called wrong."""

import numpy as np
import pytest
from support.findings import codes, found, warned, where
from support.traps import EXPERTS, LAYERS, TOP_K, arrays, choose, requests

from moetrace.lints import lint
from moetrace.trace import Trace
from moetrace.trace.writer import CountsWriter

ABSENT = 255


# Repeated rows.


def test_output_rows_that_all_choose_alike_in_every_request():
    made = requests(30, 30, 20)
    for at in range(30):
        made["experts"][50 * at + 30 : 50 * at + 50] = made["experts"][50 * at + 30]
    one = found(made)["repeated-rows"]
    assert one.count == 600 and one.rows[:2] == [(30, 50), (80, 100)] and "in 30 requests" in one.what


def test_one_padded_stretch_within_a_prompt():
    made = {"experts": choose(np.random.default_rng(1), 300), "num_experts": EXPERTS}
    made["experts"][100:120] = made["experts"][99]
    assert where(found(made)["repeated-rows"]) == (None, [(99, 120)], 21)


@pytest.mark.parametrize("size", [600, 1 << 20])
def test_requests_that_stand_still_while_they_decode_together(size, monkeypatch):
    monkeypatch.setattr("moetrace.lints.piece.BLOCK_BYTES", size)
    rng, batch, steps = np.random.default_rng(2), 8, 60
    experts = choose(rng, batch * steps).reshape(steps, batch, LAYERS, TOP_K)
    experts[30:50, 3] = experts[30, 3]
    experts[20:40, 6] = experts[20, 6]
    made = {"experts": experts.reshape(-1, LAYERS, TOP_K), "num_experts": EXPERTS, "steps": [batch] * steps}
    made |= {"request": np.tile(np.arange(batch), steps), "phase": [1] * steps}
    one = found(made)["repeated-rows"]
    assert one.count == 40 and one.rows == [(166, 167), (243, 244)] and "in 2 requests" in one.what


def test_prompts_that_begin_with_the_same_ten_rows_each():
    made = requests(20, 40, 10, 3)
    for at in range(20):
        made["experts"][50 * at : 50 * at + 10] = made["experts"][50 * at]
    assert found(made)["repeated-rows"].count == 200


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("stays", [0.5, 0.75])
def test_requests_that_stick_to_their_choices_by_chance_are_no_repetition(seed, stays):
    rng = np.random.default_rng(seed)
    made = requests(20, 40, 60, seed)
    begins = np.arange(2000) % 100 == 0
    sticky = np.repeat(np.arange(20) % 2 == 0, 100)  # every second request
    latest = np.maximum.accumulate(np.where((rng.random(2000) < stays) & sticky & ~begins, 0, np.arange(2000)))
    made["experts"] = made["experts"][latest]
    assert "repeated-rows" not in codes(made)


def test_a_word_that_is_said_five_times_is_no_repetition():
    made = requests(20, 40, 60)
    for at in range(20):
        made["experts"][100 * at + 50 : 100 * at + 55] = made["experts"][100 * at + 50]
    assert not warned(made)


# Placeholder rows.


@pytest.mark.parametrize("rows", [[5, 9], [0, 77, 200], list(range(0, 400, 8))])
def test_rows_of_the_first_experts_are_placeholders(rows):
    made = arrays()
    made["experts"][rows] = np.arange(TOP_K)
    one = found(made)["placeholder-rows"]
    assert one.count == len(rows) and one.rows[0] == (rows[0], rows[0] + 1)
    assert "experts 0 to 3" in one.what


def test_first_experts_that_are_popular_are_no_placeholder():
    rng = np.random.default_rng(0)
    experts = np.sort(np.argsort(rng.random((2000, 2, 4)), -1)[..., :2], -1)  # a sixth of the cells is (0, 1)
    assert "placeholder-rows" not in codes({"experts": experts, "num_experts": 4})


def test_first_experts_in_one_layer_are_no_placeholder():
    made = arrays()
    made["experts"][::9, 1] = np.arange(TOP_K)
    assert not warned(made)


# A part of the ids.


def of_part(first: int, stop: int, experts: int, rows: int = 1000, layers: int = 4) -> dict:
    ids = first + choose(np.random.default_rng(3), rows, layers, stop - first, 4)
    return {"experts": ids, "num_experts": experts, "request": np.arange(rows) // 50}


@pytest.mark.parametrize(
    ("first", "stop", "experts", "count"),
    [(0, 32, 128, 96), (32, 64, 128, 96), (0, 60, 64, 4), (0, 250, 512, 262), (8, 16, 16, 8)],
    ids=["local ids", "another rank", "60 padded to 64", "wrapped", "upper half"],
)
def test_ids_of_a_part_of_the_experts(first, stop, experts, count):
    one = found(of_part(first, stop, experts))["unused-experts"]
    assert one.count == count and one.layers is None


def test_ids_that_lack_a_part_in_the_middle():
    made = of_part(0, 48, 64)
    made["experts"] += 16 * (made["experts"] >= 16)
    assert "16 to 31" in found(made)["unused-experts"].what


def test_counts_of_one_rank(tmp_path):
    rng, rows = np.random.default_rng(1), np.full(10, 160)
    counts = np.zeros((10, 4, 64), np.int64)
    counts[:, :, :16] = rng.multinomial(640, np.full(16, 1 / 16), (10, 4))
    facts = {"model": "m", "num_experts": 64, "top_k": 4, "layers": 4, "source": {}}
    with CountsWriter(tmp_path / "t.h5", rows=1600, steps=10, **facts) as writer:
        writer.append_counts(counts, rows, np.full(10, 2))
    one = found(Trace.open(tmp_path / "t.h5"))["unused-experts"]
    assert one.count == 48 and "16 to 63" in one.what


@pytest.mark.parametrize(
    ("ranks", "rank", "experts", "count"), [(4, 1, 128, 96), (2, 0, 64, 32), (8, 7, 512, 448), (2, 1, 16, 8)]
)
def test_ids_of_a_rank_that_takes_every_nth_expert(ranks, rank, experts, count):
    ids = rank + ranks * choose(np.random.default_rng(3), 1000, 4, experts // ranks, 4)
    one = found({"experts": ids, "num_experts": experts, "request": np.arange(1000) // 50})["unused-experts"]
    assert one.count == count and f"modulo {ranks} is not {rank})" in one.what


@pytest.mark.parametrize("experts", [16, 64, 128])
@pytest.mark.parametrize("seed", range(4))
def test_experts_of_which_any_half_is_dead_are_no_part(seed, experts):
    rng = np.random.default_rng(seed)
    alive = np.sort(rng.permutation(experts - 2)[: experts // 2 - 2] + 1)
    ids = np.r_[0, alive, experts - 1][choose(rng, 1000, 4, experts // 2, 4)]
    assert "modulo" not in "".join(one.what for one in found({"experts": ids, "num_experts": experts}).values())


def test_experts_that_are_dead_here_and_there_are_no_part():
    made = of_part(0, 64, 64)
    for dead in (3, 17, 18, 40, 62):
        made["experts"][(made["experts"] == dead).any(2)] = np.arange(20, 24)
    assert "unused-experts" not in codes(made)


@pytest.mark.parametrize("rows", [16, 24, 50, 120, 300])
@pytest.mark.parametrize(("layers", "experts", "k"), [(1, 32, 4), (2, 32, 4), (1, 128, 8), (3, 64, 2)])
def test_a_few_rows_that_have_not_come_to_all_experts_are_no_part(rows, layers, experts, k):
    rng = np.random.default_rng(rows)
    for _ in range(8):
        popularity = 1.5 * rng.gumbel(size=(layers, experts))
        ids = np.argsort(popularity + rng.gumbel(size=(rows, layers, experts)), -1)[..., -k:]
        assert "unused-experts" not in codes({"experts": ids, "num_experts": experts})


@pytest.mark.parametrize(("used", "experts", "layers", "rows"), [(32, 128, 4, 60), (16, 18, 8, 200), (16, 64, 3, 40)])
def test_a_few_rows_of_a_part_are_one(used, experts, layers, rows):
    rng = np.random.default_rng(1)
    ids = np.argsort(rng.gumbel(size=(layers, used)) + rng.gumbel(size=(rows, layers, used)), -1)[..., -4:]
    assert found({"experts": ids, "num_experts": experts})["unused-experts"].count == experts - used


def test_a_short_trace_that_has_not_come_to_all_experts_is_no_part():
    assert "unused-experts" not in codes(of_part(0, 128, 128, rows=12))


def test_ids_that_count_from_1():
    rng = np.random.default_rng(3)
    ids = 1 + choose(rng, 1000, 8, 64, 4)
    one = found({"experts": ids, "num_experts": 65})["unused-experts"]
    assert one.count == 1 and "(0) is not" in one.what and "count from 1" in one.what
    cut = np.where(ids == 64, 255, ids)  # as --absent-from 64 leaves them
    assert "count from 1" in found({"experts": cut, "num_experts": 64})["unused-experts"].what
    one = found({"experts": ids - 1, "num_experts": 65})["unused-experts"]
    assert "(64) is not" in one.what and "count from 1" not in one.what, "too many --experts"


@pytest.mark.parametrize("dead", [0, 63])
def test_an_expert_at_an_end_that_is_dead_in_some_layers_is_no_part(dead):
    ids = choose(np.random.default_rng(3), 1000, 8, 64, 4)
    ids[:, :6][(ids[:, :6] == dead).any(2)] = np.arange(20, 24)
    assert "unused-experts" not in codes({"experts": ids, "num_experts": 64})


def test_popularity_that_falls_towards_the_last_id_is_no_part():
    rng = np.random.default_rng(0)
    popularity = -2.0 * np.log(np.arange(1, 129))
    ids = np.argsort(-(popularity + rng.gumbel(size=(300, 4, 128))), -1)[..., :4]
    assert ids.max() < 127 and "unused-experts" not in codes({"experts": ids, "num_experts": 128})


# Wrong stride.


@pytest.mark.parametrize(("k", "read", "layers"), [(8, 4, 6), (8, 2, 3), (6, 4, 8)])
def test_layers_that_are_parts_of_one(k, read, layers):
    ids = choose(np.random.default_rng(4), 2000, layers, 64, k)
    made = {"experts": ids.reshape(2000, -1, read), "num_experts": 64, "request": np.arange(2000) // 200}
    one = found(made)["wrong-stride"]
    assert one.count >= (layers * k // read) // 2 and "top_k" in (one.fix or "")


@pytest.mark.parametrize(
    ("experts", "k", "read", "rows"), [(256, 8, 4, 300), (64, 8, 2, 300), (64, 8, 1, 300), (64, 8, 1, 2000)]
)
def test_layers_that_are_parts_of_one_as_all_pairs_together_show(experts, k, read, rows):
    ids = choose(np.random.default_rng(4), rows, 24, experts, k)
    one = found({"experts": ids.reshape(rows, -1, read), "num_experts": experts})["wrong-stride"]
    assert one.count == 24 * (k // read - 1)
    whole = {"experts": ids, "num_experts": experts}
    assert "wrong-stride" not in codes(whole)


def test_layers_that_choose_apart_only_by_popularity_are_no_parts():
    """Experts that only even layers use, and others that only odd layers use."""
    ids = choose(np.random.default_rng(4), 2000, 6, 32, 4)
    ids[:, 1::2] += 32
    assert "wrong-stride" not in codes({"experts": ids, "num_experts": 64})


def test_layers_of_which_one_pair_chooses_apart_are_no_parts():
    ids = choose(np.random.default_rng(4), 2000, 8, 64, 4)
    ids[:, 3] = (ids[:, 2] + 1 + np.arange(4) * 0) % 64
    keep = [len(set(a) & set(b)) == 0 for a, b in zip(ids[:, 2].tolist(), ids[:, 3].tolist(), strict=True)]
    assert "wrong-stride" not in codes({"experts": ids[keep], "num_experts": 64})


# A shared expert, a favourite.


def with_shared(experts: int = 33, k: int = 4) -> dict:
    ids = choose(np.random.default_rng(5), 600, 3, experts - 1, k)
    ids = np.concatenate([ids, np.full((600, 3, 1), experts - 1)], axis=2)
    return {"experts": ids, "num_experts": experts, "request": np.arange(600) // 50}


def test_an_expert_in_every_cell_is_a_shared_one():
    one = found(with_shared())["shared-expert"]
    assert one.count == 1 and one.layers == [0, 1, 2] and one.what.startswith("Expert 32 is")


def test_two_shared_experts_in_the_first_slots():
    made = with_shared()
    made |= {"experts": np.concatenate([np.full((600, 3, 1), 33), made["experts"]], axis=2), "num_experts": 34}
    one = found(made)["shared-expert"]
    assert one.count == 2 and one.what.startswith("The experts 32, 33 are")


@pytest.mark.parametrize("ids", [[32, 33, 34, 35], [32, 32, 32, None], [None, 32, 32, None], [32, 33, None, 35]])
def test_a_shared_expert_with_ids_by_layer_or_not_in_all_layers(ids):
    made = {"experts": choose(np.random.default_rng(5), 600, 4, 32, 4), "num_experts": 36}
    added = np.array([ABSENT if one is None else one for one in ids])
    made["experts"] = np.concatenate([made["experts"], np.broadcast_to(added[:, None], (600, 4, 1))], axis=2)
    findings = found(made)
    assert findings["shared-expert"].layers == np.flatnonzero(added != ABSENT).tolist()
    assert findings["shared-expert"].count == len({one for one in ids if one is not None})
    assert "dominant-expert" not in findings


def test_a_favourite_of_one_layer_is_not_shared_but_named():
    made = requests(10, 20, 40, 6, experts=32)
    rows = np.flatnonzero(np.random.default_rng(1).random(600) < 0.93)
    cells = made["experts"][rows, 1]
    cells[~(cells == 9).any(1), 0] = 9
    made["experts"][rows, 1] = cells
    one = found(made)
    assert (
        "shared-expert" not in one
        and one["dominant-expert"].layers == [1]
        and "expert 9" in one["dominant-expert"].what
    )


def test_a_collapsed_layer_of_top_1():
    made = requests(10, 20, 40, 6, experts=16, k=1, layers=4)
    made["experts"][np.random.default_rng(1).random(600) < 0.92, 2] = 5
    assert found(made)["dominant-expert"].layers == [2]


@pytest.mark.parametrize("exponent", [0.6, 1.2])
def test_skewed_popularity_is_no_favourite(exponent):
    rng = np.random.default_rng(0)
    popularity = -exponent * np.log(np.argsort(rng.random((5, 64)), axis=1) + 1)
    ids = np.argsort(-(popularity + rng.gumbel(size=(1000, 5, 64))), -1)[..., :6]
    assert not {"dominant-expert", "shared-expert"} & codes({"experts": ids, "num_experts": 64})


@pytest.mark.parametrize("seed", range(3))
def test_skewed_popularity_behind_a_warm_up_is_no_favourite(seed):
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.gumbel(size=(17, 64)) + rng.gumbel(size=(1500, 17, 64)), axis=-1)[:, :, -8:]
    ids[:1000] = ids[0]  # which choose no second one
    assert "dominant-expert" not in codes({"experts": ids, "num_experts": 64})


# Another top_k than the model's.


def test_another_top_k_than_the_model_has():
    ids = choose(np.random.default_rng(0), 400, 6, 32, 2)
    made = Trace.from_arrays(ids, num_experts=32, model="tiny-olmoe", request=np.arange(400) // 50)
    one = next(one for one in lint(made) if one.code == "other-top-k")
    assert one.what == "The trace has 2 experts a token, but tiny-olmoe has 4." and one.level == "note"


@pytest.mark.parametrize(("model", "k"), [("tiny-olmoe", 4), ("mine", 2), ("../../etc/passwd", 2)])
def test_the_models_own_top_k_or_a_model_of_no_preset(model, k):
    ids = choose(np.random.default_rng(0), 400, 6, 32, k)
    made = Trace.from_arrays(ids, num_experts=32, model=model, request=np.arange(400) // 50)
    assert "other-top-k" not in {one.code for one in lint(made)}


# No false alarm.


def test_expert_choice_is_legitimate():
    rng = np.random.default_rng(1)
    experts = np.full((20, 16, 2, 8), ABSENT)
    for step in range(20):
        for layer in range(2):
            for expert in range(8):
                for token in rng.permutation(16)[:4]:
                    cell = experts[step, token, layer]
                    cell[np.count_nonzero(cell != ABSENT)] = expert
    made = {"experts": experts.reshape(320, 2, 8), "num_experts": 8, "steps": [16] * 20, "phase": [1] * 20}
    findings = found(made | {"request": np.tile(np.arange(16), 20)})
    assert {one.level for one in findings.values()} == {"note"} and "partial-cells" in findings
    assert "every-expert" not in findings and findings["partial-cells"].what.startswith("Cells hold 0 to 7 of 8 ids")


@pytest.mark.parametrize("k", [1, 2])
def test_tokens_dropped_at_capacity_are_legitimate(k):
    made = requests(10, 60, 40, 7, experts=16, k=k, layers=4)
    made["experts"][np.random.default_rng(2).random((1000, 4, k)) < 0.08] = ABSENT
    made["experts"] = np.sort(made["experts"], axis=-1)
    assert {one.level for one in found(made).values()} == {"note"}


@pytest.mark.parametrize(("share", "layers"), [(0.1, [1]), (0.02, [5]), (0.3, [2, 3, 4, 5]), (0.1, [0, 3])])
def test_rows_that_skip_some_layers_here_and_there_are_legitimate(share, layers):
    made = requests(10, 60, 40, 7, layers=6)
    skip = np.random.default_rng(2).random(1000) < share
    for layer in layers:
        made["experts"][skip, layer] = ABSENT
    findings = found(made)
    assert {one.level for one in findings.values()} == {"note"} and findings["skipped-layers"].layers == layers
    made["experts"][500:560, layers[0]] = ABSENT
    assert ("unequal-layers" in codes(made)) == (share < 0.1)


@pytest.mark.parametrize("drafted", [1, 2])
def test_draft_passes_of_the_last_layers_are_legitimate(drafted):
    made = requests(10, 20, 60, 8, layers=6)
    draft = np.arange(800) % 3 == 2
    made["experts"][draft, :-drafted] = ABSENT
    made["experts"][~draft, -drafted:] = ABSENT
    findings = found(made)
    assert {one.level for one in findings.values()} == {"note"}
    assert findings["draft-rows"].layers == list(range(6 - drafted, 6)) and findings["draft-rows"].count == 266


def test_rows_that_are_prefill_only_are_legitimate():
    made = arrays() | {"steps": [100] * 4, "phase": [0] * 4}
    assert codes(made) == {"prefill-only"}


def test_lost_rows_and_padding_are_still_called_so():
    made = requests(10, 60, 40, 9, layers=6)
    made["experts"][100:160, 2] = ABSENT
    made["experts"][400:460, 4] = ABSENT
    assert warned(made) == {"unequal-layers"}
    made = requests(10, 60, 40, 9, layers=6)
    made["experts"][np.random.default_rng(3).random(1000) < 0.1] = ABSENT
    assert warned(made) == {"empty-rows"}
