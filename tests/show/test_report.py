"""The report as a file: stands alone, escapes what strangers wrote, says what it could not read; no browser needed."""

import itertools
import json
import re
import shlex
import tomllib

import numpy as np
import polars as pl
import pytest
from support.report_page import HOSTILE, Parsed, check_alone, parsed

import moetrace as mt
from moetrace.results.record import SummaryFile
from moetrace.results.replayed import read_replayed, replayed_of
from moetrace.show.charts import latency, layers, load, over_time, parts, utilization
from moetrace.show.report.again import again
from moetrace.show.report.page import number, seconds
from moetrace.spec.toml_text import toml

pytest.importorskip("altair")
pytest.importorskip("vl_convert")


def domains(spec):
    """All texts that scales of a chart list."""
    if isinstance(spec, dict):
        for name, value in spec.items():
            yield from (value if name == "domain" and isinstance(value, list) else domains(value))
    elif isinstance(spec, list):
        for value in spec:
            yield from domains(value)


@pytest.fixture(scope="module")
def result():
    trace = mt.generate_trace("tiny-olmoe", requests=6, prompt=8, output=12, batch=3)
    return mt.replay(trace, policies=["monde", "edge-ndp", "on-demand"], slots=48)


@pytest.fixture(scope="module")
def written(result, tmp_path_factory):
    folder = tmp_path_factory.mktemp("result")
    result.write(folder)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy to be spoilt."""
    for file in written.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
        if file.suffix == ".parquet":
            pl.read_parquet(file).write_parquet(tmp_path / file.name)  # without the mark of its summary.json
    return tmp_path


def change(folder, **fields):
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_needs_no_other_file_and_is_the_same_from_memory_and_folder(result, written, tmp_path):
    page = parsed(written, tmp_path)
    check_alone(page)
    first = (tmp_path / "page.html").read_bytes()
    mt.report(result, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_bytes() == first
    assert str(tmp_path).encode() not in first and len(first) < 2 << 20
    for name in ("cdn", "jsdelivr", "unpkg", "googleapis"):
        assert name.encode() not in first


def test_is_for_everybody(written, tmp_path):
    page = parsed(written, tmp_path)
    tags = [tag for tag, _ in page.elements]
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert ("html", {"lang": "en"}) in page.elements
    assert tags.count("h1") == tags.count("main") == tags.count("header") == tags.count("nav") == 1
    assert "width=device-width" in next(a["content"] for _, a in page.elements if a.get("name") == "viewport")
    for tag, attributes in page.elements:
        if tag in ("section", "figure"):
            assert attributes["aria-labelledby"] in ids
        if tag == "a":
            assert attributes["href"][1:] in ids
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
    assert len(ids) == sum("id" in attributes for _, attributes in page.elements)
    assert tags.count("caption") == tags.count("table") >= 7
    assert tags.count("figure") == sum(a.get("type") == "application/json" for _, a in page.elements) >= 10
    levels = [int(tag[1]) for tag in tags if re.fullmatch("h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_charts_are_aggregated_and_described(written, tmp_path):
    page = parsed(written, tmp_path)
    specs = [json.loads(script) for script in page.scripts if script.startswith("{")]
    for spec in specs:
        assert spec["width"] == "container" and spec["description"] and "$schema" not in spec
        assert spec["background"] == "transparent"
    assert "monde" in "".join(page.text) and "TTFT" in "".join(page.text)


def test_the_size_does_not_grow_with_the_trace(tmp_path):
    sizes = []
    for steps in (200, 20_000):
        trace = mt.Trace.from_arrays(
            np.random.default_rng(0).integers(0, 32, (steps, 6, 1)).astype(np.uint8),
            num_experts=32,
            request=np.arange(steps, dtype=np.int32) // 100,
            steps=np.ones(steps, np.int64),
            phase=np.ones(steps, np.uint8),
        )
        mt.report(mt.replay(trace, model="tiny-olmoe", policies="ndp-ep"), tmp_path / "page.html")
        sizes.append((tmp_path / "page.html").stat().st_size)
    assert sizes[1] < sizes[0] + 20_000


def test_strangers_names_are_shown_as_text(folder, tmp_path):
    summary = json.loads((folder / "summary.json").read_text())
    names = {"monde": HOSTILE}
    for policy in summary["policies"]:
        policy["name"] = names.get(policy["name"], policy["name"])
    summary["model"]["name"] = summary["system"]["name"] = summary["moetrace"] = HOSTILE
    summary["trace"] |= {"model": HOSTILE, "source": {HOSTILE: HOSTILE, "nested": {"a": 1}}, "sha256": HOSTILE}
    (folder / "summary.json").write_text(json.dumps(summary))
    for name in ("steps", "units", "layers", "requests"):
        path = folder / f"{name}.parquet"
        pl.read_parquet(path).with_columns(pl.col("policy").replace(names)).write_parquet(path)
    page = parsed(folder, tmp_path)
    check_alone(page)
    clean = HOSTILE.replace("\x1b", "\\x1b")
    assert clean in "".join(page.text)
    assert b"\x1b" not in (tmp_path / "page.html").read_bytes()
    specs = [json.loads(script) for script in page.scripts if script.startswith("{")]
    assert any(
        clean in json.dumps(spec, ensure_ascii=False).replace('\\"', '"').replace("\\\\", "\\") for spec in specs
    )


def test_a_missing_file_leaves_its_section_out(folder, tmp_path):
    whole = parsed(folder, tmp_path)
    for name, section in (("steps", "parts"), ("units", "utilization"), ("layers", "layers"), ("experts", "load")):
        (folder / f"{name}.parquet").unlink()
        fewer = parsed(folder, tmp_path)
        assert section in {a.get("id") for _, a in whole.elements}
        assert section not in {a.get("id") for _, a in fewer.elements}
    (folder / "requests.parquet").unlink()
    check_alone(parsed(folder, tmp_path))


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda f: (f / "summary.json").write_text("{"), "not what moetrace writes"),
        (lambda f: (f / "summary.json").write_bytes(b"\xff"), "not what moetrace writes"),
        (lambda f: (f / "summary.json").write_text("[" * 100_000), "not what moetrace writes"),
        (lambda f: change(f, schema="other/9"), "schema 'other/9'"),
        (lambda f: change(f, policies=[]), "must have policies"),
        (lambda f: change(f, policies=[{"name": 1}]), r"\$\.policies\[0\]"),
        (lambda f: change(f, slots="many"), r"\$\.slots"),
        (lambda f: (f / "steps.parquet").write_bytes(b"PAR1 nothing"), "steps.parquet could not be read"),
        (lambda f: (f / "units.parquet").write_bytes(b""), "units.parquet could not be read"),
        (lambda f: pl.DataFrame({"a": [1]}).write_parquet(f / "layers.parquet"), "must have a column policy"),
        (
            lambda f: (
                pl.read_parquet(f / "units.parquet").with_columns(busy_s=pl.lit("x")).write_parquet(f / "units.parquet")
            ),
            "a column busy_s of Float64, but there is String",
        ),
        (lambda f: (f / "summary.json").unlink(), "neither summary.json nor sweep.json"),
    ],
)
def test_a_folder_that_is_no_result_is_refused_in_one_sentence(folder, tmp_path, spoil, said):
    spoil(folder)
    with pytest.raises(mt.MoetraceError, match=said) as error:
        mt.report(folder, tmp_path / "page.html")
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("table", ["steps", "units", "layers", "requests", "experts"])
def test_a_file_without_rows_leaves_its_charts_out(folder, tmp_path, table):
    path = folder / f"{table}.parquet"
    pl.read_parquet(path).clear().write_parquet(path)
    check_alone(parsed(folder, tmp_path))


@pytest.mark.parametrize("unit", [None, "", "other", "ndp", "ndpx"])
def test_units_that_no_machine_has_are_left_out(folder, tmp_path, unit):
    path = folder / "units.parquet"
    units = pl.read_parquet(path)
    pl.concat([units, units.head(1).with_columns(unit=pl.lit(unit, pl.String))]).write_parquet(path)
    spoilt = read_replayed(folder)
    assert utilization(spoilt).table["unit"].to_list() == [
        "GPU",
        *(f"NDP {number}" for number in range(6)),
        "link in",
        "link out",
    ]


@pytest.mark.parametrize("steps", [-1, 10**30])
def test_counts_are_those_of_a_column(folder, tmp_path, steps):
    change(folder, trace=json.loads((folder / "summary.json").read_text())["trace"] | {"steps": steps})
    with pytest.raises(mt.MoetraceError, match=r"\$\.trace\.steps"):
        mt.report(folder, tmp_path / "page.html")


def test_points_over_time_are_of_the_steps_that_there_are(folder):
    change(folder, trace=json.loads((folder / "summary.json").read_text())["trace"] | {"steps": 1})
    path = folder / "steps.parquet"
    pl.concat([pl.read_parquet(path).filter(policy="monde")] * 40).write_parquet(path)
    assert 80 < len(over_time(read_replayed(folder)).table) <= 160


def test_charts_show_what_the_frames_say(result):
    made = replayed_of(result)
    spent = parts(made).table
    assert spent["all, s"].to_list() == pytest.approx(result.summary["total_s"].to_list())
    times = latency(made).table
    decode = result.steps.filter(phase="decode")
    for policy in ("monde", "edge-ndp"):
        row = times.row(by_predicate=(pl.col("of") == "Decode steps") & (pl.col("policy") == policy), named=True)
        values = 1e3 * decode.filter(policy=policy)["duration_s"]
        assert row["count"] == len(values)
        assert (row["least, ms"], row["most, ms"]) == pytest.approx((values.min(), values.max()))
        assert row["p95, ms"] == pytest.approx(values.quantile(0.95, "linear"))
    figures = result.summary.row(1, named=True)
    row = times.row(by_predicate=(pl.col("of") == "Time to first token") & (pl.col("policy") == "edge-ndp"), named=True)
    assert row["p50, ms"] == pytest.approx(1e3 * figures["ttft_s_p50"])
    by_layer = layers(made).table.filter(policy="edge-ndp")
    assert by_layer["ms a step"].sum() * len(result.steps) / 3 == pytest.approx(
        1e3 * result.steps.filter(policy="edge-ndp")["moe_s"].sum()
    )
    hits, active = (
        result.layers.filter(policy="edge-ndp").select(pl.col(names).sum()).sum_horizontal()[0]
        for names in (["hits"], ["hits", "misses"])
    )
    assert hits / active == pytest.approx(figures["hit_rate"])
    moments = over_time(made).table.filter(policy="edge-ndp")
    assert moments["ms a step"].sum() == pytest.approx(1e3 * figures["total_s"], rel=1e-4)  # a point each step
    busy = utilization(made).table.filter(unit="GPU")
    assert busy["edge-ndp"][0] == figures["utilization_gpu"]
    wanted = load(made).table
    assert (
        wanted["choices"].to_list()
        == result.experts.group_by("layer").agg(pl.sum("rows")).sort("layer")["rows"].to_list()
    )


def test_damage_in_the_middle_of_a_file_is_one_sentence(folder, tmp_path):
    content = bytearray((folder / "steps.parquet").read_bytes())
    content[100:400] = bytes(300)
    (folder / "steps.parquet").write_bytes(content)
    with pytest.raises(mt.MoetraceError, match=r"steps\.parquet could not be read"):
        mt.report(folder, tmp_path / "page.html")


def test_a_file_may_not_claim_more_than_it_holds(folder, tmp_path):
    pl.DataFrame({"policy": ["monde"], "unit": ["gpu"], "busy_s": [0.0], "utilization": [0.0]}).select(
        pl.all().repeat_by(3_000_000).explode()
    ).write_parquet(folder / "units.parquet")
    with pytest.raises(mt.MoetraceError, match="claims 3,000,000 rows"):
        mt.report(folder, tmp_path / "page.html")


def test_inputs_are_kept_and_names_are_checked(folder, tmp_path):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for name in ("summary.json", "steps.parquet"):
        with pytest.raises(mt.UsageError, match="is also an input"):
            mt.report(folder, folder / name)
    with pytest.raises(mt.UsageError, match=r"must end with \.html"):
        mt.report(folder, tmp_path / "page.txt")
    with pytest.raises(mt.UsageError, match="does not exist"):
        mt.report(tmp_path / "nowhere", tmp_path / "page.html")
    with pytest.raises(mt.UsageError, match="is a file"):
        mt.report(folder / "summary.json", tmp_path / "page.html")
    with pytest.raises(mt.MoetraceError, match="could not be written"):
        mt.report(folder, tmp_path / "no" / "page.html")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_how_to_run_it_again_is_true(result, tmp_path, monkeypatch):
    run = again(replayed_of(result).summary)
    words = shlex.split(run.command)
    assert words[:3] == ["moetrace", "replay", "TRACE.h5"] and run.files == {}
    assert [words[i + 1] for i, word in enumerate(words) if word == "--policy"] == ["monde", "edge-ndp", "on-demand"]
    assert words[words.index("--slots") + 1] == "48"
    changes = {"system.ndp.units": 3, "model.top_k": 3, "policy.edge-ndp.scope": "layer"}
    changed = mt.replay(
        mt.generate_trace("tiny-olmoe", requests=2, prompt=3, output=3),
        policies=["edge-ndp", "monde"],
        overrides=changes,
        slots=48,
    )
    summary = replayed_of(changed).summary
    run = again(summary)
    monkeypatch.chdir(tmp_path)
    for name, content in run.files.items():
        tomllib.loads(content)
        (tmp_path / name).write_text(content)
    words = shlex.split(run.command)
    trace = mt.generate_trace("tiny-olmoe", requests=2, prompt=3, output=3)
    same = mt.replay(
        trace,
        model=words[words.index("--model") + 1],
        system=words[words.index("--system") + 1],
        policies=[words[i + 1] for i, word in enumerate(words) if word == "--policy"],
        slots=48,
    )
    assert replayed_of(same).summary == summary and isinstance(summary, SummaryFile)
    assert sorted(run.files) == ["model.toml", "policy-1.toml", "system.toml"]


def test_a_file_of_slow_gpus_is_said_to_be_needed(tmp_path):
    (tmp_path / "slow.csv").write_text("gpu3,0.8\n")
    overrides = {"system.cluster.rate_factors": str(tmp_path / "slow.csv")}
    trace = mt.generate_trace("tiny-olmoe", requests=1, prompt=2, output=2)
    run = again(replayed_of(mt.replay(trace, system="h100-x8", policies="ep-serial", overrides=overrides)).summary)
    assert 'rate_factors = "slow.csv"' in run.files["system.toml"] and str(tmp_path) not in run.files["system.toml"]
    assert run.notes[1] == "system.toml also needs slow.csv, which is not in a result, beside it."
    assert "--slots" not in run.command


def test_files_of_bits_and_of_a_layout_are_said_to_be_needed(tmp_path):
    (tmp_path / "bits.csv").write_text("".join(f"{layer},{expert},4\n" for layer in range(6) for expert in range(16)))
    (tmp_path / "where.csv").write_text("0,3,striped\n")
    overrides = {"model.expert_bits": str(tmp_path / "bits.csv"), "policy.edge-ndp.layout": str(tmp_path / "where.csv")}
    overrides["policy.edge-ndp.placement"] = "mixed"
    trace = mt.generate_trace("tiny-olmoe", requests=1, prompt=2, output=2)
    run = again(replayed_of(mt.replay(trace, policies="edge-ndp", slots=4, overrides=overrides)).summary)
    assert run.notes[1:] == [
        "model.toml also needs bits.csv, which is not in a result, beside it.",
        "edge-ndp also needs where.csv, which is not in a result, beside policy-1.toml.",
    ]


def test_files_needed_to_run_again_are_named(tmp_path):
    """A policy's file is named, without where it lay; so is the hash of the trace, as `moetrace info` says it."""
    path = tmp_path / "trace.h5"
    mt.generate(path, "tiny-olmoe", requests=2, prompt=3, output=3)
    rows = [list(range(32))] * 6
    (tmp_path / "own-plan.json").write_text(json.dumps({"physical_to_logical_map": rows}))
    (tmp_path / "own.toml").write_text(
        'name = "own"\nplacement = "plan"\nplan = "own-plan.json"\ndispatch = "ndp"\nresidency = "none"\n'
    )
    mt.report(
        mt.replay(path, policies=tmp_path / "own.toml", overrides={"system.ndp.units": 4}), tmp_path / "page.html"
    )
    page = Parsed((tmp_path / "page.html").read_bytes())
    text = "".join(page.text)
    assert "own also needs own-plan.json, which is not in a result, beside policy-1.toml." in text
    assert str(tmp_path) not in text
    with mt.Trace.open(path) as trace:
        assert f"must say that its content_sha256 is {trace.content_sha256}." in text


def test_toml_is_read_back():
    values = {"a b": 'x"\\\n\x7f\x00é', "n": 1, "f": 1e300, "t": True, "none": None, "l": [1, "x"], "d": {"k.": -0.5}}
    assert tomllib.loads(toml(values)) == {key: value for key, value in values.items() if value is not None}


def test_numbers_are_for_people():
    assert [number(v) for v in (None, True, 1234, 0.0, 12.3456, 0.000123456, 1e-9, 123456.7, float("nan"), "x")] == (
        ["–", "yes", "1,234", "0", "12.35", "0.0001235", "1.000e-09", "123,457", "–", "x"]
    )
    assert [seconds(v) for v in (None, 0.0, 2.5e-6, 0.0123, 12.3)] == ["–", "0 µs", "2.500 µs", "12.30 ms", "12.30 s"]


def test_reading_gives_the_written_values(result, written):
    read, made = read_replayed(written), replayed_of(result)
    assert read.summary == made.summary
    assert read.experts is not None and read.experts.equals(made.experts)
