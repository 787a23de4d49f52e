"""The output of lint: one `Finding` for each problem, and `RULES`, everything that it can find.

Three levels. An error: the file is damaged, or holds what no router can have chosen; a replay would refuse it. A
warning: the file is whole, but results would mislead. A note: legitimate, but a reader of results must know it.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

LEVELS = ("error", "warning", "note")
MAX_RANGES = 16  # of rows, kept for a finding: enough to look at, however many there are


@dataclass(frozen=True)
class Finding:
    """One thing that lint found.

    Attributes:
        code: A key of `RULES`.
        level: "error", "warning" or "note".
        what: One sentence, with figures.
        effect: Its effect on results.
        fix: A flag or an action, or None.
        layers: Absolute indices of the layers concerned, or None if it concerns no layer in particular.
        rows: The first ranges (start, stop) of the rows concerned, at most 16; empty if it concerns none in particular.
        count: How many rows, cells (one row in one layer) or requests; `what` says which.
    """

    code: str
    level: str
    what: str
    effect: str
    fix: str | None
    layers: list[int] | None
    rows: list[tuple[int, int]]
    count: int

    def to_dict(self) -> dict[str, Any]:
        """The same, ready for JSON."""
        return {**vars(self), "rows": [list(part) for part in self.rows]}


class Rule(NamedTuple):
    """The fields that all findings of one code share."""

    level: str
    effect: str
    fix: str | None = None


RULES = {
    "sha256": Rule(
        "error",
        "The file was changed or damaged after it was written; any result of it may be wrong.",
        "get it from its origin or import it again",
    ),
    "impossible-id": Rule("error", "No such expert exists; a replay refuses the trace.", "import it again"),
    "duplicate-ids": Rule(
        "error",
        "A router chooses an expert once or not at all; a replay refuses the trace.",
        "import it again, with padding and dense layers as absent",
    ),
    "impossible-row": Rule("error", "A replay refuses the trace.", "import it again"),
    "impossible-count": Rule(
        "error", "A row chooses an expert once or not at all; an analysis refuses such a count.", "import it again"
    ),
    "warm-up": Rule(
        "warning",
        "These rows are the engine's warm-up, not traffic: every cache hits on them and a few experts look hot.",
        "--drop-warmup",
    ),
    "repeated-rows": Rule(
        "warning",
        "Padding, a text of one token or a recorder that stood still is counted as traffic: every cache hits on it and "
        "a few experts look hot.",
        "moetrace select --out --rows, or capture again without these rows",
    ),
    "doubled-rows": Rule(
        "warning",
        "Each token counts several times, as where several ranks append to one log: caches always hit on a copy, and "
        "batches look larger.",
        "capture again on one rank, or keep one copy of each record",
    ),
    "stuck-layer": Rule(
        "warning",
        "A recorder did not see these layers, or stopped in them: it wrote the ids of other rows, and such a layer "
        "looks as if it always loaded the same experts.",
        "moetrace select --out --rows, or capture again with a recorder that sees every layer",
    ),
    "copied-layer": Rule(
        "warning",
        "Two layers of their own never choose alike: one was written over the other, whose choices are lost.",
        "capture again with a recorder that sees every layer",
    ),
    "placeholder-rows": Rule(
        "warning",
        "Engines write these ids where no token was routed (padding, idle ranks): as traffic they make the first "
        "experts look hot.",
        "moetrace select --out --rows, or capture again without padding",
    ),
    "dense-layer": Rule(
        "warning",
        "A dense layer has no router: replays price experts it does not have, and averages over layers are diluted.",
        "--drop-dense",
    ),
    "unequal-layers": Rule(
        "warning",
        "Rows may be shifted between layers, so what one row chose in two layers may be of two tokens.",
        "capture again with a recorder that sees every layer",
    ),
    "empty-rows": Rule(
        "warning",
        "Padding is counted as tokens: batches look larger and steps do less than they seem to.",
        "leave padding out of the capture",
    ),
    "unused-slots": Rule(
        "warning",
        "top_k is stated too high: shares per token, as of overlap, come out too low.",
        "import with the model's own top_k",
    ),
    "flat-view": Rule(
        "warning",
        "These ids are whole rankings of all experts, read row after row, not choices: routing looks perfectly "
        "balanced, and which policy wins may reverse.",
        "capture again, reading the view of the top-k ids with its stride (nb[1])",
    ),
    "wrong-stride": Rule(
        "warning",
        "A layer of the model was read as several, with a smaller top_k: layers are too many, and what one loads, "
        "another seems to load again.",
        "import with the model's own top_k",
    ),
    "unused-experts": Rule(
        "warning",
        "These are ids of one rank, local ids, ids that wrapped at 256 or count from 1, or more experts than the model "
        "has: experts look dead, and skew and cache hits come out too high.",
        "import the ids of all ranks, counted from 0, with the model's own number of experts",
    ),
    "shared-expert": Rule(
        "warning",
        "A shared expert, which every token uses without being routed, counts as a routed one: caches always hit on "
        "it, and no placement can balance it.",
        "import without the shared expert's slot, with the model's own top_k",
    ),
    "dominant-expert": Rule(
        "warning",
        "Such a layer has hardly any choice (a collapsed router, padding, or a shared expert): caches always hit on "
        "this expert, and the unit that holds it has most of the work.",
        "capture again with trained weights and without padding, or judge only the other layers",
    ),
    "uniform": Rule(
        "warning",
        "Counts this equal are made, not routed: caches look useless, and placement and balance have nothing to do.",
        "capture again without forced balance",
    ),
    "impossible-gates": Rule(
        "warning", "Whatever weighs experts by their gates is wrong there.", "capture again, or import without gates"
    ),
    "identical-requests": Rule(
        "warning",
        "The same request counts several times: caches warm up on it, and policies are tested on their own data.",
        "capture every prompt once",
    ),
    "unequal-counts": Rule(
        "warning",
        "Every row makes top_k choices in every layer: in some layers choices are lost or counted twice.",
        "capture again, or judge only layers whose totals agree",
    ),
    "empty-steps": Rule(
        "warning",
        "Unused places of a ring buffer count as steps, and the order of the others may have wrapped.",
        "capture again with a buffer no longer than the run",
    ),
    "absent-rows": Rule(
        "note",
        "Legitimate: llama.cpp routes in the last layer of a prompt only the token that it samples from. This layer "
        "has less work than the others.",
    ),
    "draft-rows": Rule(
        "note",
        "Legitimate: a draft pass runs only the layers of multi-token prediction. Its rows are no tokens of the "
        "output, and the layers have work of their own.",
    ),
    "skipped-layers": Rule(
        "note",
        "Legitimate where layers drop tokens at capacity, or rows exit early: such rows do less work. Else a recorder "
        "lost them.",
    ),
    "partial-cells": Rule(
        "note",
        "Legitimate where tokens are dropped at capacity, or experts choose their tokens; such rows do less work.",
    ),
    "gates-sum": Rule(
        "note", "Legitimate where the model does not normalise: compare gates within a choice, not between rows."
    ),
    "gate-order": Rule(
        "note",
        "Legitimate (top-k without sorting): the favourite expert is that of the largest gate, not of slot 0.",
    ),
    "position-0-sink": Rule(
        "note",
        "Legitimate (the first token is the same): those experts look hot and request starts look alike; judge skew "
        "and prediction without position 0.",
    ),
    "repeated-template": Rule(
        "note",
        "Legitimate (shared prompts or templates): a prediction tested on other requests has seen part of them, and "
        "a server with a prefix cache would not compute them again.",
    ),
    "periodic-overlap": Rule(
        "note",
        "Legitimate (texts from a template): overlap by lag measures the template, not the memory of the router.",
    ),
    "single-request": Rule(
        "note",
        "Nothing can be said of differences between requests, and a list fixed in advance looks better against LRU "
        "than in mixed traffic.",
    ),
    "short": Rule("note", "Skew and dead experts come out too high: most of the difference between experts is chance."),
    "layer-gap": Rule(
        "note", "Legitimate (dense layers in between): the next layer here is not the model's next layer."
    ),
    "first-layer-not-0": Rule("note", "Legitimate (dense layers come first): layers keep their numbers in the model."),
    "position-jumps": Rule(
        "note",
        "Legitimate for cached prefixes and speculative decoding, else rows were lost. Position prices attention.",
    ),
    "prefill-only": Rule(
        "note",
        "There is no time per output token, and whole texts count as prompts.",
        "--as decode --prompt P at import, if the text was fed in at once, or --steps A:B, if some passes decode",
    ),
    "decode-only": Rule("note", "Prompts are missing: there is no time to the first token, and caches start cold."),
    "random-routing": Rule(
        "note",
        "The counts are those of uniform random draws (a forced balance, random weights or a generator): such routing "
        "has no popularity to use.",
    ),
    "other-top-k": Rule(
        "note",
        "Legitimate where the engine was configured so; else the ids were read with the wrong stride. Work and bytes "
        "per token are not the model's.",
    ),
    "every-expert": Rule("note", "Every row uses every expert, so there is no choice to look at."),
    "counts-only": Rule("note", "Good for balance; a replay needs the ids of every row and refuses the trace."),
    "no-sha256": Rule("note", "Damage to this data cannot be seen."),
}


class Ranges:
    """Ranges of rows, in increasing order and joined where they touch; the first `limit` are kept."""

    def __init__(self, limit: int = MAX_RANGES) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.limit = limit

    def add(self, start: int, stop: int) -> None:
        """Add rows start:stop, which begin no earlier than the ranges before."""
        if self.ranges and start <= self.ranges[-1][1]:
            first, last = self.ranges[-1]
            self.ranges[-1] = (first, max(last, stop))
        elif len(self.ranges) < self.limit:
            self.ranges.append((start, stop))

    def add_mask(self, first_row: int, mask: Any) -> None:
        """Add the rows that are true in `mask` [rows], the first of which is `first_row`."""
        for start, stop in runs(mask)[: self.limit + 1].tolist():
            self.add(first_row + start, first_row + stop)


def runs(mask: np.ndarray) -> np.ndarray:
    """The runs of true in `mask` as starts and stops, int64 [runs, 2]."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return edges.reshape(-1, 2)


def many(count: int, what: str) -> str:
    """`1 row`, `2,048 rows`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def finding(
    code: str,
    what: str,
    count: int,
    layers: np.ndarray | list[int] | None = None,
    rows: Ranges | None = None,
    effect: str | None = None,
) -> Finding:
    """Make the finding `code`; `effect` if it differs from that of its rule."""
    rule = RULES[code]
    named = None if layers is None else [int(layer) for layer in layers]
    return Finding(
        code, rule.level, what, effect or rule.effect, rule.fix, named, list(rows.ranges) if rows else [], int(count)
    )
