"""Limits that figures must keep: `tpot_s.p99<=50ms`, which a sweep, a search and an advice take as hard constraints."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from moetrace.batch.metrics import check_metrics, value_of
from moetrace.engine.setup import Setup
from moetrace.results.optional_figures import may_have, need_of
from moetrace.results.record import METRICS
from moetrace.spec.errors import UsageError, printable

_FORM = re.compile(r"\s*([\w.]+)\s*(<=|>=)\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-zA-Z%]*(?:/s)?)\s*", re.ASCII)
_SIGNS = {"lower": "<=", "higher": ">="}
# Units of a limit, by the unit of the figure. Seconds, bytes and shares of 1 have their own.
_UNITS = {
    "s": {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6},
    "bytes": {"": 1.0, "B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12},
    "share": {"": 1.0, "%": 0.01},
    "1/s": {"": 1.0, "/s": 1.0},
    "J": {"": 1.0, "J": 1.0, "mJ": 1e-3, "kJ": 1e3},
    "USD": {"": 1.0, "USD": 1.0},
}
_PLAIN = {"": 1.0}


class Slo(NamedTuple):
    """A limit of one figure.

    Attributes:
        metric: The figure, as in summary.json: `tpot_s.p99`.
        limit: In the figure's own unit.
        text: The limit as it was written.
    """

    metric: str
    limit: float
    text: str

    def miss(self, value: float | None) -> float:
        """Return by what share of the limit a value misses it, 0.0 if it keeps it; infinite where it is undefined."""
        if value is None:
            return float("inf")
        beyond = value - self.limit if METRICS[self.metric].better == "lower" else self.limit - value
        return 0.0 if beyond <= 0 else beyond / self.limit if self.limit else float("inf")


def parse_slos(texts: str | Iterable[str], where: str = "") -> tuple[Slo, ...]:
    """Read limits.

    Raises UsageError, which begins with `where`, for one of another form, of an unknown figure or unit, or in the wrong
    direction.
    """
    try:
        return tuple(_parse(text) for text in ([texts] if isinstance(texts, str) else texts))
    except UsageError as error:
        raise UsageError(f"{where}{error}") from None


def worst_miss(slos: Sequence[Slo], figures: Mapping[str, Any]) -> float:
    """Return the largest share by which what summary.json says of a policy misses a limit; 0.0 if it keeps all."""
    return max((slo.miss(value_of(figures, slo.metric, "the replay")) for slo in slos), default=0.0)


def check_had(slos: Sequence[Slo], setups: Sequence[Setup]) -> None:
    """Raise a UsageError if a limit is of a figure that no cell has, as of a table that no system has."""
    for slo in slos:
        need = need_of(slo.metric)
        if not need or not setups or any(may_have(slo.metric, each.system, each.policies[0]) for each in setups):
            continue
        raise UsageError(
            f"The SLO {slo.text!r}: no cell has {slo.metric}, as no {need.what}: {need.add}, or drop the SLO."
        )


def _parse(text: str) -> Slo:
    found = _FORM.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise UsageError(f"An SLO is METRIC<=LIMIT or METRIC>=LIMIT, as in tpot_s.p99<=50ms, got {_shown(text)}.")
    name, sign, digits, unit = found.groups()
    check_metrics([name], f"The SLO {_shown(text)}: ")
    figure = METRICS[name]
    if figure.better is None:
        raise UsageError(f"The SLO {_shown(text)}: of {name} neither less nor more is better, so it has no limit.")
    if sign != _SIGNS[figure.better]:
        less = "less" if figure.better == "lower" else "more"
        raise UsageError(f"The SLO {_shown(text)}: of {name} {less} is better, so write {_SIGNS[figure.better]}.")
    units = _UNITS.get(figure.unit, _PLAIN)
    if unit not in units:
        known = ", ".join(each for each in units if each) or "no unit"
        raise UsageError(f"The SLO {_shown(text)}: {name} is given in {known}, got {unit!r}.")
    try:
        limit = float(digits) * units[unit]
    except ValueError:
        raise UsageError(f"The SLO {_shown(text)}: {digits!r} is not a number.") from None
    if not limit < 1e300:
        raise UsageError(f"The SLO {_shown(text)}: the limit must be a finite number.")
    if figure.unit == "share" and figure.better == "higher" and limit > 1:
        raise UsageError(f"The SLO {_shown(text)}: {name} is a share, and never more than 100 %.")
    return Slo(name, limit, text.strip())


def _shown(text: object) -> str:
    return repr(printable(str(text)[:100]))
