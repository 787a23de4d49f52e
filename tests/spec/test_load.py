"""Bad specs: one sentence with the file, the TOML path and what is wanted."""

import os
import re
import subprocess
import sys

import msgspec
import numpy as np
import pytest
from support.system_file import SYSTEM, write

import moetrace.spec
from moetrace.spec import (
    Model,
    MoetraceError,
    PolicySpec,
    System,
    UsageError,
    canonical,
    list_presets,
    load,
    load_loads,
    load_model,
    load_policy,
    load_static,
    load_system,
)
from moetrace.spec.load import field_names, read_table


def test_file_is_read_with_its_defaults(tmp_path):
    system = load_system(write(tmp_path / "mine.toml", SYSTEM))
    assert system.gpu.compute_efficiency == 1.0
    assert system.gpu.tflops == 100.0 and isinstance(system.gpu.tflops, float)
    assert load_system(str(tmp_path / "mine.toml")) == system


@pytest.mark.parametrize(
    ("line", "path", "wants"),
    [
        ("units = 0", "ndp.units", "a whole number from 1 to 65535, got 0"),
        ("units = 2.5", "ndp.units", "a whole number, got 2.5"),
        ('units = "2"', "ndp.units", "a whole number, got '2'"),
        ("units = true", "ndp.units", "a whole number, got True"),
        ("bandwidth_gb_s = -1", "gpu.bandwidth_gb_s", "a number from 1e-09 to 1e+09, got -1"),
        ("bandwidth_gb_s = nan", "gpu.bandwidth_gb_s", "a finite number below 2^63, got nan"),
        ("memory_gb = inf", "gpu.memory_gb", "a finite number below 2^63, got inf"),
        ("reserve_gb = nan", "gpu.reserve_gb", "a finite number below 2^63, got nan"),
        ("tflops = 1" + "0" * 400, "gpu.tflops", "a finite number below 2^63, got 1000"),
        ("units = 9223372036854775808", "ndp.units", "a finite number below 2^63, got 9223372036854775808"),
        ("reserve_gb = 17", "gpu.reserve_gb", "at most gpu.memory_gb = 16, got 17"),
        ("launch_us = -0.1", "gpu.launch_us", "a number from 0 to 1e+09, got -0.1"),
        ("compute_efficiency = 0", "gpu.compute_efficiency", "a number from 1e-06 to 1, got 0"),
        ("memory_efficiency = 1.5", "gpu.memory_efficiency", "a number from 1e-06 to 1, got 1.5"),
        ("name = 7", "gpu.name", "a text in quotes, got 7"),
        ('name = ""', "gpu.name", "a text of 1 to 100 characters, got ''"),
        ('name = "  "', "gpu.name", "a text of 1 to 100 characters, got '  '"),
        (f'name = "{"x" * 101}"', "gpu.name", "a text of 1 to 100 characters, got 'xxx"),
        ('name = "x\\u001b[31mred"', "gpu.name", "printable characters only, got 'x\\x1b[31mred'"),
        ('name = "two\\nlines"', "gpu.name", "printable characters only, got 'two\\nlines'"),
        ("bandwith_gb_s = 3", "gpu.bandwith_gb_s", "is unknown (the nearest is 'bandwidth_gb_s')"),
    ],
)
def test_bad_value_names_file_path_and_wish(tmp_path, line, path, wants):
    key, section = line.split(" = ")[0], path.split(".")[0]
    lines = SYSTEM.splitlines()
    start = lines.index(f"[{section}]")
    at = next((i for i in range(start, len(lines)) if lines[i].startswith(f"{key} =")), None)
    if at is None or key not in SYSTEM.split(f"[{section}]")[1].split("[")[0]:
        lines.insert(start + 1, line)
    else:
        lines[at] = line
    file = write(tmp_path / "bad.toml", "\n".join(lines))
    with pytest.raises(UsageError) as caught:
        load_system(file)
    assert str(caught.value).startswith(f"{file}: {path} ")
    assert wants in str(caught.value)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "name is missing, and wants a text in quotes"),
        ('name = "x"', "gpu is missing, and wants a table"),
        (SYSTEM.replace("tflops = 100\n", ""), "gpu.tflops is missing, and wants a number"),
        (SYSTEM.replace("units = 2\n", ""), "ndp.units is missing, and wants a whole number"),
        ("nmae = 3\n" + SYSTEM, "nmae is unknown (the nearest is 'name'); known are name, gpu, ndp"),
        (SYSTEM + "[gpuu]\nx = 1", "gpuu is unknown (the nearest is 'gpu')"),
        (SYSTEM.split("[ndp]")[0].replace("[gpu]", "ndp = 3\n[gpu]"), "ndp wants a table or nothing, got 3"),
        (SYSTEM.split("[link]")[0], "link is missing, and NDP units need one"),
        (
            SYSTEM + "[energy.gpu]\nidle_w = -1\nactive_w = 2",
            "energy.gpu.idle_w wants a number from 0 to 1e+09, got -1.",
        ),
    ],
)
def test_bad_table(tmp_path, text, sentence):
    with pytest.raises(UsageError) as caught:
        load_system(write(tmp_path / "bad.toml", text))
    assert f"bad.toml: {sentence}" in str(caught.value)


def test_not_toml_names_the_line(tmp_path):
    with pytest.raises(MoetraceError, match=r"bad\.toml, line 3: not TOML: "):
        load_system(write(tmp_path / "bad.toml", 'name = "x"\n\n[gpu\n'))
    with pytest.raises(MoetraceError, match=r"bad\.toml, line 2: not TOML: "):
        load_system(write(tmp_path / "bad.toml", 'name = "x"\ntext = """never ends'))


def test_unreadable_file(tmp_path):
    with pytest.raises(MoetraceError, match=r"Cannot read .*absent\.toml: No such file"):
        load_model(tmp_path / "absent.toml")
    with pytest.raises(MoetraceError, match=r"it has no config\.json and no GGUF file"):
        load_model(tmp_path)
    with pytest.raises(MoetraceError, match="not an ordinary file"):
        load_system(tmp_path)
    with pytest.raises(MoetraceError, match=r"Cannot read a\\x00/b\.toml: embedded null byte"):
        load_model("a\0/b.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(MoetraceError, match="not a UTF-8 text file"):
        load_model(tmp_path / "latin.toml")


@pytest.mark.parametrize("text", ["hidden = " + "1" * 5000, "hidden = " + "[" * 5000, ".".join("a" * 5000) + " = 1"])
def test_toml_that_python_cannot_hold(tmp_path, text):
    with pytest.raises(MoetraceError, match=r"bad\.toml: (not TOML: .*|.*(tables|lists) lie) too (long|deep)"):
        load_model(write(tmp_path / "bad.toml", text))


def test_files_without_an_end_are_not_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.toml")
    for path in ("/dev/zero", tmp_path / "pipe.toml"):
        with pytest.raises(MoetraceError, match="not an ordinary file"):
            load_system(path)
    with pytest.raises(MoetraceError, match="/dev/zero: it is not an ordinary file"):
        load_model("mixtral-8x7b", {"weight_bits": "/dev/zero"})
    with pytest.raises(MoetraceError, match="/dev/zero: it is not an ordinary file"):
        load_static("/dev/zero", 2, 2)
    monkeypatch.setattr(load, "MAX_FILE_BYTES", 1 << 20)
    with pytest.raises(MoetraceError, match=r"long\.csv: it has more than 1 MiB"):
        load_loads(write(tmp_path / "long.csv", "1" * (1 << 20) + "1"), 2, 2)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('"x\\u001b[31m" = 3\n' + SYSTEM, r"x\x1b[31m is unknown"),
        ('"x\\ny" = []\n' + SYSTEM, r"x\ny is unknown"),
        (SYSTEM + '[price]\n"x\\u001b" = 3', r"price.x\x1b is unknown; known are usd_hour, gpu, ndp, cpu, host."),
        (
            SYSTEM + '[calibration."x\\u001b"]\nsource = "s"\npoints = 1\nshapes = 2\nmedian_error = 0\np90_error = 0',
            r"calibration.x\x1b.source is a key that cannot be printed",
        ),
    ],
)
def test_no_key_steers_the_terminal(tmp_path, text, sentence):
    with pytest.raises(UsageError) as caught:
        load_system(write(tmp_path / "bad.toml", text))
    assert f"bad.toml: {sentence}" in str(caught.value)


def test_names_and_folders_in_any_script(tmp_path):
    folder = tmp_path / "\u30c7\u30fc\u30bf\u3000\x1b"
    folder.mkdir()
    write(folder / "bits.csv", "\n".join([",".join(["4"] * 8)] * 32))
    model = load_model("mixtral-8x7b", {"name": "\u30c7\u30fc\u30bf\u3000", "weight_bits": folder / "bits.csv"})
    assert model.name == "\u30c7\u30fc\u30bf\u3000" and model.weight_bits == str(folder / "bits.csv")
    with pytest.raises(MoetraceError) as caught:
        load_model(folder / "absent.toml")
    assert "/\u30c7\u30fc\u30bf\u3000\\x1b/absent.toml" in str(caught.value)


@pytest.mark.parametrize("source", [None, {}, 3, ["edge-ndp"], b"edge-ndp"])
def test_values_of_wrong_types_are_refused_as_specs(source):
    for load_spec, noun in ((load_model, "model"), (load_system, "system"), (load_policy, "policy")):
        with pytest.raises(UsageError, match=f"A {noun} is the name of a preset, .* got {type(source).__name__}"):
            load_spec(source)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UsageError, match=r"'edge-npd' \(the nearest is 'edge-ndp'\); `moetrace list systems`"):
        load_system("edge-npd")
    with pytest.raises(UsageError, match=r"No policy preset is called 'zzzz'; `moetrace list policies`"):
        load_policy("zzzz")
    with pytest.raises(UsageError, match=r"\(the nearest is 'qwen3-30b-a3b'\)"):
        load_model("Qwen3-30B-A3B")


def test_a_name_without_a_preset_that_is_the_users_file_says_how_to_write_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen3-30b").mkdir()
    for name in ("plain", "dual.toml", "mine.py"):
        write(tmp_path / name, SYSTEM)
    with pytest.raises(UsageError, match=r"called 'qwen3-30b', but there is a folder qwen3-30b: write \./qwen3-30b to"):
        load_model("qwen3-30b")
    for load_spec in (load_model, load_system, load_policy):
        with pytest.raises(UsageError, match=r"called 'plain', but there is a file plain: write \./plain to"):
            load_spec("plain")
        with pytest.raises(UsageError, match=r"called 'dual', but there is a file dual\.toml: write that to"):
            load_spec("dual")
    assert load_system("./plain") == load_system("dual.toml")
    with pytest.raises(UsageError, match=r"name the function in it, too, as mine\.py:NAME"):
        load_policy("mine.py")
    # Names of a folder without a model or system in it, and names that are no paths.
    for load_spec, name in (
        (load_system, "qwen3-30b"),
        (load_model, "a\0b"),
        (load_model, "x" * 5000),
        (load_model, ""),
    ):
        with pytest.raises(UsageError, match=r"lists them, and a path that ends in \.toml is read as a file"):
            load_spec(name)


def test_overrides_are_texts_or_values():
    assert load_system("edge-ndp", {"ndp.units": 4}).units == 4
    assert load_system("edge-ndp", {"ndp.units": "4"}).units == 4
    assert load_system("edge-ndp", {"ndp.units": np.int64(4)}).units == 4
    assert load_policy("monde", {"name": "my monde"}).name == "my monde"
    assert load_model("mixtral-8x7b", {"weight_bits": "4"}).weight_bits == 4


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"ndp.units": "0"}, "ndp.units wants a whole number from 1 to 65535, got 0"),
        ({"ndp.unit": 3}, r"ndp.unit is unknown \(the nearest is 'units'\)"),
        ({"npd.units": 3}, r"npd is unknown \(the nearest is 'ndp'\)"),
        ({"name.units": 3}, "'name.units' cannot be set, as name is not a table"),
        (
            {"cpu.tflops": 3},
            r"there is no \[cpu\] to set cpu.tflops in: set cpu.bandwidth_gb_s, cpu.command_us, too, or use a system "
            r"that has one \(as a6000-xeon\)\.",
        ),
        (
            {"cpu.chunks": 3, "cpu.tflops": 3},
            r"there is no \[cpu\] to set cpu.chunks in: set cpu.bandwidth_gb_s, cpu.c",
        ),
        ({"remote.vcpus": -1}, r"there is no \[remote\] to set remote.vcpus in: .* or use a system .* \(as remoe\)"),
        (
            {"energy.gpu.idle_w": 3},
            r"there is no \[energy.gpu\] to set energy.gpu.idle_w in: set energy.gpu.active_w, too",
        ),
        ({"energy.gpu.idle": 3}, r"energy.gpu.idle is unknown \(the nearest is 'idle_w'\)"),
        (
            {"network.decode.row_ns": 3},
            r"there is no \[network\] to set network.decode.row_ns in: set network.bandwidth",
        ),
        ({"gpu": 3}, "gpu wants a table, got 3"),
        ({"": 3}, "'' is not the path of a field"),
        ({".x": 3}, "'.x' is not the path of a field"),
        ({"ndp.": 3}, "'ndp.' is not the path of a field"),
        ({3: 3}, "3 is not the path of a field"),
        ({"ndp.units": "1" * 5000}, "ndp.units wants a whole number, got '1+"),
        ({"ndp.units": 10**5000}, "ndp.units wants a finite number below"),
        ({"ndp.units": "3\nx = 1"}, "ndp.units wants a whole number, got '3.nx = 1'"),
    ],
)
def test_bad_override(overrides, sentence):
    with pytest.raises(UsageError, match=f"system edge-ndp: {sentence}"):
        load_system("edge-ndp", overrides)


@pytest.mark.parametrize("part", ["ndp", "link", "cpu", "disk", "remote", "network"])
def test_any_field_of_an_absent_part_says_that_it_is_absent(tmp_path, part):
    """The field that was set is named first, whatever its value, and not only one that is missing beside it."""
    bare = write(tmp_path / "bare.toml", SYSTEM.partition("[ndp]")[0])
    for path in field_names(System):
        if path.startswith(f"{part}."):
            with pytest.raises(UsageError, match=rf"there is no \[{part}\] to set {path} in: set {part}\."):
                load_system(bare, {path: 0.2})


@pytest.mark.parametrize("struct", [Model, System, PolicySpec])
def test_choices_of_an_unknown_key_are_never_empty(struct):
    """In any table of a spec, in a list of tables and in a table of tables too."""
    paths = {path.rpartition(".")[0] for path in field_names(struct)} | {""}
    paths |= {"gpu.levels[...]", "calibration[...]"} if struct is System else set()
    for path in paths:
        message = f"Object contains unknown field `nosuch` - at `${f'.{path}' if path else ''}`"
        sentence = load._explain(message, load.Loaded({}, "it"), struct)
        assert re.fullmatch(r"it: \S*nosuch is unknown( \(the nearest is '\w+'\))?; known are \w+(, \w+)*\.", sentence)


@pytest.mark.parametrize("kind", ["models", "systems", "policies"])
def test_instance_goes_through_the_same_door(kind):
    load = {"models": load_model, "systems": load_system, "policies": load_policy}[kind]
    for name in list_presets(kind):
        spec = load(name)
        assert load(spec) == spec
    with pytest.raises(UsageError, match="name wants a text"):
        load(msgspec.structs.replace(spec, name=3))


def test_instance_is_checked_and_overridden():
    model = load_model("mixtral-8x7b")
    with pytest.raises(UsageError, match="model mixtral-8x7b: top_k wants at most the 8 experts"):
        load_model(msgspec.structs.replace(model, top_k=9))
    assert load_model(model, {"weight_bits": 8}).weight_bits == 8
    assert load_model(msgspec.structs.replace(model, top_k=np.int64(3))).top_k == 3
    with pytest.raises(UsageError, match="model mixtral-8x7b: cannot be read: it holds object"):
        load_model(msgspec.structs.replace(model, top_k=object()))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"top_k": 9}, "top_k wants at most the 8 experts that a layer has, got 9"),
        ({"top_k": 0}, "top_k wants a whole number from 1 to 65535, got 0"),
        ({"experts": 65536}, "experts wants a whole number from 1 to 65535, got 65536"),
        ({"weight_bits": 0}, "weight_bits wants a number.* from 1e-06 to 64, got 0"),
        ({"weight_bits": [16, 8]}, "weight_bits wants one number for each of the 32 MoE layers, got 2 numbers"),
        ({"weight_bits": [16] * 31 + [-1]}, r"weight_bits\[31\] wants a number from 1e-06 to 64, got -1"),
        ({"weight_bits": [16] * 31 + ["a"]}, r"weight_bits\[31\] wants a number, got 'a'"),
        ({"weight_bits": True}, "weight_bits wants a number or a text in quotes or a table or a list, got True"),
        (
            {"hidden": 1, "expert_intermediate": 1, "weight_bits": 2},
            "weight_bits wants at least one byte for the 3 weights of an expert, got 2",
        ),
        ({"weight_bits": [16] * 31 + [1e-300]}, r"weight_bits\[31\] wants a number from 1e-06 to 64, got 1e-300"),
        ({"once_params": -1}, "once_params wants a whole number from 0 to 1000000000000000, got -1"),
        ({"kv_bytes_per_token_layer": -1}, "kv_bytes_per_token_layer wants a number from 0 to 1e\\+09, got -1"),
    ],
)
def test_bad_model(overrides, sentence):
    with pytest.raises(UsageError, match=f"model mixtral-8x7b: {sentence}"):
        load_model("mixtral-8x7b", overrides)


def test_expert_bytes_of_one_width_of_a_list_and_of_a_table(tmp_path, monkeypatch):
    small = {"moe_layers": 2, "experts": 3, "hidden": 4, "expert_intermediate": 5}
    model = load_model("mixtral-8x7b", small | {"weight_bits": 4})
    assert model.expert_bytes().tolist() == [[30.0] * 3] * 2
    assert model.flop_per_row == 2 * 3 * 4 * 5
    model = load_model("mixtral-8x7b", small | {"weight_bits": [16, 8]})
    assert model.expert_bytes().tolist() == [[120.0] * 3, [60.0] * 3]
    write(tmp_path / "bits.csv", "# bits\n16,8,4\n\n2, 2, 16\n")
    monkeypatch.chdir(tmp_path)
    model = load_model("mixtral-8x7b", small | {"weight_bits": "bits.csv"})
    assert model.expert_bytes().tolist() == [[120.0, 60.0, 30.0], [15.0, 15.0, 120.0]]
    assert canonical(model)["weight_bits"] == "bits.csv"
    for wrong in ("0", "64.1", "0.1"):
        write(tmp_path / "bits.csv", f"16,8,4\n2,2,{wrong}\n")
        with pytest.raises(UsageError, match=rf"bits\.csv: weight_bits wants .*, got {wrong}\."):
            load_model("mixtral-8x7b", small | {"weight_bits": "bits.csv"})


def test_file_named_in_a_toml_is_found_beside_it(tmp_path):
    write(tmp_path / "bits.csv", "\n".join([",".join(["4"] * 8)] * 32))
    text = "\n".join(f"{key} = {value!r}" for key, value in canonical(load_model("mixtral-8x7b")).items())
    write(tmp_path / "mine.toml", text.replace("weight_bits = 16.0", "weight_bits = 'bits.csv'", 1))
    model = load_model(tmp_path / "mine.toml")
    assert model.weight_bits == str(tmp_path / "bits.csv")
    assert (model.expert_bytes() == 3 * 4096 * 14336 / 2).all()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("1,2\n", "1 lines of numbers, but the model has 2 MoE layers"),
        ("1,2\n3\n", "line 2: 1 numbers, but the model has 2 experts"),
        ("1,2\n# x\n3,x\n", "line 3: wants numbers separated by commas"),
        ("1,2\n3,-1\n", "line 2: wants finite numbers below 2\\^63 that are not negative"),
        ("1,nan\n3,1\n", "line 1: wants finite numbers below 2\\^63 that are not negative"),
    ],
)
def test_bad_table_file(tmp_path, text, sentence):
    with pytest.raises(MoetraceError, match=sentence):
        read_table(write(tmp_path / "table.csv", text), 2, 2)


def test_table_file(tmp_path):
    table = read_table(write(tmp_path / "table.csv", "1,2.5\n3,4\n"), 2, 2)
    assert table.dtype == np.float64 and table.tolist() == [[1.0, 2.5], [3.0, 4.0]]


def imported_by(code):
    found = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"], check=True, capture_output=True, text=True
    )
    return {"numba", "h5py", "polars", "click", "rich", "numpy", "msgspec"} & set(found.stdout.split())


def test_the_room_is_light():
    assert imported_by("import moetrace.spec") == set()
    assert imported_by("from moetrace.spec import *; load_system('edge-ndp')") == {"numpy", "msgspec"}


def test_every_name_that_the_room_offers_is_there():
    for name in moetrace.spec.__all__:
        assert getattr(moetrace.spec, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'load_modle'"):
        vars(moetrace.spec)["__getattr__"]("load_modle")
