"""SGLang's recorder: dumps of all modes come out exactly, and what is none is one sentence, never executed."""

import builtins
import gzip
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from support.writers import imported, refused, routing, steps
from support.writers.sglang import MAP, PASSES, csv, detailed, per_pass, per_token, record, stat

from moetrace.importers import sglang
from moetrace.importers.formats import detect

torch = pytest.importorskip("torch")


def logical_counts(ids: np.ndarray) -> np.ndarray:
    return np.stack([np.bincount(of_layer.ravel(), minlength=8) for of_layer in ids.transpose(1, 0, 2)])


def test_tokens_requests_and_steps_come_out_as_they_went_in(tmp_path):
    path, logical = per_token(tmp_path / "a_0.pt")
    trace = imported(tmp_path, path)
    segments = [segment for _, segments in PASSES for segment in segments]
    assert np.array_equal(trace.read("experts", 0, 99), logical) and trace.top_k == 2 and trace.num_experts == 8
    assert trace.read("request", 0, 99).tolist() == [who for who, _, rows in segments for _ in range(rows)]
    assert trace.read("position", 0, 99).tolist() == [
        p for _, first, rows in segments for p in range(first, first + rows)
    ]
    assert steps(trace) == [(6, 0), (2, 1), (11, 2), (12, 0), (3, 0), (4, 1), (3, 1)], "the idle pass is left out"
    assert trace.read("row_phase", 8, 19).tolist() == [0] * 9 + [1] * 2
    assert trace.read("token", 0, 8).tolist() == [0, 1, 2, 3, 4, 5, 50, 51]
    assert trace.source["mode"] == "per_token" and "reconstructed" in trace.source["requests"]
    assert trace.source["idle_passes_dropped"] == 1


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_slots_of_padding_are_cut(tmp_path, top_k):
    path, logical = per_token(tmp_path / "a.pt", top_k=top_k)
    assert np.array_equal(imported(tmp_path, path).read("experts", 0, 99), logical)
    assert f"{top_k} experts a token, but --top-k says 9" in refused(tmp_path, path, top_k=9)


def test_ranks_with_other_tokens_follow_one_another_within_a_pass(tmp_path):
    paths, logical = zip(*(per_token(tmp_path / f"a_{r}.pt", PASSES[:2], rank=r, seed=r) for r in (0, 1)), strict=True)
    trace = imported(tmp_path, paths[1], paths[0])
    assert steps(trace) == [(12, 0), (4, 1)] and trace.source["ranks"] == 2
    expected = np.concatenate([ids[part] for part in (slice(6), slice(6, 8)) for ids in logical])
    assert np.array_equal(trace.read("experts", 0, 16), expected)
    assert trace.read("request", 0, 16).tolist() == [0] * 4 + [1] * 2 + [2] * 4 + [3] * 2 + [0, 1, 2, 3]


def test_copies_of_tensor_parallel_ranks_are_taken_once(tmp_path):
    path, logical = per_token(tmp_path / "a_0.pt")
    content = torch.load(path)
    for rank in (1, 2):
        copy = [one | {"rank": rank} for one in content["records"]]
        detailed(tmp_path / f"a_{rank}.pt", copy)
    trace = imported(tmp_path, *(tmp_path / f"a_{rank}.pt" for rank in range(3)))
    assert np.array_equal(trace.read("experts", 0, 99), logical)
    assert trace.source["copies_of_ranks_dropped"] == 2 * 7 and trace.source["ranks"] == 3


def test_dense_layers_are_absent_and_dropped_if_the_model_then_fits(tmp_path):
    ids = routing(4, 3, 2, 8)
    ids[:, 0] = -1
    path = detailed(tmp_path / "a.pt", [record(1, 0, 1, [(0, 0, 4)], ids)])
    trace = imported(tmp_path, path)
    assert (trace.read("experts", 0, 4)[:, 0] == 255).all() and trace.layers == 3
    trace = imported(tmp_path, path, layers=2)
    assert trace.layer_index.tolist() == [1, 2] and np.array_equal(trace.read("experts", 0, 4), ids[:, 1:])


def test_rows_of_padding_are_cut_and_unknown_modes_known_by_their_segments(tmp_path):
    one = record(1, 0, 1, [(0, 0, 4)], routing(4, 3, 2, 8)) | {"extend_seq_lens": [3, 0]}
    drafts = record(2, 0, 5, [(0, 3, 3)], routing(3, 3, 2, 8)) | {"extend_seq_lens": [3]}
    more = record(4, 0, 5, [(0, 6, 3), (1, 2, 2)], routing(5, 3, 2, 8))
    later = record(3, 0, 99, [(1, 0, 2)], routing(2, 3, 2, 8)) | {"extend_seq_lens": torch.tensor([2])}
    trace = imported(tmp_path, detailed(tmp_path / "a.pt", [one, drafts, later, more]))
    assert steps(trace) == [(3, 0), (3, 1), (2, 0), (5, 1)] and trace.source["padding_rows_dropped"] == 1
    assert trace.read("request", 0, 8).tolist() == [0] * 6 + [1] * 2
    assert trace.read("request", 8, 13).tolist() == [0] * 3 + [1] * 2


def test_a_request_that_ended_is_not_gone_on_with(tmp_path):
    """Request 0 ends while it expects position 4; when request 1 comes to 4, that is its own."""
    passes = [(1, [(0, 0, 3)]), (2, [(0, 3, 1)]), (1, [(1, 0, 2)]), *((2, [(1, p, 1)]) for p in range(2, 7))]
    trace = imported(tmp_path, per_token(tmp_path / "a.pt", passes)[0])
    assert trace.read("request", 0, 99).tolist() == [0] * 4 + [1] * 7


def test_a_prompt_does_not_go_on_with_a_request_that_decodes(tmp_path):
    passes = [(1, [(0, 0, 3)]), (2, [(0, 3, 1)]), (1, [(1, 4, 2)])]  # the second has its first four tokens cached
    assert (
        imported(tmp_path, per_token(tmp_path / "a.pt", passes)[0]).read("request", 0, 9).tolist() == [0] * 4 + [1] * 2
    )


def test_passes_are_summed_over_ranks(tmp_path):
    ids = [[routing(4 + number, 3, 2, 8, 10 * rank + number) for number in range(3)] for rank in range(2)]
    segments = [[(0, 0, len(one)) for one in of_rank] for of_rank in ids]
    paths = [
        per_pass(tmp_path / f"{r}.pt", [record(9 - n, r, 1, [segments[r][n]], ids[r][n]) for n in range(3)])
        for r in range(2)
    ]
    trace = imported(tmp_path, *paths, top_k=2)
    expected = np.stack([sum(logical_counts(ids[rank][number]) for rank in range(2)) for number in (2, 1, 0)])
    assert np.array_equal(trace.read("counts", 0, 3), expected) and steps(trace) == [(12, 2), (10, 2), (8, 2)]
    assert trace.source["mode"] == "per_pass" and trace.source["ranks"] == 2


def test_stat_without_the_unused_steps(tmp_path):
    counts = np.zeros((6, 3, 8), np.int32)
    counts[[0, 1, 4], 1:] = 6
    path = stat(tmp_path / "a.pt", counts)
    trace = imported(tmp_path, path, top_k=2)
    assert np.array_equal(trace.read("counts", 0, 9), counts[[0, 1, 4]]) and trace.rows == 3 * 24
    assert trace.source["unused_steps_dropped"] == 3 and "ring" in trace.source["order_of_steps"]
    assert imported(tmp_path, path, top_k=2, layers=2).layer_index.tolist() == [1, 2]
    assert imported(tmp_path, path, path, top_k=2).steps == 6, "several dumps follow one another"


def test_csv_of_ranks(tmp_path):
    counts = np.random.default_rng(0).integers(0, 4, (3, 3, 8))
    paths = [csv(tmp_path, 0, 1.5, counts[0]), csv(tmp_path, 1, 1.6, counts[1]), csv(tmp_path, 2, 1.7, counts[1])]
    paths += [csv(tmp_path, rank, 9.5, counts[2]) for rank in range(3)]
    trace = imported(tmp_path, *paths, top_k=2, num_experts=8)
    assert np.array_equal(trace.read("counts", 0, 9), [counts[0] + counts[1], counts[2]]), "copies count once"
    assert trace.source["ranks"] == 3 and imported(tmp_path, paths[0], top_k=2).source["num_experts"]


def test_csv_is_the_file_of_that_name_and_not_packed(tmp_path):
    named, other = (
        csv(tmp_path, 0, 1.5, np.full((3, 8), n)).rename(tmp_path / name)
        for n, name in ((1, "a[1].csv"), (2, "a1.csv"))
    )
    assert imported(tmp_path, named, top_k=2, num_experts=8).read("counts", 0, 1).max() == 1
    (tmp_path / "a.gz").write_bytes(gzip.compress(other.read_bytes()))
    assert "does not begin" in refused(tmp_path, tmp_path / "a.gz", format="sglang", top_k=2)


def test_a_dump_that_unpacks_to_more_than_it_is_is_refused(tmp_path):
    path = stat(tmp_path / "a.pt", np.ones((2, 3, 8), np.int32))
    with zipfile.ZipFile(path) as dump, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for info in dump.infolist():
            packed.writestr(info.filename, dump.read(info))
    assert "is compressed" in refused(tmp_path, tmp_path / "b.pt", format="sglang", top_k=2)


class Attack:
    def __reduce__(self):
        return Path.touch, (Path("attacked"),)


def test_a_pickle_that_would_execute_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"records": [Attack()], "last_physical_to_logical_map": 1}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Attack()))
    for name in ("a.pt", "b.pt"):
        assert refused(tmp_path, tmp_path / name, format="sglang")
        assert not (tmp_path / "attacked").exists()
    assert "no dump of plain tensors" in refused(tmp_path, tmp_path / "a.pt")


def test_without_torch_it_is_said_what_to_install(tmp_path, monkeypatch):
    path = per_token(tmp_path / "a.pt")[0]
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "torch":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install '.[engines]'" in refused(tmp_path, path)


def test_sizes_of_strides_are_not_believed(tmp_path):
    torch.save({"logical_count": torch.ones(1, dtype=torch.int32).expand(10**9, 10**6, 10**3)}, tmp_path / "a.pt")
    assert "no contiguous tensor" in refused(tmp_path, tmp_path / "a.pt", top_k=2)


def test_a_tensor_that_many_records_share_is_not_believed(tmp_path):
    one = record(0, 0, 1, [(0, 0, 400)], routing(400, 3, 2, 8))
    records = [one | {"forward_pass_id": number} for number in range(5)]
    assert "its records claim" in refused(tmp_path, detailed(tmp_path / "a.pt", records))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk_ids_of_layer": torch.full((3, 4, 8), 9)}, "ids from 9 to 9"),
        ({"topk_ids_of_layer": torch.full((3, 4, 8), -1)}, "every id is -1"),
        ({"topk_ids_of_layer": torch.zeros((3, 4, 8))}, "not integers"),
        ({"topk_ids_of_layer": torch.zeros((2, 4, 8), dtype=torch.int32)}, "does not fit the map"),
        ({"topk_ids_of_layer": torch.zeros((3, 4, 8), dtype=torch.int32)}, "more than once"),
        ({"topk_ids_of_layer": [1]}, "no plain tensor"),
        ({"topk_ids_of_layer": torch.ones(3, 4, 8, dtype=torch.int32).to_sparse()}, "no plain tensor"),
        ({"topk_ids_of_layer": torch.ones(3, 4, 8, dtype=torch.int32, device="meta")}, "no plain tensor"),
        ({"input_ids": [1]}, "1 input_ids"),
        ({"input_ids": [2**40] * 4}, "no list of int32"),
        ({"positions": [-1] * 4}, "negative"),
        ({"positions": None}, "no plain tensor"),
        ({"extend_seq_lens": [9]}, "of 9 tokens"),
        ({"forward_pass_id": None}, "no forward_pass_id"),
        ({"forward_mode": torch.ones(2)}, "forward_mode is a Tensor"),
        ({"gatherer_key": torch.ones(2), "forward_mode": "extend"}, "forward_mode is a str"),
    ],
)
def test_records_that_are_refused(tmp_path, changes, message):
    path = detailed(tmp_path / "a.pt", [record(1, 0, 1, [(0, 0, 4)], routing(4, 3, 2, 8)) | changes])
    assert message in refused(tmp_path, path)


def test_dumps_that_are_refused(tmp_path):
    one = record(1, 0, 1, [(0, 0, 4)], routing(4, 3, 2, 8))
    path, token = per_pass(tmp_path / "a.pt", [one]), detailed(tmp_path / "b.pt", [one])
    counts = stat(tmp_path / "c.pt", np.ones((2, 3, 8), np.int32))
    assert "--top-k" in refused(tmp_path, path)
    assert "import dumps of one start" in refused(tmp_path, path, path, top_k=2)
    assert "import dumps of one start" in refused(tmp_path, token, token)
    assert "import them separately" in refused(tmp_path, path, counts, top_k=2)
    assert "with topk_ids_of_layer and without" in refused(tmp_path, path, token, top_k=2)
    assert "holds no records" in refused(tmp_path, detailed(tmp_path / "d.pt", []))
    assert "other layers or experts" in refused(tmp_path, token, detailed(tmp_path / "e.pt", [one], MAP[:2]))
    assert "counts nothing" in refused(tmp_path, stat(tmp_path / "f.pt", np.zeros((2, 3, 8), np.int32)), top_k=2)
    assert "impossible count" in refused(tmp_path, stat(tmp_path / "g.pt", np.full((2, 3, 8), -1)), top_k=2)
    assert "not numbers of 3 axes" in refused(tmp_path, stat(tmp_path / "h.pt", np.ones((8,))), top_k=2)
    assert "are not whole" in refused(tmp_path, stat(tmp_path / "h.pt", np.full((3, 8), 0.5)), top_k=2)
    torch.save({"weight": torch.ones(3)}, tmp_path / "i.pt")
    assert "neither logical_count nor records" in refused(tmp_path, tmp_path / "i.pt", format="sglang")
    path.write_bytes(path.read_bytes()[:-100])
    assert "no dump of plain tensors" in refused(tmp_path, path, top_k=2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0,-1,5", "line 2: expert_id"),
        ("0,1,-5", "line 2: count"),
        ("x,1,5", "can't be read as CSV"),
        ("0,,5", "line 2: expert_id"),
        ("65534,65534,5", "too few"),
        ("0,9,5", "there are 8"),
        ("", "line 2: layer_id"),
        ("0,0,0", "counts nothing"),
    ],
)
def test_csv_that_is_refused(tmp_path, line, message):
    path = tmp_path / "expert_distribution_rank0_timestamp1.5.csv"
    path.write_text(f"layer_id,expert_id,count\n{line}\n")
    hints = {} if message == "too few" else {"num_experts": 8}
    assert message in refused(tmp_path, path, top_k=2, **hints)


def test_it_is_seen_from_the_content(tmp_path):
    paths = [per_token(tmp_path / "a.pt")[0], stat(tmp_path / "b.pt", np.ones((2, 3, 8), np.int32))]
    for path in [*paths, csv(tmp_path, 0, 1.0, np.ones((3, 8), int))]:
        assert detect(path) == "sglang"
    torch.save({"weight": torch.ones(3)}, tmp_path / "i.pt")
    assert not sglang.recognize((tmp_path / "i.pt").read_bytes(), "i.pt")
    assert not sglang.recognize(b"layer,expert\n1,2\n", "a.csv")
