"""`moetrace list` and `moetrace show`."""

import csv
import io
import json
import subprocess
import sys

import pytest

from moetrace import exports
from moetrace.analyze.prefetch.value import PREDICTORS
from moetrace.cli import main
from moetrace.cli.commands.list import _CHOICES, _NAMED
from moetrace.generators import list_profiles
from moetrace.importers import formats as importers
from moetrace.spec import list_presets, load_policy
from moetrace.spec.choices import FOLDERS, cache_policies
from moetrace.spec.policy import parameters


@pytest.fixture
def moetrace(capsys, monkeypatch):
    """Run a command line; returns exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*args):
        try:
            main(list(args))
            code = 0
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code or 0, out, err

    return run


@pytest.mark.parametrize("kind", ["models", "systems", "policies"])
def test_list_names_every_preset_within_80_columns(moetrace, kind):
    code, out, err = moetrace("list", kind)
    assert (code, err) == (0, "")
    assert [name for name in list_presets(kind) if f"\n{name} " not in out] == []
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("kind", ["models", "systems", "policies"])
def test_list_formats_agree(moetrace, kind):
    rows = json.loads(moetrace("list", kind, "--format", "json")[1])
    table = list(csv.DictReader(io.StringIO(moetrace("list", kind, "--format", "csv")[1])))
    assert [row["name"] for row in rows] == [row["name"] for row in table] == list_presets(kind)
    assert list(rows[0]) == list(table[0])
    assert [["" if value is None else str(value) for value in row.values()] for row in rows] == [
        list(row.values()) for row in table
    ]


def test_list_policies_says_what_tells_each_from_the_others(moetrace):
    rows = json.loads(moetrace("list", "policies", "--format", "json")[1])
    assert len({row["meaning"] for row in rows}) == len(rows) and not any(row["meaning"].endswith(".") for row in rows)
    words = " ".join(moetrace("list", "policies")[1].split())
    assert words.count("First ablation of foresee: nothing is learned from layers before") == 1
    assert words.count(" foresee-no-ahead ") == 2


@pytest.mark.parametrize("kind", list(_NAMED))
def test_list_gives_the_meaning_of_each_name(moetrace, kind):
    rows = json.loads(moetrace("list", kind, "--format", "json")[1])
    registry = {
        "cache-policies": cache_policies(),
        "predictors": PREDICTORS,
        "profiles": list_profiles(),
        "import-formats": importers.FORMATS,
        "export-formats": exports.FORMATS,
    }
    assert [row["name"] for row in rows] == list(registry[kind])
    assert all(row.get("meaning") or row.get("source") for row in rows)
    out = moetrace("list", kind)[1]
    assert [row["name"] for row in rows if f"\n{row['name']} " not in out] == [] and max(
        map(len, out.splitlines())
    ) <= 80


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["relpay"], "there is no command 'relpay' (the nearest is 'replay'). See `moetrace --help`."),
        (["analyze", "cach"], "there is no command 'cach' (the nearest is 'cache'). See `moetrace analyze --help`."),
        (["info", "a.h5", "--verfy"], "there is no option --verfy (the nearest is '--verify')."),
        (["info", "a.h5", "--format", "jsn"], "--format must be one of table, json, csv, but is 'jsn' (the nearest is"),
        (["analyze", "cache", "a.h5", "--policy", "beladi"], "but is 'beladi' (the nearest is 'belady')"),
        (["import", "a", "-o", "b.h5", "--from", "vlm"], "but is 'vlm' (the nearest is 'vllm')"),
        (
            ["show", "polcy", "monde"],
            "KIND must be one of model, system, policy, but is 'polcy' (the nearest is 'policy')",
        ),
        (
            ["generate", "a.h5", *["--profile", "tiny", "--requests", "1", "--prompt", "1", "--output", "1"]],
            "the nearest is 'tiny-olmoe'",
        ),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(moetrace, args, says):
    code, out, err = moetrace(*args)
    assert (code, out, err.count("\n")) == (2, "", 1) and says in err


def test_narrow_terminal_keeps_names_and_figures_whole(moetrace, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    out = moetrace("list", "models")[1]
    assert "qwen1.5-moe-a2.7b " in out and "…" not in out
    out = moetrace("show", "system", "edge-ndp", "--model", "qwen3-30b-a3b")[1]
    assert "fetch_beats_all_units_rows" in out and "…" not in out


@pytest.mark.parametrize("columns", [50, 80, 200])
def test_list_systems_keeps_the_names_of_gpus_whole(moetrace, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = moetrace("list", "systems")[1]
    rows = json.loads(moetrace("list", "systems", "--format", "json")[1])
    assert all(any(line.startswith(row["name"]) and row["gpu"] in line for line in out.splitlines()) for row in rows)
    # Every part of the table has a line for each system, and the narrower the terminal, the more parts there are.
    assert out.count("\nedge-ndp ") == {50: 3, 80: 2, 200: 1}[columns]
    assert columns == 50 or max(map(len, out.splitlines())) <= columns


def test_show_system_with_a_model(moetrace):
    code, out, err = moetrace("show", "system", "edge-ndp", "--model", "qwen3-30b-a3b", "--format", "json")
    shown = json.loads(out)
    assert (code, err) == (0, "")
    assert shown["spec"]["ndp"]["units"] == 6
    assert shown["derived"]["slots"] == 1222
    assert shown["derived"]["ndp_compute_bound_rows"] == 6


def test_show_overrides(moetrace):
    args = ("show", "system", "edge-ndp", "--model", "mixtral-8x7b", "--format", "csv")
    code, out, err = moetrace(*args, "--set", "system.ndp.units=2", "--set", "model.weight_bits=4")
    assert (code, err) == (0, "")
    assert "spec,ndp.units,2\n" in out and "derived,slots,125\n" in out
    code, out, err = moetrace(*args, "--set", "system.ndp.units=2")
    assert code == 0 and "derived,slots,31\n" in out
    assert err.startswith("A replay would be refused: The experts of mixtral-8x7b take 90.2 GB")


def test_show_a_model_of_few_bits(moetrace):
    few = ("--set", "model.weight_bits.bits=3", "--set", "model.weight_bits.sparse=0.01")
    code, out, err = moetrace("show", "model", "mixtral-8x7b", *few, "--format", "json")
    shown = json.loads(out)
    assert (code, err, shown["spec"]["weight_bits"]) == (0, "", {"bits": 3, "sparse": 0.01})
    assert shown["derived"]["weight_bits_mean"] == pytest.approx(3.48)
    assert shown["derived"]["expert_mb_mean"] == pytest.approx(3 * 4096 * 14336 * 3.48 / 8 / 1e6)
    assert "weight_bits.sparse" in moetrace("show", "model", "mixtral-8x7b", *few)[1]
    code, out, err = moetrace("show", "model", "mixtral-8x7b", "--set", "model.weight_bits.sparse=2")
    assert (code, out) == (2, "") and "weight_bits.sparse wants a number from 0 to 1, got 2" in err


@pytest.mark.parametrize("kind", ["model", "system", "policy"])
def test_show_every_preset(moetrace, kind):
    for name in list_presets({"policy": "policies"}.get(kind, f"{kind}s")):
        code, out, err = moetrace("show", kind, name)
        assert (code, err) == (0, "")
        assert name in out and max(map(len, out.splitlines())) <= 80


def test_choices_are_listed_by_their_folders():
    assert {folder: kind for kind, folder in FOLDERS.items()} == _CHOICES


def test_show_policy_explains_its_choices_and_leaves_out_what_it_does_not_read(moetrace):
    out = moetrace("show", "policy", "edge-ndp")[1]
    assert "each expert split over all units" in out and "alpha" not in out and "prefetch_blocks" in out
    out = moetrace("show", "policy", "edge-ndp", "--set", "policy.residency=ewma", "--set", "policy.prefetch=online:2")[
        1
    ]
    assert "alpha" in out and "up to m experts" in out


def test_show_policy_has_a_line_for_each_parameter_that_it_reads(moetrace):
    for name in list_presets("policies"):
        policy = load_policy(name)
        out = moetrace("show", "policy", name)[1]
        rows = list(csv.DictReader(io.StringIO(moetrace("show", "policy", name, "--format", "csv")[1])))
        for field in set(parameters()) - set(policy.unread):
            line = next(line for line in out.splitlines() if line.startswith(f"{field} "))
            value = getattr(policy, field)
            assert [row["value"] for row in rows if row["name"] == field] == ["" if value is None else str(value)]
            assert value is not None or line.split()[1:4] == ["-", "not", "set:"]
    out = moetrace("show", "policy", "n-cpu-moe")[1]
    assert "gpu_layers      -" in out and "gpu_rows        32" in out
    # A file to keep has no line for a parameter that is not set.
    assert "gpu_layers" not in moetrace("show", "policy", "n-cpu-moe", "--format", "toml")[1]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["show", "system", "edge-npd"], "No system preset is called 'edge-npd' (the nearest is 'edge-ndp')"),
        (
            ["show", "system", "edge-ndp", "--set", "system.ndp.units=0"],
            "ndp.units wants a whole number from 1 to 65535",
        ),
        (["show", "system", "edge-ndp", "--set", "ndp.units=0"], "--set wants system.FIELD=VALUE"),
        (["show", "system", "edge-ndp", "--set", "system..x=3"], "--set wants system.FIELD=VALUE"),
        (["show", "system", "edge-ndp", "--set", "system.ndp.units"], "--set wants system.FIELD=VALUE"),
        (["show", "model", "mixtral-8x7b", "--model", "olmoe-1b-7b"], "--model goes with `show system` only"),
        (["show", "machine", "edge-ndp"], "KIND must be one of model, system, policy, but is 'machine'"),
        (["list", "model"], "but is 'model' (the nearest is 'models')"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(moetrace, args, sentence):
    code, out, err = moetrace(*args)
    assert (code, out) == (2, "")
    assert sentence in err and "Traceback" not in err


def test_brackets_in_a_name_are_no_markup(moetrace):
    assert "[bold]mine" in moetrace("show", "policy", "monde", "--set", "policy.name=[bold]mine")[1]


def test_bad_file_is_exit_code_1(moetrace, tmp_path):
    (tmp_path / "bad.toml").write_text("name =")
    code, out, err = moetrace("show", "model", str(tmp_path / "bad.toml"))
    assert (code, out) == (1, "")
    assert "bad.toml, line 1: not TOML" in err


def test_list_needs_nothing_heavy():
    code = (
        "import sys; from moetrace.cli import main; main(['list', 'systems']); "
        "sys.exit(sorted({'numba', 'h5py', 'polars'} & set(sys.modules)) or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
