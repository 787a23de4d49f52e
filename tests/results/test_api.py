"""The Python API: what `import moetrace` offers, and what it does not load."""

import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

import moetrace as mt
from moetrace.spec.errors import MoetraceError
from moetrace.trace.writer import CountsWriter


def test_every_public_name_is_there():
    for name in mt.__all__:
        assert getattr(mt, name) is not None, name
    assert set(mt.__all__) <= set(dir(mt))
    with pytest.raises(AttributeError, match="no attribute 'replya'"):
        mt.replya  # noqa: B018


@pytest.mark.parametrize(("command", "light"), [([], []), (["replay"], ["numpy", "msgspec"])])
def test_import_and_help_load_nothing_heavy(command, light):
    """The help of a replay reads the records of choices, which stand beside their hooks."""
    heavy = {"numpy", "numba", "polars", "h5py", "rich", "msgspec"} - set(light)
    code = f"""
import sys, moetrace, moetrace.cli
try:
    moetrace.cli.main([*{command}, "--help"])
except SystemExit:
    pass
assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def trace(**more):
    rng = np.random.default_rng(0)
    experts = rng.permuted(np.tile(np.arange(32, dtype=np.uint8), (40, 6, 1)), axis=2)[:, :, :4]
    return mt.Trace.from_arrays(np.ascontiguousarray(experts), num_experts=32, **{"model": "tiny-olmoe"} | more)


def test_specs_may_be_instances_names_and_files(tmp_path):
    (tmp_path / "own.toml").write_text('name = "own"\nplacement = "tp"\ndispatch = "ndp"\n')
    spec = mt.load_policy("monde", {"name": "hot", "placement": "tp:2"})
    result = mt.replay(
        trace(model="unheard of"),
        model=mt.load_model("tiny-olmoe"),
        system=mt.load_system("edge-ndp", {"ndp.units": 4}),
        policies=[spec, tmp_path / "own.toml", "ndp-ep"],
        overrides={"system.gpu.launch_us": 1.0, "policy.hot.placement": "tp:4"},
    )
    assert result.summary["name"].to_list() == ["hot", "own", "ndp-ep"]
    assert result.to_dict()["policies"][0]["choices"]["placement"] == "tp:4"
    assert (result.run.system.units, result.run.system.gpu.launch_us) == (4, 1.0)
    assert result.warnings == ()


def test_a_path_will_do_for_a_trace(tmp_path):
    tiny = trace()
    tiny.write(tmp_path / "t.h5")
    for question in (mt.lint, mt.locality, mt.balance, partial(mt.cache_hits, capacities=[16])):
        for path in (tmp_path / "t.h5", str(tmp_path / "t.h5")):
            assert str(question(path)) == str(question(mt.Trace.open(path))), question
        with pytest.raises(mt.UsageError, match="A trace is a Trace or the path of its file, got int"):
            question(3)
        with pytest.raises(mt.MoetraceError, match=r"there is no file no\.h5"):
            question(trace="no.h5")
    with pytest.raises(mt.MoetraceError, match="has 40 rows to fit"):
        mt.fit_profile(str(tmp_path / "t.h5"))


def test_a_refused_number_is_named_as_both_python_and_the_command_line_know_it():
    with pytest.raises(mt.UsageError, match=r"^requests is 0: give a whole number from 1"):
        mt.generate_trace("mixtral-8x7b", requests=0, prompt=1, output=1)


def test_progress_counts_every_row():
    told = []
    mt.replay(trace(), policies="ndp-ep", progress=told.append)
    assert sum(told) == 40


def test_warnings_say_that_the_trace_has_another_top_k():
    result = mt.replay(trace(), policies="ndp-ep", overrides={"model.top_k": 5})
    (warning,) = result.warnings
    assert "4 experts" in warning


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"overrides": {"ndp.units": 4}}, "model.FIELD, system.FIELD or policy.FIELD, got 'ndp.units'"),
        ({"policies": []}, "at least one policy"),
        ({"jobs": 0}, "jobs is 0"),
        ({"policies": [None]}, "A policy is the name of a preset, .* got NoneType"),
        ({"policies": {"monde"}}, "got set"),
        ({"policies": [3]}, "got int"),
        ({"policies": [len]}, "got builtin_function_or_method"),
        ({"policies": partial(print)}, "got partial"),
        ({"system": None}, "A system is the name of a preset, .* got NoneType"),
        ({"system": {}}, "got dict"),
        ({"model": {}}, "A model is the name of a preset, .* got dict"),
        ({"slots": "48 GBit"}, "slots wants a number of experts of at least 0, a share .*, got '48 GBit'"),
        ({"slots": 48.0}, "slots is 48.0, but must be a whole number"),
        ({"jobs": 1.5}, "jobs is 1.5, but must be a whole number"),
        ({"overrides": ["system.ndp.units"]}, "overrides is a mapping of paths to values, got list"),
        ({"overrides": {3: 4}}, "policy.FIELD, got 3"),
        ({"overrides": {"system..x": 4}}, "policy.FIELD, got 'system..x'"),
        ({"policies": "monde", "overrides": {"policy.ndp-ep.scope": "global"}}, "nearest is 'monde'"),
    ],
)
def test_senseless_arguments(options, words):
    with pytest.raises(mt.UsageError, match=words):
        mt.replay(trace(), **options)


@pytest.mark.parametrize("source", [None, 3, {}])
def test_senseless_trace(source):
    with pytest.raises(mt.UsageError, match="A trace is a Trace or the path of its file, got"):
        mt.replay(source)


def test_counts_are_refused_as_counts_for_each_model(tmp_path):
    facts = {"model": "unknown", "num_experts": 4, "top_k": 2, "layers": 1, "rows": 1, "steps": 1, "source": {}}
    with CountsWriter(tmp_path / "counts.h5", **facts) as writer:
        writer.append_counts(np.ones((1, 1, 4), int), np.array([1]), np.array([2], np.uint8))
    with pytest.raises(MoetraceError, match="holds only counts of ids"):
        mt.replay(tmp_path / "counts.h5")


def test_whole_numbers_may_be_numpys(tmp_path):
    result = mt.replay(
        trace(),
        policies="on-demand",
        slots=np.int64(48),
        jobs=np.int32(1),
        overrides={"system.ndp.units": np.int64(3), "system.gpu.launch_us": np.float32(2)},
    )
    result.write(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert (summary["slots"], summary["system"]["ndp"]["units"]) == (48, 3)


def test_warnings_say_that_the_dense_weights_do_not_fit():
    result = mt.replay(trace(), policies="ndp-ep", overrides={"model.once_params": 10**11})
    (warning,) = result.warnings
    assert warning.startswith("the dense weights of tiny-olmoe (200.")
    assert "do not fit the GPU of edge-ndp (14.0 GB left); they are priced as if they did." in warning


def test_third_policy_of_a_name_gets_the_next_free_number():
    named = [mt.load_policy("ndp-ep", {"name": name}) for name in ("a", "a", "a-2", "a")]
    assert mt.replay(trace(), policies=named).summary["name"].to_list() == ["a", "a-3", "a-2", "a-4"]


def test_a_function_by_the_decorator_is_a_policy(tmp_path, monkeypatch):
    (tmp_path / "own_policies.py").write_text(
        "import moetrace as mt\n\n@mt.policy\ndef on_units(state, view, layer, load, plan):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    on_units = __import__("own_policies").on_units
    own, preset = mt.replay(trace(), policies=[on_units, "ndp-ep"]).to_dict()["policies"]
    assert (own["name"], own["total_s"]) == ("on_units", preset["total_s"])


def first(most: int):
    @mt.policy
    def first_few(state, view, layer, load, plan):
        for i in range(min(most, load.size)):
            plan[i] = 1

    return first_few


def test_functions_that_no_file_holds_are_policies_too():
    """As in a notebook; two of one name stay two."""
    none, every, preset = mt.replay(trace(), policies=[first(0), first(999), "on-demand"]).to_dict()["policies"]
    assert [none["name"], every["name"]] == ["first_few", "first_few-2"]
    assert every["total_s"] == preset["total_s"]
    assert none["demand_bytes"] == 0 < every["demand_bytes"]


def test_summary_stays_json_for_any_source():
    result = mt.replay(trace(source={"loss": [float("nan"), 1.5], "by": {"max": float("inf")}}), policies="ndp-ep")
    assert result.to_dict()["trace"]["source"] == {"loss": [None, 1.5], "by": {"max": None}}
