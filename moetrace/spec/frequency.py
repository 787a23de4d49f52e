"""Frequency levels of a GPU: `[[gpu.levels]]` of a system (timing model, section 10)."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Annotated

import msgspec
from msgspec import Meta

Relative = Annotated[float, Meta(ge=1e-6, le=1)]


class Level(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One level that the GPU can run at.

    Attributes:
        frequency: Frequency over that of the top level, which is 1.
        voltage: Voltage over that of the top level, which is 1.
    """

    frequency: Relative
    voltage: Relative

    @property
    def power(self) -> float:
        """Its power beyond idle, over that of the top level: f*v^2."""
        return self.frequency * self.voltage**2


def by_frequency(levels: Sequence[Level]) -> list[Level]:
    """Return levels with the top first."""
    return sorted(levels, key=lambda level: -level.frequency)


def level_misfits(levels: Sequence[Level] | None, memory_scales: bool | None) -> Iterator[str]:
    """Yield a sentence, without its full stop, for what a GPU's levels (by frequency) cannot be."""
    if levels is None:
        if memory_scales is not None:
            yield "gpu.memory_scales is set, but the GPU has no levels: add [[gpu.levels]] or remove it"
        return
    if not levels:
        yield "gpu.levels is empty: list levels, the top with frequency = 1 and voltage = 1, or remove it"
        return
    top = levels[0]
    if (top.frequency, top.voltage) != (1, 1):
        yield (
            "gpu.levels has no top level: the highest must have frequency = 1 and voltage = 1, got "
            f"frequency = {top.frequency:g} and voltage = {top.voltage:g}"
        )
    for level, lower in pairwise(levels):
        if lower.frequency == level.frequency:
            yield f"gpu.levels has frequency = {level.frequency:g} twice: keep one of them"
        elif lower.voltage > level.voltage:
            yield (
                f"gpu.levels has voltage = {lower.voltage:g} at frequency = {lower.frequency:g}, above "
                f"{level.voltage:g} at {level.frequency:g}: a lower frequency must not have a higher voltage"
            )
