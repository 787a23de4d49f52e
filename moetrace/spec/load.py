"""Read a spec from a preset, a TOML file or an instance, override single fields, and check every value.

A bad spec is one sentence: which file, which TOML path (`gpu.bandwidth_gb_s`) and what it must be.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn, TypeGuard, TypeVar

import msgspec
import msgspec.inspect
import numpy as np

from moetrace.spec.deep_keys import MOST_PARTS, has_deep_key
from moetrace.spec.errors import MoetraceError, UsageError, printable
from moetrace.spec.field_types import fields_at, node_at, range_of, type_at
from moetrace.spec.named import nearest, noun_of, preset_text, preset_with
from moetrace.spec.ordinary_file import read_ordinary

S = TypeVar("S", bound=msgspec.Struct)

# Fields whose text is the path of a file, and fields where it is one only in the form `file.py:function`.
FILE_FIELDS = ("weight_bits", "expert_bits", "loads", "plan", "static", "budget", "layout", "rates", "rate_factors")
AUTO = "auto"  # not a file's name: the table is made from the trace
FUNCTION_FIELDS = ("dispatch", "residency")
# Fields where a number stands for a table with one field.
NUMBER_FIELDS = {"weight_bits": "bits"}

# Nothing that belongs to a spec comes near: a text file, a TOML file, a number, a text, a name.
MAX_FILE_BYTES = 16 << 20
MAX_TOML_BYTES = 1 << 20
MAX_NUMBER = 2**63
MAX_TEXT, MAX_NAME = 4096, 100

_WORDS = {
    "float": "a number",
    "int": "a whole number",
    "str": "a text in quotes",
    "bool": "true or false",
    "object": "a table",
    "array": "a list",
    "null": "nothing",
}
_KINDS = {
    msgspec.inspect.FloatType: "a number",
    msgspec.inspect.IntType: "a whole number",
    msgspec.inspect.StrType: "a text in quotes",
    msgspec.inspect.StructType: "a table",
}
_LIMITS = {">": "greater than", ">=": "of at least", "<": "less than", "<=": "of at most"}


class Loaded(NamedTuple):
    """A spec's values before its own rules are checked, and where they come from."""

    raw: dict[str, Any]
    where: str
    begun: Mapping[str, str] = MappingProxyType({})  # table that was absent -> path of the override that began it

    def refuse(self, path: str, wants: str) -> NoReturn:
        """Raise the UsageError that says what `path` wants and what it got."""
        raise UsageError(f"{self.where}: {path} wants {wants}{_got(self.raw, path)}.")


def read(kind: str, source: str | Path | msgspec.Struct, overrides: Mapping[str, object]) -> Loaded:
    """Read the raw values of a spec and put the overrides in; `kind` is `models`, `systems` or `policies`.

    A text that ends in `.toml` or holds a slash is a file, any other one a preset's name. Files named in a TOML are
    found beside it, files named in an override in the current folder.

    Raises:
        UsageError: an unknown preset, or an override whose path is not one of a table.
        MoetraceError: a file that cannot be read or is not TOML.
    """
    noun = noun_of(kind)
    if isinstance(source, msgspec.Struct):
        where = f"{noun} {getattr(source, 'name', '')}"
        raw = _builtins(source, where)
    elif not isinstance(source, str | Path):
        raise UsageError(
            f"A {noun} is the name of a preset, the path of a TOML file or one that load_{noun} returned, "
            f"got {type(source).__name__}."
        )
    elif isinstance(source, Path) or source.endswith(".toml") or "/" in source or "\\" in source:
        raw, where = read_toml(source), str(source)
        _find_files(raw, raw, Path(source).absolute().parent)
    else:
        raw, where = deepcopy(_read_preset(kind, source)), f"{noun} {source}"
    return overridden(Loaded(raw, where), overrides)


@cache
def _read_preset(kind: str, name: str) -> dict[str, Any]:
    """Values of a preset, read once: three took 1 of the 26 ms of a replay of 2,000 tokens."""
    return parse(preset_text(kind, name), f"{noun_of(kind)} {name}")


def overridden(loaded: Loaded, overrides: Mapping[str, object]) -> Loaded:
    """Put new values of single fields into raw ones; files that they name are found in the current folder."""
    begun: dict[str, str] = {}
    for path, value in overrides.items():
        for table in _override(loaded.raw, path, _typed(value), loaded.where):
            begun.setdefault(table, path)
    _find_files(loaded.raw, overrides, Path.cwd())
    return loaded._replace(begun=begun)


def convert(loaded: Loaded, struct: type[S]) -> S:
    """Turn raw values into `struct`, or raise the UsageError that names the path of a bad, missing or unknown one."""
    try:
        _check_numbers(loaded)
        _check_begun(loaded, struct)
        spec = msgspec.convert(loaded.raw, struct)
        _check_texts(loaded)
        return spec
    except msgspec.ValidationError as error:
        raise UsageError(_explain(str(error), loaded, struct)) from None
    except RecursionError:
        raise UsageError(f"{loaded.where}: tables or lists lie too deep in each other.") from None


def read_text(path: str | Path, most_bytes: int | None = None, *, follow: bool = True) -> str:
    """Text of an ordinary UTF-8 file of at most 16 MiB, or a MoetraceError that says why not."""
    try:
        return read_ordinary(path, most_bytes or MAX_FILE_BYTES, follow=follow).decode("utf-8")
    except UnicodeDecodeError:
        raise MoetraceError(f"Cannot read {path}: it is not a UTF-8 text file.") from None


def read_table(path: str | Path, rows: int, columns: int) -> np.ndarray:
    """Read a CSV of numbers, one line per layer and one column per expert; float64 `[rows, columns]`.

    Blank lines and lines that begin with `#` are skipped. Numbers must be below 2^63 and not negative.
    """
    lines = list(data_lines(path))
    if len(lines) != rows:
        raise MoetraceError(f"{path}: {len(lines)} lines of numbers, but the model has {rows} MoE layers.")
    table = np.empty((rows, columns))
    for row, (number, cells) in enumerate(lines):
        if len(cells) != columns:
            raise MoetraceError(f"{path}, line {number}: {len(cells)} numbers, but the model has {columns} experts.")
        try:
            table[row] = [float(cell) for cell in cells]
        except ValueError:
            raise MoetraceError(f"{path}, line {number}: wants numbers separated by commas.") from None
        if not ((table[row] >= 0) & (table[row] < MAX_NUMBER)).all():
            raise MoetraceError(f"{path}, line {number}: wants finite numbers below 2^63 that are not negative.")
    return table


def data_lines(path: str | Path, header: Sequence[str] = ()) -> Iterator[tuple[int, list[str]]]:
    """Line number and comma-separated cells of each line of a CSV file that is not blank or a `#` comment.

    The first of them is left out if it is the ``header``.
    """
    is_first = True
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        cells = line.split(",")
        if not (is_first and [cell.strip() for cell in cells] == [*header]):
            yield number, cells
        is_first = False


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file of at most 1 MiB, or raise a MoetraceError that says why not."""
    return parse(read_text(path, MAX_TOML_BYTES), str(path))


def parse(text: str, where: str) -> dict[str, Any]:
    """Read TOML, or raise the MoetraceError that begins with `where` and names the line."""
    if has_deep_key(text):
        raise MoetraceError(f"{where}: a key has more than {MOST_PARTS} parts, so tables lie too deep.")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"^(.*) \(at (?:line (\d+), column \d+|end of document)\)$", str(error))
        what, line = (place[1], place[2] or len(text.splitlines())) if place else (str(error), "?")
        raise MoetraceError(f"{where}, line {line}: not TOML: {what}.") from None
    except (ValueError, RecursionError):  # more digits or brackets than Python reads
        raise MoetraceError(f"{where}: not TOML: a number is too long, or tables lie too deep.") from None


def canonical(spec: msgspec.Struct) -> dict[str, Any]:
    """Every field of a spec as plain values, files only by their names: the same on every machine."""
    return _without_folders(msgspec.to_builtins(spec))


def _without_folders(values: dict[str, Any]) -> dict[str, Any]:
    """Leave of the path of each file its last part."""
    for key, value in values.items():
        if isinstance(value, dict):
            _without_folders(value)
        elif _is_file(value, key):
            values[key] = Path(value).name
    return values


def field_names(struct: type[msgspec.Struct]) -> list[str]:
    """Dotted paths of a spec's fields, those of inner tables too; a table that may be a number has a path itself."""

    def names(kind: Any, prefix: str) -> Iterator[str]:
        for field in kind.fields:
            path, inner = f"{prefix}{field.encode_name}", field.type
            tables = [each for each in getattr(inner, "types", [inner]) if isinstance(each, msgspec.inspect.StructType)]
            if not tables or field.encode_name in NUMBER_FIELDS:
                yield path
            if tables:
                yield from names(tables[0], f"{path}.")

    return list(names(msgspec.inspect.type_info(struct), ""))


def _typed(value: object) -> object:
    """Read a text as a TOML value where it is one: `6` is a number, `balance` stays a text.

    Other types of numbers and paths of Python become plain ones.
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        return value
    try:
        parsed = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):
        return value
    return parsed["value"] if list(parsed) == ["value"] else value


def _override(raw: dict[str, Any], path: str, value: object, where: str) -> list[str]:
    """Set a field; return the tables that were absent until then, the outermost first."""
    if not isinstance(path, str) or not all(path.split(".")):
        raise UsageError(f"{where}: {path!r} is not the path of a field, as name or gpu.tflops would be.")
    *tables, key = path.split(".")
    table, begun = raw, []
    for depth, name in enumerate(tables, 1):
        # An optional table that is absent is begun here; `_check_begun` says what it then lacks.
        if table.get(name) is None:
            table[name] = {}
            begun.append(".".join(tables[:depth]))
        elif name in NUMBER_FIELDS and isinstance(table[name], int | float):
            table[name] = {NUMBER_FIELDS[name]: table[name]}
        table = table[name]
        if not isinstance(table, dict):
            raise UsageError(f"{where}: {path!r} cannot be set, as {name} is not a table.")
    table[key] = value
    return begun


def _find_files(raw: dict[str, Any], keys: Mapping[str, object], folder: Path) -> None:
    """Make the files that the fields `keys` of `raw`, and of its tables, name absolute, as seen from `folder`."""
    for path in keys:
        *tables, key = path.split(".")
        table: Any = raw
        for name in tables:
            table = table.get(name) if isinstance(table, dict) else None
        value = table.get(key) if isinstance(table, dict) else None
        if isinstance(value, dict):
            _find_files(value, {name: None for name in value if "." not in name}, folder)
        elif _is_file(value, key):
            table[key] = str(folder / value)


def _is_file(value: object, field: str) -> TypeGuard[str]:
    if not isinstance(value, str) or value == AUTO:
        return False
    return field in FILE_FIELDS or (field in FUNCTION_FIELDS and ".py:" in value)


def _builtins(spec: msgspec.Struct, where: str) -> dict[str, Any]:
    try:
        return msgspec.to_builtins(spec, enc_hook=_plain)
    except (TypeError, RecursionError) as error:
        raise UsageError(f"{where}: cannot be read: {error}.") from None


def _plain(value: object) -> object:
    plain = _typed(value)
    if plain is value:
        raise TypeError(f"it holds {type(value).__name__}, which TOML has not")
    return plain


def _check_numbers(loaded: Loaded) -> None:
    """Refuse numbers that would overflow later on, before msgspec refuses them in a less clear sentence."""
    for path, value in _leaves(loaded.raw):
        # One comparison for NaN and both infinities too.
        if isinstance(value, int | float) and not abs(value) < MAX_NUMBER:
            loaded.refuse(path, "a finite number below 2^63")


def _check_begun(loaded: Loaded, struct: type[msgspec.Struct]) -> None:
    """Refuse a field of an absent table that needs others beside it: which these are, and who has such a table."""
    for table, path in loaded.begun.items():
        fields, given = getattr(node_at(struct, table), "fields", ()), _at(loaded.raw, table)
        if not isinstance(given, dict) or given.keys() - {field.encode_name for field in fields}:
            continue  # msgspec's message names the unknown field
        lacks = [f"{table}.{field.encode_name}" for field in fields if field.required]
        lacks = [field for field in lacks if field.rpartition(".")[2] not in given]
        if lacks:
            others = preset_with("systems", f"[{table}]")
            instead = f", or use a system that has one (as {others})" if others else ""
            raise UsageError(
                f"{loaded.where}: there is no [{table}] to set {path} in: set {', '.join(lacks)}, too{instead}."
            )


def _check_texts(loaded: Loaded) -> None:
    """Refuse texts that are empty, endless, or could steer a terminal."""
    for path, value in _leaves(loaded.raw):
        if path != printable(path):
            raise UsageError(f"{loaded.where}: {path} is a key that cannot be printed.")
        if not isinstance(value, str):
            continue
        # Only the last part of a path must be printable: the names of its folders are not ours to judge.
        shown = Path(value).name if _is_file(value, path.rpartition(".")[2]) else value
        longest = MAX_NAME if path.rpartition(".")[2] == "name" else MAX_TEXT
        if not value.strip() or len(value) > longest:
            loaded.refuse(path, f"a text of 1 to {longest} characters")
        if shown != printable(shown):
            loaded.refuse(path, "printable characters only")


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{index}]")
    else:
        yield path, value


def _at(raw: object, path: str) -> object:
    for key in re.findall(r"[^.\[\]]+", path):
        raw = raw[int(key)] if isinstance(raw, list) else raw[key] if isinstance(raw, dict) else None
    return raw


def _got(raw: dict[str, Any], path: str) -> str:
    try:
        value = _at(raw, path)
    except (KeyError, IndexError):
        return ""
    if isinstance(value, dict):
        return ", got a table"
    try:
        text = repr(value)
    except ValueError:  # more digits than Python writes
        return ""
    return f", got {text if len(text) <= MAX_NAME else text[:MAX_NAME] + '...'}"


def _explain(message: str, loaded: Loaded, struct: type[msgspec.Struct]) -> str:
    """msgspec's message, in the words of one who writes TOML."""
    what, _, path = message.partition(" - at `$")
    path = path.lstrip(".").rstrip("`")
    prefix = f"{path}." if path else ""
    if found := re.match(r"(?s)Object contains unknown field `(.*)`", what):
        known = list(fields_at(struct, path))
        choices = f"; known are {', '.join(known)}" if known else ""
        return f"{loaded.where}: {prefix}{found[1]} is unknown{nearest(found[1], known)}{choices}."
    if found := re.match(r"Object missing required field `(.*)`", what):
        wants = _KINDS.get(fields_at(struct, path)[found[1]].__class__, "a value")
        return f"{loaded.where}: {prefix}{found[1]} is missing, and wants {wants}."
    if found := re.match(r"Expected `(.*?)`(?: ([<>]=?) ([\d.e+-]+))?", what):
        wants = " or ".join(_WORDS.get(name, name) for name in found[1].split(" | "))
        if found[2]:
            wants += range_of(type_at(struct, path)) or f" {_LIMITS[found[2]]} {float(found[3]):g}"
        if path.endswith("[...]"):
            return f"{loaded.where}: every value of {path[:-5]} wants {wants}."
        return f"{loaded.where}: {path} wants {wants}{_got(loaded.raw, path)}."
    table, _, field = path.rpartition(".")
    kind = fields_at(struct, table).get(field)
    if legal := [name for inner in getattr(kind, "types", [kind]) for name in getattr(inner, "values", ())]:
        near = nearest(str(_at(loaded.raw, path)), legal)
        return f"{loaded.where}: {path} wants one of {', '.join(legal)}{near}{_got(loaded.raw, path)}."
    return f"{loaded.where}: {path}: {what}{_got(loaded.raw, path)}."
