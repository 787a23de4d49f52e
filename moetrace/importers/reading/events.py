"""Server-sent events, as which servers stream answers: the one place that separates a JSON value from the text around
it.

Lines of a stream are `data: VALUE`, other fields (`event:`, `id:`, `retry:`) and comments (`: ping`), which keep a
connection open; `data: [DONE]` ends it.
"""

import re

_LINE = re.compile(rb"\s*(data|event|id|retry|):")  # a comment has no name
_DONE = b"[DONE]"
_BEFORE = re.compile(rb"\s*(?:(?:event|id|retry)?:[^\n]*\n\s*)*data:\s*")


def is_event(text: bytes) -> bool:
    """Whether a line, or what begins with it, is of a stream of events."""
    return _LINE.match(text) is not None


def payload(line: bytes) -> bytes:
    """The JSON text of a line: without `data:`, empty for a line without JSON; a line outside of a stream as it is."""
    found = _LINE.match(line)
    if not found:
        return line
    text = line[found.end() :] if found[1] == b"data" else b""
    return b"" if text.strip() == _DONE else text


def first_value(text: bytes) -> bytes:
    """The beginning of a text, without what a stream puts before its first JSON value."""
    return _BEFORE.sub(b"", text, count=1).lstrip() if is_event(text) else text.lstrip()
