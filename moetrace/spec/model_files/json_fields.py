"""Read a JSON file of a stranger, and take numbers from it that are checked before anything is computed with them."""

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from moetrace.spec.errors import MoetraceError, printable
from moetrace.spec.ordinary_file import read_ordinary

# Released config.json files have 1 to 30 KB; a few have lists of unquantized modules and reach 3 MB.
MAX_CONFIG_BYTES = 4 << 20
MAX_LAYERS = 10_000
MAX_COUNT = 2**31


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """The object in an ordinary JSON file of at most `limit` bytes, or a MoetraceError that says why not."""
    data = read_ordinary(path, limit)
    try:
        found = json.loads(data)
    except RecursionError:
        raise MoetraceError(f"Cannot read {path}: its JSON is nested too deep.") from None
    except ValueError as error:
        raise MoetraceError(f"Cannot read {path}: it is not JSON ({str(error)[:100]}).") from None
    if not isinstance(found, dict):
        raise MoetraceError(f"Cannot read {path}: it must be a JSON object.")
    return found


class Fields:
    """The fields of a config.json, and the defaults of its family for those that it leaves out."""

    def __init__(self, where: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.where = where
        self._values = values
        self._defaults = defaults

    def get(self, *names: str) -> Any:
        """The value of the first of `names` that the file has and does not leave null, else the family's default.

        A dotted name is a field of that name, or one of an inner object.
        """
        for source in (self._values, self._defaults):
            for name in names:
                value: Any = source.get(name)
                if value is None and "." in name:
                    value = source
                    for key in name.split("."):
                        value = value.get(key) if isinstance(value, Mapping) else None
                if value is not None:
                    return value
        return None

    def count(self, *names: str) -> int:
        """A whole number from 1 on, which must be there."""
        value = self.get(*names)
        if value is None:
            self.refuse(f"it has no {' or '.join(names)}")
        return self._checked(names, value, 1)

    def maybe(self, *names: str, default: int = 0) -> int:
        """A whole number from 0 on; `default` if the file does not have the field."""
        value = self.get(*names)
        return default if value is None else self._checked(names, value, 0)

    def numbers(self, name: str, length: int) -> list[int] | None:
        """A list with a whole number for each layer; None if the file has no list of that name."""
        value = self.get(name)
        if not isinstance(value, list):
            return None
        if len(value) < length:
            self.refuse(f"{name} must have a number for each of the {length} layers, got {len(value)}")
        return [self._checked((name,), each, 0) for each in value[:length]]

    def words(self, name: str, length: int) -> list[str] | None:
        """A list with a text for each layer; None if the file has no list of that name."""
        value = self.get(name)
        if not isinstance(value, list):
            return None
        if len(value) < length or not all(isinstance(each, str) for each in value):
            self.refuse(f"{name} must have a text for each of the {length} layers, got {len(value)} values")
        return value[:length]

    def places(self, name: str) -> set[int] | None:
        """The whole numbers in a list that names layers; None if the file has no list of that name."""
        value = self.get(name)
        if value is not None and not isinstance(value, list):
            self.refuse(f"{name} must be a list of layers, got {_shown(value)}")
        return None if value is None else {each for each in value if isinstance(each, int)}

    def flag(self, name: str) -> bool:
        """Whether a field is true."""
        return self.get(name) is True

    def refuse(self, why: str) -> NoReturn:
        """Raise the MoetraceError that begins with the path of the file."""
        raise MoetraceError(f"Cannot read a MoE model from {self.where}: {why}.")

    def _checked(self, names: tuple[str, ...], value: Any, least: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < MAX_COUNT:
            name = next((name for name in names if self.get(name) is not None), names[0])
            got = _shown(value) if not isinstance(value, int) or abs(value) < 2**64 else "a longer number"
            self.refuse(f"{name} must be a whole number from {least} to 2^31, got {got}")
        return value


def _shown(value: Any) -> str:
    """A value in few words: of a long list, or a text, the part that is not shown is not read."""
    return printable(reprlib.repr(value)[:60])
