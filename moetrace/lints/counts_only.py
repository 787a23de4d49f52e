"""Traces that hold only counts: what can be said of them."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from moetrace.analyze.sizes import own_experts
from moetrace.lints.evenness import EvennessCheck
from moetrace.lints.finding import Finding, Ranges, finding, many
from moetrace.lints.piece import Progress
from moetrace.lints.popularity import popularity
from moetrace.trace.format import Trace

_LEAST_ROWS = 32  # that show a top-k of a layer's own


class CountSteps:
    """`impossible-count`, `empty-steps`, `unequal-counts`, and dense layers, of /counts [steps, layers, experts]."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.offset, self.top_k = trace.offset, trace.top_k
        self.names = ("impossible-count", "empty-steps", "unequal-counts")
        self.steps: dict[str, int] = dict.fromkeys(self.names, 0)
        self.rows = {name: Ranges() for name in self.names}
        self.layers = {name: np.zeros(trace.layers, bool) for name in self.names}
        self.chosen = np.zeros((trace.layers, trace.num_experts), np.int64)
        self.unequal: list[tuple[int, np.ndarray]] = []  # first step, and uint8 [steps, layers / 8] bits
        self.own_top_k = np.zeros(trace.layers, np.int64)  # of the first step that counts; -1: others differ

    def see(self, first: int, counts: np.ndarray) -> None:
        """Look at the next steps, from step `first` on."""
        rows = np.diff(self.offset[first : first + len(counts) + 1])
        impossible = ((counts < 0) | (counts > rows[:, None, None])).any(2)
        counts = np.clip(counts, 0, rows[:, None, None])  # so that sums stay below 2^63
        self.chosen += counts.sum(0)
        totals = counts.sum(2)
        empty = (counts == 0).all((1, 2))
        wanted = rows * self.top_k
        unequal = (totals != wanted[:, None]) & ~empty[:, None]
        self._see_own(totals, rows)
        # A layer that never counts anything is dense: that is said once, not for every step.
        self._add("impossible-count", first, impossible)
        self._add("empty-steps", first, empty)
        self.unequal.append((first, np.packbits(unequal & (totals != 0) & ~impossible, axis=1)))

    def _see_own(self, totals: np.ndarray, rows: np.ndarray) -> None:
        """Compare `totals` [steps, layers] with what the steps before have for each of their `rows` [steps]."""
        each, rest = np.divmod(totals, np.maximum(rows, 1)[:, None])
        each = np.where(rest == 0, each, -1)
        most = np.maximum(each.max(0, initial=0), self.own_top_k)
        least = np.where(each == 0, most, each).min(0, initial=1 << 60)
        self.own_top_k = np.where((least < most) | ((self.own_top_k != 0) & (self.own_top_k != most)), -1, most)

    def fewer(self) -> np.ndarray:
        """bool [layers]: layers that choose the same number of experts in every row of every step, below top_k."""
        return (self.own_top_k > 0) & (self.own_top_k < self.top_k) & (self.trace.rows >= _LEAST_ROWS)

    def _add(self, name: str, first: int, wrong: Any) -> None:
        """Count steps, given as `wrong` [steps] or [steps, layers]."""
        steps = wrong if wrong.ndim == 1 else wrong.any(1)
        self.steps[name] += int(np.count_nonzero(steps))
        if wrong.ndim == 2:
            self.layers[name] |= wrong.any(0)
        for step in np.flatnonzero(steps)[: self.rows[name].limit + 1].tolist():
            self.rows[name].add(int(self.offset[first + step]), int(self.offset[first + step + 1]))

    def dense(self) -> np.ndarray:
        """bool [layers]: layers that counted nothing."""
        return (self.chosen == 0).all(1)

    def findings(self) -> Iterator[Finding]:
        """The findings."""
        said = {
            "impossible-count": "counts are negative or above the rows of the step",
            "empty-steps": "nothing is counted in any layer",
            "unequal-counts": f"counts of layers do not sum to rows x top_k ({self.top_k})",
        }
        index, fewer = self.trace.layer_index, self.fewer()
        for first, bits in self.unequal:
            self._add("unequal-counts", first, np.unpackbits(bits, axis=1, count=fewer.size).astype(bool) & ~fewer)
        for name in self.names:
            if count := self.steps[name]:
                layers = index[self.layers[name]] if self.layers[name].any() else None
                what = f"In {count:,} of {self.trace.steps:,} steps, {said[name]}."
                yield finding(name, what, count, layers, self.rows[name])
        if (dense := self.dense()).any():
            number = int(np.count_nonzero(dense))
            what = f"{number} of {self.trace.layers} layers did not route: {number} without any choice."
            yield finding("dense-layer", what, number, index[dense])
        if fewer.any():
            number = int(np.count_nonzero(fewer))
            what = f"In {many(number, 'layer')}, every row chooses fewer than {self.top_k} experts, always."
            effect = "Legitimate where layers have a top_k of their own; they do less work."
            yield finding("partial-cells", what, number, index[fewer], None, effect)
        steps = self.trace.steps
        held = "one step" if steps == 1 else f"{steps:,} steps"
        yield finding("counts-only", f"The trace holds counts of {held}, but no ids.", steps)


def check_counts(trace: Trace, digests: dict[str, Any], progress: Progress | None) -> Iterator[Finding]:
    """Every finding in a trace of counts; `digests` and `progress` as for `pieces`."""
    digests["counts"] = hashlib.sha256()
    steps = CountSteps(trace)
    for block in trace.count_blocks(check=False):
        digests["counts"].update(block.counts.data)
        steps.see(block.first_step, block.counts)
        if progress:
            progress(len(block.counts))
    yield from steps.findings()
    evenness = EvennessCheck(trace.num_experts, trace.top_k, trace.layer_index, own_experts(trace))
    evenness.chosen = steps.chosen
    yield from evenness.findings(steps.dense())
    made = np.full(trace.layers, trace.rows)
    yield from popularity(steps.chosen, made, trace.top_k, trace.layer_index, steps.dense())
