"""The search space: the axes of a sweep, as choices, and ranges of numbers from its [search] table."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from moetrace.batch.grid import Point, Space, flat_paths
from moetrace.batch.metrics import check_metrics
from moetrace.results.record import METRICS
from moetrace.spec import load_policy
from moetrace.spec.errors import MoetraceError, UsageError, printable
from moetrace.spec.load import Loaded, convert

if TYPE_CHECKING:
    from optuna.trial import Trial

SAMPLERS = ("tpe", "random")
# The goal of a search depends on these, so a search has one of each.
_FIXED = ("trace", "batch", "model", "system")


class Range(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Numbers from `low` to `high`: whole ones if both are; `log` draws their logarithm evenly."""

    low: int | float
    high: int | float
    log: bool = False


class Halving(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to search.

    The best of each `keep` trials that were replayed over a part of the trace go on to a part `keep` times as long;
    there are `parts` of them, and the last one is the whole trace.
    """

    objective: str = "total_s"
    trials: int = 54
    parts: int = 3
    keep: int = 3
    seed: int = 0
    sampler: str = "tpe"
    range: dict[str, Any] = {}

    @property
    def maximize(self) -> bool:
        """Whether more of the objective is better."""
        return METRICS[self.objective].better == "higher"

    @property
    def round(self) -> int:
        """How many trials begin at once, so that one of them may come to the end."""
        return self.keep ** (self.parts - 1)

    def steps(self, part: int, steps: int) -> int:
        """How many of the trace's first steps a part takes."""
        return -(-steps // self.keep ** (self.parts - 1 - part))


class SearchChoices(NamedTuple):
    """The space of a search, checked."""

    space: Space
    halving: Halving
    ranges: dict[str, Range]  # by field
    names: dict[str, set[str]]  # of each policy by its label: that, and the one in its file

    def plain(self) -> Point:
        """The first of each axis and nothing from a range: the reference that the search tries to beat."""
        return self.space.point([0] * len(self.space.axes))

    def suggest(self, trial: "Trial") -> Point:
        """Let a trial of Optuna's choose; a range of `policy.NAME.FIELD` only where that policy was chosen."""
        row = [self._pick(trial, axis.fields, len(axis.values)) for axis in self.space.axes]
        policy = self.space.point(row).labels["policy"]
        also: dict[str, int | float] = {}
        for field, span in self.ranges.items():
            name = _policy_name(field)
            if name and name not in self.names[str(policy)]:
                continue
            if isinstance(span.low, int) and isinstance(span.high, int):
                also[field] = trial.suggest_int(field, span.low, span.high, log=span.log)
            else:
                also[field] = trial.suggest_float(field, span.low, span.high, log=span.log)
        return self.space.point(row, also)

    def _pick(self, trial: "Trial", fields: tuple[str, ...], count: int) -> int:
        return trial.suggest_categorical(" ".join(fields), list(range(count))) if count > 1 else 0


def check_choices(space: Space) -> SearchChoices:
    """Check the space of a search.

    Raises UsageError for an unknown objective, a range that is empty, of no number or also an axis, a trace, model or
    system that is a list, or nothing to choose.
    """
    where = f"{space.where}, search"
    halving = convert(Loaded(space.search or {}, where), Halving)
    check_metrics([halving.objective], f"{where}: objective ")
    if METRICS[halving.objective].better is None:
        raise UsageError(f"{where}: of {halving.objective} neither less nor more is better: take another objective.")
    for name, least, most in (("trials", 1, 100_000), ("parts", 1, 8), ("keep", 2, 16), ("seed", 0, 2**32 - 1)):
        if not least <= getattr(halving, name) <= most:
            raise UsageError(f"{where}: {name} is {getattr(halving, name)}, but must be from {least} to {most:,}.")
    if halving.sampler not in SAMPLERS:
        raise UsageError(f"{where}: sampler wants {' or '.join(SAMPLERS)}, got {printable(halving.sampler)!r}.")
    fields = {field: len(axis.values) for axis in space.axes for field in axis.fields}
    for field, count in fields.items():
        if count > 1 and field.partition(".")[0] in _FIXED:
            raise UsageError(f"{space.where}: a search is for one trace and machine, but {field} is a list.")
    ranges = {field: _range(field, span, where) for field, span in _spans(halving.range, where).items()}
    for field in ranges.keys() & fields.keys():
        raise UsageError(f"{where}: {field} has a range, and is given beside it: keep one of them.")
    if not ranges and space.size == 1:
        raise UsageError(f"{where}: there is nothing to choose: give policy, slots or a policy's field several values.")
    names = {}
    for axis in space.axes:
        for i, field in enumerate(axis.fields):
            if field == "policy":
                for at, label in enumerate(space.labels["policy"]):
                    names[str(label)] = {str(label), _name_of(space, axis.values[at][i])}
    known = sorted(set().union(*names.values()))
    for field in ranges:
        name = _policy_name(field)
        if name and name not in known:
            raise UsageError(f"{where}: range {printable(field)} is of no policy here; there are {', '.join(known)}.")
    return SearchChoices(space, halving, ranges, names)


def _policy_name(field: str) -> str:
    """NAME of `policy.NAME.FIELD`, nothing of `policy.FIELD` and `slots`."""
    return field.partition(".")[2].rpartition(".")[0]


def _name_of(space: Space, source: str) -> str:
    row = [0] * len(space.axes)
    for i, axis in enumerate(space.axes):
        if "policy" in axis.fields:
            row[i] = next(at for at, value in enumerate(axis.values) if source in value)
    try:
        return load_policy(space.point(row).values["policy"], {}).name
    except MoetraceError:
        return source  # the replay reports the error


def _spans(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The ranges by their field's path."""

    def closed(inner: Mapping[str, Any]) -> dict[str, Any]:
        """Hide a range in a list, so that its keys are not taken for fields."""
        return {
            key: closed(value) if isinstance(value, Mapping) and not _is_range(value) else [value]
            for key, value in inner.items()
        }

    fields = {key: value for key, value in table.items() if key != "slots"}
    slots = {key: value for key, value in table.items() if key == "slots"}
    return slots | {field: span for field, (span,) in flat_paths(closed(fields), f"{where}: range", where).items()}


def _is_range(value: Mapping[str, Any]) -> bool:
    return not value or bool(value.keys() & {"low", "high", "log"})


def _range(field: str, span: Any, where: str) -> Range:
    at = f"{where}, range {printable(field)}"
    if not isinstance(span, Mapping):
        raise UsageError(f"{at} wants {{ low = ..., high = ... }}, got {printable(repr(span))}.")
    if field.partition(".")[0] not in ("policy", "slots"):
        raise UsageError(f"{at}: a search is for one model and machine; ranges are of slots and policy fields.")
    found = convert(Loaded(dict(span), at), Range)
    if not found.low <= found.high:
        raise UsageError(f"{at}: low is {found.low} and high {found.high}, so there is nothing between them.")
    if found.log and found.low <= 0:
        raise UsageError(f"{at}: low is {found.low}, and logarithms want more than 0.")
    if field == "slots" and not (isinstance(found.low, int) and isinstance(found.high, int) and found.low >= 0):
        raise UsageError(f"{at} wants whole numbers from 0.")
    return found
