"""The break-even of speculation: beside two replays put next to each other, and not where none was asked for."""

import json
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

import moetrace as mt
from moetrace.results.break_even import verified_batch

SHIPPED = Path(__file__).parents[2] / "traces"
HOW = {"slots": 48, "policies": ["on-demand-lfu", "edge-ndp"]}


def seconds_by_size(trace: mt.Trace, result: mt.Result, policy: str) -> dict[int, list[float]]:
    """Seconds of the decode steps, by how many requests they have."""
    request, found = trace.read("request", 0, trace.rows), {}
    steps = result.steps.filter(policy=policy)["duration_s"].to_list()
    for step, (begin, end) in enumerate(zip(trace.offset, trace.offset[1:], strict=False)):
        if trace.phase[step] == 1:
            found.setdefault(len(set(request[begin:end].tolist())), []).append(steps[step])
    return found


@pytest.mark.parametrize("wish", [{"batch": 1}, {"batch": 3}, {"batch": 3, "chunk": 64}, {"batch": 2, "accept": 1.5}])
def test_it_is_the_ratio_of_two_replays(tmp_path, wish):
    batching = {name: value for name, value in wish.items() if name != "accept"}
    mt.rebatch(SHIPPED / "tiny-olmoe.h5", tmp_path / "verified.h5", verify=3, **wish)
    mt.rebatch(SHIPPED / "tiny-olmoe.h5", tmp_path / "single.h5", **batching)
    rows: list[int] = []
    found = mt.replay(tmp_path / "verified.h5", progress=rows.append, **HOW)
    plain = mt.replay(tmp_path / "single.h5", **HOW)
    with mt.Trace.open(tmp_path / "verified.h5") as one, mt.Trace.open(tmp_path / "single.h5") as other:
        assert sum(rows) == 2 * one.rows
        for policy, single in zip(found.to_dict()["policies"], plain.to_dict()["policies"], strict=True):
            verified = seconds_by_size(one, found, policy["name"])
            alone = seconds_by_size(other, plain, policy["name"])
            pairs = [(each, fmean(alone[size])) for size in verified.keys() & alone for each in verified[size]]
            wanted = sum(each for each, _ in pairs) / sum(other_s for _, other_s in pairs)
            assert policy["break_even_tokens"] == pytest.approx(wanted, rel=1e-9)
            assert 1 < policy["break_even_tokens"] < 3 and single["break_even_tokens"] is None
    assert found.summary["break_even_tokens"].null_count() == 0


def test_prompts_without_output_have_no_break_even(tmp_path):
    trace = mt.Trace.from_arrays(np.zeros((4, 1, 1), np.uint8), num_experts=4, phase=np.zeros(4, int))
    mt.rebatch(trace, tmp_path / "t.h5", batch=1, verify=2)
    model = mt.load_model("olmoe-1b-7b", overrides={"moe_layers": 1, "dense_layers": 0, "experts": 4, "top_k": 1})
    (policy,) = mt.replay(tmp_path / "t.h5", model=model, policies="monde").to_dict()["policies"]
    assert policy["break_even_tokens"] is None


@pytest.mark.parametrize(
    "said",
    [
        {"batch": 1, "chunk": None},
        {"batch": 1, "chunk": None, "verify": 1},
        {"batch": "1", "chunk": None, "verify": 2},
        {"batch": True, "chunk": None, "verify": 2},
        {"batch": 1, "chunk": -1, "verify": 2},
        {"batch": 1, "chunk": None, "verify": 2**80},
        {"batch": None, "chunk": None, "verify": 2},
        [2],
        None,
    ],
)
def test_parameters_in_a_source_are_checked(said):
    source = {"rebatch": "moetrace", "parameters": said}
    trace = mt.Trace.from_arrays(np.zeros((1, 1, 1), np.uint8), num_experts=4, source=json.loads(json.dumps(source)))
    assert verified_batch(trace) is None
