"""The choices of a policy as records: the name of each, its meaning, the parameters that it reads, and its partners.

A record stands beside its hook in the engine, one file a choice, and the folder is the registry. Here the folders are
named as text: this is the one place where the spec knows of the engine. A record's file imports nothing heavy.
Other packages bring records by entry points of the group `moetrace.choices`. Their code is imported only for a name
that no built-in choice has, and for lists of choices: an error in a package never stops a built-in choice.
"""

import contextlib
import importlib
import pkgutil
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from moetrace.spec.choice_records import BY_ADMISSION as BY_ADMISSION
from moetrace.spec.choice_records import BY_AGE as BY_AGE
from moetrace.spec.choice_records import BY_HAND as BY_HAND
from moetrace.spec.choice_records import BY_SCORE as BY_SCORE
from moetrace.spec.choice_records import BY_TOUCH as BY_TOUCH
from moetrace.spec.choice_records import CachePolicy, Dispatch, Placement, Prefetch, Residency
from moetrace.spec.choice_records import PolicyChoice as PolicyChoice
from moetrace.spec.errors import MoetraceError, harmless
from moetrace.spec.load import FUNCTION_FIELDS

ENTRY_POINTS = "moetrace.choices"
USER = "file.py:function"
# Kinds of choices, as the fields of a policy -> the folder of the engine that holds their records.
FOLDERS = {
    "placement": "placements",
    "dispatch": "dispatches",
    "residency": "residencies",
    "prefetch": "prefetches",
}
KINDS = tuple(FOLDERS)
_NAME = re.compile("[a-z0-9][a-z0-9-]{0,63}")


def choices_of(kind: str) -> Mapping[str, Any]:
    """Return the records of a kind (`placement`, `dispatch`, `residency` or `prefetch`) by name, in a stable order.

    It reads the choices of all installed packages, and says on stderr which of them it skips.
    """
    _note_faults()
    found = [*_built_in()[kind].values(), *(one for (of, _), one in _brought().found.items() if of == kind)]
    return {
        one.record.name: one.record for one in sorted(found, key=lambda one: (one.record.list_order, one.record.name))
    }


def find(kind: str, choice: str) -> Any:
    """Return the record of a choice, with any number (`tp:2`); None for a user's own function and unknown names.

    Raises MoetraceError if the name is that of another package's choice, and that cannot be used.
    """
    found = _find(kind, choice)
    return found and found.record


def legal(kind: str) -> tuple[str, ...]:
    """Return the forms of the choices that a replay takes: `("ep", ..., "tp", "tp:g")`."""
    forms = [form for record in choices_of(kind).values() if not record.instead for form in record.forms]
    return (*forms, USER) if kind in FUNCTION_FIELDS else tuple(forms)


def source_of(kind: str, choice: str) -> Path | None:
    """Return the file, or the folder, that holds a choice of another package; None for a built-in one."""
    found = _find(kind, choice)
    return found and found.source


def go_together(prefetch: Prefetch, residency: str) -> bool:
    """Whether a prefetch goes with a residency, or with a user's (`file.py:function`)."""
    if residency == USER:
        return prefetch.users or prefetch.any_residency
    record = find("residency", residency)
    if record is None or record.instead:
        return False
    return prefetch.any_residency or residency in prefetch.residencies or prefetch.name in record.prefetches


def residencies_of(prefetch: Prefetch) -> tuple[str, ...]:
    """Return the residencies that a prefetch goes with: those that it names, those that name it, and a user's."""
    known = choices_of("residency")
    names = dict.fromkeys([*(name for name in prefetch.residencies if name in known), *known, USER])
    return tuple(name for name in names if go_together(prefetch, name))


def prefetches_of(residency: str) -> tuple[str, ...]:
    """Return the forms of the prefetches that a residency goes with, or `file.py:function`."""
    partners = [record for record in choices_of("prefetch").values() if go_together(record, residency)]
    return tuple(form for record in partners for form in record.forms)


def cache_policy(name: str) -> CachePolicy | None:
    """Return the residency of that name as `moetrace analyze cache` replays it; None if that has no such name."""
    record = None if ":" in name else find("residency", name)
    return record and record.cache


def cache_policies() -> dict[str, CachePolicy]:
    """Return the residencies that `moetrace analyze cache` knows, by name and in its order."""
    found = {name: record.cache for name, record in choices_of("residency").items() if record.cache}
    return dict(sorted(found.items(), key=lambda item: (item[1].list_order, item[0])))


def planned_placements() -> tuple[str, ...]:
    """Return the forms of the placements that `moetrace analyze balance` knows: `("ep", ..., "tp", "tp:g")`."""
    return tuple(form for record in choices_of("placement").values() if record.planner for form in record.forms)


def described(kind: str) -> list[dict[str, str]]:
    """Return a row for each record of a kind, for people: name, meaning, parameters, goes_with and used_by."""
    return [
        {
            "name": ", ".join(record.forms),
            "meaning": record.meaning,
            "parameters": ", ".join(record.parameters),
            "goes_with": _partners(record),
            "used_by": ", ".join(_users(record)),
        }
        for record in choices_of(kind).values()
    ]


def _partners(record: Any) -> str:
    if record.instead:
        return ""
    if isinstance(record, Dispatch) and record.partners:
        return ", ".join(f"{kind} {name}" for kind, name in record.partners)
    if isinstance(record, Residency):
        return f"prefetch {', '.join(prefetches_of(record.name))}"
    if isinstance(record, Placement) and record.needs_units:
        return "systems with [ndp]"
    if isinstance(record, Prefetch) and not record.any_residency:
        with_others = "".join(f"{kind} {name}, " for kind, name in record.partners)
        return f"{with_others}residency {', '.join(residencies_of(record))}"
    return "any"


def _users(record: Any) -> Iterator[str]:
    if not record.instead:
        yield "replay"
    if isinstance(record, Residency) and record.cache:
        yield "analyze cache"
    if isinstance(record, Placement) and record.planner:
        yield "analyze balance"


def resolve(reference: str) -> Any:
    """Return what a `module:name` of a record stands for."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


class _Found(NamedTuple):
    record: Any
    package: str
    source: Path | None


class _Fault(NamedTuple):
    name: str  # of the choice, or of the entry point that brings it
    sentence: str


class _Brought(NamedTuple):
    found: dict[tuple[str, str], _Found]  # by kind and name
    faults: list[_Fault]


def _find(kind: str, choice: str) -> _Found | None:
    name = choice.partition(":")[0]
    built_in = _built_in()[kind].get(choice) or _built_in()[kind].get(name)
    if built_in:
        return built_in
    if not _NAME.fullmatch(name):  # as of file.py:function: no package can have it
        return None
    brought = _brought()
    if (kind, name) not in brought.found:
        for fault in brought.faults:
            if fault.name == name:
                raise MoetraceError(fault.sentence)
    return brought.found.get((kind, name))


@cache
def _built_in() -> dict[str, dict[str, _Found]]:
    """Read the records of this package, by kind and name."""
    found: dict[str, dict[str, _Found]] = {}
    for kind, folder in FOLDERS.items():
        package = importlib.import_module(f"moetrace.engine.{folder}")
        modules = [f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
        records = [importlib.import_module(module).RECORD for module in modules]
        found[kind] = {record.name: _Found(record, "moetrace", None) for record in records}
    return found


@cache
def _brought() -> _Brought:
    """Read the records of other packages. A name that two packages bring stands for neither of them."""
    brought, clashes = _Brought({}, []), set()
    for point in sorted(metadata.entry_points(group=ENTRY_POINTS), key=lambda point: point.value):
        try:
            one = _load(point)
        except MoetraceError as error:
            brought.faults.append(_Fault(point.name, str(error)))
            continue
        kind, name = key = one.record.kind, one.record.name
        if other := _built_in()[kind].get(name) or brought.found.get(key):
            clashes.add(key)
            sentence = (
                f"The packages {other.package} and {one.package} both bring a {kind} called {name}: rename or "
                "uninstall one of them."
            )
            brought.faults.append(_Fault(name, sentence))
        else:
            brought.found[key] = one
    for key in clashes:
        brought.found.pop(key, None)
    return brought


@cache
def _note_faults() -> None:
    """Say once which choices of other packages are skipped."""
    for fault in _brought().faults:
        print(harmless(f"moetrace: note: {fault.sentence}"), file=sys.stderr)


def _load(point: metadata.EntryPoint) -> _Found:
    """Import what an entry point names; raise MoetraceError if that is no record."""
    package = point.dist.name if point.dist else point.value
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for data
            record = point.load()
    except (Exception, SystemExit) as error:
        raise MoetraceError(
            f"The package {package} brings choices, but {point.value} cannot be read: {type(error).__name__}: "
            f"{' '.join(str(error).split())}."
        ) from error
    record = getattr(record, "RECORD", record)
    if not isinstance(record, Placement | Dispatch | Residency | Prefetch):
        raise MoetraceError(
            f"The package {package} brings {point.value}, which must be a Placement, Dispatch, Residency or "
            "Prefetch of moetrace.spec.choices, or a module that has one as RECORD."
        )
    if not _NAME.fullmatch(record.name):
        raise MoetraceError(
            f"The package {package} brings a {record.kind} whose name is not of lower-case letters, digits and "
            f"dashes: {record.name!r}."
        )
    return _Found(record, package, _source(point.module))


def _source(module: str) -> Path | None:
    """Return the folder of the package that a module is of, or the file of a module that is of none."""
    file = getattr(sys.modules[module.partition(".")[0]], "__file__", None) or sys.modules[module].__file__
    path = Path(file) if file else None
    return path.parent if path and path.name == "__init__.py" else path
