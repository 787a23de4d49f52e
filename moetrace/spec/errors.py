"""The errors that a user may see: one sentence each, saying what, where and what to do; and how text is shown."""

import re
import unicodedata

# Lines that a CI log obeys: GitHub's `::error::` after any blanks, its `##[group]` and Azure's `##vso[...]` anywhere.
_STARTS_COMMAND = re.compile(r"^([^\S\n]*):(?=:)", re.MULTILINE)
_HOLDS_COMMAND = re.compile(r"#(?=#\w*\[)")


class MoetraceError(Exception):
    """Something failed in a way that the message explains; commands print the message and exit with 1."""

    exit_code = 1

    def __str__(self) -> str:
        """The sentence, on one harmless line even if a stranger's file put control characters into it."""
        return harmless(super().__str__())


class UsageError(MoetraceError):
    """An invalid request (a wrong name, value or combination); commands exit with 2."""

    exit_code = 2


def stop_behind(error: BaseException) -> KeyboardInterrupt | SystemExit | None:
    """Return the signal that lies behind an error: Numba, stopped while it compiles, raises an error of its own."""
    seen: list[BaseException] = []
    while error not in seen:
        seen.append(error)
        if isinstance(error, KeyboardInterrupt | SystemExit):
            return error
        error = error.__cause__ or error.__context__ or error
    return None


def counted(number: int, noun: str) -> str:
    """Return `1 row` or `2,000 rows`; the plural takes an s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def harmless(line: str) -> str:
    """Return a line as a terminal and the log of a CI run may see it: `printable`, and no command to either."""
    return inert(printable(line))


def inert(text: str) -> str:
    """Write the sign with which a line that is a command to a CI log begins (`::error::`, `##[group]`) as an escape."""
    if "::" not in text and "##" not in text:
        return text
    return _HOLDS_COMMAND.sub(r"\\x23", _STARTS_COMMAND.sub(r"\1\\x3a", text))


def printable(text: str) -> str:
    """Write control characters, which could break a line or steer a terminal, as escapes (`\\x1b`)."""
    if text.isprintable():
        return text
    return "".join(letter if _shows(letter) else letter.encode("unicode_escape").decode() for letter in text)


def _shows(letter: str) -> bool:
    return letter.isprintable() or unicodedata.category(letter) == "Zs"
