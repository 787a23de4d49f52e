"""Ids that carry no expert: padding, zero-computation and shared experts, and ids that the user names."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from moetrace.importers.captured import Hints
from moetrace.spec.errors import MoetraceError, counted
from moetrace.trace.schema import absent_id, expert_dtype


class Placeholders:
    """Turns ids that carry no expert into -1, and counts them.

    These are the ids of `Hints.absent_from` and `Hints.absent_ids`, and every id beyond the experts that fills a cell
    of several slots: no router chooses an expert twice. Formats with a mark of their own (`marks`) have no others.
    """

    def __init__(self, num_experts: int, hints: Hints, marks: bool = False) -> None:
        self.num_experts, self._hints, self._marks = num_experts, hints, marks
        self.absent = absent_id(num_experts)
        self._wishes = hints.absent_from is not None or bool(hints.absent_ids)
        self.cells = 0  # of one id beyond the experts
        self.chosen = 0  # ids of experts that the user calls absent, and that stand once in their cells

    def marked(self, ids: np.ndarray) -> np.ndarray:
        """`ids` [..., top_k], as a copy with -1 where they carry no expert, or as they are if they all do."""
        hints = self._hints
        if self._wishes:
            gone = np.isin(ids, hints.absent_ids)
            if hints.absent_from is not None:
                gone |= ids >= hints.absent_from
            experts = gone & (ids >= 0) & (ids < self.num_experts)
            if experts.any():
                self.chosen += int((np.count_nonzero(experts, axis=-1) == 1).sum())
            ids = np.where(gone, -1, ids.astype(np.int64))
        if not self._marks and ids.shape[-1] > 1 and ids.size and int(ids.max()) >= self.num_experts:
            one = (ids[..., :1] >= self.num_experts) & (ids == ids[..., :1])
            cells = one.all(axis=-1)
            if cells.any():
                self.cells += int(cells.sum())
                ids = ids.astype(np.int64)
                ids[cells] = -1
        return ids

    def narrow(self, ids: np.ndarray) -> np.ndarray:
        """`marked` ids of any dtype in the dtype of a trace, with its mark for absent instead of -1."""
        marked = self.marked(ids)
        narrow = marked.astype(expert_dtype(self.num_experts), copy=False)
        if marked.dtype.kind == "i":
            narrow[marked == -1] = self.absent
        return narrow

    def checked(self, ids: np.ndarray) -> tuple[np.ndarray, bool, tuple[int, ...] | None]:
        """`marked` ids, whether some are -1, and the index of the first that is neither -1 nor an expert.

        Clean ids cost their greatest and, if they have a sign, their least.
        """
        if not ids.size:
            return ids, False, None
        low, high = _range(ids)
        if self._wishes or high >= self.num_experts:
            ids = self.marked(ids)
            low, high = _range(ids)
        if low >= -1 and high < self.num_experts:
            return ids, low < 0, None
        wrong = (ids < -1) | (ids >= self.num_experts)
        return ids, low < 0, tuple(int(i) for i in np.argwhere(wrong)[0])

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Count nothing of ids that are only looked at, and come again."""
        before = self.cells, self.chosen
        try:
            yield
        finally:
            self.cells, self.chosen = before

    def told(self, where: str) -> dict[str, Any]:
        """The entries in `source` on cells of one id beyond the experts and on absent experts, also notes."""
        facts: dict[str, Any] = {}
        if self.cells:
            facts["padding_cells"] = self.cells
            self._hints.note(
                f"{where}: {self.cells:,} cells hold one id that is no expert in every slot, which is padding: absent."
            )
        if self.chosen:
            facts["absent_choices_of_experts"] = self.chosen
            self._hints.note(
                f"{where}: --absent makes {counted(self.chosen, 'cell')} lose an expert that stands there once, as a "
                f"true choice does."
            )
        return facts


def _range(ids: np.ndarray) -> tuple[int, int]:
    return int(ids.min()) if ids.dtype.kind == "i" else 0, int(ids.max())


def advice(expert: int, num_experts: int, slots: int = 0) -> str:
    """The advice on an id beyond the experts, in a cell with this number of slots, as the end of a sentence."""
    if expert < num_experts:
        return ""
    if slots == num_experts > 1:
        return (
            f": these look like counts of {num_experts} experts, not ids: save them as JSON, "
            f'{{"logical_count": [steps, layers, experts]}}'
        )
    what = f"if ids from {num_experts} on carry no expert (padding, zero or shared experts)"
    first = "; if ids count from 1, take 1 from each" if expert == num_experts else ""
    return f": {what}, give --absent-from {num_experts}{first}"


def check_width(where: str, dtype: np.dtype, num_experts: int) -> None:
    """Raise MoetraceError if ids of a dtype can't name all experts: then the greater ones have wrapped."""
    if dtype.kind in "iu" and num_experts > np.iinfo(dtype).max + 1:
        most = np.iinfo(dtype).max + 1
        raise MoetraceError(
            f"{where} holds ids of {dtype}, but there are {num_experts} experts, so that ids from {most} on have "
            f"wrapped: capture again with uint16, or give --experts {most} or fewer if the model has only these."
        )
