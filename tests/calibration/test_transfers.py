"""Constants of a network from transfers: found where they are known, judged on other shapes, written into a cluster."""

import itertools
import tomllib
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moetrace as mt
from moetrace.calibration.fitting import fit_transfers
from moetrace.calibration.measured import Measured, read_measured
from moetrace.calibration.system_file import base_text
from moetrace.calibration.transfers import TRANSFER, transfer_work

SHAPES = ((7168, 12, 4, 4), (4096, 12, 2, 4), (3072, 8, 3, 2), (5120, 16, 2, 8))
ROWS = (1, 16, 256, 4096)


def copies_of(experts: int, top_k: int, gpus: int, dedup: bool) -> float:
    """Mean copies of a row, over every choice that it can make."""
    if not dedup:
        return top_k
    choices = [*itertools.combinations(range(experts), top_k)]
    return sum(len({expert * gpus // experts for expert in chosen}) for chosen in choices) / len(choices)


def transfers(dispatch_s=60e-6, combine_s=40e-6, row_s=70e-9, bytes_s=400e9, dedup=True) -> pl.DataFrame:
    """Return times of transfers over a network of these constants, computed one by one."""
    rows = []
    for hidden, experts, top_k, gpus in SHAPES:
        copies = copies_of(experts, top_k, gpus, dedup)
        for count, (stage, bits, start_s) in itertools.product(
            ROWS, (("dispatch", 16.0, dispatch_s), ("dispatch", 8.25, dispatch_s), ("combine", 16.0, combine_s))
        ):
            moved = count * copies * (gpus - 1) / gpus * hidden * bits / 8
            seconds = start_s + (count * row_s if dedup else 0) + moved / bytes_s
            rows.append((stage, hidden, experts, top_k, gpus, count, bits, seconds))
    return pl.DataFrame(rows, schema=("stage", *TRANSFER), orient="row").cast(dict.fromkeys(TRANSFER, pl.Float64))


@given(st.floats(1e-6, 3e-4), st.floats(1e-6, 3e-4), st.floats(1e-9, 3e-7), st.floats(50e9, 900e9), st.booleans())
@settings(max_examples=25, deadline=None)
def test_constants_that_made_the_times_are_found(dispatch_s, combine_s, row_s, bytes_s, dedup):
    found = fit_transfers(transfers(dispatch_s, combine_s, row_s, bytes_s, dedup), 1800e9, dedup)
    assert (found.points, found.shapes) == (48, 4) and found.p90_error < 1e-3
    assert (found.dispatch_s, found.combine_s) == (pytest.approx(dispatch_s, 1e-3), pytest.approx(combine_s, 1e-3))
    assert found.bytes_s == pytest.approx(bytes_s, rel=2e-3)
    assert found.row_s == pytest.approx(row_s if dedup else 0, rel=1e-2, abs=1e-12)


def test_no_bandwidth_exceeds_the_port_and_the_fit_is_doubted():
    found = mt.calibrate(Measured({}, {}, "mine", [], {"network": transfers()}), "h100-x8", port_gb_s=200)
    assert found.system.network.bandwidth_gb_s == 200 and found.fits["network"].p90_error > 0.1
    (note,) = found.notes
    assert note.startswith("The fit of the network is doubtful: its bandwidth is at the port's limit of 200 GB/s")
    assert "at the limit of a GPU's port" in found.text


def test_times_in_ms_are_doubted():
    thousandfold = transfers().with_columns(pl.col("seconds") * 1e3)
    (note,) = mt.calibrate(Measured({}, {}, "mine", [], {"network": thousandfold}), "h100-x8").notes
    assert note.startswith("The fit of the network is doubtful: its bandwidth of 0.4 GB/s is 0.0009")
    assert not mt.calibrate(Measured({}, {}, "mine", [], {"network": transfers()}), "h100-x8").notes


def test_a_row_with_more_experts_than_the_other_gpus_have_comes_to_every_gpu():
    frame = transfers().head(1).with_columns(experts=4.0, top_k=4.0, gpus=2.0, rows=10.0, hidden=8.0, bits=8.0)
    assert transfer_work(frame, dedup=True).tolist() == [[1.0, 0.0, 10.0, 10 * 2 * 0.5 * 8]]


def test_each_phase_is_written_into_its_section(tmp_path):
    parts = {
        "network": transfers(),
        "network.decode": transfers(bytes_s=200e9, dedup=False),
        "network.prefill": transfers(dispatch_s=90e-6),
    }
    found = mt.calibrate(Measured({}, {}, "mine", [], parts), "h100-x8", name="ours", port_gb_s=450)
    network = found.system.network
    assert (network.bandwidth_gb_s, network.dispatch_latency_us, network.row_ns) == (400, 60, 70)
    assert (network.decode.bandwidth_gb_s, network.decode.combine_latency_us, network.decode.row_ns) == (200, 40, 0)
    assert network.prefill.dispatch_latency_us == 90 and network.decode.dedup is False
    assert "network calibrated (error 0.0%" in found.system.how_known
    assert "network decode calibrated" in found.system.how_known
    assert found.frame["part"].to_list() == [*parts]
    path = tmp_path / "ours.toml"
    path.write_text(found.text)
    assert mt.load_system(path) == found.system
    before, after = (tomllib.loads(text) for text in (base_text("h100-x8"), found.text))
    assert before["gpu"] == after["gpu"]


def test_presets_predict_measured_transfers():
    """Clusters miss some measured transfers by what they say."""
    rows = pl.read_csv(Path(__file__).with_name("transfers.csv"), comment_prefix="#")
    assert rows["system"].n_unique() == 3
    for (name, part), some in rows.group_by("system", "part", maintain_order=True):
        system = mt.load_system(name)
        said = system.calibration[part.replace(".", "_")]
        given_ = system.network.of_phase(part.removeprefix("network").removeprefix(".") or "mixed")
        starts = pl.Series([given_[f"{stage}_latency_us"] / 1e6 for stage in some["stage"]])
        work = transfer_work(some, given_["dedup"])
        predicted = starts + work[:, 2] * given_["row_ns"] / 1e9 + work[:, 3] / (given_["bandwidth_gb_s"] * 1e9)
        errors = (predicted / some["seconds"] - 1).abs()
        assert len(some) >= 6 and errors.median() < 2 * said.median_error
        assert said.median_error <= 0.13 and errors.max() < 1


GOOD = "part,stage,hidden,experts,top_k,gpus,rows,bits,seconds\n" + "".join(
    f"network,{stage},{hidden},16,2,8,{rows},16,1e-4\n"
    for hidden in (4096, 7168)
    for stage in ("dispatch", "combine")
    for rows in (1, 64)
)
AISIMULATE = (
    "gpu,framework,comm_backend,phase,comm_dtype,ep_size,hidden_size,topk,num_experts,num_tokens,latency\n"
    + "".join(
        f"h100,{framework},{kernel},{phase},{dtype},8,{hidden},8,256,{rows},{60 + rows}\n"
        for framework, kernel, dtype in (
            ("TRTLLM", "trtllm_deepep_ht", "nvfp4"),
            ("TRTLLM", "trtllm_deepep_ll", "fp8"),
            ("vLLM", "deepep_ht", "default"),
            ("vLLM", "deepep_v2_context", "default"),
        )
        for phase in ("dispatch", "combine")
        for hidden in (4096, 7168)
        for rows in (1, 64)
    )
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GOOD.replace("stage", "phase"), "has no column stage"),
        (GOOD.replace("gpus", "ranks"), "has no column gpus; it has stage, hidden"),
        (GOOD.replace("bits", "dtype"), "has no column bits"),
        (GOOD.replace("combine", "gather"), "row 3: stage must be dispatch or combine"),
        (GOOD.replace("combine", "dispatch"), "has no time of stage combine: measure both"),
        (GOOD.replace(",8,1,16", ",3,1,16"), "row 1: gpus must be 2 or more and divide experts"),
        (GOOD.replace(",8,1,16", ",1,1,16"), "row 1: gpus must be 2 or more and divide experts"),
        (GOOD.replace("16,2,8,64", "16,17,8,64"), "row 2: top_k must be at most experts, got 17 of 16"),
        (GOOD.replace("64,16,1e-4", "64,16,soon"), "row 2: seconds must be a number, got 'soon'"),
        (GOOD.replace("64,16,1e-4", "64,16,-1"), "row 2: seconds must be a number greater than 0"),
        (GOOD.replace("7168", "4096"), "has 1 shape of transfers for the network"),
        (GOOD.replace("network,", "net,"), "part 'net' is unknown; use one of gpu, cpu, link, disk, network"),
        (AISIMULATE, r"transfers of several frameworks \(TRTLLM, vLLM\): choose one with --framework"),
        (AISIMULATE.replace("comm_dtype", "type"), "has no column comm_dtype"),
        (AISIMULATE.replace("_deepep_", "_nccl_").replace(",deepep_ht", ",nccl"), "no row can be used. 32 rows of oth"),
    ],
)
def test_bad_tables_are_refused_in_one_sentence(tmp_path, text, says):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(mt.MoetraceError, match=says) as refused:
        mt.calibrate(path, "h100-x8")
    assert "\n" not in str(refused.value)


def test_a_network_needs_a_cluster(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(GOOD)
    with pytest.raises(mt.UsageError, match=r"system h100-sxm has no \[network\]: name a cluster with --system\.$"):
        mt.calibrate(path, "h100-sxm")


def test_tables_of_aisimulate_are_read(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(AISIMULATE)
    found = read_measured(path, {"framework": "TRTLLM"})
    assert [*found.transfers] == ["network", "network.decode"] and found.notes == []
    rows = found.transfers["network"]
    assert rows.filter(pl.col("stage") == "dispatch")["bits"].unique().to_list() == [4.5]
    assert rows.filter(pl.col("stage") == "combine")["bits"].unique().to_list() == [16]
    assert rows.row(0, named=True) | {"seconds": 0} == {
        "stage": "dispatch", "hidden": 4096, "experts": 256, "top_k": 8, "gpus": 8, "rows": 1, "bits": 4.5,
        "seconds": 0,
    }  # fmt: skip
    assert rows["seconds"][1] == pytest.approx(124e-6)
    found = read_measured(path, {"framework": "vLLM"})
    assert found.notes == ["8 rows of other kernels than DeepEP's first version left out."]
    assert found.transfers["network"]["bits"].unique().sort().to_list() == [8.25, 16]
