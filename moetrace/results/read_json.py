"""JSON files as strangers may have written them: checked, or refused in one sentence."""

import json
import re
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from moetrace.spec.errors import MoetraceError, printable
from moetrace.spec.load import read_text

MOST_JSON_BYTES = 64 << 20


def read_json(path: Path, form: Any) -> Any:
    """Return a JSON file as the struct `form`; raises MoetraceError (file, field) if it is not one."""
    try:
        size_bytes = path.stat().st_size
        content = path.read_bytes() if size_bytes <= MOST_JSON_BYTES else b""
    except OSError as error:
        raise MoetraceError(f"{path} could not be read: {error.strerror or error}.") from None
    if size_bytes > MOST_JSON_BYTES:
        raise MoetraceError(f"{path} has {size_bytes:,} bytes, more than any that moetrace writes.")
    try:
        return msgspec.json.decode(content, type=form)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MoetraceError(f"{path} is not what moetrace writes: {printable(str(error))}.") from None


def read_strict_json(path: Path) -> Any:
    """Read JSON as plain values: no key twice, no NaN or infinity. Raises MoetraceError with the line if it is not."""
    text = read_text(path)
    try:
        found = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # half of a pair alone is no text
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
