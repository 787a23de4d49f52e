"""What engines are told to keep: read back as each engine reads it, by plain code."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import moetrace as mt
from moetrace.exports.resident import KeptChoice
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.spec.policy_files import load_static

rng = np.random.default_rng(2)
IDS = np.stack([rng.permuted(np.tile(np.arange(6), (40, 3, 1)), axis=2)[..., :2]])[0].astype(np.uint8)
IDS[:, :, 0] = np.where(rng.random((40, 3)) < 0.5, 0, IDS[:, :, 0])
IDS[:, :, 1] = np.where(IDS[:, :, 1] == IDS[:, :, 0], (IDS[:, :, 0] + 1) % 6, IDS[:, :, 1])
COUNTS = Counter((layer, int(e)) for row in IDS for layer in range(3) for e in row[layer])
HOTTEST = sorted(((layer, e) for layer in range(3) for e in range(6)), key=lambda pair: (-COUNTS[pair], pair))


def made(layer_index=(0, 1, 2)) -> mt.Trace:
    return mt.Trace.from_arrays(IDS, num_experts=6, layer_index=np.array(layer_index))


def written(path: Path, to: str, trace: mt.Trace | None = None, **choice) -> Path:
    mt.export(trace or made(), path, to=to, choice=KeptChoice(**choice))
    return path


@pytest.mark.parametrize("slots", [None, 5])
def test_torch_reads_the_counts(tmp_path, slots):
    torch = pytest.importorskip("torch")
    path = written(tmp_path / "a.pt", "ktransformers", made((1, 2, 4)), slots=slots)
    for mmap in (False, True):
        found = torch.load(path, weights_only=True, mmap=mmap)["logical_count"]
        assert tuple(found.shape) == (1, 5, 6) and found.dtype == torch.int64 and found.is_contiguous()
        counts = found.sum(dim=0).numpy()
        assert not counts[[0, 3]].any()
        for (layer, e), position in zip(HOTTEST, range(18), strict=True):
            wanted = COUNTS[layer, e] if slots is None else max(0, 5 - position)
            assert counts[[1, 2, 4][layer], e] == wanted
    assert path.read_bytes() == written(tmp_path / "b.pt", "ktransformers", made((1, 2, 4)), slots=slots).read_bytes()


def test_a_fork_of_llama_cpp_ranks_experts_as_the_trace(tmp_path):
    freq: Counter = Counter()
    for line in written(tmp_path / "a.csv", "moe-cache-profile").read_text().splitlines():
        pos, layer, *ids = map(int, line.split(","))
        assert pos >= 0 and len(line) < 4095
        freq.update((layer, e) for e in ids)
    for layer in range(3):
        ranked = sorted((-freq[layer, e], e) for e in range(6) if freq[layer, e])
        assert [e for _, e in ranked] == [e for of, e in HOTTEST if of == layer and COUNTS[of, e]]


@pytest.mark.parametrize("choice", [{"slots": 7}, {"layer_slots": 2}, {"slots": 0}])
def test_sets(tmp_path, choice):
    path = written(tmp_path / "a.csv", "static-csv", **choice)
    per_layer = [pair for layer in range(3) for pair in [pair for pair in HOTTEST if pair[0] == layer][:2]]
    expected = HOTTEST[: choice["slots"]] if "slots" in choice else [p for p in HOTTEST if p in per_layer]
    assert [tuple(pair) for pair in load_static(path, 3, 6).tolist()] == expected
    lines = written(tmp_path / "a.map", "moe-l2", made((1, 2, 4)), held=path).read_text().splitlines()
    assert lines[0] == f"# EXPERT_TOTAL {len(expected)}"
    pins = [(int(line.split()[0]), int(e)) for line in lines[1:] for e in line.split()[1:]]
    assert sorted(pins) == sorted(([1, 2, 4][layer], e) for layer, e in expected)


def test_a_manifest_places_each_expert_once(tmp_path):
    manifest = json.loads(written(tmp_path / "a.json", "e4b-placement", slots=4, dram_slots=5).read_text())
    tiers = [manifest["tiers"][name] for name in ("vram", "dram", "nvme")]
    assert [tuple(pair) for tier in tiers for pair in tier] == HOTTEST and list(map(len, tiers)) == [4, 5, 9]
    assert manifest["geometry"] == {"n_layers": 3, "n_experts": 6, "bytes_per_expert": None}
    assert manifest["masses"]["vram_frac"] == sum(COUNTS[pair] for pair in HOTTEST[:4]) / COUNTS.total()
    with pytest.raises(MoetraceError, match="has 3 MoE layers, and which of a model's layers these are is not known"):
        written(tmp_path / "b.json", "e4b-placement", made((1, 2, 3)), slots=4)


def test_a_manifest_numbers_modules_with_experts(tmp_path):
    dense_first = mt.load_model("deepseek-v2-lite")
    rows, layers = 4, dense_first.moe_layers
    ids = np.tile(np.arange(6, dtype=np.uint8), (rows, layers, 1))
    whole = mt.Trace.from_arrays(ids, num_experts=64, layer_index=dense_first.layer_index, model=dense_first.name)
    assert whole.layer_index[0] == 1
    manifest = json.loads(written(tmp_path / "a.json", "e4b-placement", whole, slots=4).read_text())
    pairs = [tuple(pair) for tier in manifest["tiers"].values() for pair in tier]
    assert sorted(pairs) == [(layer, expert) for layer in range(layers) for expert in range(64)]
    part = mt.Trace.from_arrays(
        ids[:, 1:], num_experts=64, layer_index=dense_first.layer_index[1:], model=dense_first.name
    )
    with pytest.raises(MoetraceError, match=f"has {layers - 1} MoE layers, and its model has {layers}"):
        written(tmp_path / "b.json", "e4b-placement", part, slots=4)


def test_layers_in_main_memory(tmp_path):
    active = [len({int(e) for e in IDS[:, layer].ravel()}) for layer in range(3)]
    assert active == [6, 6, 6]  # one step: all layers are equal, and the later ones stay
    read = lambda **choice: written(tmp_path / "a", "llama-args", **choice).read_text()  # noqa: E731
    assert read(slots=12) == "--n-cpu-moe 1\n" and read(slots=18) == "\n" and read(slots=5) == "--n-cpu-moe 3\n"
    (tmp_path / "s.csv").write_text("".join(f"{layer},{e}\n" for layer in (0, 1) for e in range(6 - layer)))
    pattern = re.fullmatch(r"-ot (\S+)=CPU\n", read(held=tmp_path / "s.csv"))[1]
    names = [f"blk.{n}.ffn_{part}_exps.weight" for n in (0, 1, 2, 12) for part in ("up", "gate", "down", "gate_up")]
    assert {name.split(".")[1] for name in names if re.search(pattern, name)} == {"1", "2"}


def test_layers_of_part_of_a_model_are_refused(tmp_path):
    model = mt.load_model("qwen3-30b-a3b")
    ids = np.tile(np.arange(8, dtype=np.uint8), (4, model.moe_layers, 1))
    of = lambda index: mt.Trace.from_arrays(  # noqa: E731
        ids[:, index], num_experts=128, layer_index=np.array(index), model=model.name
    )
    assert written(tmp_path / "a", "llama-args", of(range(48)), slots=0).read_text() == "--n-cpu-moe 48\n"
    with pytest.raises(MoetraceError, match="has 3 MoE layers, and its model has 48: llama-args says of all layers"):
        written(tmp_path / "b", "llama-args", of(range(10, 13)), slots=0)
    with pytest.raises(MoetraceError, match="which of a model's layers these are is not known: llama-args says"):
        written(tmp_path / "b", "llama-args", made((1, 2, 4)), slots=0)


def test_a_set_without_a_whole_layer_is_no_choice_of_layers(tmp_path):
    held = tmp_path / "s.csv"
    held.write_text("".join(f"{layer},{e}\n" for layer in range(3) for e in range(5)))
    with pytest.raises(UsageError, match=r"the set of 15 experts holds no layer whole, and llama\.cpp keeps whole"):
        written(tmp_path / "a", "llama-args", held=held)
    held.write_text("layer,expert\n")
    assert written(tmp_path / "a", "llama-args", held=held).read_text() == "--n-cpu-moe 3\n"


def test_conflicting_options_are_refused(tmp_path):
    for form, choice, sentence in (
        ("moe-l2", {}, "moe-l2 holds a set of experts: give --slots"),
        ("npz", {"slots": 3}, "npz holds the whole trace"),
        ("eplb", {"phase": "decode"}, "eplb holds the whole trace: give no --phase"),
        ("moe-l2", {"slots": 1, "layer_slots": 1}, "give one of them"),
        ("moe-l2", {"slots": 1, "dram_slots": 1}, "has no tier of main memory"),
        ("llama-args", {"layer_slots": 1}, "llama.cpp keeps whole layers"),
    ):
        with pytest.raises(UsageError, match=sentence):
            written(tmp_path / "a", form, **choice)
    with pytest.raises(MoetraceError, match="has no choices in mixed steps"):
        written(tmp_path / "a", "moe-l2", slots=1, phase="mixed")
    assert list(tmp_path.iterdir()) == []
