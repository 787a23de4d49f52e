"""`moetrace calibrate`."""

import json

import pytest

import moetrace as mt
from moetrace.calibration import read_measured, this_machine

TABLE = "hidden,intermediate,experts,top_k,rows,bits,seconds\n" + "".join(
    f"{hidden},768,64,4,{rows},16,{20e-6 + min(64, 4 * rows) * 3 * hidden * 768 * 2 / 600e9}\n"
    for hidden in (1024, 2048, 4096)
    for rows in (1, 8, 64)
)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(TABLE)
    return path


def test_a_table_becomes_a_system(run, table, tmp_path):
    out = tmp_path / "mine.toml"
    code, said, err = run("calibrate", table, "--system", "rtx4090-offload", "-o", out)
    assert code == 0 and "data sheet" in said and "mine.toml: system mine, gpu calibrated (error" in err
    assert mt.load_system(out).gpu.bytes_s == pytest.approx(600e9, rel=0.01)
    code, said, _ = run("calibrate", table, "--system", "rtx4090-offload", "--format", "json")
    (part,) = json.loads(said)["parts"]
    assert code == 0 and part["shapes"] == 3 and part["start_us"] == pytest.approx(20, abs=0.5)
    assert run("show", "system", out)[0] == 0


def test_the_errors_fit_the_terminal(run, table, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, said, _ = run("calibrate", table, "--system", "rtx4090-offload")
    assert code == 0 and max(map(len, said.splitlines())) <= 80
    assert said.count("gpu ") == 2 and "data sheet" in said and "efficiency" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "either a TABLE"),
        (("T", "--measure"), "either a TABLE"),
        (("T",), "--system is missing"),
        (("T", "--system", "rtx4090-offload", "--only", "cpu"), "go with --measure only"),
        (("T", "--system", "rtx4090-offload", "-o", "x.txt"), "must end with .toml"),
        (("--measure", "--save-table", "x.txt"), "must end with .csv"),
        (("--measure", "--system", "rtx4090-offload", "--gpu", "h100"), "choose rows of a TABLE"),
        (("T", "--system", "rtx4090-offload", "--gpu", "h100"), "no column gpu"),
    ],
)
def test_wrong_usage_is_one_sentence(run, table, arguments, says):
    code, _, err = run("calibrate", *(table if argument == "T" else argument for argument in arguments))
    assert code == 2 and says in err and err.count("\n") == 1


def test_an_interruption_leaves_the_times_so_far(run, tmp_path, monkeypatch):
    def reads(_):
        yield 65536, 1e-4, 0.0
        yield 1048576, 1e-3, 0.0
        raise KeyboardInterrupt

    monkeypatch.setattr(this_machine, "disk_times", reads)
    code, _, err = run("calibrate", "--measure", "--only", "disk", "--save-table", tmp_path / "t.csv")
    assert code == 130 and "t.csv: 2 times." in err and "interrupted" in err
    assert read_measured(tmp_path / "t.csv").copies["disk"].rows() == [(65536, 1e-4), (1048576, 1e-3)]


def test_a_disk_that_cannot_be_measured_is_left_out(run, tmp_path, monkeypatch):
    monkeypatch.setattr(this_machine, "NO_DISK", "No disk here.")
    code, _, err = run("calibrate", "--measure", "--only", "disk", "--save-table", tmp_path / "t.csv")
    assert code == 1 and err == "moetrace: Nothing was measured. No disk here.\n" and not (tmp_path / "t.csv").exists()


def test_wrong_units_are_noted_beside_the_values(run, table, tmp_path):
    wrong = tmp_path / "ms.csv"
    head, *rows = table.read_text().splitlines()
    rows = [",".join([*row.split(",")[:-1], str(float(row.split(",")[-1]) * 1e3)]) for row in rows]
    wrong.write_text("\n".join([head, *rows]) + "\n")
    code, said, err = run("calibrate", wrong, "--system", "rtx4090-offload")
    assert code == 0 and err.startswith("moetrace: note: The fit of the gpu is doubtful: ") and err.count("\n") == 1
    assert run("calibrate", table, "--system", "rtx4090-offload")[2] == ""
    code, said, _ = run("calibrate", wrong, "--system", "rtx4090-offload", "--format", "json")
    assert code == 0 and len(json.loads(said)["notes"]) == 1


def test_a_disk_is_printed_and_no_empty_system_is_written(run, tmp_path):
    path, out = tmp_path / "disk.csv", tmp_path / "o.toml"
    path.write_text("part,bytes,seconds\ndisk,65536,1e-4\ndisk,1048576,1e-3\ndisk,4194304,4e-3\n")
    code, said, err = run("calibrate", path, "--system", "rtx4090-offload")
    assert code == 0 and "latency" in said and "sizes" in said and "efficiency" not in said
    assert "-" not in said.splitlines()[-1].split() and "disk is printed only" in err
    code, said, err = run("calibrate", path, "--system", "rtx4090-offload", "-o", out)
    assert code == 2 and "o.toml was not written: no fitted value" in err and "disk" in said and not out.exists()


def test_output_replaces_a_file_whole_but_never_an_input(run, table, tmp_path):
    out = tmp_path / "mine.toml"
    out.write_text("old")
    assert run("calibrate", table, "--system", "rtx4090-offload", "-o", out)[0] == 0
    before = out.read_text()
    assert mt.load_system(out).name == "mine"
    code, _, err = run("calibrate", table, "--system", out, "-o", out)
    assert code == 2 and "mine.toml" in err and err.count("\n") == 1 and out.read_text() == before


@pytest.mark.parametrize(("scatter", "noted"), [(0.1, False), (0.6, True)])
def test_measuring_says_how_long_it_takes_and_whether_repeats_differ(run, tmp_path, monkeypatch, scatter, noted):
    monkeypatch.setattr(this_machine, "disk_times", lambda _: iter([(65536, 1e-4, scatter), (1048576, 1e-3, scatter)]))
    code, _, err = run("calibrate", "--measure", "--only", "disk", "--save-table", tmp_path / "t.csv")
    first, *rest = err.splitlines()
    assert code == 0 and first.startswith("moetrace: measuring disk takes ") and "run nothing else" in first
    assert any("quartiles lie 60% of the median apart" in line for line in rest) == noted


def test_transfers_become_the_network_of_a_cluster(run, tmp_path):
    """Of two experts of four, two on each GPU: 2 of 6 rows have both on one GPU, 4 of 6 on two."""
    path, out = tmp_path / "t.csv", tmp_path / "mine.toml"
    path.write_text(
        "part,stage,hidden,experts,top_k,gpus,rows,bits,seconds\n"
        + "".join(
            f"network,{stage},{hidden},4,2,2,{rows},16,{start + rows * (2 - 1 / 3) / 2 * hidden * 2 / 440e9}\n"
            for hidden in (4096, 7168)
            for stage, start in (("dispatch", 60e-6), ("combine", 40e-6))
            for rows in (1, 64, 4096)
        )
    )
    code, said, err = run("calibrate", path, "--system", "h100-x8", "--port-gb-s", "450", "-o", out)
    assert code == 0 and "dispatch" in said and "440" in said and "network calibrated (error" in err
    network = mt.load_system(out).network
    assert (network.bandwidth_gb_s, network.dispatch_latency_us, network.combine_latency_us) == (440, 60, 40)
    assert run("show", "system", out)[0] == 0
    (tmp_path / "slow.csv").write_text("gpu,factor\n3,0.5\n")
    out.write_text(out.read_text().replace("[cluster]\n", '[cluster]\nrate_factors = "slow.csv"\n'))
    (tmp_path / "sub").mkdir()
    assert run("calibrate", path, "--system", out, "-o", tmp_path / "sub" / "b.toml")[0] == 0
    assert 'rate_factors = "../slow.csv"' in (tmp_path / "sub" / "b.toml").read_text()
    assert run("show", "system", tmp_path / "sub" / "b.toml")[0] == 0
    code, said, _ = run("calibrate", path, "--system", "h100-x8", "--format", "json")
    (part,) = json.loads(said)["parts"]
    assert code == 0 and part["part"] == "network" and part["row_ns"] == pytest.approx(0, abs=0.1)
    code, _, err = run("calibrate", path, "--system", "h100-x8", "--framework", "vLLM")
    assert code == 2 and "no column framework: leave out --framework" in err
