"""Who is in which step of a generated trace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moetrace.spec.errors import UsageError
from moetrace.trace.schema import DECODE, PREFILL


class StepBlock(NamedTuple):
    """Successive whole steps: request, position int32 [rows]; step_rows int64 [steps]; phase uint8 [steps]."""

    request: np.ndarray
    position: np.ndarray
    step_rows: np.ndarray
    phase: np.ndarray


class BatchSchedule(NamedTuple):
    """Equal requests through continuous batching that prefills before it decodes; no step mixes the two.

    As soon as a place is free the next request takes it: its prompt rows are one prefill step of their own, then it
    joins the decoding batch. Equal lengths end together, so requests run in groups of `batch`: their prefill steps one
    after another, then `output` decode steps with one row per request. The last group may be smaller. Positions of a
    request run from 0, first through the prompt, then through the output. A part of length 0 has no steps.
    """

    requests: int
    prompt: int
    output: int
    batch: int = 1

    @property
    def rows(self) -> int:
        """Token rows of all requests."""
        return self.requests * (self.prompt + self.output)

    @property
    def steps(self) -> int:
        """Steps of all groups."""
        groups = -(-self.requests // self.batch)
        return (self.requests if self.prompt else 0) + groups * self.output

    def check(self) -> None:
        """Raise a UsageError for a schedule that cannot run."""
        for option, value, least in zip(("requests", "prompt", "output", "batch"), self, (1, 0, 0, 1), strict=True):
            if not least <= value < 2**31:
                raise UsageError(f"{option} is {value}: give a whole number from {least} to {2**31 - 1}.")
        if self.prompt + self.output == 0:
            raise UsageError("prompt and output are both 0: give at least one of them a length.")
        if self.prompt + self.output >= 2**31:
            raise UsageError(f"prompt and output together exceed {2**31 - 1} positions: shorten one of them.")

    def blocks(self, rows: int) -> Iterator[StepBlock]:
        """Yield all steps in time order, about `rows` rows at a time and at least one step."""
        first = 0
        while first < self.steps:
            group, index, prefills, step_rows = self._shape(np.arange(first, min(first + rows, self.steps)))
            count = max(1, int(np.searchsorted(np.cumsum(step_rows), rows, side="right")))
            first += count
            group, index, prefills, step_rows = (part[:count] for part in (group, index, prefills, step_rows))
            decode = index >= prefills
            step = np.repeat(np.arange(count), step_rows)
            within = np.arange(step.size) - (np.cumsum(step_rows) - step_rows)[step]
            request = group[step] * self.batch + np.where(decode[step], within, index[step])
            position = np.where(decode[step], self.prompt + index[step] - prefills[step], within)
            phase = np.where(decode, DECODE, PREFILL).astype(np.uint8)
            yield StepBlock(request.astype(np.int32), position.astype(np.int32), step_rows, phase)

    def _shape(self, step: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return group, index in the group, prefill steps of the group and rows, each int64 [steps]."""
        group, index = np.divmod(step, (self.batch if self.prompt else 0) + self.output)
        members = np.minimum(self.batch, self.requests - group * self.batch)
        prefills = members if self.prompt else np.zeros_like(members)
        return group, index, prefills, np.where(index < prefills, self.prompt, members)
