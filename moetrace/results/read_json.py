"""JSON files as strangers may have written them: checked, or refused in one sentence."""

import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from moetrace.spec.errors import MoetraceError, printable
from moetrace.spec.load import read_text
from moetrace.spec.ordinary_file import read_ordinary

MOST_JSON_BYTES = 64 << 20


def read_json(path: Path, form: Any, *, follow: bool = True) -> Any:
    """Return a JSON file as the struct `form`; raises MoetraceError (file, field) if it is not one.

    Every number is finite. `follow` as in `open_ordinary`.
    """
    return decode_json(path, read_ordinary(path, MOST_JSON_BYTES, follow=follow), form)


def decode_json(path: Path, content: bytes, form: Any) -> Any:
    """Return what a JSON file holds as the struct `form`; as `read_json`."""
    try:
        return msgspec.json.decode(content, type=form)  # which refuses 1e999
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MoetraceError(f"{path} is not what moetrace writes: {printable(str(error))}.") from None


def read_strict_json(path: Path, *, follow: bool = True) -> Any:
    """Read JSON as plain values: no key twice, every number finite; raises MoetraceError with the line if not.

    `follow` as in `open_ordinary`.
    """
    text = read_text(path, follow=follow)
    try:
        found = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # a surrogate without its partner is not text
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except json.JSONDecodeError as error:
        conflict = "; it has the marks of a merge conflict" if re.search(r"^(<{7}|>{7}) ", text, re.MULTILINE) else ""
        raise MoetraceError(f"{path}, line {error.lineno}: not JSON: {error.msg}{conflict}.") from None
    except UnicodeEncodeError:
        raise MoetraceError(f"{path}: a text in it is no Unicode.") from None
    except (ValueError, RecursionError) as error:
        why = "objects or lists lie too deep in each other" if isinstance(error, RecursionError) else error
        raise MoetraceError(f"{path}: {why}.") from None


def convert_strict(path: Path, raw: Any, form: Any) -> Any:
    """Return plain values that were read from `path` as the struct `form`; raises MoetraceError (file, field)."""
    try:
        return msgspec.convert(raw, form)
    except msgspec.ValidationError as error:
        raise MoetraceError(f"{path}: {explained(error)}.") from None


def explained(error: Exception, path: str = "") -> str:
    """msgspec's message with the path of the bad field in front; `path` is where its `$` is."""
    what, _, at = str(error).partition(" - at `$")
    at = f"{path}{at.rstrip('`')}".lstrip(".")
    return f"{at}: {what}" if at else what


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for at, name in enumerate(names) if name in names[:at])
        raise ValueError(f"{twice[:200]!r} is there twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:50]} is too large a number")
    return value
