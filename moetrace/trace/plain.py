"""Whether an HDF5 file is as plain as `Writer` makes it, read from its bytes and without HDF5.

HDF5 follows any address in a file: some files keep it busy for ever, deaf to signals, and some end the
process. This reader follows only what the writer uses, each address once: headers of version 2, links and attributes
inside of headers, numbers and text of fixed length, contiguous data or chunks that a B-tree of version 1 lists. HDF5
may open such a file here; any other goes through `own_process` first. Layout: HDF5 File Format Specification 3.0.
"""

import struct
from collections.abc import Iterable, Iterator
from typing import BinaryIO

SIGNATURE = b"\x89HDF\r\n\x1a\n"
MAX_CHUNKS = 1 << 20  # of a dataset; a trace of 4 billion rows reaches this
_NOWHERE = (1 << 64) - 1
_NUMBER, _FLOAT, _TEXT = 0, 1, 3  # classes of datatypes
_HEADER_BYTES = 1 << 20  # of one header; those of the writer have up to 64 KiB
_MAX_PARTS = 64  # of one header
# Types of messages in a header.
_NIL, _SPACE, _LINK_INFO, _TYPE, _OLD_FILL, _FILL, _LINK = range(7)
_LAYOUT, _GROUP_INFO, _FILTERS, _ATTRIBUTE, _CONTINUED, _CHANGED, _ATTRIBUTE_INFO = 8, 10, 11, 12, 16, 18, 21
_HARMLESS = (_NIL, _SPACE, _OLD_FILL, _FILL, _GROUP_INFO, _FILTERS, _CHANGED)


class _NotPlainError(Exception):
    """The file holds something that the writer does not use."""


def is_hdf5(file: BinaryIO) -> bool:
    """Whether a file begins as HDF5 does: at byte 0, or at 512 or a power of two beyond, after a user's own bytes."""
    size = file.seek(0, 2)
    place = 0
    while place + len(SIGNATURE) <= size:
        file.seek(place)
        if file.read(len(SIGNATURE)) == SIGNATURE:
            return True
        place = max(512, 2 * place)
    return False


def is_cut(file: BinaryIO) -> bool:
    """Whether a file that begins as the writer's do is shorter than it says that it is."""
    file.seek(0)
    start = file.read(48)
    if len(start) < 48:
        return True
    newer = start.startswith(SIGNATURE) and start[8] in (2, 3)
    return newer and struct.unpack_from("<Q", start, 28)[0] > file.seek(0, 2)


def is_plain(file: BinaryIO, paths: Iterable[str]) -> bool:
    """Whether the objects at `paths` (those that exist) and the groups above them are as the writer makes them."""
    try:
        _Walk(file).check(paths)
    except (_NotPlainError, struct.error, IndexError, OverflowError, OSError):
        return False
    return True


class _Walk:
    """The objects of one file, each visited once."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = file.seek(0, 2)
        self.seen: set[int] = set()

    def check(self, paths: Iterable[str]) -> None:
        """Raise _NotPlainError unless all is plain."""
        start = self.read(0, 48)
        version, offsets, lengths = start[8:11]
        base, extension, _, root = struct.unpack_from("<4Q", start, 12)
        if not start.startswith(SIGNATURE) or version not in (2, 3) or (offsets, lengths, base) != (8, 8, 0):
            raise _NotPlainError
        if extension != _NOWHERE:
            raise _NotPlainError
        groups = {"": self.links(root)}
        for path in paths:
            above = ""
            *parents, name = path.strip("/").split("/")
            for parent in parents:
                inside = f"{above}/{parent}"
                if inside not in groups:
                    address = groups[above].get(parent)
                    groups[inside] = {} if address is None else self.links(address)
                above = inside
            if (address := groups[above].get(name)) is not None:
                self.links(address)

    def read(self, address: int, size: int) -> bytes:
        """Bytes of the file, all of them."""
        if size > _HEADER_BYTES or address + size > self.size:
            raise _NotPlainError
        self.file.seek(address)
        found = self.file.read(size)
        if len(found) < size:
            raise _NotPlainError
        return found

    def once(self, address: int) -> int:
        """The address, for the first time."""
        if address in self.seen:
            raise _NotPlainError
        self.seen.add(address)
        return address

    def links(self, address: int) -> dict[str, int]:
        """Check an object; return where its links lead."""
        found: dict[str, int] = {}
        dimensions = 0
        layouts = []
        for kind, data in self.messages(address):
            if kind == _LINK:
                name, target = _link(data)
                found[name] = target
            elif kind in (_LINK_INFO, _ATTRIBUTE_INFO):
                skip = 2 + (data[1] & 1) * (8 if kind == _LINK_INFO else 2)
                if struct.unpack_from("<Q", data, skip)[0] != _NOWHERE:  # dense storage
                    raise _NotPlainError
            elif kind == _TYPE:
                _check_type(data, (_NUMBER, _FLOAT))
            elif kind == _ATTRIBUTE:
                _check_attribute(data)
            elif kind == _LAYOUT:
                layouts.append(data)
            elif kind not in _HARMLESS:
                raise _NotPlainError
            if kind == _SPACE:
                dimensions = data[1]
        for data in layouts:
            self.check_layout(data, dimensions)
        return found

    def messages(self, address: int) -> Iterator[tuple[int, bytes]]:
        """Type and data of each message of the header at `address`, wherever it goes on."""
        start = self.read(self.once(address), 32)
        if start[:5] != b"OHDR\x02":
            raise _NotPlainError
        flags = start[5]
        width = 1 << (flags & 3)
        first = 6 + (16 if flags & 32 else 0) + (4 if flags & 16 else 0)
        size = int.from_bytes(self.read(address + first, width), "little")
        parts = [self.read(address + first + width, size)]
        head = struct.Struct("<BHBH" if flags & 4 else "<BHB")
        for number in range(_MAX_PARTS):
            if number == len(parts):
                return
            part, at = parts[number], 0
            while at + head.size <= len(part):
                kind, length, shared = head.unpack_from(part, at)[:3]
                at += head.size
                if at + length > len(part) or shared & 2:
                    raise _NotPlainError
                data = part[at : at + length]
                at += length
                if kind == _CONTINUED:
                    place, length = struct.unpack("<2Q", data)
                    more = self.read(self.once(place), length)
                    if more[:4] != b"OCHK":
                        raise _NotPlainError
                    parts.append(more[4:-4])
                else:
                    yield kind, data
        raise _NotPlainError

    def check_layout(self, data: bytes, dimensions: int) -> None:
        """Raise unless data is contiguous or in chunks of a plain index."""
        version, kind = data[:2]
        if version != 3 or kind not in (1, 2):
            raise _NotPlainError
        if kind == 2:
            if data[2] != dimensions + 1:
                raise _NotPlainError
            root = struct.unpack_from("<Q", data, 3)[0]
            if root != _NOWHERE:
                self.check_index(root, dimensions)

    def check_index(self, root: int, dimensions: int) -> None:
        """Raise unless the chunks' B-tree is one: each node once, levels going down, not too many chunks."""
        key = 8 + 8 * (dimensions + 1)
        waiting: list[tuple[int, int | None]] = [(root, None)]
        chunks = 0
        while waiting:
            address, wanted = waiting.pop()
            head = self.read(self.once(address), 24)
            kind, level, used = struct.unpack_from("<BBH", head, 4)
            if head[:4] != b"TREE" or kind != 1 or (wanted is not None and level != wanted):
                raise _NotPlainError
            body = self.read(address + 24, used * (key + 8) + key)
            if level == 0:
                chunks += used
            else:
                below = (struct.unpack_from("<Q", body, number * (key + 8) + key)[0] for number in range(used))
                waiting += [(child, level - 1) for child in below]
            if chunks + len(waiting) > MAX_CHUNKS:
                raise _NotPlainError


def _link(data: bytes) -> tuple[str, int]:
    """Name and address of a link that is hard."""
    flags = data[1]
    at = 2
    if flags & 8:
        if data[at] != 0:
            raise _NotPlainError
        at += 1
    at += (8 if flags & 4 else 0) + (1 if flags & 16 else 0)
    width = 1 << (flags & 3)
    length = int.from_bytes(data[at : at + width], "little")
    name = data[at + width : at + width + length]
    return name.decode(errors="replace"), struct.unpack_from("<Q", data, at + width + length)[0]


def _check_type(data: bytes, classes: tuple[int, ...]) -> None:
    if data[0] & 15 not in classes:
        raise _NotPlainError


def _check_attribute(data: bytes) -> None:
    version, flags, name_bytes = struct.unpack_from("<BBH", data)
    if version != 3 or flags:
        raise _NotPlainError
    _check_type(data[9 + name_bytes :] or b"\xff", (_NUMBER, _FLOAT, _TEXT))
