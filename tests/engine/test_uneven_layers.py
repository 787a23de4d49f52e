"""Models whose layers have different numbers of experts, and whose experts work in a latent vector."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from engine.test_against_oracle import compare, small_case
from support.strategies import all_policies, as_arrays, routing

from moetrace.cli.tables.replay_table import print_comparison
from moetrace.engine.run import run_setups
from moetrace.engine.setup import Setup
from moetrace.generators import generate_trace
from moetrace.results.frames import total_s
from moetrace.results.replay import replay
from moetrace.spec import MoetraceError, PolicySpec, UsageError, gpu_slots, load_model, load_policy, load_system
from moetrace.trace.format import Trace

EXPERTS = [6, 4, 5]


def uneven_case(seed: int, **changes):
    """A case whose layers have 6, 4 and 5 experts, and whose trace chooses none that is not there."""
    rng = np.random.default_rng(seed)
    case = small_case(rng)
    rows = len(case.trace.experts)
    ids = np.concatenate([routing(rng, rows, (1, experts, 2), 0.05) for experts in EXPERTS], axis=1)
    model = msgspec.structs.replace(case.model, experts=EXPERTS, top_k=[2, 1, 2], moe_hidden=256, **changes)
    return replace(case, trace=replace(case.trace, experts=ids, expert_bytes=None), model=model)


@pytest.mark.parametrize("seed", range(3))
def test_against_the_oracle(seed):
    case = uneven_case(seed)
    policies = all_policies(case.system.units)
    picked = np.random.default_rng(seed).permutation(len(policies))[:12]
    compare(case, [policies[index] for index in picked])


def test_ids_of_a_layer_are_its_own():
    case = uneven_case(0)
    arrays = as_arrays(case.trace, 6)
    trace = Trace.from_arrays(num_experts=6, **arrays)
    fewer = msgspec.structs.replace(case.model, experts=[6, 3, 5])
    common = {"system": case.system, "policies": [load_policy("monde")], "slots": 3}
    setups = [Setup(model=model, **common) for model in (case.model, fewer)]
    good, bad = run_setups(trace, setups)
    assert not isinstance(good, MoetraceError)
    assert "The trace chooses expert 3 in MoE layer 1, but that layer of small has 3 experts" in str(bad)


@pytest.mark.parametrize(
    ("end", "slots", "layers"), [("last", 9, 2), ("last", 8, 1), ("first", 10, 2), ("first", 15, 3)]
)
def test_whole_layers_are_as_many_as_their_own_experts_fit(end, slots, layers):
    case = uneven_case(1)
    fitting = PolicySpec(
        name="fitting", dispatch="gpu", residency="static-layers", prefetch="none", scope="global", gpu_layers_end=end
    )
    said = msgspec.structs.replace(fitting, name="said", gpu_layers=layers)
    trace = Trace.from_arrays(num_experts=6, **as_arrays(case.trace, 6))
    (run,) = run_setups(trace, [Setup(model=case.model, system=case.system, policies=[fitting, said], slots=slots)])
    one, other = run.lanes
    assert total_s(one) == total_s(other)
    assert one.state.cache.residents.sum() == other.state.cache.residents.sum() > slots - 6
    more = msgspec.structs.replace(fitting, gpu_layers=layers + 1)
    (error,) = run_setups(trace, [Setup(model=case.model, system=case.system, policies=[more], slots=slots)])
    assert isinstance(error, UsageError) and f"gpu_layers is {layers + 1}" in str(error).replace(" = ", " is ")


def test_slots_and_sizes():
    model = uneven_case(0).model
    assert model.all_experts == 15 and model.expert_params == 256 * 1024
    assert model.activation_row_bytes == 512 and model.flop_per_row == 2 * 256 * 1024
    big = load_system("rtx4090-offload")
    assert gpu_slots(model, big, model.expert_bytes()) == 15
    without = load_system("jetson-orin")
    assert gpu_slots(model, without, model.expert_bytes()) == 15


def test_no_link_and_policies_of_a_user():
    case = uneven_case(1)
    trace = Trace.from_arrays(num_experts=6, **as_arrays(case.trace, 6))
    policy = PolicySpec(name="p", placement="ep", dispatch="gpu", residency="lru", prefetch="none", scope="global")
    (run,) = run_setups(trace, [Setup(model=case.model, system=load_system("jetson-orin"), policies=[policy])])
    assert not isinstance(run, MoetraceError) and run.slots == 15
    assert run.lanes[0].log.layer["misses"].sum() == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"experts": [8, 8]}, "experts wants one number for each of the 32 MoE layers, got 2 numbers"),
        ({"top_k": [2] * 31}, "top_k wants one number for each of the 32 MoE layers, got 31 numbers"),
        ({"experts": [8] * 31 + [1]}, "top_k wants at most the 1 experts that MoE layer 31 has, got 2"),
        ({"experts": [8] * 31 + [0]}, "experts"),
        ({"moe_hidden": 0}, "moe_hidden wants a whole number from 1 to 1000000"),
        ({"moe_hidden": "x"}, "moe_hidden wants a whole number"),
        ({"top_k": []}, "top_k wants one number for each"),
    ],
)
def test_bad_lists(change, says):
    with pytest.raises(UsageError, match=says):
        load_model("mixtral-8x7b", change)


def test_the_table_and_a_generator_know_them(capsys):
    case = uneven_case(0)
    trace = Trace.from_arrays(num_experts=6, **as_arrays(case.trace, 6))
    result = replay(trace, model=case.model, system=case.system, policies="monde")
    print_comparison(result.to_dict(), "t.h5")
    assert "of 15 experts" in capsys.readouterr().out
    with pytest.raises(UsageError, match="Zipf's law draws equally many experts in every layer"):
        generate_trace(case.model, requests=1, prompt=1, output=1)
