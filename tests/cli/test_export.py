"""`moetrace export`: what it writes, says and refuses."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from moetrace import exports
from moetrace.cli.commands.export import FORMATS

TRACES = Path(__file__).parents[2] / "traces"


def test_export_writes_and_says_so(run, tmp_path):
    out = tmp_path / "t.npz"
    assert run("export", TRACES / "tiny-olmoe.h5", "-o", out) == (0, "", f"{out}: 16,414 rows, 1.4 MB.\n")
    assert np.load(out)["expert_ids"].shape == (16414, 6, 4)
    code, _, err = run("export", TRACES / "tiny-olmoe.h5", "-o", tmp_path / "t", "--to", "oracle-general")
    assert code == 0 and err.endswith("16,414 rows, 9.5 MB.\n") and (tmp_path / "t").stat().st_size == 16414 * 24 * 24


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ([TRACES / "tiny-olmoe.h5", "-o", "t.csv"], 2, "t.csv does not say its format by its ending"),
        ([TRACES / "tiny-olmoe.h5", "-o", "t.npz", "--to", "csv"], 2, "--to"),
        ([TRACES / "tiny-olmoe.h5"], 2, "-o"),
        (["none.h5", "-o", "t.npz"], 1, "there is no file none.h5"),
        (["t.json", "-o", "t.json"], 2, "t.json is also an input: choose another name"),
        ([TRACES / "tiny-olmoe.h5", "-o", "none/t.npz"], 1, "none/t.npz could not be written: there is no folder none"),
    ],
)
def test_export_refuses(run, tmp_path, monkeypatch, arguments, code, sentence):
    monkeypatch.chdir(tmp_path)
    shutil.copy(TRACES / "tiny-olmoe.h5", "t.json")
    found, out, err = run("export", *arguments)
    assert (found, out) == (code, "") and sentence in err and len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]


def test_export_offers_every_format(run):
    assert tuple(exports.FORMATS) == FORMATS
    help_text = run("export", "--help")[1]
    assert all(ending in help_text for endings, _ in exports.FORMATS.values() for ending in endings)


def test_expert_maps(run, tmp_path):
    out, trace = tmp_path / "map.json", TRACES / "mixtral-8x7b-b16.h5"
    assert run("export", trace, "-o", out, "--to", "vllm-map", "--units", 4)[0] == 0
    assert run("analyze", "balance", trace, "--units", 4, "--plan", out)[0] == 0
    for more in (["--redundant", 4], ["--plan", out], ["--units", 4, "--slots", 3]):
        code, _, err = run("export", trace, "-o", tmp_path / "x", "--to", "vllm-map", *more)
        assert code == 2 and "--redundant and --plan go with --units" in err and len(err.splitlines()) == 1
    code, _, err = run("export", trace, "-o", tmp_path / "x", "--to", "vllm-map")
    assert code == 2 and "give --units N" in err and [path.name for path in tmp_path.iterdir()] == ["map.json"]


def test_a_result_is_exported(run, tmp_path):
    policy = 'name = "p"\nplacement = "ep-block"\ndispatch = "ndp"\nresidency = "static-popular"\nscope = "global"\n'
    (tmp_path / "p.toml").write_text(policy)
    trace, result, out = TRACES / "mixtral-8x7b-b16.h5", tmp_path / "res", tmp_path / "set.csv"
    assert run("replay", trace, "--policy", tmp_path / "p.toml", "--slots", 40, "-o", result)[0] == 0
    assert run("export", result, "-o", out, "--to", "static-csv") == (0, "", f"{out}: 0.0 MB.\n")
    assert len(out.read_text().splitlines()) == 41
    for more, sentence in (
        (["--to", "moe-l2", "--slots", 4], "whose policy decides the experts: give no --phase"),
        ([], "say with --to what of it is wanted"),
    ):
        code, _, err = run("export", result, "-o", tmp_path / "x", *more)
        assert code == 2 and sentence in err and len(err.splitlines()) == 1
    code, _, err = run("export", trace, "-o", tmp_path / "x", "--to", "npz", "--policy", "p")
    assert code == 2 and "--policy and --trace are of a replay's result" in err and not (tmp_path / "x").exists()
