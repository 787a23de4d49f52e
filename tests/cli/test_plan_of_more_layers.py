"""A plan with a row for each layer of a model, and a trace that numbers its MoE layers only."""

import json

import numpy as np
import pytest

import moetrace as mt

GOOD, PLAIN = [0, 2, 1, 3], [0, 1, 2, 3]


@pytest.fixture
def trace(tmp_path):
    """Experts 0 and 1 are chosen by every row: on one unit with the plain plan, on both with the good one."""
    ids = np.tile(np.array([0, 1], np.uint8), (200, 2, 1))
    mt.Trace.from_arrays(ids, num_experts=4, steps=[10] * 20).write(tmp_path / "t.h5")
    return tmp_path / "t.h5"


def plan(folder):
    rows = [PLAIN] * 3 + [GOOD] * 2
    (folder / "plan.json").write_text(json.dumps({"physical_to_logical_map": rows}))
    return folder / "plan.json"


def test_balance_refuses_or_judges_the_right_rows(tmp_path, trace, run):
    path = plan(tmp_path)
    asked = ("--units", 2, "--placement", "ep-block", "--plan", path, "--format", "json")
    code, out, err = run("analyze", "balance", trace, *asked)
    assert (code, out) == (1, "")
    assert "nothing says which of them these are" in err
    assert len(err.splitlines()) == 1
    moved = tmp_path / "moved.h5"
    assert run("select", trace, "-o", moved, "--first-layer", 3)[0] == 0
    with mt.Trace.open(moved) as shifted:
        assert shifted.layer_index.tolist() == [3, 4]
        assert shifted.source["selected"][-1]["first_layer"] == 3
    code, out, _ = run("analyze", "balance", moved, *asked)
    assert code == 0
    assert [row["imbalance"] for row in json.loads(out)["summary"]] == [2.0, 1.0], "ep-block, and the plan"


def test_replay_refuses_it_too(tmp_path, trace, run):
    plan(tmp_path)
    (tmp_path / "p.toml").write_text('name = "p"\ndispatch = "ndp"\nplacement = "plan"\nplan = "plan.json"\n')
    fields = [f"--set=model.{name}" for name in ("moe_layers=2", "experts=4", "top_k=2")]
    asked = ("replay", trace, "--model", "mixtral-8x7b", "--system", "edge-ndp", *fields, "--set", "system.ndp.units=2")
    code, _, err = run(*asked, "--policy", tmp_path / "p.toml")
    assert code != 0
    assert "plan.json has 5 layers (0 to 4), but the trace has 2 (0 to 1), and mixtral-8x7b has MoE layers" in err
