"""What is exported of a result is what the replay kept, and where it placed experts."""

import json

import numpy as np
import pytest
from msgspec import UNSET
from msgspec.structs import replace

import moetrace as mt
from moetrace.results.exporting import export_result
from moetrace.spec import PolicySpec
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.spec.policy_files import load_static

MODEL = replace(mt.load_model("tiny-olmoe"), dense_layers=0)
SYSTEM = mt.load_system("edge-ndp", {"ndp.units": 4})


def spec(residency, **more):
    return PolicySpec(name=residency, placement="ep-block", dispatch="ndp", residency=residency, **more)


@pytest.fixture(scope="module")
def trace():
    return mt.generate_trace("tiny-olmoe", requests=2, prompt=5, output=8, seed=3)


def result_of(trace, folder, *policies, slots=40, system=SYSTEM, model=MODEL):
    result = mt.replay(trace, model=model, system=system, policies=list(policies), slots=slots)
    result.write(folder)
    return result


def exported(folder, path, to="static-csv", **more):
    export_result(folder, path, to=to, **more)
    return load_static(path, 6, 32) if to == "static-csv" else path.read_text()


@pytest.mark.parametrize(
    "policy",
    [
        spec("static-popular"),
        spec("static-popular", scope="layer"),
        spec("static-hindsight"),
        spec("static-layers"),
        spec("static-layers", gpu_layers=1, gpu_layers_end="first"),
    ],
)
def test_the_set_is_that_of_the_replay(tmp_path, trace, policy):
    result = result_of(trace, tmp_path / "res", policy)
    state = result.run.lanes[0].state
    kept = state.cells["resident"] == 1 if policy.residency != "static-hindsight" else state.cells["admit"] == 1
    pairs = exported(tmp_path / "res", tmp_path / "a.csv")
    assert {tuple(pair) for pair in pairs.tolist()} == {tuple(pair) for pair in np.argwhere(kept).tolist()}
    rows = result.experts["rows"].to_numpy().reshape(6, 32)
    wanted = [-rows[layer, expert] for layer, expert in pairs]
    assert len(pairs) > 0 and wanted == sorted(wanted), "hottest first"


def test_files_of_a_policy_are_not_in_a_result(tmp_path, trace, monkeypatch):
    (tmp_path / "given.csv").write_text("layer,expert\n3,7\n0,31\n5,0\n")
    (tmp_path / "loads.csv").write_text(("1," * 31 + "1\n") * 6)
    monkeypatch.chdir(tmp_path)  # a file of this name may be another one
    policy = spec("static", static=str(tmp_path / "given.csv"))
    other = replace(spec("lru", loads=str(tmp_path / "loads.csv")), placement="eplb")
    result_of(trace, tmp_path / "res", policy, other)
    with pytest.raises(UsageError, match=r"keeps the set of given\.csv, which a result does not hold: take .* --set"):
        exported(tmp_path / "res", tmp_path / "a.csv", policy="static")
    with pytest.raises(UsageError, match=r"places experts by loads\.csv, which a result does not hold: take"):
        exported(tmp_path / "res", tmp_path / "a", "vllm-map", policy="lru")


def test_a_set_can_be_replayed_again(tmp_path, trace):
    one = result_of(trace, tmp_path / "res", spec("static-popular"))
    exported(tmp_path / "res", tmp_path / "a.csv")
    two = result_of(trace, tmp_path / "b", spec("static", static=str(tmp_path / "a.csv")))
    assert two.summary["total_s"].item() == one.summary["total_s"].item()


def test_layers_have_the_numbers_of_the_model(tmp_path, trace):
    policy = spec("static-layers", gpu_layers=1)
    result_of(trace, tmp_path / "res", policy)
    assert exported(tmp_path / "res", tmp_path / "a", "llama-args") == "--n-cpu-moe 5\n"
    result_of(trace, tmp_path / "dense", policy, model=replace(MODEL, dense_layers=[0, 3]))
    text = exported(tmp_path / "dense", tmp_path / "m", "moe-l2")
    assert text.startswith("# EXPERT_TOTAL 32\n7 ")
    result_of(trace, tmp_path / "unknown", policy, model=replace(MODEL, dense_layers=UNSET))
    with pytest.raises(UsageError, match=r"does not say which of its layers have experts: .* --trace TRACE.h5"):
        exported(tmp_path / "unknown", tmp_path / "m", "moe-l2")
    assert len(exported(tmp_path / "unknown", tmp_path / "a.csv")) == 32, "a set of our own counts entries"


def test_a_trace_tells_numbers_and_is_checked(tmp_path):
    for seed in (1, 2):
        mt.generate(tmp_path / f"{seed}.h5", "tiny-olmoe", requests=1, prompt=4, output=4, seed=seed)
    with mt.Trace.open(tmp_path / "1.h5") as trace:
        policy = spec("static-layers", gpu_layers=1)
        result_of(trace, tmp_path / "res", policy, model=replace(MODEL, dense_layers=UNSET))
    text = exported(tmp_path / "res", tmp_path / "m", "moe-l2", trace=tmp_path / "1.h5")
    assert text.splitlines()[1].startswith("5 ")
    with pytest.raises(MoetraceError, match=r"is not the trace that .* is of: their sha256s differ"):
        exported(tmp_path / "res", tmp_path / "m", "moe-l2", trace=tmp_path / "2.h5")


def test_a_placement_is_a_map(tmp_path, trace):
    result_of(trace, tmp_path / "res", spec("static-popular"), replace(spec("lru"), placement="ep"))
    rows = json.loads(exported(tmp_path / "res", tmp_path / "a", "vllm-map", policy="static-popular"))
    assert rows == [list(range(32))] * 6
    ascend = json.loads(exported(tmp_path / "res", tmp_path / "b", "vllm-ascend-map", policy="lru"))
    assert ascend["layer_list"][5]["device_list"][1] == {"device_id": 1, "device_expert": list(range(1, 32, 4))}
    result_of(trace, tmp_path / "tp", replace(spec("lru"), placement="tp"))
    with pytest.raises(UsageError, match="the plan splits experts"):
        exported(tmp_path / "tp", tmp_path / "c", "vllm-map")


def test_impossible_exports_are_refused_in_one_sentence(tmp_path, trace):
    folder = tmp_path / "res"
    result_of(trace, folder, spec("lru"), spec("none"))
    for more, sentence in (
        ({}, r"holds 2 policies: name one with --policy \(lru, none\)"),
        ({"policy": "x"}, "has no policy 'x': it holds lru, none"),
        ({"policy": "lru"}, "Policy lru keeps no fixed set: its residency is lru; sets are of static"),
        ({"policy": "none"}, "Policy none keeps no expert: its residency is none"),
        ({"policy": "lru", "to": "npz"}, "npz is of a whole trace, and .* is a replay's result"),
        ({"policy": "lru", "to": "vllm-map", "dram_slots": 3}, "vllm-map has no tier of main memory"),
    ):
        with pytest.raises(UsageError, match=sentence) as raised:
            exported(folder, tmp_path / "a", **more)
        assert "\n" not in str(raised.value)
    result_of(trace, tmp_path / "one", spec("static-popular"))
    with pytest.raises(UsageError, match="moe-l2 has no tier of main memory"):
        exported(tmp_path / "one", tmp_path / "a", "moe-l2", dram_slots=4)
    with pytest.raises(UsageError, match="does not exist: name a folder"):
        exported(tmp_path / "nothing", tmp_path / "a")
    (tmp_path / "one" / "experts.parquet").unlink()
    with pytest.raises(MoetraceError, match=r"has no experts\.parquet, which says"):
        exported(tmp_path / "one", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_tables_of_another_result_are_refused(tmp_path, trace):
    result_of(trace, tmp_path / "one", spec("static-popular"))
    result_of(trace, tmp_path / "two", spec("static-popular"), slots=30)
    (tmp_path / "two" / "experts.parquet").replace(tmp_path / "one" / "experts.parquet")
    with pytest.raises(MoetraceError, match=r"experts\.parquet"):
        exported(tmp_path / "one", tmp_path / "a")
