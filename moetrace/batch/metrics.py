"""Figures that a gate compares and a search judges by: their names as a user writes them, values and tolerances."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from moetrace.results.record import METRICS, is_absent, value_in
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.spec.named import nearest

# Results are deterministic, so what moved at all has moved for a reason. But a sum of a million terms, or a quantile
# between two of them, may end in other digits with another NumPy or on another processor: about 1e-16 an operation,
# 1e-12 at worst. A thousand times that is still far below what anybody would call a change.
ROUNDING = 1e-9


# A new baseline gates these figures: the first list for all replays, the second for those that have them. Figures that
# move together with others (`moved_bytes`) or are sums of others (`remote_s`) are left out.
DEFAULT_METRICS = (
    "total_s",
    "step_s.p99",
    "ttft_s.p50",
    "ttft_s.p99",
    "tpot_s.p50",
    "tpot_s.p99",
    "hit_rate",
    "demand_bytes",
)
DEFAULT_OPTIONAL = (
    *("gate_mass_dropped", "resent_bytes", "host_hit_rate", "disk_bytes", "remote_usd", "cold_s"),
    *("energy_j", "price_usd", "in_time", "regret"),
)


def default_metrics(cells: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return what a new baseline gates of replays with these figures: of some machines only where a cell has it."""
    there = [*cells]
    some = (name for name in DEFAULT_OPTIONAL if not all(is_absent(name, figures) for figures in there))
    return (*DEFAULT_METRICS, *some)


def check_metrics(names: Iterable[str], where: str = "") -> tuple[str, ...]:
    """Return the names without repetitions; raise a UsageError, which begins with `where`, if one is no metric's."""
    found = tuple(dict.fromkeys(names))
    for name in found:
        if name not in METRICS:
            raise UsageError(f"{where}{name!r} is no metric{nearest(name, list(METRICS))}; {_known()}.")
    return found


def value_of(figures: Mapping[str, Any], name: str, where: str) -> float | None:
    """Return a figure of what summary.json says of a policy: finite, not negative, or None where it is undefined.

    For the units' utilization it is the mean. Raises MoetraceError, which begins with `where`, if it is no number.
    """
    try:
        return value_in(figures, name, lambda value: _finite(value, name, where))
    except (LookupError, TypeError):
        raise MoetraceError(f"{where} has no {name}: write the folder again with this version.") from None


class _Allowed(NamedTuple):
    relative: float | None = None
    absolute: float | None = None


class Tolerances:
    """How far each metric may move before it counts.

    Args:
        texts: each `0.5%` (of every metric's baseline), `total_s=0.1%` (of this one's) or `total_s=0.002` (in its own
            unit). `ttft_s=...` is of all metrics that begin so. The nearest name counts, `total_s` before all of them;
            where both kinds are given for one name, the wider. By default ROUNDING.

    Raises UsageError if a text is none of these, or names no metric.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._allowed: dict[str, _Allowed] = {}
        for text in texts:
            name, value, percent = _parse(text)
            kind = "relative" if percent else "absolute"
            self._allowed[name] = self._allowed.get(name, _Allowed())._replace(**{kind: value})

    def of(self, metric: str, baseline: float) -> float:
        """How far `metric` may be from `baseline`, in its unit."""
        for name in (metric, metric.partition(".")[0], ""):
            if name in self._allowed:
                relative, absolute = self._allowed[name]
                return max((relative or 0.0) * abs(baseline), absolute or 0.0)
        return ROUNDING * abs(baseline)


def _parse(text: str) -> tuple[str, float, bool]:
    """Name (`""` for every metric), value and whether it is a share of the baseline."""
    found = re.fullmatch(r"\s*(?:([\w.]+)\s*=)?\s*([0-9.eE+-]+)\s*(%?)\s*", text, re.ASCII)
    try:
        value = float(found[2]) if found else math.nan
    except ValueError:
        value = math.nan
    if found is None or not 0 <= value < (1e6 if found[3] else 1e300):
        raise UsageError(
            f"A tolerance is 0.5%, total_s=0.1% or total_s=0.002 (in its unit), and not negative: got {text!r}."
        )
    name = found[1] or ""
    if not (name or found[3]):
        raise UsageError(f"The tolerance {text!r} is in which metric's unit? Write total_s={value:g}, or {value:g}%.")
    if name and not any(name in (metric, metric.partition(".")[0]) for metric in METRICS):
        raise UsageError(f"The tolerance {text!r} names no metric{nearest(name, list(METRICS))}; {_known()}.")
    return name, value / 100 if found[3] else value, bool(found[3])


def _known() -> str:
    return f"known are {', '.join(METRICS)}"


def _finite(value: object, name: str, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e300:
        raise MoetraceError(f"{where}: {name} wants a finite number that is not negative, or null.")
    return float(value)
