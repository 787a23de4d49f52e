"""Types of the fields of a spec by their TOML path, and what they take, for messages."""

import re
from typing import Any

import msgspec
import msgspec.inspect

_HOLDERS = msgspec.inspect.DictType | msgspec.inspect.ListType


def range_of(kind: Any) -> str:
    """` from 1e-09 to 1e+09`: what a field of that type (of `msgspec.inspect`) takes, "" if it is open at an end."""
    kinds = [getattr(each, "value_type", each) for each in getattr(kind, "types", [kind])]
    kinds = [each for each in kinds if getattr(each, "ge", None) is not None]
    if not kinds or kinds[0].le is None:
        return ""
    return f" from {_number(kinds[0].ge)} to {_number(kinds[0].le)}"


def _number(limit: float) -> str:
    return f"{limit:g}" if isinstance(limit, float) else f"{limit}"


def type_at(struct: type[msgspec.Struct], path: str) -> Any:
    """Return the type of a field, of the values of a list or of a table of numbers; None if it has no type."""
    table, _, key = re.sub(r"\[[^\]]*\]$", "", path).rpartition(".")
    try:
        return fields_at(struct, table).get(key)
    except (AttributeError, StopIteration):
        return None


def fields_at(struct: type[msgspec.Struct], path: str) -> dict[str, msgspec.inspect.Type]:
    """Types of the fields of the table at `path` of a spec; none where it is no table, or its keys are the user's."""
    return {field.encode_name: field.type for field in getattr(node_at(struct, path), "fields", ())}


def node_at(struct: type[msgspec.Struct], path: str) -> Any:
    """Type of the table at `path` of a spec, of `msgspec.inspect`; None if there is no table."""
    node: Any = msgspec.inspect.type_info(struct)
    for key in filter(None, path.replace("[...]", "[").split(".")):
        name, inside, _ = key.partition("[")  # `calibration[...]`: any value of it
        if name:
            kind = {field.encode_name: field.type for field in getattr(node, "fields", ())}.get(name)
            node = _table_in(kind, _HOLDERS if inside else msgspec.inspect.StructType)
        if inside:
            node = _table_in(getattr(node, "value_type", getattr(node, "item_type", None)), msgspec.inspect.StructType)
    return node


def _table_in(kind: Any, wanted: Any) -> Any:
    """The wanted type among those that a field may have: of a table, or of a container of several."""
    return next((each for each in getattr(kind, "types", [kind]) if isinstance(each, wanted)), kind)
