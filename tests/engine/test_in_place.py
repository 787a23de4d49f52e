"""Experts that run where they lie: whole layers or popular ones on the GPU, the others at home."""

import numpy as np
import pytest
from support.in_ms import moe_ms, policy, replay, rows, steps, system

from moetrace.spec import UsageError, load_policy, load_system

CPU = system(cpu={})


def test_residents_run_on_the_gpu_and_the_others_at_home():
    """Two residents of 1 ms each, beside two at home of 2 ms each; a step of many rows fetches these for 4 ms each."""
    trace = steps(rows(0, 1), rows(0, 1, 2, 3), rows(0, 1, 2), rows(2), rows(2))
    by_count = policy("in-place", "static-popular", scope="global")  # 2 is demanded most, then 0 and 1
    lane = replay(trace, CPU, by_count, slots=2)
    assert moe_ms(lane) == pytest.approx([2, 4, 2, 1, 1])
    assert lane.log.step["hits"].tolist() == [1, 2, 2, 1, 1]
    assert lane.log.step["demand_bytes"].tolist() == [0] * 5
    of_many = policy("in-place", "static-popular", scope="global", gpu_rows=3)
    lane = replay(trace, CPU, of_many, slots=2)
    assert moe_ms(lane) == pytest.approx([2, 9, 5, 1, 1])
    assert lane.log.step["demand_bytes"].tolist() == [0, 2e6, 1e6, 0, 0]
    assert lane.log.step["hits"].tolist() == [1, 2, 2, 1, 1]  # nothing is kept of it


def test_whole_layers_stay_on_the_gpu():
    layers = steps(*[[[[0], [1], [2]], [[3], [1], [0]]]] * 2)
    for end, held in (("last", 2), ("first", 0), (None, 2)):
        for slots, count in ((4, 1), (7, 1), (3, 0), (12, 3)):
            lane = replay(layers, CPU, policy("in-place", "static-layers", gpu_layers_end=end), slots=slots)
            expected = [1 if count == 3 or (count == 1 and layer == held) else 0 for layer in range(3)]
            of_layer = lane.log.layer
            assert (of_layer["hits"] / (of_layer["hits"] + of_layer["misses"])).tolist() == expected
            assert lane.state.cache.resident.sum() == 4 * count <= slots
    lane = replay(layers, CPU, policy("in-place", "static-layers", gpu_layers=0), slots=12)
    assert lane.log.layer["hits"].sum() == 0
    with pytest.raises(UsageError, match="gpu_layers is 4, but the model has 3 MoE layers"):
        replay(layers, CPU, policy("in-place", "static-layers", gpu_layers=4), slots=12)
    with pytest.raises(UsageError, match=r"gpu_layers = 2 are 8 experts, but .* 7 slots: give gpu_layers = 1 "):
        replay(layers, CPU, policy("in-place", "static-layers", gpu_layers=2), slots=7)


def test_fiddler_looks_at_each_expert_by_itself():
    """A row takes 1 ms at home (2 ms at least), and 4 + 1 ms or more on the GPU: from 6 rows on a fetch is sooner."""
    trace = steps(rows(*[0] * 5), rows(*[0] * 6), rows(*[0] * 5, *[1] * 5, *[2] * 5), rows(3))
    lane = replay(trace, CPU, policy("fiddler"))
    assert moe_ms(lane) == pytest.approx([5, 5, 15, 2])
    assert lane.log.layer["gpu_experts"].tolist() == [1]
    kept = replay(trace, CPU, policy("fiddler", "lru"))
    assert moe_ms(kept) == pytest.approx([5, 5, 10, 2])  # what was fetched is a resident, which runs on the GPU


def test_popular_ones_are_there_from_the_start_and_for_good():
    trace = steps(rows(3, 2), rows(3, 1), rows(3, 2), rows(0))
    lane = replay(trace, CPU, policy("gpu", "static-popular", scope="global"), slots=2)
    assert lane.log.step["hits"].tolist() == [2, 1, 2, 0]
    fetched = replay(trace, CPU, policy("gpu", "static-hindsight", scope="global"), slots=2)
    assert fetched.log.step["hits"].tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("name", ["n-cpu-moe", "ktransformers", "fiddler", "hybrid"])
def test_presets_of_runtimes_run_on_units_as_on_a_cpu(name):
    trace = steps(*(rows(0, 1, int(e)) for e in np.arange(6) % 4))
    on_cpu, on_units = (replay(trace, on, load_policy(name)) for on in (CPU, system(ndp={})))
    assert on_cpu.log.step["moe_s"].tolist() == on_units.log.step["moe_s"].tolist()
    with pytest.raises(UsageError, match="needs NDP units or a CPU that runs experts"):
        replay(trace, load_system("rtx4090-offload"), load_policy(name))
