"""Tables that are not regular: quotes, lines of other lengths, layers that are names."""

import numpy as np
import polars as pl
import pytest
from support.writers import imported, refused, routing
from support.writers.any_table import csv_of

from moetrace.importers.captured import Hints
from moetrace.importers.importing import import_traces
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace import Trace


def named(path, columns):
    import_traces(path, path.parent / "named.h5", hints=Hints(num_experts=8, columns=columns))
    return Trace.open(path.parent / "named.h5")


def lines_of(ids, line):
    rows, layers, _ = ids.shape
    return "".join(line(row, layer, *ids[row, layer].tolist()) for row in range(rows) for layer in range(layers))


@pytest.mark.parametrize("chunk", [64, 1 << 20])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_newlines_and_separators_in_quotes(tmp_path, monkeypatch, chunk, newline):
    monkeypatch.setattr("moetrace.importers.reading.text.CHUNK_BYTES", chunk)
    ids = routing(9, 3, 2, 8)
    forms = {
        "list, text": lambda t, layer, a, b: f'{t},{layer},"[{a}, {b}]","one{newline}two, ""q"""{newline}',
        "text, list": lambda t, layer, a, b: f'{t},{layer},"a{newline}{newline}b,c",{a} {b}{newline}',
        "list": lambda t, layer, a, b: f'{t},{layer},"[{a}{newline} {b}]",x{newline}',
    }
    for form, line in forms.items():
        head = "token,layer,text,experts" if form == "text, list" else "token,layer,experts,text"
        (path := tmp_path / "a.csv").write_text(head + newline + lines_of(ids, line), newline="")
        trace = imported(tmp_path, path, num_experts=8)
        assert np.array_equal(trace.read("experts", 0, 9), ids), form
    path.write_text(path.read_text() + '9,0,"1 2,never closed\n' + "x" * 100)
    assert "\n" not in refused(tmp_path, path, num_experts=8)


def test_quotes_that_come_late_in_a_column_that_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("moetrace.importers.reading.tabular._FIRST_BYTES", 64)
    ids = routing(9, 3, 2, 8)
    texts = ["x"] * 5 + ['"a\nb"'] * 4
    made = lines_of(ids, lambda t, layer, a, b: f"{t},{layer},{a},{texts[t]}\n{t},{layer},{b},y\n")
    (path := tmp_path / "a.csv").write_text("token,layer,expert,text\n" + made)
    assert np.array_equal(imported(tmp_path, path, num_experts=8).read("experts", 0, 9), ids)


def test_lines_with_too_few_or_too_many_fields(tmp_path):
    ids = routing(20, 3, 2, 8)
    columns = {"layer": "layer", "token": "token", "experts": "e0+e1"}
    path = tmp_path / "a.csv"
    path.write_text(
        "token,layer,e0,e1\n" + lines_of(ids, lambda t, n, a, b: f"{t},{n},{a}{f',{b}' if t % 5 else ''}\n")
    )
    found = named(path, columns).read("experts", 0, 20)
    lacking = np.zeros_like(ids, bool)
    lacking[::5, :, 1] = True
    assert np.array_equal(found, np.where(lacking, 255, ids))
    path.write_text("token,layer,e0,e1\n" + lines_of(ids, lambda t, n, a, b: f"{t},{n},{a},{b}{',' * (t % 3)}\n"))
    found = named(path, columns).read("experts", 0, 20)
    assert np.array_equal(found, ids), "commas at the end say nothing"
    path.write_text("token,layer,experts\n" + lines_of(ids, lambda t, n, a, b: f"{t},{n},{a},{b}\n"))
    assert np.array_equal(imported(tmp_path, path, num_experts=8).read("experts", 0, 20), ids), "a list without quotes"
    for line, why in (
        ("9,0,1,2,3\n", "more fields than 4 names"),
        ("9,x,1\n", "row 60 holds 'x' as layer"),
        ("9\n", "no layer"),
    ):
        path.write_text("token,layer,e0,e1\n" + lines_of(ids, lambda t, n, a, b: f"{t},{n},{a},{b}\n") + line)
        with pytest.raises(MoetraceError, match=why):
            import_traces(path, tmp_path / "x.h5", hints=Hints(num_experts=8, columns=columns))


@pytest.mark.parametrize("form", ["parquet", "jsonl", "csv"])
@pytest.mark.parametrize("name", ["model.layers.{}.mlp.gate", "layer_{}", "blk.{}.ffn_gate_inp.0", "moe{}"])
def test_layers_by_their_names(tmp_path, form, name):
    ids = routing(9, 3, 2, 8)
    layers = [name.format(number) for number in (1, 3, 12)]
    frame = pl.DataFrame(
        {"token": np.repeat(np.arange(9), 3), "layer": layers * 9, "experts": ids.reshape(-1, 2).tolist()}
    )
    path = tmp_path / f"a.{form}"
    if form == "parquet":
        frame.write_parquet(path)
    elif form == "jsonl":
        frame.write_ndjson(path)
    else:
        path.write_text(csv_of(frame))
    trace = imported(tmp_path, path, num_experts=8)
    assert trace.layer_index.tolist() == [1, 3, 12] and np.array_equal(trace.read("experts", 0, 9), ids)
    frame.with_columns(pl.col("layer").replace({layers[1]: "the last one"})).write_parquet(tmp_path / "b.parquet")
    assert "row 1 has the layer 'the last one', whose name has no number" in refused(
        tmp_path, tmp_path / "b.parquet", num_experts=8
    )


@pytest.mark.parametrize(("left_out", "what"), [("request", "request"), ("gates", "gates"), ("step", "step")])
def test_files_of_layers_that_lack_a_column_are_refused(tmp_path, left_out, what):
    columns = {"request": [0, 0, 1], "step": [0, 1, 2], "token": [0, 1, 0]}
    columns |= {"experts": [[1, 2], [3, 4], [5, 6]], "gates": [[0.5, 0.5]] * 3}
    paths = [tmp_path / f"layer_{number}.parquet" for number in range(2)]
    for path in paths:
        pl.DataFrame(columns).write_parquet(path)
    assert imported(tmp_path, *paths, num_experts=8).layers == 2
    pl.DataFrame(columns).drop(left_out).write_parquet(paths[1])
    assert f"do not both have a column of {what}." in refused(tmp_path, *paths, num_experts=8)


def test_steps_of_any_number(tmp_path):
    steps = [-(2**63), -(2**63), 0, 2**63 - 1]
    columns = {"step": steps, "token": [0, 1, 0, 0], "layer": [0] * 4, "experts": [[1, 2]] * 4}
    pl.DataFrame(columns).write_parquet(tmp_path / "a.parquet")
    assert np.diff(imported(tmp_path, tmp_path / "a.parquet", num_experts=8).offset).tolist() == [2, 1, 1]


def test_whole_numbers_that_are_written_otherwise(tmp_path):
    ids = routing(9, 3, 2, 8)
    row, layer, _ = np.indices(ids.shape).reshape(3, -1)
    table = pl.DataFrame({"token": row, "layer": layer, "expert": ids.ravel()})
    floats = table.with_columns(pl.all().cast(pl.Float64))
    floats.write_csv(tmp_path / "a.csv")
    floats.with_columns(
        pl.when(pl.col("token") == 4).then(float("nan")).otherwise("expert").alias("expert")
    ).write_parquet(tmp_path / "b.parquet")
    cells = pl.DataFrame({"token": row[::2], "layer": layer[::2], "experts": ids.reshape(-1, 2).tolist()})
    cells.with_columns(pl.col("experts").cast(pl.List(pl.String))).write_ndjson(tmp_path / "c.jsonl")
    for name in ("a.csv", "b.parquet", "c.jsonl"):
        expected = ids.copy()
        if name == "b.parquet":
            expected[4] = 255
        assert np.array_equal(imported(tmp_path, tmp_path / name, num_experts=8).read("experts", 0, 9), expected), name
    lacking = pl.when(pl.col("token") == 4).then(float("nan")).otherwise("layer")
    floats.with_columns(lacking.alias("layer")).write_parquet(tmp_path / "f.parquet")
    assert "row 24 has no layer" in refused(tmp_path, tmp_path / "f.parquet", num_experts=8)
    floats.with_columns(pl.col("expert") + 0.5).write_parquet(tmp_path / "d.parquet")
    assert "must be whole numbers" in refused(tmp_path, tmp_path / "d.parquet", num_experts=8)
    cells.with_columns(pl.lit([["a", "b"]]).alias("experts")).write_parquet(tmp_path / "e.parquet")
    assert "must be whole numbers" in refused(tmp_path, tmp_path / "e.parquet", num_experts=8)


def test_gates_with_a_decimal_comma(tmp_path):
    ids = routing(9, 3, 2, 8)
    made = lines_of(ids, lambda t, layer, a, b: f"{t};{layer};{a};0,75\n{t};{layer};{b};0,25\n")
    (path := tmp_path / "a.csv").write_text("token;layer;expert;gate\n" + made)
    trace = imported(tmp_path, path, num_experts=8)
    assert np.array_equal(trace.read("experts", 0, 9), ids)
    assert (trace.read("gates", 0, 9) == [0.75, 0.25]).all()


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_the_number_of_a_file_of_whole_tokens_is_no_layer(tmp_path, form):
    ids = routing(9, 3, 2, 8)
    paths = [tmp_path / f"prompt_{number}.{form}" for number in range(2)]
    for path, part in zip(paths, (ids[:4], ids[4:]), strict=True):
        frame = pl.DataFrame({"token": np.arange(len(part)), "experts": part.tolist()})
        frame.write_parquet(path) if form == "parquet" else frame.write_ndjson(path)
    trace = imported(tmp_path, *paths, num_experts=8)
    assert trace.layer_index.tolist() == [0, 1, 2] and np.array_equal(trace.read("experts", 0, 9), ids)
    assert trace.read("request", 0, 9).tolist() == [0] * 4 + [1] * 5 and "layers" not in trace.source


def test_long_names_of_columns_are_shown_short(tmp_path):
    names = [f"{number}" + "x" * 5000 + "\n" for number in range(30)]
    pl.DataFrame(dict.fromkeys(names, 1)).write_parquet(tmp_path / "a.parquet")
    for columns in (None, {"experts": "e"}):
        with pytest.raises(UsageError, match="it has 0xxx") as raised:
            import_traces(tmp_path / "a.parquet", tmp_path / "o.h5", hints=Hints(num_experts=8, columns=columns))
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 2000
