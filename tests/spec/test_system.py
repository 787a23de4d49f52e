"""Slots of the GPU, and what fits where."""

import msgspec
import numpy as np
import pytest

from moetrace.spec import UsageError, check_fits, gpu_slots, load_model, load_system
from moetrace.spec.budget import slots_of
from moetrace.spec.fits import dense_misfit


def test_slots_follow_the_timing_model():
    model, system = load_model("qwen3-30b-a3b"), load_system("edge-ndp")
    dense = 48 * 19_136_512 * 2 + 311_164_928 * 2
    assert gpu_slots(model, system, model.expert_bytes()) == int((14e9 - dense) // (3 * 2048 * 768 * 2))


def test_slots_are_counted_in_the_largest_expert():
    model, system = load_model("qwen3-30b-a3b"), load_system("edge-ndp")
    weights = np.full((48, 128), 1e7)
    weights[7, 9] = 1e9
    assert gpu_slots(model, system, weights) == 11


def test_slots_are_never_negative_nor_more_than_the_experts():
    model = load_model("qwen2-57b-a14b")
    assert gpu_slots(model, load_system("edge-ndp"), model.expert_bytes()) == 0
    everything = load_system("edge-ndp", {"gpu.memory_gb": 1000})
    assert gpu_slots(model, everything, model.expert_bytes()) == 28 * 64
    no_room = load_system("edge-ndp", {"gpu.reserve_gb": 16})
    assert gpu_slots(load_model("olmoe-1b-7b"), no_room, np.ones((16, 64))) == 0


def test_room_for_all_experts_holds_all_for_any_largest_size():
    model, system = load_model("qwen3-30b-a3b"), load_system("edge-ndp")
    weights = np.full((48, 128), 1e6)
    weights[7, 9] = 1e9
    assert gpu_slots(model, system, weights) == 48 * 128 == slots_of("14GB", weights)


def test_dense_weights_that_do_not_fit_are_named():
    model = load_model("qwen2-57b-a14b")
    assert dense_misfit(model, load_system("edge-ndp", {"gpu.memory_gb": 1000})) is None
    need = (28 * model.dense_bytes + model.head_bytes) / 1e9
    assert dense_misfit(model, load_system("edge-ndp", {"gpu.memory_gb": 12})) == (
        f"the dense weights of qwen2-57b-a14b ({need:.1f} GB) do not fit the GPU of edge-ndp (10.0 GB left); "
        "they are priced as if they did."
    )


def test_experts_that_do_not_fit_the_units_are_refused():
    model, system = load_model("mixtral-8x7b"), load_system("edge-ndp", {"ndp.units": 2})
    with pytest.raises(
        UsageError, match=r"90\.2 GB .* 2 NDP units of 32 GB .*ndp\.units=3, or, in a replay, pass --ign"
    ):
        check_fits(model, system, model.expert_bytes())
    check_fits(model, system, model.expert_bytes(), ignore_capacity=True)
    check_fits(model, system, model.expert_bytes() / 2)


def test_host_memory_holds_anything():
    model = load_model("deepseek-v3")
    check_fits(model, load_system("rtx4090-offload"), model.expert_bytes())


@pytest.mark.parametrize(
    ("memory_gb", "advice"),
    [
        (32, "model.weight_bits=8.5 and model.dense_weight_bits=8.5 if it is quantized, set system"),
        (24, "dense_weight_bits=6.5 if"),
        (8, "GPU too; set system"),
    ],
)
def test_a_refusal_of_a_pc_with_too_little_memory_says_how_many_bits_fit(memory_gb, advice):
    model, system = load_model("qwen3-30b-a3b"), load_system("rtx3060-ddr4", {"host.memory_gb": memory_gb})
    with pytest.raises(
        UsageError, match=r"which has all of them, those on the GPU too; .*memory_gb=58, add a \[disk"
    ) as caught:
        check_fits(model, system, model.expert_bytes())
    assert advice in str(caught.value)
    if "bits=" in advice:
        bits = float(advice.split("bits=")[1].split(" ")[0])
        fits = load_model("qwen3-30b-a3b", {"weight_bits": bits})
        check_fits(fits, system, fits.expert_bytes())
    with pytest.raises(UsageError) as caught:  # sizes of a trace, which no bits of the model change
        check_fits(model, system, model.expert_bytes() * 1.1)
    assert "bits" not in str(caught.value)


def test_a_pc_without_a_link_is_refused_and_fits_with_one():
    model = load_model("mixtral-8x7b")
    pc = msgspec.structs.replace(load_system("rtx3060-ddr4"), link=None, host=None)
    with pytest.raises(
        UsageError, match=r"; .*add a \[link\] .* host memory, where its \[cpu\] runs them, or, in a replay, pass"
    ):
        check_fits(model, pc, model.expert_bytes())
    with_link = load_system(pc, {"link.bandwidth_gb_s": 25, "link.latency_us": 5})
    check_fits(model, with_link, model.expert_bytes())
    assert pc.home is None
    assert with_link.home is not None


def test_without_a_link_the_gpu_holds_all_or_the_model_is_refused():
    jetson = load_system("jetson-orin")
    small, large = load_model("olmoe-1b-7b"), load_model("mixtral-8x7b")
    check_fits(small, jetson, small.expert_bytes())
    assert gpu_slots(small, jetson, small.expert_bytes()) == 16 * 64
    with pytest.raises(UsageError, match=r"do not fit the 53\.1 GB that the GPU .* a \[cpu\] .* --ignore-capacity"):
        check_fits(large, jetson, large.expert_bytes())
    check_fits(large, jetson, large.expert_bytes(), ignore_capacity=True)
    # The largest expert times L*E would not fit here, but the experts do: all of them are resident.
    uneven = np.full((16, 64), 1e6)
    uneven[0, 0] = 1e9
    check_fits(small, jetson, uneven)
    assert gpu_slots(small, jetson, uneven) == 16 * 64


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        (
            "rtx4090-ddr5",
            {"host.channels_gb_s": 9},
            "host.channels_gb_s needs experts that are spread over NDP units: add [ndp] or remove host.channels_gb_s.",
        ),
        (
            "edge-ndp",
            {"ndp.contention": True},
            "ndp.contention needs reads of units' memory that take time: add "
            "ndp.outside_gb_s or host.channels_gb_s or remove ndp.contention.",
        ),
        (
            "edge-ndp",
            {"link.host_read": True},
            "link.host_read needs experts in host memory, and with [ndp] they live "
            "in the units: remove link.host_read.",
        ),
        (
            "rtx4090-offload",
            {"link.host_read": True},
            "link.host_read needs the bandwidth of the CPU's memory: add [cpu] or remove link.host_read.",
        ),
        (
            "edge-ndp",
            {"link.mtu_bytes": 90},
            "link.mtu_bytes needs packets that are lost: add link.loss or remove link.mtu_bytes.",
        ),
        (
            "edge-ndp",
            {"link.rto_ms": 0},
            "link.rto_ms needs packets that are lost: add link.loss or remove link.rto_ms.",
        ),
        (
            "edge-ndp",
            {"link.loss_mode": "reliable"},
            "link.loss_mode needs packets that are lost: add link.loss or remove link.loss_mode.",
        ),
        ("edge-ndp", {"link.seed": 0}, "link.seed needs packets that are lost: add link.loss or remove link.seed."),
    ],
)
def test_a_field_that_nothing_reads_is_refused(name, changed, said):
    with pytest.raises(UsageError) as error:
        load_system(name, changed)
    assert str(error.value) == f"system {name}: {said}"


def test_chunks_of_a_cpu_need_a_link():
    on = load_system("rtx4090-ddr5", {"cpu.chunks": 2})
    with pytest.raises(UsageError) as error:
        load_system(msgspec.structs.replace(on, link=None))
    assert str(error.value) == (
        f"system {on.name}: cpu.chunks needs a link to the GPU: add [link] or remove cpu.chunks."
    )


def test_a_field_that_something_reads_is_taken():
    assert load_system("edge-ndp", {"ndp.contention": True, "ndp.outside_gb_s": 9}).ndp.contention
    assert load_system("edge-ndp", {"ndp.contention": True, "host.channels_gb_s": 9}).ndp.contention
    assert load_system("rtx4090-ddr5", {"link.host_read": True}).link.host_read
    off = load_system("edge-ndp", {"ndp.contention": False, "link.host_read": False})  # a switch that is off
    assert off.ndp.contention is off.link.host_read is False
