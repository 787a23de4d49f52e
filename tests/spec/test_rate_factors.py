"""The file of GPUs that are slower than the others of a cluster."""

import numpy as np
import pytest

from moetrace.batch.cell import files_of
from moetrace.engine.setup import Setup
from moetrace.spec import MoetraceError, load_model, load_policy, load_system
from moetrace.spec.load import canonical
from moetrace.spec.network import Cluster
from moetrace.spec.rate_factors import read_factors


def given(path, text):
    path.write_text(text)
    return path


def test_a_gpu_has_its_name_or_its_number(tmp_path):
    apart = Cluster(attention=1, experts=2)
    for header in ("gpu,factor\n", " gpu , factor\n", "# measured\n", ""):
        path = given(tmp_path / "f.csv", f"{header}experts1,0.5\n\n 0 ,1.25\n")
        assert read_factors(path, apart).tolist() == [1.25, 1.0, 0.5]
    assert read_factors(given(tmp_path / "f.csv", "gpu2,0.8\n"), Cluster(gpus=3)).tolist() == [1.0, 1.0, 0.8]
    assert read_factors(given(tmp_path / "f.csv", ""), Cluster(gpus=3)).tolist() == [1.0] * 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpu8,0.5\n", "f.csv, line 1: the cluster has no GPU gpu8; wants one of gpu0 to gpu7, or of 0 to 7."),
        ("gpu,factor\n8,0.5\n", "f.csv, line 2: the cluster has no GPU 8; wants one of gpu0 to gpu7, or of 0 to 7."),
        ("-1,0.5\n", "f.csv, line 1: the cluster has no GPU -1; wants one of gpu0 to gpu7, or of 0 to 7."),
        ("experts0,0.5\n", "f.csv, line 1: the cluster has no GPU experts0; wants one of gpu0 to gpu7, or of 0 to 7."),
        ("0,0.5\n\ngpu0,0.5\n", "f.csv, line 3: gpu0 has a factor already; give each GPU one."),
        ("0,0\n", "f.csv, line 1: wants a factor from 1e-06 to 1e+06, got 0."),
        ("0,-1\n", "f.csv, line 1: wants a factor from 1e-06 to 1e+06, got -1."),
        ("0,nan\n", "f.csv, line 1: wants a factor from 1e-06 to 1e+06, got nan."),
        ("0,inf\n", "f.csv, line 1: wants a factor from 1e-06 to 1e+06, got inf."),
        ("0,slow\n", "f.csv, line 1: wants gpu,factor, as gpu7,0.8."),
        ("0\n", "f.csv, line 1: wants gpu,factor, as gpu7,0.8."),
        ("0,1,1\n", "f.csv, line 1: wants gpu,factor, as gpu7,0.8."),
        (",1\n", "f.csv, line 1: wants gpu,factor, as gpu7,0.8."),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, text, said):
    path = given(tmp_path / "f.csv", text)
    with pytest.raises(MoetraceError) as error:
        load_system("h100-x8", {"cluster.rate_factors": str(path)})
    assert str(error.value) == f"{tmp_path}/{said}"


def test_a_file_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(MoetraceError, match=r"^Cannot read .*f\.csv"):
        load_system("h100-x8", {"cluster.rate_factors": str(tmp_path / "f.csv")})


def test_the_file_lies_beside_its_toml_and_is_an_input_of_a_cell(tmp_path):
    path = given(tmp_path / "f.csv", "0,0.5\n")
    (tmp_path / "s.toml").write_text(
        'name = "s"\n[gpu]\nname = "g"\ntflops = 1\nbandwidth_gb_s = 1\nmemory_gb = 1\nreserve_gb = 0\nlaunch_us = 0\n'
        '[cluster]\ngpus = 2\nrate_factors = "f.csv"\n'
        "[network]\nbandwidth_gb_s = 1\ndispatch_latency_us = 0\ncombine_latency_us = 0\n"
    )
    system = load_system(tmp_path / "s.toml")
    assert system.cluster.rate_factors == str(path)
    assert canonical(system)["cluster"]["rate_factors"] == "f.csv"
    setup = Setup(model=load_model("tiny-olmoe"), system=system, policies=[load_policy("ep-serial")])
    assert files_of(setup) == {"system.cluster.rate_factors": str(path)}
    assert np.array_equal(read_factors(system.cluster.rate_factors, system.cluster), [0.5, 1.0])
