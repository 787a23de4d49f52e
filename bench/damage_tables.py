"""Damage tables and arrays that stay whole files: columns and axes of other types, names, lengths and values."""

import io
import re
from random import Random

import numpy as np
import polars as pl

_NAMES = ("layer", "token", "experts", "expert", "gates", "request", "step", "phase", "position", "slot", "x", "", "e0")
_TEXTS = (b"", b"-1", b"x", b"nan", b"1e400", b"%d" % 2**70, b"[]", b"[1, 2, 3]", b"1 2", b'"1,2"', b'"', b"null", b"0")
_KINDS = (pl.String, pl.Float32, pl.Float64, pl.Int8, pl.UInt64, pl.Int64, pl.Boolean, pl.Binary, pl.Date, pl.Null)
_NUMBERS = (None, -1, 0, 2**31, 2**63 - 1, -(2**63), float("nan"), float("inf"), 0.5, "x", "[1, 2]", "\ud7ff", [], [[]])
_DTYPES = (
    "u1",
    "i1",
    ">i4",
    "<u8",
    "<i8",
    "f2",
    "<f8",
    "c8",
    "?",
    "S3",
    "U2",
    "M8[s]",
    "V4",
    [("a", "<i4"), ("b", "<f4")],
)


def changed_columns(random: Random, data: bytes, pool: list[bytes]) -> bytes | None:
    """A text of columns in which one is missing, moved, doubled, renamed, or of one value."""
    first, *rest = data.split(b"\n")
    separators = [mark for mark in (b",", b";", b"\t", b" ") if mark in first]
    if not separators or not rest:
        return None
    mark = random.choice(separators)
    rows = [line.split(mark) for line in (first, *rest)]
    at, other = random.randrange(len(rows[0])), random.randrange(len(rows[0]))
    way, text = random.randrange(6), random.choice(_TEXTS)
    for number, row in enumerate(rows):
        if at >= len(row) or other >= len(row):
            continue
        if way == 0:
            del row[at]
        elif way == 1:
            row[at], row[other] = row[other], row[at]
        elif way == 2:
            row.insert(other, row[at])
        elif way == 3 and number:
            row[at] = text
        elif way == 4 and not number:
            row[at] = random.choice(_NAMES).encode()
        elif way == 5 and random.random() < 0.2:
            row[at] = random.choice(_TEXTS)
    mark = random.choice((b",", b";", b"\t")) if random.random() < 0.1 else mark
    return b"\n".join(mark.join(row) for row in rows)


def changed_parquet(random: Random, data: bytes, pool: list[bytes]) -> bytes | None:
    """A Parquet file that is whole, in which a column has another type, name or value, or rows are others."""
    if data not in pool:  # damaged before: polars reads no such file without a panic now and then
        return None
    try:
        frame = pl.read_parquet(io.BytesIO(data))
        said = {key: text for key, text in pl.read_parquet_metadata(io.BytesIO(data)).items() if "ARROW" not in key}
        for _ in range(random.choice((1, 1, 2))):
            frame = _changed_frame(random, frame)
        whole = io.BytesIO()
        sizes = {"row_group_size": random.choice((None, 1, 7)), "compression": random.choice(("zstd", "uncompressed"))}
        frame.write_parquet(whole, metadata=said, **sizes)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, TypeError, ValueError, OverflowError):
        return None
    return whole.getvalue()


def _changed_frame(random: Random, frame: pl.DataFrame) -> pl.DataFrame:
    name = random.choice(frame.columns)
    column = pl.col(name)
    way = random.randrange(9)
    if way == 0:
        return frame.drop(name)
    if way == 1:
        return frame.rename({name: random.choice((*_NAMES, *frame.columns, "\n", "x" * 300))})
    if way == 2:
        return frame.with_columns(column.cast(random.choice(_KINDS), strict=False))
    if way == 3:
        return frame.with_columns(pl.lit(random.choice(_NUMBERS), allow_object=False).alias(name))
    if way == 4:
        inside = pl.List if random.random() < 0.5 else pl.Struct
        return frame.with_columns((pl.concat_list(column) if inside is pl.List else pl.struct(column)).alias(name))
    if way == 5:
        some = pl.Series([random.random() < 0.2 for _ in range(frame.height)], dtype=pl.Boolean)
        return frame.with_columns(pl.when(some).then(pl.lit(random.choice(_NUMBERS[:6]))).otherwise(column).alias(name))
    if way == 6 and isinstance(frame.schema[name], pl.List):
        return frame.with_columns(column.list.head(pl.int_range(pl.len()) % random.choice((1, 2, 3))))
    if way == 7:
        return frame.sample(fraction=random.choice((0, 0.5, 1)), shuffle=True, seed=random.randrange(1000))
    return pl.concat([frame, frame.head(random.choice((0, 1, frame.height)))]).reverse()


def changed_array(random: Random, data: bytes, pool: list[bytes]) -> bytes | None:
    """A .npy file that is whole, of another dtype, shape, order or with other values."""
    whole = io.BytesIO()
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
        with np.errstate(all="ignore"):
            np.save(whole, _changed_values(random, array))
    except Exception:  # noqa: BLE001 - damaged before
        return None
    found = whole.getvalue()
    if random.random() < 0.1:  # a header that says another shape than there is
        found = re.sub(rb"\d+(?=[,)])", b"%d" % random.choice((0, 2**40, 2**63)), found[:128], count=1) + found[128:]
    return found


def _changed_values(random: Random, array: np.ndarray) -> np.ndarray:
    way = random.randrange(8)
    if way == 0:
        return array.astype(random.choice(_DTYPES))
    if way == 1:
        return np.asfortranarray(array) if random.random() < 0.3 else array.transpose()
    if way == 2:
        return array.reshape(random.choice(((-1,), (1, *array.shape), (*array.shape, 1), (-1, 1))))
    if way == 3:
        return array[: random.choice((0, 1, -1))]
    if way == 4:
        return array[..., : random.choice((0, 1, -1))]
    if way == 5:
        return np.concatenate([array] * random.choice((2, 2, 9)), axis=random.randrange(max(1, array.ndim)))
    array = array.copy()
    some = np.frombuffer(random.randbytes(array.size), np.uint8).reshape(array.shape) < random.choice((1, 30, 256))
    if array.dtype.kind == "f":
        array[some] = random.choice((np.nan, np.inf, -1.0, 1e30, 0.0))
    elif array.dtype.kind in "iu":
        array[some] = random.choice((0, np.iinfo(array.dtype).max, np.iinfo(array.dtype).min, 1))
    return array
