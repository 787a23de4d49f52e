"""The identity of an input of a cell, as a baseline holds it."""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import msgspec

# 12 of a SHA-256's 64 digits are enough to keep all cells of one project apart.
_DIGITS = 12
# The names of a spec, and how well its constants are known: no figure depends on them.
_LABELS = ("name", "known", "calibration")


def identity(value: object) -> str | int | None:
    """The identity of an input in a baseline: a number itself, or the first digits of a SHA-256, given or computed.

    The labels of a spec (its name, how well it is known) do not count; nor does a field that is not set, so that one
    which a later version adds changes nothing as long as nobody sets it.
    """
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return value[:_DIGITS]
    if isinstance(value, Mapping):
        value = {key: inner for key, inner in _set_fields(value).items() if key not in _LABELS}
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()[:_DIGITS]


def _set_fields(value: Any) -> Any:
    """A spec without the fields that are None."""
    if isinstance(value, Mapping):
        return {key: _set_fields(inner) for key, inner in value.items() if inner is not None}
    return value
