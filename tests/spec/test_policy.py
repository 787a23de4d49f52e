"""Which choices go together, and which parameter belongs to which."""

import itertools

import msgspec
import numpy as np
import pytest

from moetrace.spec import (
    MoetraceError,
    PolicySpec,
    UsageError,
    canonical,
    check_policy,
    cluster_policy,
    load_loads,
    load_policy,
    load_static,
    load_system,
)
from moetrace.spec.choices import USER
from moetrace.spec.choices import legal as legal_choices


def load(**fields):
    return load_policy(PolicySpec(name="mine"), fields)


def legal(dispatch, residency, prefetch):
    """Section 5 of the timing model, word by word."""
    if dispatch == "hot":
        return residency == prefetch == "none"
    return {
        "none": True,
        "prefill": residency == "prefill",
        "foresee": residency == "foresee",
        "online:2": residency in ("ewma", "lfu", "lfu-window", "lfuda"),
        "oracle:1": residency in ("lru", "fifo", "sieve", "lfu", "lfu-window", "lfuda", "ewma", "least-stale"),
    }[prefetch]


def test_every_combination(tmp_path):
    (tmp_path / "static.csv").write_text("0,1\n")
    accepted = 0
    for dispatch, residency, prefetch in itertools.product(
        ("ndp", "gpu", "hot", "balance", "optimal"),
        [name for name in legal_choices("residency") if name != USER],
        ("none", "prefill", "online:2", "foresee", "oracle:1"),
    ):
        fields = {"dispatch": dispatch, "residency": residency, "prefetch": prefetch}
        if residency == "static":
            fields["static"] = str(tmp_path / "static.csv")
        if legal(dispatch, residency, prefetch):
            accepted += 1
            assert load(**fields).residency == residency
        else:
            with pytest.raises(UsageError, match="goes with"):
                load(**fields)
    assert accepted == 4 * (17 + 1 + 4 + 1 + 8) + 1


def test_refusal_lists_legal_choices():
    partners = r"prefetch online:2 goes with residency ewma or lfu or lfuda or lfu-window or file.py:function only"
    with pytest.raises(UsageError, match=partners):
        load(residency="lru", prefetch="online:2")
    with pytest.raises(UsageError, match=r"got residency lru, which goes with prefetch none or oracle:d\."):
        load(residency="lru", prefetch="prefill")
    with pytest.raises(UsageError, match="hot goes with residency none and prefetch none only, got residency lru"):
        load(dispatch="hot", residency="lru")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"placement": "ep-blok"},
            r"placement wants one of ep, ep-block, ep-lpt, eplb, plan, tp, tp:g, striped, mixed "
            r"\(the nearest is 'ep-block'\), got",
        ),
        ({"placement": "tp:0"}, "placement wants tp:g with a whole number g from 1 to 65535, got 'tp:0'"),
        ({"placement": "tp:"}, "placement wants tp:g with a whole number g"),
        ({"placement": "tp:g"}, "placement wants tp:g with a whole number g"),
        ({"placement": "ep:2"}, "placement wants one of ep, "),
        ({"dispatch": "balence"}, r"dispatch wants one of .* \(the nearest is 'balance'\), got 'balence'"),
        ({"dispatch": "file.py:function"}, "there is no such file"),
        ({"residency": "lur"}, r"residency wants one of .*file.py:function \(the nearest is 'lru'\)"),
        ({"residency": "ewma", "prefetch": "online"}, "prefetch wants online:m with a whole number m from 1 to 65535"),
        ({"residency": "ewma", "prefetch": "online:0"}, "prefetch wants online:m"),
        ({"residency": "ewma", "prefetch": "online:-1"}, "prefetch wants online:m"),
        ({"residency": "ewma", "prefetch": "online:65536"}, "prefetch wants online:m with a whole number m from 1"),
        ({"residency": "ewma", "prefetch": "oracle:x"}, "prefetch wants oracle:d with a whole number d from 1 to 4096"),
        ({"residency": "ewma", "prefetch": "oracle:4097"}, "prefetch wants oracle:d with a whole number d from 1 to"),
        ({"prefetch": "prefill:2"}, "prefetch wants one of none, prefill, online:m, foresee, oracle:d"),
        ({"scope": "world"}, "scope wants one of layer, global, request, got 'world'"),
        ({"half_life": 3}, "half_life applies to residency lfu or file.py:function only"),
        ({"residency": "lfu", "half_life": 2**63}, "half_life wants a finite number below 2.63, got 922"),
        ({"residency": "lfu", "half_life": 0}, "half_life wants a whole number.* from 1 to 1000000000, got 0"),
        ({"residency": "lru", "alpha": 0.3}, "alpha applies to residency ewma or file.py:function only"),
        ({"residency": "ewma", "alpha": 0}, "alpha wants a number from 1e-06 to 1, got 0"),
        ({"residency": "ewma", "alpha": 1.1}, "alpha wants a number from 1e-06 to 1, got 1.1"),
        ({"residency": "ewma", "alpha": float("nan")}, "alpha wants a finite number below 2.63, got nan"),
        ({"p": 0.5}, "p applies to prefetch oracle:d only"),
        ({"seed": 1}, "seed applies to prefetch oracle:d only"),
        ({"residency": "lru", "prefetch": "oracle:1", "p": 1.5}, "p wants a number from 0 to 1, got 1.5"),
        (
            {"residency": "lru", "prefetch": "oracle:1", "seed": -1},
            "seed wants a whole number from 0 to .*, got -1",
        ),
        ({"residency": "lru", "prefetch": "oracle:1", "seed": 2**63}, "seed wants a finite number below 2.63, got"),
        ({"loads": "x.csv"}, "loads applies to placement ep-lpt or eplb or policies with remote only"),
        ({"gpu_rows": 32}, "gpu_rows applies to dispatch in-place only"),
        ({"dispatch": "in-place", "gpu_rows": 0}, "gpu_rows wants a whole number from 1 to 1000000000, got 0"),
        ({"gpu_layers": 3}, "gpu_layers applies to residency static-layers only"),
        ({"residency": "static-layers", "gpu_layers": -1}, "gpu_layers wants a whole number from 0 to 65535, got -1"),
        (
            {"residency": "static-layers", "gpu_layers_end": "frist"},
            r"gpu_layers_end wants one of first, last \(the nearest is 'first'\), got 'frist'",
        ),
        ({"placement": "ep-lpt"}, "loads wants the path of a CSV file"),
        ({"placement": "eplb"}, "loads wants the path of a CSV file of loads, which placement eplb needs"),
        ({"placement": "plan"}, "plan wants the path of a plan file"),
        ({"plan": "x.json"}, "plan applies to placement plan only"),
        ({"residency": "arc"}, "residency arc is only in moetrace analyze cache, where accesses come one at a time"),
        ({"residency": "static-prefill"}, "residency static-prefill .* use residency prefill"),
        (
            {"placement": "eplb-hierarchical"},
            "placement eplb-hierarchical is only available in `moetrace analyze balance`; export",
        ),
        ({"static": "x.csv"}, "static applies to residency static only"),
        ({"residency": "static"}, "static wants the path of a CSV file"),
        ({"prefetch_blocks": True}, "prefetch_blocks applies to a prefetch other than none only"),
        ({"prefetch_blocks": 1}, "prefetch_blocks wants true or false, got 1"),
        ({"disptach": "gpu"}, r"disptach is unknown \(the nearest is 'dispatch'\)"),
    ],
)
def test_bad_policy(fields, sentence):
    with pytest.raises(MoetraceError, match=f"policy mine: {sentence}" if "no such" not in sentence else sentence):
        load(**fields)


def test_parameter_in_a_file_must_apply_even_at_its_default(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('name = "mine"\nresidency = "lru"\nalpha = 0.3\n')
    with pytest.raises(UsageError, match="alpha applies to residency ewma or"):
        load_policy(file)


def test_parsed_choices():
    policy = load(placement="tp:2", residency="ewma", prefetch="online:3", alpha=1)
    assert policy.group_size(6) == 2
    assert policy.prefetch_depth == 3
    assert load(placement="tp").group_size(6) == 6
    assert load(placement="ep-block").group_size(6) == 1
    assert load().prefetch_depth == 0
    assert load(residency="lfu", prefetch="oracle:2", p=0, half_life=1, seed=2**63 - 1).prefetch_depth == 2


def test_user_functions(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("")
    file = tmp_path / "mine.toml"
    file.write_text('name = "mine"\ndispatch = "mine.py:split"\nresidency = "mine.py:keep"\nprefetch = "oracle:2"\n')
    policy = load_policy(file)
    assert (policy.dispatch, policy.residency) == (f"{tmp_path}/mine.py:split", f"{tmp_path}/mine.py:keep")
    for prefetch in ("none", "online:2", "oracle:2"):
        assert load_policy(file, {"prefetch": prefetch}).prefetch == prefetch
    assert canonical(policy)["dispatch"] == "mine.py:split"
    with pytest.raises(
        UsageError, match=r"got residency mine.py:keep, which goes with prefetch none or online:m or or"
    ):
        load_policy(file, {"prefetch": "prefill"})
    seen = load_policy(file, {"alpha": 0.5, "half_life": 8})
    assert (seen.alpha, seen.half_life) == (0.5, 8)
    assert not {"alpha", "half_life"} & set(seen.unread)
    with pytest.raises(MoetraceError, match=r"dispatch names .*, and there is no such file"):
        load_policy(file, {"dispatch": f"{'x' * 300}.py:split"})
    with pytest.raises(UsageError, match="dispatch wants the name of a function after"):
        load_policy(file, {"dispatch": f"{tmp_path}/mine.py:not a name"})
    monkeypatch.chdir(tmp_path)
    policy = load_policy("mine.py:split", {"placement": "tp"})
    assert (policy.name, policy.placement, policy.residency) == ("split", "tp", "lru")
    assert policy.dispatch == f"{tmp_path}/mine.py:split"


def test_a_python_file_without_a_function_is_no_toml(tmp_path):
    for source in (str(tmp_path / "mine.py"), tmp_path / "mine.py"):
        with pytest.raises(UsageError, match=r"mine\.py is a Python file: name the function in it.*mine\.py:NAME"):
            load_policy(source)


def test_policy_and_system():
    edge, offload = load_system("edge-ndp"), load_system("rtx4090-offload")
    for size in (1, 2, 3, 6):
        check_policy(load(placement=f"tp:{size}"), edge)
    with pytest.raises(UsageError, match="placement tp:4 wants a group size that divides the 6 NDP units"):
        check_policy(load(placement="tp:4"), edge)
    with pytest.raises(UsageError, match="tp:12 wants a group size that divides"):
        check_policy(load(placement="tp:12"), edge)
    check_policy(load_policy("on-demand"), offload)
    with pytest.raises(UsageError, match=r"dispatch hot needs NDP units or a CPU .* rtx4090-offload has none; only"):
        check_policy(load_policy("monde"), offload)
    own = PolicySpec(name="mine", dispatch="/there/mine.py:split")
    with pytest.raises(UsageError, match=r"dispatch mine.py:split needs NDP units"):
        check_policy(own, offload)
    for policy in (own, load_policy("monde"), load(placement="tp:4")):  # a CPU is home, and places nothing
        check_policy(policy, load_system("rtx4090-ddr5"))


def test_unread_parameters_are_those_of_other_choices():
    own = set(cluster_policy.FIELDS) - {"plan_steps"}
    assert set(load_policy("monde").unread) - own == {"half_life", "alpha", "p", "seed", "loads", "plan", "static"} | {
        "layout",
        "budget",
        "prefetch_blocks",
        "gpu_rows",
        "gpu_layers",
        "gpu_layers_end",
        "most_count",
        "evicted_share",
        "margin",
        "ahead_layers",
        "follows",
        "now_weight",
        "long_weight",
        "deadline_ms",
        "with_cpu",
        "host_residency",
        "remote",
        "plan_steps",
        "replicas",
    }
    assert "alpha" not in load(residency="ewma").unread


def test_loads(tmp_path):
    (tmp_path / "loads.csv").write_text("1,2\n3,4.5\n")
    policy = load(placement="ep-lpt", loads=str(tmp_path / "loads.csv"))
    assert load_loads(policy.loads, 2, 2).tolist() == [[1, 2], [3, 4.5]]
    assert canonical(policy)["loads"] == "loads.csv"


def test_static(tmp_path):
    file = tmp_path / "static.csv"
    file.write_text("layer,expert\n0,1\n# a comment\n1, 0\n")
    pairs = load_static(file, 2, 2)
    assert pairs.dtype == np.int64 and pairs.tolist() == [[0, 1], [1, 0]]
    file.write_text("")
    assert load_static(file, 2, 2).shape == (0, 2)
    for text, sentence in {
        "0,1\n0,2\n": "line 2: wants a layer below 2 and an expert below 2, got 0,2",
        "-1,1\n": "line 1: wants a layer below 2",
        "0,1\n0,1\n": "line 2: expert 1 of layer 0 is there twice",
        "0\n": "line 1: wants a layer and an expert",
        "0,1,1\n": "line 1: wants a layer and an expert",
        "0,1\nlayer,expert\n": "line 2: wants a layer and an expert",
    }.items():
        file.write_text(text)
        with pytest.raises(MoetraceError, match=sentence):
            load_static(file, 2, 2)


def test_specs_are_frozen():
    with pytest.raises(AttributeError):
        load_policy("monde").dispatch = "gpu"
    assert msgspec.to_builtins(load_policy("monde"))["name"] == "monde"
