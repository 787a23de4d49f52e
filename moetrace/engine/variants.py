"""The lines of the replay, compiled for what some replays have and others do not, which costs those nothing."""

from collections.abc import Hashable
from functools import cache
from typing import Any

from moetrace.engine.bounds import clairvoyant_s, clairvoyant_signature
from moetrace.engine.replay import Aside, replay_batch, replay_signature
from moetrace.engine.tiers.tier_records import Tiers, without_disk
from moetrace.jit.compile import kernel

_lines = getattr(replay_batch, "py_func", replay_batch)
_clairvoyant_lines = getattr(clairvoyant_s, "py_func", clairvoyant_s)


def variant(tiers: Tiers | None, aside: Aside) -> Any:
    """Return the replay for lanes that have such tiers, or None, and what else is there."""
    if tiers is None and all(part is None for part in aside):
        return replay_batch
    return _variant(_Example(tiers, aside))


def clairvoyant(tiers: Tiers | None) -> Any:
    """Return the clairvoyant run for machines that have such tiers, or None."""
    return clairvoyant_s if tiers is None else _clairvoyant(_Example(without_disk(tiers), Aside()))


class _Example:
    """Two examples are equal if the same parts of them are there: then their types are equal, too."""

    def __init__(self, tiers: Tiers | None, aside: Aside) -> None:
        self.tiers, self.aside = tiers, aside
        self.there = _there((tiers, aside))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Example) and self.there == other.there

    def __hash__(self) -> int:
        return hash(self.there)


@cache
def _variant(example: _Example) -> Any:
    # Types are read from the example when the kernel is compiled; until then it keeps these arrays.
    return kernel(_lines, signature=lambda: replay_signature(example.tiers, example.aside))


@cache
def _clairvoyant(example: _Example) -> Any:
    return kernel(_clairvoyant_lines, signature=lambda: clairvoyant_signature(example.tiers))


def _there(part: Any) -> Hashable:
    return tuple(_there(one) for one in part) if isinstance(part, tuple) else part is not None
