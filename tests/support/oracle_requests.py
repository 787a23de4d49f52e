"""The figures of requests, slow and obvious: turns, restarts, drafts, latencies, from plain lists.

A request may have more than one prompt, be preempted and computed again, and guess ahead. Everything is written down
row by row and looked up again by walking over all rows; it shares no code with the package.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise

PREFILL, DECODE = 0, 1


@dataclass(frozen=True, eq=False)  # two rows that look alike are two rows
class Row:
    """A token row: of which step and request, where it stands in its request, in which phase it was recorded."""

    step: int
    request: int
    position: int
    phase: int


@dataclass
class Turn:
    """A prompt and its answer: rows in the order of the trace; a row that counts as decode stands there."""

    rows: list[Row] = field(default_factory=list)
    prefill: list[Row] = field(default_factory=list)
    decode: list[Row] = field(default_factory=list)

    def first_decode(self) -> Row | None:
        return self.decode[0] if self.decode else None

    def prompt(self) -> list[Row]:
        """Return the prefill rows before the first decode row: all of them if there is none."""
        first = self.first_decode()
        return [row for row in self.prefill if first is None or self.rows.index(row) < self.rows.index(first)]

    def accepted(self) -> list[Row]:
        """Return the decode rows that no decode row of a later step takes back."""
        return [
            row
            for row in self.decode
            if not any(later.step > row.step and later.position <= row.position for later in self.decode)
        ]

    def tokens(self) -> int:
        return len({row.position for row in self.accepted()})


@dataclass
class Figures:
    """What a request comes to; NaN where a figure is undefined."""

    turns: int
    tokens: int
    recomputed_rows: int
    drafted_rows: int
    accepted_rows: int
    ttft_s: float
    ttft_max_s: float
    tpot_s: float
    gaps: list[float]  # between tokens, in order of time


def runs_of(rows: list[Row]) -> list[list[Row]]:
    """Cut the rows of one request into runs of prefill rows and, between them, sequences of decode rows."""
    pieces: list[list[Row]] = []
    for row in rows:
        if pieces and pieces[-1][0].phase == row.phase:
            pieces[-1].append(row)
        else:
            pieces.append([row])
    return pieces


def turns_of(rows: list[Row]) -> list[Turn]:
    """Give each row of a request, in the order of the trace, to its turn."""
    turns: list[Turn] = []
    before: list[Row] = []
    for piece in runs_of(rows):
        highest = max((row.position for row in before), default=-1)
        is_restart = False
        if not turns:
            turns.append(Turn())
        elif piece[0].phase == PREFILL:
            is_restart = max(row.position for row in piece) <= highest + 1
            if not is_restart:
                turns.append(Turn())
        turn = turns[-1]
        for row in piece:
            turn.rows.append(row)
            is_next_token = is_restart and row.position == highest + 1
            (turn.decode if row.phase == DECODE or is_next_token else turn.prefill).append(row)
        before += piece
    return turns


def quantile(values: list[float], q: float) -> float:
    """Return the quantile, interpolated linearly between the two neighbours."""
    if not values:
        return math.nan
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def first_token_s(turn: Turn, start_s: list[float], end_s: list[float]) -> float:
    if turn.prompt():
        return end_s[turn.prompt()[-1].step]
    return start_s[turn.decode[0].step]


def figures_of(rows: list[Row], start_s: list[float], end_s: list[float]) -> Figures:
    """Return the figures of one request: its rows in the order of the trace, start and end of every step."""
    turns = turns_of(rows)
    ttft, gaps = [], []
    for turn in turns:
        if turn.prompt():
            ttft.append(first_token_s(turn, start_s, end_s) - start_s[turn.rows[0].step])
        else:
            ttft.append(math.nan)
        if turn.decode:
            points = [first_token_s(turn, start_s, end_s)]
            highest = -1
            for step in sorted({row.step for row in turn.decode}):
                grown = max((row.position for row in turn.accepted() if row.step == step), default=-1)
                if grown > highest:
                    points.append(end_s[step])
                    highest = grown
            gaps += [later - sooner for sooner, later in pairwise(points)]
    answered = [turn for turn in turns if turn.decode]
    spent = [end_s[turn.decode[-1].step] - first_token_s(turn, start_s, end_s) for turn in answered]
    tokens = sum(turn.tokens() for turn in answered)
    drafted = accepted = 0
    for step in sorted({row.step for turn in turns for row in turn.decode}):
        drafted += sum(row.step == step for turn in turns for row in turn.decode) - 1
        kept = {(i, row.position) for i, turn in enumerate(turns) for row in turn.accepted() if row.step == step}
        accepted += max(len(kept) - 1, 0)
    decode = [row for turn in turns for row in turn.decode]
    recomputed = [
        i
        for i, row in enumerate(rows)
        if not any(row is other for other in decode) and row.position in [other.position for other in rows[:i]]
    ]
    known = [seconds for seconds in ttft if not math.isnan(seconds)]
    return Figures(
        turns=len(turns),
        tokens=tokens,
        recomputed_rows=len(recomputed),
        drafted_rows=drafted,
        accepted_rows=accepted,
        ttft_s=ttft[0],
        ttft_max_s=max(known, default=math.nan),
        tpot_s=math.fsum(spent) / tokens if tokens else math.nan,
        gaps=gaps,
    )


def all_figures(rows: list[Row], start_s: list[float], end_s: list[float]) -> dict[int, Figures]:
    """Return the figures of every request, by ascending number."""
    return {
        request: figures_of([row for row in rows if row.request == request], start_s, end_s)
        for request in sorted({row.request for row in rows})
    }
