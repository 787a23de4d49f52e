"""Result folders of strangers: special files, links, files that unpack to far more, numbers that none of ours has."""

import contextlib
import gzip
import io
import json
import os
import shutil
import socket
import struct

import polars as pl
import pytest

import moetrace as mt
from moetrace.results import read_parquet
from moetrace.results.folder import read_cells, read_summary
from moetrace.results.replayed import read_replayed
from moetrace.spec import parquet_pages
from moetrace.spec.load import read_text
from moetrace.spec.ordinary_file import read_ordinary
from moetrace.spec.parquet_pages import DamagedParquetError, parquet_sizes
from moetrace.spec.plan import load_plan


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    trace = mt.generate_trace("tiny-olmoe", requests=2, prompt=3, output=3)
    mt.replay(trace, policies=["monde", "on-demand"], slots=8).write(folder)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "out")


def special(path, what):
    path.unlink()
    if what == "fifo":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "socket":
        with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as one:  # a socket's path must be short
            one.bind(path.name)
    else:
        path.symlink_to({"device": "/dev/zero", "loop": path, "nothing": "/nowhere", "file": path.with_name("x")}[what])


@pytest.mark.parametrize("what", ["fifo", "folder", "socket", "device", "loop", "nothing", "file"])
def test_special_files_are_refused_at_once(folder, what):
    shutil.copy(folder / "units.parquet", folder / "x")
    special(folder / "units.parquet", what)
    said = "not an ordinary file" if what in ("fifo", "folder", "socket") else "it is a symbolic link"
    with pytest.raises(mt.MoetraceError, match=rf"Cannot read .*units\.parquet: .*{said}"):
        read_replayed(folder)
    shutil.copy(folder / "summary.json", folder / "x")
    special(folder / "summary.json", what)
    for read in (read_replayed, read_cells):
        with pytest.raises(mt.MoetraceError, match=rf"Cannot read .*summary\.json: .*{said}"):
            read(folder)


def test_a_path_that_the_user_names_may_be_a_link_but_no_pipe(written, tmp_path):
    (tmp_path / "spec.toml").write_text("a = 1\n")
    (tmp_path / "link.toml").symlink_to(tmp_path / "spec.toml")
    os.mkfifo(tmp_path / "pipe.json")
    assert read_text(tmp_path / "link.toml") == "a = 1\n"
    for path in (tmp_path / "pipe.json", "/dev/zero", tmp_path):
        with pytest.raises(mt.MoetraceError, match="it is not an ordinary file"):
            read_text(path)
    with pytest.raises(mt.MoetraceError, match="it is not an ordinary file"):
        load_plan(tmp_path / "pipe.json", [0], 1, 1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(mt.MoetraceError, match=r"pipe\.json: it is not an ordinary file"):
        mt.gate(written, tmp_path / "pipe.json")
    (tmp_path / "large").write_bytes(bytes((1 << 20) + 1))
    assert len(read_ordinary(tmp_path / "large", (1 << 20) + 1)) == (1 << 20) + 1
    with pytest.raises(mt.MoetraceError, match="it has more than 1 MiB"):
        read_ordinary(tmp_path / "large", 1 << 20)


def altered(folder, path, value):
    """Write `value` at a path of keys in summary.json, as JSON text."""
    summary = json.loads((folder / "summary.json").read_text())
    place = summary
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = "HERE"
    (folder / "summary.json").write_text(json.dumps(summary).replace('"HERE"', value))


@pytest.mark.parametrize("value", ["1e999", "-1e999", "1" + "0" * 400 + ".5", "NaN", "Infinity"])
def test_numbers_that_are_too_large_for_a_float_are_refused(folder, value):
    altered(folder, ["model", "hidden"], value)
    for read in (read_summary, read_cells):
        with pytest.raises(mt.MoetraceError, match=r"summary\.json"):
            read(folder)
    with pytest.raises(mt.MoetraceError, match=r"summary\.json"):
        mt.gate(folder, folder / "b.json", update=True)
    assert not (folder / "b.json").exists()


@pytest.mark.parametrize("name", ["hits", "total_s", "ttft_s.p50", "utilization.ndp"])
def test_a_negative_figure_is_refused(folder, name):
    keys = ["policies", 0, *name.split(".")]
    altered(folder, keys, "[0.5, -1]" if name == "utilization.ndp" else "-1")
    with pytest.raises(mt.MoetraceError, match=r"summary\.json"):
        read_summary(folder)
    with pytest.raises(mt.MoetraceError, match=f"{name} wants a finite number that is not negative"):
        mt.gate(folder, folder / "b.json", metrics=[name], update=True)


@pytest.mark.parametrize(
    ("name", "column", "value"),
    [("units", "utilization", float("nan")), ("layers", "hits", -1), ("steps", "duration_s", float("inf"))],
)
def test_a_number_in_a_table_must_be_finite_and_not_negative(folder, name, column, value):
    path = folder / f"{name}.parquet"
    frame = pl.read_parquet(path)
    changed = pl.when(pl.int_range(pl.len()) == pl.len() - 1).then(pl.lit(value)).otherwise(pl.col(column))
    frame.with_columns(changed.alias(column)).write_parquet(path)
    with pytest.raises(mt.MoetraceError, match=rf"{name}\.parquet: the column {column} must have finite numbers"):
        read_replayed(folder)


def sizes(path):
    with path.open("rb") as file:
        return parquet_sizes(file)


@pytest.mark.parametrize("compression", ["zstd", "gzip", "snappy", "uncompressed"])
def test_sizes_are_those_of_the_pages(tmp_path, compression):
    texts = ["x" * 50_000 + str(number) for number in range(200)]
    frame = pl.DataFrame({"policy": texts, "number": range(200), "flag": [True, None] * 100})
    frame.write_parquet(tmp_path / "a.parquet", compression=compression, row_group_size=50)
    found = sizes(tmp_path / "a.parquet")
    assert (found.rows, found.group_rows) == (200, 50)
    assert 200 * 50_000 < found.unpacked_bytes < 200 * 50_200
    assert found.unpacked_bytes / 4 <= found.group_bytes < found.unpacked_bytes / 4 + 2000
    pl.DataFrame({"a": []}, schema={"a": pl.Int64}).write_parquet(tmp_path / "none.parquet")
    assert sizes(tmp_path / "none.parquet").rows == 0


def test_a_table_that_unpacks_to_far_more_is_refused_before_it_is_read(folder, monkeypatch):
    path = folder / "units.parquet"
    whole = pl.read_parquet(path)
    long = pl.concat([whole.with_columns(pl.lit("x" * 60_000).alias("unit")).head(1)] * 400)
    long = long.with_columns(pl.col("unit") + pl.int_range(pl.len()).cast(pl.String))
    long.write_parquet(path)
    assert path.stat().st_size < 300_000 and sizes(path).unpacked_bytes > 400 * 60_000
    monkeypatch.setattr(read_parquet, "MOST_BYTES", 10 << 20)
    monkeypatch.setattr(pl, "scan_parquet", None)  # nothing of it is read
    with pytest.raises(
        mt.MoetraceError, match=r"units\.parquet has 24,\d{3},\d{3} bytes in a row group when it is unpacked"
    ):
        read_parquet.whole_frame(path, {"unit": pl.String})
    with pytest.raises(mt.MoetraceError, match="bytes in a row group when it is unpacked"):
        read_parquet.scan(path, {"unit": pl.String})
    long.write_parquet(path, row_group_size=50)
    with pytest.raises(mt.MoetraceError, match=r"bytes when it is unpacked, but 10,485,760 is the most that is read"):
        read_parquet.whole_frame(path, {"unit": pl.String})
    monkeypatch.setattr(read_parquet, "MOST_ROWS", 100)
    with pytest.raises(mt.MoetraceError, match="has 400 rows, but 100 is the most that is read"):
        read_parquet.whole_frame(path, {"unit": pl.String})


def test_a_footer_that_understates_its_pages_is_not_believed(tmp_path):
    """A page's own header counts: what the footer sums up may say less."""
    path = tmp_path / "a.parquet"
    pl.DataFrame({"policy": ["x" * 1_000_000]}).write_parquet(path)
    data = path.read_bytes()
    found = sizes(path)
    assert found.unpacked_bytes > 1_000_000

    def varint(value):
        value = value << 1
        text = b""
        while value > 127:
            text, value = text + bytes([value & 127 | 128]), value >> 7
        return text + bytes([value])

    footer = len(data) - 8 - struct.unpack("<I", data[-8:-4])[0]
    for less in range(found.unpacked_bytes, found.unpacked_bytes + 200):  # total_uncompressed_size counts headers, too
        if (at := data.find(varint(less), footer)) > 0:
            data = data[:at] + varint(16_384 + 1) + data[at + len(varint(less)) :]
    path.write_bytes(data)
    assert sizes(path).unpacked_bytes == found.unpacked_bytes


def test_the_file_that_was_checked_is_the_one_that_is_read(tmp_path, monkeypatch):
    """Another file takes its name, after its sizes were checked and again before its rows are read."""
    path = tmp_path / "a.parquet"
    pl.DataFrame({"a": [1, 2]}).write_parquet(path)

    def swap(*arguments):
        path.unlink()
        path.write_text("another file")
        return sizes_of(*arguments)

    sizes_of = read_parquet._checked_sizes
    monkeypatch.setattr(read_parquet, "_checked_sizes", swap)
    frame = read_parquet.scan(path, {"a": pl.Int64})
    assert frame is not None and frame.collect()["a"].to_list() == [1, 2]
    assert frame.select(pl.col("a").sum()).collect(engine="streaming").item() == 3
    path.unlink()
    pl.DataFrame({"a": [3]}).write_parquet(path)
    assert read_parquet.whole_frame(path, {"a": pl.Int64})["a"].to_list() == [3]


def test_any_damage_to_a_parquet_file_is_read_or_refused(written):
    data = (written / "units.parquet").read_bytes()
    refused = 0
    for at in range(4, len(data), 31):
        for byte in (0, 0x19, 0xFF):
            try:
                assert parquet_sizes(io.BytesIO(data[:at] + bytes([byte]) + data[at + 1 :])).rows >= 0
            except DamagedParquetError:
                refused += 1
    assert refused > 20
    for length in range(0, len(data), 97):
        with pytest.raises(DamagedParquetError):
            parquet_sizes(io.BytesIO(data[:length]))


def test_a_footer_nested_too_deep_is_refused(tmp_path):
    deep = b"\x1c" * 5000
    (tmp_path / "a").write_bytes(b"PAR1" + deep + struct.pack("<I", len(deep)) + b"PAR1")
    with pytest.raises(DamagedParquetError, match="nested too deep"):
        sizes(tmp_path / "a")
    long = b"\x19\xfc\xff\xff\xff\x7f"  # a list of 2^28 structs
    (tmp_path / "a").write_bytes(b"PAR1" + long + struct.pack("<I", len(long)) + b"PAR1")
    with pytest.raises(DamagedParquetError, match="claims more than it holds"):
        sizes(tmp_path / "a")
    assert parquet_pages._MOST_FOOTER < 1 << 26


def test_a_timeline_that_unpacks_to_far_more_or_is_nested_too_deep_is_refused(tmp_path):
    pytest.importorskip("altair")
    from moetrace.show.charts.one_step import one_step

    path = tmp_path / "timeline.json.gz"
    for content, said in (
        (b'{"traceEvents": [], "otherData": {"a": ' + b"[" * 100_000, "not what moetrace writes"),
        (b'{"traceEvents": [{"ph": "X", "name": "a", "ts": 1e999}]}', "not what moetrace writes"),
        (b'{"traceEvents": [{"ph": "X", "name": "a", "dur": -1}]}', "not what moetrace writes"),
    ):
        path.write_bytes(gzip.compress(content, 1))
        with pytest.raises(mt.MoetraceError, match=said):
            one_step(path)
    (tmp_path / "summary.json").write_text("[" * 100_000)
    for read in (read_summary, read_cells):
        with pytest.raises(mt.MoetraceError, match=r"summary\.json"):
            read(tmp_path)
