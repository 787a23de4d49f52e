"""Whether a TOML text has a key of very many parts (a.b.c), which Python's reader takes hours for.

Its time grows with the square of the parts at least: a line of half a million of them fits a small file.
"""

import re

MOST_PARTS = 32

_TOKEN = re.compile(
    r"""
    (?P<part> "(?!"")(?:[^"\\\n]|\\.)*+" | '(?!'')[^'\n]*+' | [A-Za-z0-9_-]++ )
    | (?P<space> [ \t]++ ) | (?P<dot> \. )
    | \"""(?:[^"\\]|\\.|"(?!""))*+"{3,5} | \'''(?:[^']|'(?!''))*+'{3,5} | \#[^\n]*+ | [^"'\#.A-Za-z0-9_\- \t]++ | .
    """,
    re.DOTALL | re.VERBOSE,
)


def has_deep_key(text: str) -> bool:
    """Whether a key of a TOML text, or anything else of that form, has more than 32 parts."""
    if not any(line.count(".") >= MOST_PARTS for line in text.split("\n")):
        return False
    dots, after_part = 0, False
    for token in _TOKEN.finditer(text):
        if token.lastgroup == "part":
            after_part = True
        elif token.lastgroup == "dot" and after_part:
            dots, after_part = dots + 1, False
            if dots >= MOST_PARTS:
                return True
        elif token.lastgroup != "space":
            dots, after_part = 0, False
    return False
