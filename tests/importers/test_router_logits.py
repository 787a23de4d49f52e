"""Logits of routers: choices and gates by the stated rule, against plain loops, whatever file they stand in."""

import os
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.writers.router_logits import EXPERTS, LAYERS, ROWS, by_hand, logits, samples

from moetrace.importers import router_logits
from moetrace.importers.captured import Hints
from moetrace.importers.formats import detect
from moetrace.importers.importing import import_traces
from moetrace.importers.reading import router_rule
from moetrace.importers.reading.router_rule import choose, said_router
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace import Trace


def read(folder, *paths, router="softmax", top_k=2, **options):
    import_traces(paths, folder / "out.h5", hints=Hints(top_k=top_k, router=router), **options)
    trace = Trace.open(folder / "out.h5")
    trace.verify()
    return trace


def no(folder, *paths, error=MoetraceError, **options) -> str:
    with pytest.raises(error) as found:
        read(folder, *paths, **options)
    assert not (folder / "out.h5").exists()
    assert "\n" not in str(found.value) and str(found.value).endswith(".")
    return str(found.value)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_choices_are_those_of_plain_loops(data):
    score = data.draw(st.sampled_from(["softmax", "sigmoid"]))
    groups = data.draw(st.sampled_from([1, 2, 4]))
    experts = groups * data.draw(st.integers(1, 5))
    kept = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, experts // groups * kept))
    # None is negative: sigmoids of x and -x are 1 together, and which of two such groups is better is rounding.
    rows = np.array(
        data.draw(st.lists(st.lists(st.integers(0, 12), min_size=experts, max_size=experts), min_size=1, max_size=5))
    )
    rule = said_router(f"{score},groups={groups}:{kept},scale=1.5")
    norm, bias = data.draw(st.booleans()), None
    if data.draw(st.booleans()):
        # Steps of 1/4 leave no sums of scores and bias that differ in their last bit only.
        bias = [number / 4 for number in data.draw(st.lists(st.integers(-3, 3), min_size=experts, max_size=experts))]
        rule = rule._replace(bias="b.npy")
    found = choose(rows, np.zeros(1) if bias is None else np.array(bias), rule._replace(norm=norm), top_k)
    for at, row in enumerate(rows.tolist()):
        how = {"norm": norm, "scale": 1.5, "groups": groups, "kept": kept, "bias": bias}
        ids, gates = by_hand(row, score, top_k, **how)
        assert found.experts[at].tolist() == ids
        np.testing.assert_allclose(found.gates[at], gates, rtol=1e-12)
    if groups == 1:  # a tie is where the higher id first among equals gives another set
        other = [
            {experts - 1 - id for id in by_hand(row[::-1], score, top_k, **how | {"bias": bias and bias[::-1]})[0]}
            for row in rows.tolist()
        ]
        assert found.ties == sum(set(ids) != set(of.tolist()) for ids, of in zip(other, found.experts, strict=True))


def test_equal_logits_are_chosen_by_id():
    found = choose(np.array([[1.0, 3.0, 3.0, 3.0], [0.0] * 4]), np.zeros(1), said_router("softmax,norm"), 2)
    assert found.experts.tolist() == [[1, 2], [0, 1]] and found.gates.tolist() == [[0.5, 0.5]] * 2
    high = np.array([[40.0, 50.0, 60.0]])  # whose sigmoids are all 1
    assert choose(high, np.zeros(1), said_router("sigmoid"), 3).experts.tolist() == [[2, 1, 0]]


def test_a_note_counts_ties_at_the_last_choice(tmp_path):
    made = np.zeros((3, 2, 4), np.float32)
    made[0, 0], made[1, 0], made[2, 0] = [3, 2, 1, 1], [3, 2, 2, 1], [5, 5, 5, 5]  # layer 1: zeros
    np.save(tmp_path / "logits.npy", made)
    notes: list[str] = []
    for top_k in (2, 4):
        hints = Hints(top_k=top_k, router="softmax", note=notes.append)
        import_traces(tmp_path / "logits.npy", tmp_path / f"{top_k}.h5", hints=hints)
    (note,) = [note for note in notes if "ties" in note]
    assert "in 5 of 6 cells (83.33%) the last choice ties" in note


def test_each_file_gives_the_same_trace(tmp_path):
    made = logits()
    for sample in samples(tmp_path):
        rule = said_router(sample.hints["router"])
        path = sample.files[0]
        assert {detect(file) for file in sample.files} == {"router-logits"}, path.name
        trace = read(tmp_path, *sample.files, router=sample.hints["router"])
        assert trace.source["router"] == sample.hints["router"] and trace.num_experts == EXPERTS
        planes = {"layer_1.npy": [1, 1], "four.pt": [0, 1, 2, 0]}.get(path.name, [0, 1, 2])
        rounded = {"layer_1.npy": np.float16}.get(path.name, np.float32)
        if path.name == "list.pt":
            import torch

            used = torch.tensor(made).bfloat16().float().numpy()
        else:
            used = made.astype(rounded)
        assert trace.layer_index.tolist() == ([1, 4] if path.name == "layer_1.npy" else list(range(len(planes))))
        ids, gates = trace.read("experts", 0, ROWS), trace.read("gates", 0, ROWS)
        for row, (place, plane) in product(range(ROWS), enumerate(planes)):
            how = {"norm": rule.norm, "scale": rule.scale, "groups": rule.groups, "kept": rule.kept_groups}
            expected, weights = by_hand(used[row, plane].tolist(), rule.score, 2, **how)
            assert ids[row, place].tolist() == expected, (path.name, row, plane)
            np.testing.assert_allclose(gates[row, place], weights, rtol=1e-3)
        trace.close()


def test_pieces_cut_nothing(tmp_path, monkeypatch):
    for sample in samples(tmp_path):
        whole = read(tmp_path, *sample.files).read("experts", 0, ROWS)
        monkeypatch.setattr(router_logits, "_BLOCK_BYTES", 8 * EXPERTS * LAYERS * 2)
        assert np.array_equal(read(tmp_path, *sample.files).read("experts", 0, ROWS), whole)
        monkeypatch.undo()


def test_bias_of_a_file_and_phases(tmp_path):
    made = logits(40, 2, 8, 3)
    np.save(tmp_path / "a.npy", made)
    bias = np.round(np.random.default_rng(1).normal(0, 0.3, (2, 8)), 3)
    np.save(tmp_path / "bias.npy", bias)
    for own in (bias, bias[0].astype(np.float32)):
        np.save(tmp_path / "bias.npy", own)
        rule = f"sigmoid,norm,groups=4:2,scale=2.5,bias={tmp_path / 'bias.npy'}"
        trace = read(tmp_path, tmp_path / "a.npy", router=rule, top_k=3, decode_after=10)
        assert trace.steps == 31 and trace.top_k == 3
        ids, gates = trace.read("experts", 0, 40), trace.read("gates", 0, 40)
        for row, layer in np.ndindex(40, 2):
            how = {"norm": True, "scale": 2.5, "groups": 4, "kept": 2}
            mine = (own if own.ndim == 1 else own[layer]).astype(float).tolist()
            expected, weights = by_hand(made[row, layer].tolist(), "sigmoid", 3, **how, bias=mine)
            assert ids[row, layer].tolist() == expected
            np.testing.assert_allclose(gates[row, layer], weights, rtol=1e-3)


def test_a_bias_is_an_ordinary_file_of_a_bounded_size_and_is_not_written_over(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", logits(5, 2, 8, 3))
    os.mkfifo(tmp_path / "fifo")
    for path in ("/dev/zero", tmp_path / "fifo", tmp_path):
        assert "it is not an ordinary file" in no(tmp_path, tmp_path / "a.npy", router=f"softmax,bias={path}")
    bias = tmp_path / "bias.npy"
    np.save(bias, np.zeros(8))
    with pytest.raises(UsageError, match="is also an input"):
        import_traces(tmp_path / "a.npy", bias, hints=Hints(top_k=2, router=f"softmax,bias={bias}"))
    assert np.load(bias).tolist() == [0] * 8
    monkeypatch.setattr(router_rule, "_MOST_BIAS_BYTES", 1 << 20)
    np.save(bias, np.zeros(1 << 17))
    assert "it has more than 1 MiB" in no(tmp_path, tmp_path / "a.npy", router=f"softmax,bias={bias}")


def test_files_of_all_layers_are_requests(tmp_path):
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", logits())
    trace = read(tmp_path, tmp_path / "a.npy", tmp_path / "b.npy")
    assert trace.rows == 2 * ROWS and trace.read("request", 0, 14).tolist() == [0] * ROWS + [1] * ROWS


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("argmax", "must be softmax or sigmoid"),
        ("", "must be softmax or sigmoid"),
        ("softmax,norm=1", "does not know 'norm=1'"),
        ("softmax,scale=0", "does not know 'scale=0'"),
        ("softmax,scale=nan", "does not know 'scale=nan'"),
        ("softmax,groups=2", "does not know 'groups=2'"),
        ("softmax,groups=2:3", "keeps 3 of 2 groups"),
        ("softmax,groups=3:2", "can't cut into 3 equal groups"),
        ("softmax,groups=8:1", "1 experts, of which 2 can't be chosen"),
        (None, "give --router softmax"),
    ],
)
def test_an_impossible_rule_is_wrong_usage(tmp_path, rule, message):
    np.save(tmp_path / "a.npy", logits())
    assert message in no(tmp_path, tmp_path / "a.npy", router=rule, error=UsageError)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (np.zeros(7), "not floats [8] or [3, 8]"),
        (np.zeros(8, int), "not floats"),
        (np.full(8, np.nan), "NaN or infinity"),
        (None, "Cannot read "),
    ],
)
def test_a_bias_that_does_not_fit_is_one_sentence(tmp_path, bias, message):
    np.save(tmp_path / "a.npy", logits())
    if bias is not None:
        np.save(tmp_path / "b.npy", bias)
    assert message in no(tmp_path, tmp_path / "a.npy", router=f"sigmoid,bias={tmp_path / 'b.npy'}")


def test_arrays_that_do_not_fit_are_refused_in_one_sentence(tmp_path):
    path = tmp_path / "layer_2.npy"
    for value, message in ((np.nan, "the logit nan"), (np.inf, "the logit inf")):
        made = logits()
        made[3, 1, 5] = value
        np.save(path, made)
        assert message in no(tmp_path, path) and "row 3, layer 1, expert 5" in no(tmp_path, path)
    np.save(path, logits()[:, 0])
    path.write_bytes(path.read_bytes()[:-1])
    assert "its size differs" in no(tmp_path, path)
    np.save(path, logits())
    assert "top_k" in no(tmp_path, path, top_k=None) and "must be 1 to num_experts (8)" in no(tmp_path, path, top_k=9)
    np.save(tmp_path / "logits.npy", logits()[:, 0])
    assert "does not say of which" in no(tmp_path, tmp_path / "logits.npy")
    np.save(path, logits()[:, 0])
    np.save(tmp_path / "other_2.npy", logits()[:, 0])
    assert "are of the same layer, 2" in no(tmp_path, path, tmp_path / "other_2.npy")
    np.save(tmp_path / "other_3.npy", logits()[:5, 0])
    assert "not the same" in no(tmp_path, path, tmp_path / "other_3.npy")
    np.savez(tmp_path / "a.npz", layer1=logits()[:, 0], layer2=logits()[:4, 0])
    assert "layer2 has shape (4, 8)" in no(tmp_path, tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", a_1=logits()[:, 0], b_1=logits()[:, 0])
    assert "are of layer 1" in no(tmp_path, tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", a_1=logits()[:, 0], ids_2=np.zeros((7, 8), int))
    assert "must be floats [rows, experts]" in no(tmp_path, tmp_path / "a.npz")
    np.save(path, np.zeros((7, 3, 2), int))
    assert detect(path) == "vllm" and "not floats" in no(tmp_path, path), "ids are no logits"


def test_a_rule_is_refused_for_ids(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((7, 3, 2), int))
    assert "--from or --columns says vllm" in no(tmp_path, tmp_path / "a.npy", format="vllm", error=UsageError)


def test_pickles_that_hold_other_things(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "a.pt"
    for value, message in (
        ((torch.zeros(3, 4), torch.zeros(4, 4)), "not of one [rows, experts]"),
        ([torch.zeros(3, 4, 5)], "not of one [rows, experts]"),
        ([torch.zeros(3, 4).T], "no contiguous tensor"),
        ([torch.zeros(1, 4).expand(2000, 4)], "no contiguous tensor"),
        ([torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.int32)], "not a tensor of floats"),
        ([torch.zeros(3, 4), 7], "entry 1 is a int"),
        ([], "holds no tensors"),
    ):
        torch.save(value, path)
        assert message in no(tmp_path, path)
    torch.save([torch.zeros(300, 40)] * 3, path)
    assert "claim more than its size" in no(tmp_path, path), "one tensor under many names"
    for value in (torch.ones(3, 4), {"logical_count": torch.ones(1, 3, 4)}, torch.ones(1, 3, 4, dtype=torch.int32)):
        torch.save(value, path)
        assert not router_logits.recognize(path.read_bytes()[: 64 << 10], "a.pt")


def test_weights_of_models_are_no_logits(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "a.safetensors"
    safetensors.save_file({"model.layers.0.mlp.gate.weight": np.zeros((4, 8), np.float32)}, path)
    with pytest.raises(MoetraceError, match="in no format"):
        detect(path)
    safetensors.save_file({"router_logits": np.zeros((4, 8), np.float32)}, path)
    assert "does not say its layer" in no(tmp_path, path)


def test_a_note_names_scores_that_are_taken_for_logits(tmp_path):
    values = logits().astype(np.float64)
    scores = np.exp(values) / np.exp(values).sum(2, keepdims=True)
    sigmoids = 1 / (1 + np.exp(-values))
    for floats, what in (
        (scores.astype(np.float16), "those of each cell sum to 1"),
        (sigmoids, "all are between 0 and 1"),
        (values, None),
        (np.abs(values), None),
        (np.zeros_like(values), None),
    ):
        notes: list[str] = []
        np.save(tmp_path / "a.npy", floats)
        hints = Hints(top_k=2, router="softmax", note=notes.append)
        import_traces(tmp_path / "a.npy", tmp_path / "out.h5", hints=hints)
        told = [note for note in notes if "look like scores, not logits" in note]
        assert len(told) == (what is not None) and all(what in note for note in told)
    np.save(tmp_path / "logits.npy", np.log(scores))
    whole = read(tmp_path, tmp_path / "logits.npy").read("gates", 0, len(values))
    order = np.sort(scores, axis=2)[..., ::-1][..., :2]
    np.testing.assert_allclose(whole, order, atol=1e-3, err_msg="as the note says")
