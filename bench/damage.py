"""Damage files as accidents and enemies do: bytes, lines, numbers, JSON values, members of archives, headers."""

import base64
import binascii
import io
import json
import re
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

from damage_tables import changed_array, changed_columns, changed_parquet

_NUMBERS = (-1, 0, 1, 2, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30)
_TEXTS = [*(b"%d" % n for n in _NUMBERS), b"", b"-", b"nan", b"1e999", b"0x10", b"null", b'"', b"\n", b"\xff"]
_DEEP = "<deep>"  # stands for a value of lists in lists, which `json.dumps` could not write
_VALUES = [*_NUMBERS, 2**70, -(2**70), _DEEP, 0.5, -0.0, 1e308, 1e400, float("nan"), True, False, None]
_VALUES += ["", "x", "1", "\ud800", [], {}, [[]], [0]]


def damaged(random: Random, content: dict[str, bytes], pool: list[bytes]) -> dict[str, bytes]:
    """Files of a sample, by name, of which some are damaged, and perhaps one is missing or there twice."""
    content = dict(content)
    names = sorted(content)
    if random.random() < 0.05:
        content[random.choice(names) + "~"] = content[random.choice(names)]
    if random.random() < 0.05 and len(content) > 1:
        del content[random.choice(names)]
    for name in random.sample(sorted(content), random.choice((1, 1, 1, len(content)))):
        for _ in range(random.choice((1, 1, 1, 2, 5))):
            content[name] = damaged_bytes(random, content[name], pool)
    return content


def damaged_bytes(random: Random, data: bytes, pool: list[bytes]) -> bytes:
    """`data` with one damage that its form allows, or any."""
    ways: list[Callable[[Random, bytes, list[bytes]], bytes | None]] = [_raw, _raw]
    if data[:2] == b"PK":
        ways += [_zip] * 4
    elif data[:6] == b"\x93NUMPY":
        ways += [changed_array] * 3
    elif data[:4] == data[-4:] == b"PAR1":
        ways += [changed_parquet] * 4
    elif _is_text(data):
        ways += [_number, _number, _lines, _json, _json, _json, changed_columns]
    elif _length_header(data):
        ways += [_header, _header]
    for _ in range(4):
        if (found := random.choice(ways)(random, data, pool)) is not None:
            return found
    return _raw(random, data, pool)


def _is_text(data: bytes) -> bool:
    return b"\0" not in data[:1000] and sum(byte < 128 for byte in data[:1000]) > 0.9 * len(data[:1000])


def _raw(random: Random, data: bytes, pool: list[bytes]) -> bytes:
    start = random.randrange(len(data) + 1)
    if random.random() < 0.3:  # headers are at the beginning
        start = min(start, random.randrange(200))
    stop = min(len(data), start + random.choice((1, 1, 4, 16, 100, len(data))))
    part = data[start:stop]
    way = random.randrange(8)
    if way == 0:
        return data[:start]
    if way == 1:
        return data[:start] + data[stop:]
    if way == 2:
        return data[:start] + part * random.choice((2, 2, 3, 50 if len(part) < 10_000 else 2)) + data[stop:]
    if way == 3:
        other = random.choice(pool)
        first = random.randrange(len(other) + 1)
        return data[:start] + other[first : first + random.choice((1, 16, 1000))] + data[stop:]
    if way == 4:
        size = random.choice((1, 2, 4, 8))
        value = random.choice(_NUMBERS) % (1 << (8 * size))
        return data[:start] + value.to_bytes(size, random.choice(("little", "big"))) + data[start + size :]
    if way == 5:
        return data[:start] + random.randbytes(len(part)) + data[stop:]
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 3, 10))):
        if changed:
            at = min(start + random.randrange(64), len(changed) - 1) if way == 6 else random.randrange(len(changed))
            changed[at] ^= 1 << random.randrange(8)
    return bytes(changed)


def _number(random: Random, data: bytes, pool: list[bytes]) -> bytes | None:
    found = [match.span() for match in re.finditer(rb"-?\d+(?:\.\d+)?", data[:200_000])]
    if not found:
        return None
    start, stop = random.choice(found)
    return data[:start] + random.choice(_TEXTS) + data[stop:]


def _lines(random: Random, data: bytes, pool: list[bytes]) -> bytes | None:
    lines = data.splitlines(keepends=True)
    at, other = random.randrange(len(lines) or 1), random.randrange(len(lines) or 1)
    if len(lines) < 2:
        return None
    way = random.randrange(5)
    if way == 0:
        del lines[at]
    elif way == 1:
        lines.insert(other, lines[at])
    elif way == 2:
        lines[at], lines[other] = lines[other], lines[at]
    elif way == 3:
        lines[at] = lines[at].replace(random.choice((b",", b" ", b":", b"\n")), random.choice((b"", b",,", b"\r\n")), 1)
    else:
        fields = re.split(rb"(,)", lines[at])
        lines[at] = b"".join(random.sample(fields, len(fields)))
    return b"".join(lines)


def _json(random: Random, data: bytes, pool: list[bytes]) -> bytes | None:
    """One value of one JSON line, of an event's data, or of the whole, replaced, removed or doubled."""
    try:
        return _dumped(random, json.loads(data), pool)
    except (ValueError, RecursionError):
        lines = data.splitlines(keepends=True)
    at = random.randrange(len(lines) or 1)
    try:
        event, text = re.match(rb"((?:data: *)?)(.*)", lines[at], re.DOTALL).groups()  # type: ignore[union-attr]
        lines[at] = event + _dumped(random, json.loads(text), pool) + b"\n"
    except (ValueError, RecursionError, IndexError):
        return None
    return b"".join(lines)


def _dumped(random: Random, value: Any, pool: list[bytes]) -> bytes:
    """`value` with a change, as a JSON text."""
    depth = random.choice((2, 3, 64, 300, 5000))
    deep = random.choice((b"[" * depth + b"]" * depth, b'{"a":' * depth + b"0" + b"}" * depth))
    return json.dumps(_changed(random, value, pool)).encode().replace(b'"%s"' % _DEEP.encode(), deep)


def _changed(random: Random, value: Any, pool: list[bytes]) -> Any:
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(sorted(value))
        way = random.random()
        if way < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if way < 0.15:
            return value | {random.choice(sorted(value)): value[key]}
        return value | {key: _changed(random, value[key], pool)}
    if isinstance(value, list) and value and random.random() < 0.9:
        at, value = random.randrange(len(value)), list(value)
        way = random.random()
        if way < 0.1:
            del value[at]
        elif way < 0.2:
            value.insert(random.randrange(len(value) + 1), value[at])
        else:
            value[at] = _changed(random, value[at], pool)
        return value
    if isinstance(value, str) and len(value) > 16 and random.random() < 0.8:
        try:
            return base64.b64encode(damaged_bytes(random, base64.b64decode(value, validate=True), pool)).decode()
        except (binascii.Error, ValueError):
            pass
    return random.choice(_VALUES)


def _zip(random: Random, data: bytes, pool: list[bytes]) -> bytes | None:
    """One member damaged, missing or doubled, in an archive that is whole."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
    except Exception:  # noqa: BLE001 - damaged before
        return None
    if not members:
        return None
    names = sorted(members)
    name = random.choice(names if random.random() < 0.5 else [n for n in names if n.endswith(".pkl")] or names)
    way = random.random()
    if way < 0.05:
        del members[name]
    elif way < 0.1:
        members[random.choice(names)] = members[name]
    else:
        members[name] = damaged_bytes(random, members[name], pool)
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return whole.getvalue()


def _length_header(data: bytes) -> bool:
    return data[8:9] == b"{" and 2 <= int.from_bytes(data[:8], "little") <= len(data) - 8


def _header(random: Random, data: bytes, pool: list[bytes]) -> bytes | None:
    """A JSON header after its length in 8 bytes, as of safetensors, damaged, with its length kept right."""
    size = int.from_bytes(data[:8], "little")
    header = (random.choice((_json, _json, _number))(random, data[8 : 8 + size], pool)) or b"{}"
    return len(header).to_bytes(8, "little") + header + data[8 + size :]
