"""Any table whose columns are named: each form gives the same trace; what does not fit is one sentence."""

import numpy as np
import polars as pl
import pytest
from support.writers import steps
from support.writers.any_table import (
    EXPERTS,
    NUMBERS,
    ROWS,
    choices,
    csv_of,
    gates,
    ids,
    json_of,
    lists,
    prompt_table,
    score_table,
    tokens,
)

from moetrace.exports import export
from moetrace.importers.captured import Hints
from moetrace.importers.columns import said_columns
from moetrace.importers.formats import detect
from moetrace.importers.importing import import_traces
from moetrace.spec.errors import MoetraceError
from moetrace.trace import Trace


def named(folder, *sources, columns=None, **hints):
    hints = {"num_experts": EXPERTS} | hints
    said = said_columns(columns) if columns else None
    import_traces(sources, folder / "out.h5", hints=Hints(columns=said, **hints))
    trace = Trace.open(folder / "out.h5")
    trace.verify()
    return trace


def not_named(folder, *sources, columns=None, **hints) -> str:
    with pytest.raises(MoetraceError) as error:
        named(folder, *sources, columns=columns, **hints)
    assert not (folder / "out.h5").exists()
    text = str(error.value)
    assert "\n" not in text and text.endswith(".")
    return text


def check(trace: Trace, numbers: list[int] = NUMBERS) -> None:
    np.testing.assert_array_equal(trace.read("experts", 0, ROWS), ids())
    np.testing.assert_array_equal(trace.read("gates", 0, ROWS), gates())
    assert trace.rows == ROWS and trace.layer_index.tolist() == numbers and trace.source["format"] == "any-table"
    assert trace.read("request", 0, ROWS).tolist() == (np.arange(ROWS) // 6).tolist()
    assert trace.read("position", 0, ROWS).tolist() == (np.arange(ROWS) % 6).tolist()


def write(folder, frame: pl.DataFrame, kind: str):
    path = folder / f"a.{kind}"
    if kind == "parquet":
        frame.write_parquet(path)
    else:
        path.write_text(csv_of(frame) if kind == "csv" else json_of(frame))
    return path


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("frame", [choices, lists])
def test_a_row_a_choice_and_a_row_a_cell(tmp_path, frame, kind):
    path = write(tmp_path, frame(), kind)
    assert detect(path) == "any-table"
    check(named(tmp_path, path))


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("frame", [choices, lists])
def test_columns_of_other_names_in_another_order(tmp_path, frame, kind):
    names = {
        "request": "who",
        "token_idx": "when",
        "layer": "depth",
        "expert": "x",
        "experts": "x",
        "gate": "w",
        "gates": "w",
    }
    made = frame().rename({name: names[name] for name in frame().columns}).with_columns(pl.lit(5).alias("more"))
    path = write(tmp_path, made.select(sorted(made.columns)), kind)
    check(named(tmp_path, path, columns="layer=depth,token=when,experts=x,gates=w,request=who"))


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_row_a_token(tmp_path, kind):
    check(
        named(tmp_path, write(tmp_path, tokens(), kind), columns="experts=experts,gates=gates,request=request"),
        [0, 1, 2],
    )


def test_a_column_for_each_slot(tmp_path):
    made = (
        lists().with_columns(pl.col("experts").list.get(at).alias(f"e{at}") for at in (0, 1)).drop("experts", "gates")
    )
    for columns in ("e0+e1", "e*"):
        trace = named(
            tmp_path,
            write(tmp_path, made, "csv"),
            columns=f"layer=layer,token=token_idx,request=request,experts={columns}",
        )
        np.testing.assert_array_equal(trace.read("experts", 0, ROWS), ids())


def test_rows_in_any_order(tmp_path):
    made = (
        lists().with_columns(pl.Series("step", np.repeat(np.arange(ROWS), 3))).sample(fraction=1, shuffle=True, seed=1)
    )
    trace = named(tmp_path, write(tmp_path, made, "parquet"))
    np.testing.assert_array_equal(trace.read("experts", 0, ROWS), ids())
    assert steps(trace) == [(1, 0)] * ROWS


def test_layers_one_after_another_without_a_column_of_tokens(tmp_path):
    made = lists().sort("layer", maintain_order=True).drop("token_idx", "request")
    trace = named(tmp_path, write(tmp_path, made, "parquet"))
    np.testing.assert_array_equal(trace.read("experts", 0, ROWS), ids())


def test_a_file_for_each_layer(tmp_path):
    """As one public capture is: indices and scores, the layer in the name alone."""
    for entry, layer in enumerate(NUMBERS):
        frame = {"indices": ids()[:, entry].tolist(), "scores": gates()[:, entry].tolist()}
        pl.DataFrame(frame, schema={"indices": pl.List(pl.Int16), "scores": pl.List(pl.Float32)}).write_parquet(
            tmp_path / f"layer{layer}.parquet"
        )
    paths = [tmp_path / f"layer{layer}.parquet" for layer in (4, 1, 3)]
    trace = named(tmp_path, *paths)
    assert trace.layer_index.tolist() == NUMBERS
    np.testing.assert_array_equal(trace.read("experts", 0, ROWS), ids())
    np.testing.assert_array_equal(trace.read("gates", 0, ROWS), gates())


@pytest.mark.parametrize("name", ["tiny-olmoe.h5", "mixtral-8x7b-b16.h5"])
def test_an_export_is_read_back(tmp_path, name):
    from pathlib import Path

    with Trace.open(Path(__file__).parents[2] / "traces" / name) as trace:
        export(trace, tmp_path / "a.parquet")
        back = named(tmp_path, tmp_path / "a.parquet", num_experts=trace.num_experts)
        assert back.has == trace.has and back.layer_index.tolist() == trace.layer_index.tolist()
        for column in ("experts", "request", "position", *trace.has):
            np.testing.assert_array_equal(back.read(column, 0, back.rows), trace.read(column, 0, trace.rows))
        np.testing.assert_array_equal(back.offset, trace.offset)
        np.testing.assert_array_equal(back.phase, trace.phase)


def test_a_route_trace_without_its_first_lines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(
        "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n"
        "0,0,0,1,0,5,0.75,0,9\n0,0,0,1,1,2,0.25,1,9\n0,1,1,1,0,3,0.5,2,9\n0,1,1,1,1,1,0.5,1,9\n1,0,0,1,0,4,1.0,0,9\n"
    )
    trace = named(tmp_path, path)
    assert trace.read("experts", 0, 3).tolist() == [[[5, 2]], [[3, 1]], [[4, 255]]]
    assert trace.read("recorded", 0, 3).tolist() == [[[0, 1]], [[2, 1]], [[0, 255]]]
    assert trace.read("request", 0, 3).tolist() == [0, 0, 1] and trace.read("position", 0, 3).tolist() == [0, 1, 0]
    assert steps(trace) == [(1, 0), (1, 1), (1, 0)]


def test_phases_and_requests_as_texts_and_steps(tmp_path):
    made = lists().with_columns(
        pl.when(pl.col("token_idx") < 4).then(pl.lit("Prefill")).otherwise(pl.lit("decode")).alias("phase"),
        pl.format("req-{}", pl.col("request")).alias("request"),
        pl.Series("step", np.repeat([0] * 4 + [1, 2] + [3] * 4 + [4, 5], 3)),
    )
    for kind in ("parquet", "csv", "jsonl"):
        trace = named(tmp_path, write(tmp_path, made, kind))
        assert steps(trace) == [(4, 0), (1, 1), (1, 1)] * 2
        assert trace.read("request", 0, ROWS).tolist() == [0] * 6 + [1] * 6


def test_no_choice_is_absent(tmp_path):
    made = lists().with_columns(pl.Series("experts", [[1, None], [2, -1], *ids().reshape(-1, 2)[2:].tolist()]))
    for kind in ("parquet", "jsonl"):
        trace = named(tmp_path, write(tmp_path, made.drop("gates"), kind))
        assert trace.read("experts", 0, 1)[0, :2].tolist() == [[1, 255], [2, 255]]


def test_pieces_cut_nothing(tmp_path, monkeypatch):
    path = write(tmp_path, choices(), "parquet")
    monkeypatch.setattr("moetrace.importers.reading.tabular._SLICE_ROWS", (5, 5))
    choices().write_parquet(path, row_group_size=7)
    check(named(tmp_path, path))
    monkeypatch.setattr("moetrace.importers.reading.text.CHUNK_BYTES", 50)
    check(named(tmp_path, write(tmp_path, choices(), "csv")))


def changed(**columns) -> pl.DataFrame:
    return lists().with_columns(pl.Series(name, values) for name, values in columns.items())


CELLS = ids().reshape(-1, 2).tolist()
BAD = {
    "missing column": (lists(), "layer=depth,token=token_idx,experts=experts", "has no column 'depth' for layer"),
    "no experts": (lists(), "layer=layer,token=token_idx", "must say which column holds the experts"),
    "unknown meaning": (lists(), "layers=layer,experts=experts", "knows no 'layers'"),
    "ids that are text": (
        lists().with_columns(pl.Series("experts", [f"e{at}" for at in range(36)])),
        None,
        "must be whole numbers",
    ),
    "two rows for one cell": (pl.concat([lists(), lists()[4:5]]), None, "two rows hold the same cell (layer 3"),
    "negative layer": (changed(layer=[-1, *lists()["layer"].to_list()[1:]]), None, "row 0 is of layer -1"),
    "different numbers": (
        changed(experts=[*CELLS[:5], [1, 2, 3], *CELLS[6:]]).drop("gates"),
        None,
        "3 experts in layer 4, but 2",
    ),
    "an expert too many": (changed(experts=[[1, 8], *CELLS[1:]]), None, "expert 8 is not 0 to 7"),
    "an expert twice": (changed(experts=[[1, 1], *CELLS[1:]]), None, "more than once"),
    "gates of another number": (changed(gates=[[0.5], *lists()["gates"].to_list()[1:]]), None, "differ in number"),
    "a phase that is none": (lists().with_columns(phase=pl.lit("warm")), None, "'warm'"),
    "layers without a name": (lists().drop("layer"), "experts=experts", "does not say the layer"),
}


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("bad", BAD)
def test_a_table_that_does_not_fit_is_refused_in_one_sentence(tmp_path, bad, kind):
    frame, columns, message = BAD[bad]
    said = not_named(tmp_path, write(tmp_path, frame, kind), columns=columns)
    if not (kind == "csv" and bad == "ids that are text"):
        assert message in said or (kind != "parquet" and bad == "different numbers")


def test_choices_of_cells_that_differ_in_number(tmp_path):
    path = write(tmp_path, choices()[1:], "parquet")
    assert "give --top-k" in not_named(tmp_path, path)
    assert named(tmp_path, path, top_k=2).read("experts", 0, 1)[0, 0].tolist() == [ids()[0, 0, 1], 255]


def test_a_table_of_unknown_columns_names_the_way_out(tmp_path):
    pl.DataFrame({"a": [1], "b": [2]}).write_parquet(tmp_path / "a.parquet")
    said = not_named(tmp_path, tmp_path / "a.parquet")
    assert "--columns" in said and "it has a, b" in said
    (tmp_path / "a.txt").write_text("nothing of this kind\n")
    assert "write the choices as a table (Parquet, CSV, JSON lines)" in not_named(tmp_path, tmp_path / "a.txt")


def test_a_parquet_file_that_claims_more_than_its_size_justifies_is_refused(tmp_path):
    rows = 20_000_000
    frame = pl.DataFrame(
        {"layer": np.zeros(rows, np.int32), "token": np.zeros(rows, np.int32), "expert": np.zeros(rows, np.int32)}
    )
    frame.write_parquet(tmp_path / "a.parquet", compression="zstd", row_group_size=rows)
    assert "is the most that is read" in not_named(tmp_path, tmp_path / "a.parquet")


def test_a_small_list_that_repeats_one_value_is_refused(tmp_path):
    frame = pl.DataFrame(
        {"layer": [0], "token": [0], "experts": [[1] * 30_000_000]}, schema_overrides={"experts": pl.List(pl.Int32)}
    )
    frame.write_parquet(tmp_path / "a.parquet", compression="zstd")
    assert "values in a row group" in not_named(tmp_path, tmp_path / "a.parquet")


def test_other_formats_keep_their_files(tmp_path):
    from support.writers import colibri, lattice, llamacpp

    for module, name in ((lattice, "lattice"), (llamacpp, "llamacpp"), (colibri, "colibri")):
        folder = tmp_path / name
        folder.mkdir()
        for sample in module.samples(folder):
            assert {detect(path) for path in sample.files} == {name}


def test_the_tables_of_moe_beyond(tmp_path):
    paths = [tmp_path / f"prompt_{number}_data.csv" for number in (1, 2)]
    paths[0].write_text(prompt_table(), newline="")
    paths[1].write_text(prompt_table([3, 1]), newline="")
    assert detect(paths[0]) == "any-table"
    trace = named(tmp_path, *paths)
    assert np.array_equal(trace.read("experts", 0, 8), ids()[[0, 1, 2, 3, 4, 5, 3, 1]]), "a file is a request"
    assert trace.layer_index.tolist() == NUMBERS and trace.read("request", 0, 8).tolist() == [0] * 6 + [1] * 2
    assert trace.read("position", 0, 8).tolist() == [*range(6), 0, 1] and steps(trace) == [(6, 0), (2, 0)]
    with_vectors = prompt_table().replace("Expert IDs\r\n", "Expert IDs,Token Embedding Vector\r\n", 1)
    with_vectors = with_vectors.replace(']"\r\n', ']","[0.5, -1.25]"\r\n')
    paths[0].write_text(with_vectors, newline="")
    assert np.array_equal(named(tmp_path, paths[0]).read("experts", 0, 6), ids()[:6])


def test_the_tables_of_dynande(tmp_path):
    paths = [tmp_path / f"flame-moe_epoch5473_layer{layer}_firstTokens_64x512.csv" for layer in NUMBERS]
    for place, path in enumerate(paths):
        path.write_text(score_table(place))
    assert {detect(path) for path in paths} == {"any-table"}
    import_traces(paths, tmp_path / "out.h5")
    with Trace.open(tmp_path / "out.h5") as trace:
        trace.verify()
        assert np.array_equal(trace.read("experts", 0, ROWS), ids()) and trace.num_experts == EXPERTS
        expected = np.sort(gates() + 0.01, axis=-1)[..., ::-1]
        np.testing.assert_allclose(trace.read("gates", 0, ROWS), expected, atol=1e-3)
        assert trace.layer_index.tolist() == NUMBERS and trace.source["columns"]["scores"] == "expert_0 to expert_7"
    one = tmp_path / "a.csv"
    one.write_text(score_table(0, told_layer=9))
    assert named(tmp_path, one).layer_index.tolist() == [9], "without a layer in the name, layer_id says it"


def test_scores_may_be_rounded_away_and_must_be_scores(tmp_path):
    path = tmp_path / "layer3.csv"
    text = "layer_id,token_id,expert_0,expert_1,expert_2\n0,0,0.5,0.0,0.5\n0,1,0.0,0.0,0.25\n0,2,0.0,0.0,0.0\n"
    path.write_text(text)
    trace = named(tmp_path, path, num_experts=None)
    assert trace.read("experts", 0, 3).tolist() == [[[0, 2]], [[2, 255]], [[255, 255]]]
    (tmp_path / "out.h5").unlink()
    for value in ("-0.5", "nan"):
        path.write_text(text.replace("0.25", value))
        assert "row 1: expert_2 is" in not_named(tmp_path, path, num_experts=None)
    path.write_text(text.replace("expert_2", "expert_3"))
    with pytest.raises(MoetraceError, match="in no format"):
        detect(path)
    path.write_text(text)
    (tmp_path / "layer4.csv").write_text("layer_id,token_id,expert_0,expert_1\n0,0,0.5,0.5\n")
    assert "do not have the same experts" in not_named(tmp_path, path, tmp_path / "layer4.csv", num_experts=None)


def test_slots_that_count_from_1_are_refused(tmp_path):
    slot = pl.col("expert").cum_count().over("request", "token_idx", "layer")
    path = tmp_path / "a.csv"
    choices().with_columns(slot=slot - 1).write_csv(path)
    check(named(tmp_path, path))
    (tmp_path / "out.h5").unlink()
    choices().with_columns(slot=slot).write_csv(path)
    message = not_named(tmp_path, path)
    assert "no choice has the slot 0" in message and "take 1 from each" in message


def test_a_table_of_counts_says_what_its_columns_are_called(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("layer,expert,count\n0,0,7\n0,1,9\n")
    with pytest.raises(MoetraceError, match="call the columns layer_id,expert_id,count"):
        detect(path)
