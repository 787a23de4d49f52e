"""How large a Parquet file becomes when it is read: from its footer and its pages' headers, before any is unpacked.

Polars does not tell, and a page of 100 kB may unpack to 2 GiB. Footer and headers are in Thrift's compact protocol
(https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md); the numbers of their fields are in
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift.
"""

from typing import Any, BinaryIO, NamedTuple

_MAGIC = b"PAR1"
_MOST_FOOTER = 16 << 20  # one of ours has 3 kB a row group
_MOST_PAGES = 1 << 20
_HEADER_BYTES = 1 << 16  # of a page, which may hold its least and its greatest value
_MOST_DEPTH = 16


class Sizes(NamedTuple):
    """Rows of the file and of its largest row group; bytes of all pages and of the largest row group, unpacked.

    `group_values` is the most values of a column in a row group, those in lists included: a few bytes may repeat one.
    `values` are those of all row groups, by the name of the column in the table, as far as pages tell them.
    `texts` are the metadata that the file's writer added, by key.
    """

    rows: int
    group_rows: int
    unpacked_bytes: int
    group_bytes: int
    group_values: int
    texts: dict[bytes, bytes] = {}  # noqa: RUF012 - not changed
    values: dict[str, int] = {}  # noqa: RUF012 - not changed


class DamagedParquetError(ValueError):
    """The fault of a damaged file, as the end of a sentence."""


def parquet_sizes(file: BinaryIO) -> Sizes:
    """Return how large the file becomes. Raises DamagedParquetError if it is no Parquet file, or damaged."""
    try:
        return _sizes(file)
    except DamagedParquetError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError):  # a field is missing, or of another kind
        raise DamagedParquetError("its footer or a page is damaged") from None


def _sizes(file: BinaryIO) -> Sizes:
    size_bytes = file.seek(0, 2)
    file.seek(max(0, size_bytes - 8))
    tail = file.read(8)
    if len(tail) < 8 or tail[4:] != _MAGIC:
        raise DamagedParquetError("it is not a Parquet file")
    length = int.from_bytes(tail[:4], "little")
    if length > min(_MOST_FOOTER, size_bytes - 12):
        raise DamagedParquetError(f"its footer claims {length:,} bytes")
    file.seek(size_bytes - 8 - length)
    footer = _Thrift(file.read(length)).struct()
    rows, total, most_rows, most_bytes, most_values, pages = footer[3], 0, 0, 0, 0, 0
    all_values: dict[str, int] = {}
    groups = footer[4] if rows else []
    for group in groups:
        group_bytes = 0
        for column in group[1]:
            found, count, values = _unpacked(file, column[3], size_bytes, _MOST_PAGES - pages)
            group_bytes, pages, most_values = group_bytes + found, pages + count, max(most_values, values)
            name = column[3][3][0].decode(errors="replace")
            all_values[name] = all_values.get(name, 0) + values
        most_rows, most_bytes, total = max(most_rows, group[3]), max(most_bytes, group_bytes), total + group_bytes
    if min(rows, *(group[3] for group in groups), 0) < 0 or sum(group[3] for group in groups) != rows:
        raise DamagedParquetError("its row groups do not add up to its rows")
    texts = {pair[1]: pair.get(2, b"") for pair in footer.get(5, [])}
    return Sizes(rows, most_rows, total, most_bytes, most_values, texts, all_values)


def _unpacked(file: BinaryIO, column: dict[int, Any], size_bytes: int, most_pages: int) -> tuple[int, int, int]:
    """Return what the pages of one column of one row group become, in bytes, how many pages there are, and values."""
    at = min(offset for offset in (column[9], column.get(11)) if offset)
    stop, total, pages, values = at + column[7], 0, 0, 0
    if not 4 <= at <= stop <= size_bytes:
        raise DamagedParquetError("a column lies outside the file")
    while at < stop:
        file.seek(at)
        header = _Thrift(file.read(min(_HEADER_BYTES, stop - at)))
        page = header.struct()
        data = page.get(5) or page.get(8)  # of version 1 or 2; a dictionary has neither
        values += data[1] if data else 0
        if page[2] < 0 or page[3] < 0 or values < 0:
            raise DamagedParquetError("a page has a negative size")
        at += header.at + page[3]
        total, pages = total + page[2], pages + 1
        if pages > most_pages:
            raise DamagedParquetError(f"it has more than {_MOST_PAGES:,} pages")
    if at != stop:
        raise DamagedParquetError("a page ends outside its column")
    return total, pages, values


class _Thrift:
    """A struct in the compact protocol, as a dict by the number of a field."""

    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        if depth > _MOST_DEPTH:
            raise DamagedParquetError("its footer is nested too deep")
        found: dict[int, Any] = {}
        number = 0
        while kind := self._byte():
            number = number + (kind >> 4) if kind >> 4 else self._zigzag()
            found[number] = self._value(kind & 15, depth)
        return found

    def _value(self, kind: int, depth: int, inside: bool = False) -> Any:
        if kind in (1, 2):  # a field's kind is its value; in a list it is a byte
            return self._byte() == 1 if inside else kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._zigzag()
        if kind == 7:
            return self._bytes(8)
        if kind == 8:
            return self._bytes(self._varint())
        if kind in (9, 10):
            return self._list(depth + 1)
        if kind == 12:
            return self.struct(depth + 1)
        raise DamagedParquetError("its footer has a field of no known kind")  # maps stand nowhere in it

    def _list(self, depth: int) -> list[Any]:
        if depth > _MOST_DEPTH:
            raise DamagedParquetError("its footer is nested too deep")
        head = self._byte()
        count = head >> 4 if head >> 4 != 15 else self._varint()
        if count > len(self._data) - self.at:  # an element has a byte at least
            raise DamagedParquetError("its footer claims more than it holds")
        return [self._value(head & 15, depth, inside=True) for _ in range(count)]

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _bytes(self, count: int) -> bytes:
        if count > len(self._data) - self.at:
            raise DamagedParquetError("its footer claims more than it holds")
        self.at += count
        return self._data[self.at - count : self.at]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise DamagedParquetError("a number in its footer is too long")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
