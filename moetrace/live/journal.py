"""The answers so far, in a file beside the future trace: the next run need not ask again for the answers of a killed
one.

Each line is an answer as the server sent it, on one line, with a mark in front that says which prompt it answers:
`{"moetrace":{"prompt":3,"asked":"0123..."},` and then the answer's own fields. So `moetrace import` reads it, too.
"""

import contextlib
import itertools
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from moetrace.importers.reading.text import MAX_LINE_BYTES
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace.atomic import hold, keep_inputs, sync_folder, uninterrupted, whole_file

_MARK = re.compile(rb'\{"moetrace":\{"prompt":(\d{1,10}),"asked":"([0-9a-f]{32})"\},')
# A killed run may leave a line of this form without its end. Lines of other forms are not ours, and stay.
_BEGIN = b'{"moetrace":{"prompt":'
_COPIED_BYTES = 1 << 20
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND | sum(getattr(os, n, 0) for n in ("O_CLOEXEC", "O_NOFOLLOW", "O_BINARY"))


class _Place(NamedTuple):
    key: str
    offset: int
    size: int


def marked(number: int, key: str, answer: bytes, more: dict[str, Any] | None = None) -> bytes:
    """An answer as a line of the journal, with the fields `more` in front; raises MoetraceError if it is no object."""
    try:
        answer = msgspec.json.format(answer, indent=-1)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MoetraceError(f"it is no JSON: {str(error).rstrip('.')[:200]}.") from None
    if not answer.startswith(b"{") or answer == b"{}" or b"\n" in answer:
        raise MoetraceError("it is no JSON object.")
    mark = msgspec.json.encode({"moetrace": {"prompt": number, "asked": key}} | (more or {}))
    return mark[:-1] + b"," + answer[1:] + b"\n"


class Journal:
    """Answers by the number of their prompt; only one process has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[int, _Place] = {}
        try:
            if path.is_symlink() or (path.exists() and not path.is_file()):
                raise MoetraceError(f"{path} is no ordinary file: move it away.")
            self._descriptor = os.open(path, _FLAGS, 0o666)
        except OSError as error:
            raise MoetraceError(f"{path} could not be opened: {error.strerror or error}.") from error
        self._size = 0
        try:
            if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                raise MoetraceError(f"{path} is no ordinary file: move it away.")
            self._hold()
            self._read()
        except BaseException:
            os.close(self._descriptor)
            raise

    def __len__(self) -> int:
        return len(self._places)

    def key(self, number: int) -> str | None:
        """The request that got the answer to this prompt; None without an answer yet."""
        place = self._places.get(number)
        return place and place.key

    def first(self) -> bytes:
        """The line of the first prompt that has an answer; there must be one."""
        place = self._places[min(self._places)]
        with self.path.open("rb") as file:
            file.seek(place.offset)
            return file.read(place.size)

    @property
    def most(self) -> int:
        """The highest number of a prompt, -1 without prompts."""
        return max(self._places, default=-1)

    def add(self, number: int, key: str, line: bytes) -> None:
        """Append the line of an answer, on disk when this returns; raises MoetraceError if the system refuses it."""
        try:
            with uninterrupted():
                rest = memoryview(line)
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
                os.fsync(self._descriptor)
                self._places[number] = _Place(key, self._size, len(line))
                self._size += len(line)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
            raise MoetraceError(f"{self.path} could not be written: {error.strerror or error}.") from error

    def put_in_order(self) -> None:
        """Bring the answers into the order of their prompts, in which the trace has them."""
        places = [self._places[number] for number in sorted(self._places)]
        if all(a.offset < b.offset for a, b in itertools.pairwise(places)):
            return
        with self.path.open("rb") as held, whole_file(self.path, follow=False) as file:
            for place in places:
                held.seek(place.offset)
                for start in range(0, place.size, _COPIED_BYTES):
                    file.write(held.read(min(_COPIED_BYTES, place.size - start)))

    def close(self, keep: bool = True) -> None:
        """Let the file go, if that is not done; it is removed unless it is to `keep`, or if it is empty."""
        if self._descriptor < 0:
            return
        if not keep or not self._places:
            self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = -1

    def _hold(self) -> None:
        try:
            hold(self._descriptor)
        except BlockingIOError:
            raise UsageError(f"{self.path} is in use: another run writes the same trace.") from None

    def _read(self) -> None:
        """Find the answers; a last line that a killed run left without its end is taken away."""
        with self.path.open("rb") as file:
            for line_number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
                if not line.endswith(b"\n") and len(line) <= MAX_LINE_BYTES and _begun(line):
                    break
                found = _MARK.match(line) if len(line) <= MAX_LINE_BYTES else None
                if found is None or int(found[1]) in self._places:
                    raise MoetraceError(
                        f"{self.path}: line {line_number} is no answer that moetrace record put there: move the file "
                        f"away, or write another trace."
                    )
                self._places[int(found[1])] = _Place(found[2].decode(), self._size, len(line))
                self._size += len(line)
        os.ftruncate(self._descriptor, self._size)  # to the end of the last whole line
        sync_folder(self.path.parent)


def _begun(line: bytes) -> bool:
    return line.startswith(_BEGIN) or _BEGIN.startswith(line)


@contextlib.contextmanager
def journal_of(out: Path, inputs: Iterable[Path]) -> Iterator[Journal]:
    """Yield the journal of a trace that is to be, none of the `inputs`; it stays unless it is closed, or is empty."""
    path = out.with_name(f"{out.name}.answers.jsonl")
    keep_inputs(path, inputs)
    journal = Journal(path)
    try:
        yield journal
    finally:
        journal.close()
