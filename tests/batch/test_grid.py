"""The grid: which lists are axes, which points they span, and what makes no sense."""

import itertools
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrace.batch.grid import load_grid
from moetrace.spec import MoetraceError, UsageError

FIELDS = ["model.top_k", "system.ndp.units", "system.link.latency_us", "policy.alpha", "policy.monde.scope"]


def names(grid) -> list[str]:
    return [point.name for point in grid.points]


def test_lists_are_axes_and_the_first_changes_slowest(tmp_path):
    (tmp_path / "s.toml").write_text(
        'trace = "deep/a.h5"\npolicy = ["monde", "own/mine.py:fast"]\nslots = [8, 16]\n'
        "[set]\nsystem.gpu.launch_us = 2.5\npolicy.alpha = [0.5]\n"
    )
    grid = load_grid(tmp_path / "s.toml")
    assert names(grid) == [
        f"a/edge-ndp/{policy}/slots={slots}/policy.alpha=0.5" for policy in ("monde", "fast") for slots in (8, 16)
    ]
    assert grid.axes == {"policy": ["monde", "fast"], "slots": [8, 16], "policy.alpha": [0.5]}
    last = grid.points[-1]
    assert last.values == {
        "trace": f"{tmp_path}/deep/a.h5",
        "system": "edge-ndp",
        "policy": f"{tmp_path}/own/mine.py:fast",
        "slots": 16,
        "system.gpu.launch_us": 2.5,
        "policy.alpha": 0.5,
    }


def test_zipped_axes_go_together(tmp_path):
    grid = load_grid(
        {
            "slots": [1, 2],
            "zip": [
                {"trace": ["a.h5", "b.h5"], "model": ["x.toml", "y.toml"]},
                {"set": {"system": {"link": {"bandwidth_gb_s": [25, 50], "latency_us": [5, 3]}}}},
            ],
            "policy": "monde",
        }
    )
    assert len(grid.points) == 8
    assert names(grid)[:3] == [
        "a/x/edge-ndp/monde/slots=1/system.link.bandwidth_gb_s=25/system.link.latency_us=5",
        "a/x/edge-ndp/monde/slots=1/system.link.bandwidth_gb_s=50/system.link.latency_us=3",
        "a/x/edge-ndp/monde/slots=2/system.link.bandwidth_gb_s=25/system.link.latency_us=5",
    ]
    assert {(p.labels["trace"], p.labels["model"]) for p in grid.points} == {("a", "x"), ("b", "y")}


def test_excluded_cells_are_left_out():
    grid = {"trace": ["x/a.h5", "b.h5"], "slots": [1, 2], "set": {"system.ndp.units": [4, 6]}, "policy": "monde"}
    left = load_grid(grid | {"exclude": [{"trace": "a", "slots": 2}, {"set": {"system": {"ndp": {"units": [4, 5]}}}}]})
    assert names(left) == [
        "a/edge-ndp/monde/slots=1/system.ndp.units=6",
        "b/edge-ndp/monde/slots=1/system.ndp.units=6",
        "b/edge-ndp/monde/slots=2/system.ndp.units=6",
    ]
    assert names(load_grid(grid | {"exclude": [{"trace": "x/a.h5"}, {"trace": "nothing"}]}))[0].startswith("b/")


def test_python_may_say_it_in_its_own_words():
    plain = load_grid({"trace": ["t.h5"], "slots": [0, 2, 4], "set": {"system.gpu.launch_us": [0.5, 1.0]}})
    own = load_grid(
        {"trace": (Path("t.h5"),), "slots": range(0, 6, 2), "set": {"system.gpu.launch_us": np.array([0.5, 1.0])}}
    )
    assert own == plain


def test_policies_by_default_suit_the_systems(tmp_path):
    text = (resources.files("moetrace.spec") / "presets/systems/rtx4090-ddr5.toml").read_text(encoding="utf-8")
    (tmp_path / "pc.toml").write_text(text, encoding="utf-8")
    (tmp_path / "sweep.toml").write_text('trace = "t.h5"\nsystem = ["pc.toml", "rtx3090-ddr4"]\n', encoding="utf-8")
    offload = {"system": ["rtx4090-offload"] * 2, "slots": [1, 2]}
    for sweep, policies in (
        ({"trace": "t.h5"}, ["monde", "edge-ndp"]),
        ({"trace": "t.h5", "system": ["edge-ndp", "monde-cxl"]}, ["monde", "edge-ndp"]),
        (
            {"trace": "t.h5", "zip": [offload]},
            ["resident", "on-demand-lfu"],
        ),
        ({"trace": "t.h5", "system": "there-is-none"}, ["monde", "edge-ndp"]),
        (tmp_path / "sweep.toml", ["n-cpu-moe", "hybrid"]),
    ):
        assert list(dict.fromkeys(point.labels["policy"] for point in load_grid(sweep).points)) == policies
    with pytest.raises(UsageError, match="policy is missing, and its systems have no defaults in common"):
        load_grid({"trace": "t.h5", "system": ["edge-ndp", "rtx4090-ddr5"]})


def test_files_of_one_name_get_distinct_labels():
    grid = load_grid({"trace": ["one/a.h5", "two/a.h5", "b.h5"], "policy": "monde"})
    assert [point.labels["trace"] for point in grid.points] == ["one-a.h5", "two-a.h5", "b"]


def test_files_of_fields_are_found_beside_the_sweep(tmp_path):
    (tmp_path / "s.toml").write_text('trace = "a.h5"\n[set]\npolicy.static = ["hot/x.csv", "y.csv"]\n')
    grid = load_grid(tmp_path / "s.toml")
    assert grid.axes["policy.static"] == ["x", "y"]
    assert grid.points[0].values["policy.static"] == str(tmp_path / "hot/x.csv")


@settings(deadline=None)
@given(st.data())
def test_a_grid_is_the_product_of_its_axes(data):
    fields = data.draw(st.lists(st.sampled_from(FIELDS), unique=True))
    axes = {field: data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True)) for field in fields}
    grid = load_grid({"trace": "t.h5", "policy": "monde", "set": axes})
    want = list(itertools.product(*axes.values()))
    assert [tuple(point.values[field] for field in fields) for point in grid.points] == want
    assert len(set(names(grid))) == len(want)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "trace is missing"),
        ({"trace": []}, "trace is an empty list, so there is no cell"),
        ({"trace": "t.h5", "polices": ["monde"]}, "polices is unknown .the nearest is 'policy'."),
        ({"trace": "t.h5", "slots": [1, 1]}, "names t/edge-ndp/monde/slots=1 more than once"),
        ({"trace": "t.h5", "slots": "many"}, "slots wants"),
        ({"trace": "t.h5", "slots": [-1]}, "slots wants a number of experts of at least 0, .* got -1"),
        ({"trace": 3}, "trace wants"),
        ({"trace": object()}, "trace wants"),
        ({"trace": ["t.h5", ""]}, "a text of 1 to"),
        ({"trace": "t.h5", "pareto": "cost"}, "pareto wants one of gpu_memory_bytes, link_bytes, price"),
        ({"trace": "t.h5", "set": {"system.ndp.unit": [1]}}, "system.ndp.unit is no field of a system .*'ndp.units'"),
        ({"trace": "t.h5", "set": {"sistem": {"ndp": 1}}}, "got 'sistem.ndp' .the nearest is 'system'"),
        ({"trace": "t.h5", "set": {"policy": {"half_live": 1}}}, "the nearest is 'half_life'"),
        ({"trace": "t.h5", "set": {"system.name": "a", "system": {"name": "b"}}}, "system.name is given twice"),
        ({"trace": "t.h5", "set": {"system.name": []}}, "system.name is an empty list"),
        ({"trace": "t.h5", "zip": [{"slots": [1, 2], "policy": ["monde"]}]}, "zip 1: slots has 2 values and policy 1"),
        ({"trace": "t.h5", "zip": [{"slots": [1, 2]}]}, "zip 1 wants two axes or more"),
        ({"trace": "t.h5", "exclude": [{"policy": ["monde", "edge-ndp"]}]}, "exclude leaves no cell"),
        ({"trace": "t.h5", "exclude": [{"slots": 3}]}, "exclude 1: slots is nothing that this sweep gives"),
        ({"trace": "t.h5", "exclude": [{"polic": "x"}]}, "exclude 1: polic is unknown .the nearest is 'policy'"),
        ({"trace": "t.h5", "zip": [{"slots": 1, "policy": ["monde"]}]}, "zip 1: slots wants a list"),
        ({"trace": "t.h5", "zip": [{"slot": [1], "policy": ["monde"]}]}, "slot is unknown .the nearest is 'slots'"),
        ({"slots": [1], "trace": "t.h5", "zip": [{"slots": [1], "policy": ["monde"]}]}, "slots is given twice"),
        ({"trace": "t.h5", "slots": list(range(400)), "set": {"system.ndp.units": list(range(400))}}, "320,000 cells"),
    ],
)
def test_an_impossible_grid_is_refused_in_one_sentence(given, words):
    with pytest.raises(UsageError, match=words) as error:
        load_grid(given)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_sweep(tmp_path):
    path = tmp_path / "s.toml"
    for text, words in (("trace =", "not TOML"), ("[[zip]]\nset = 3\n", "set wants a table")):
        path.write_text(text)
        with pytest.raises(MoetraceError, match=words):
            load_grid(path)
    with pytest.raises(MoetraceError, match="Cannot read"):
        load_grid(tmp_path / "none.toml")


def test_a_number_is_refused_as_a_grid():
    with pytest.raises(UsageError, match="path of a TOML file or a mapping, got int"):
        load_grid(5)  # pyright: ignore


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({"batch": 0}, "batch wants whole numbers from 1, got 0"),
        ({"batch": [1, "two"]}, "batch"),
        ({"batch": True}, "batch"),
        ({"slo": "total_s"}, "An SLO is"),
        ({"slo": ["total_s<=1s", "late>=1"]}, "less is better"),
    ],
)
def test_batches_and_limits_are_checked(grid, words):
    with pytest.raises(UsageError) as error:
        load_grid({"trace": "t.h5", "policy": "monde"} | grid)
    assert words in str(error.value) and "the sweep" in str(error.value)
