"""The answer of `advise rebalance`: a row for each number of redundant experts and each interval, and the best."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import polars as pl

from moetrace.batch.advice import WORTH, percent_saved
from moetrace.batch.cell import Cell
from moetrace.batch.cell_frame import fits
from moetrace.batch.command import replay_command
from moetrace.results.figure_text import beyond
from moetrace.results.record import REBALANCE_SCHEMA
from moetrace.results.summary import summary_frame
from moetrace.spec.errors import counted
from moetrace.version import __version__

_LEAST = 0.0005  # shown as 0.1 %
RebalanceKind = Literal["plan again", "plan once", "nothing to win"]


class Planned(NamedTuple):
    """One replay of the table.

    Attributes:
        redundant: Redundant experts of a layer; None where the placement takes none, or as many as make slots equal.
        interval: Steps from one plan to the next; 0: only the first is made; None: none is made at all.
        cell: The replay as a cell of a sweep: its point, its inputs and their hash.
        found: The content of its cell's file: `result`, `costs` and `warnings`.
    """

    redundant: int | None
    interval: int | None
    cell: Cell
    found: dict[str, Any]

    @property
    def figures(self) -> dict[str, Any]:
        """The policy's part of summary.json."""
        return self.found["result"]["policies"][0]

    @property
    def total_s(self) -> float:
        """Time of all steps."""
        return self.figures["total_s"]

    @property
    def fits(self) -> bool:
        """Whether every GPU has room for its slots."""
        return fits(self.cell, self.found)

    @property
    def label(self) -> str:
        """`a plan every 100 steps with 16 redundant experts`."""
        if self.interval is None:
            return "no plan"
        often = "a plan every step" if self.interval == 1 else f"a plan every {self.interval:,} steps"
        often = often if self.interval else "one plan"
        if self.redundant is None:
            return often
        copies = (
            f"with {counted(self.redundant, 'redundant expert')}" if self.redundant else "without redundant experts"
        )
        return f"{often} {copies}"


@dataclass(repr=False)
class RebalanceAdvice:
    """How many redundant experts a cluster should hold for a trace, and how often it should plan again.

    Attributes:
        rows: Every replay: first the one without any plan, then by redundant experts, and from seldom to often.
        window: Steps that a plan is made from.
        steps: Steps of the trace.
        policy: Name of the policy whose other fields all rows have.
        migrate: Whether steps wait for experts to move (`pause`), or not (`async`).
        notes: Sentences about what may not be meant so.
    """

    rows: Sequence[Planned]
    window: int
    steps: int
    policy: str
    migrate: str
    notes: list[str]

    def __repr__(self) -> str:
        return f"<RebalanceAdvice: {self.verdict} .command replays the best, .frame has all>"

    @property
    def none(self) -> Planned:
        """The replay in which no plan is ever made: the experts stay in blocks, one copy of each."""
        return self.rows[0]

    @cached_property
    def best(self) -> Planned:
        """The row of the least time among those that fit; of equal ones the first."""
        return min((row for row in self.rows if row.fits), key=lambda row: row.total_s)

    @property
    def once(self) -> Planned | None:
        """The best row that plans once; None if none of them is there and fits."""
        return min((row for row in self.rows if row.fits and row.interval == 0), key=_time, default=None)

    @property
    def command(self) -> str:
        """The command that replays the best row."""
        return replay_command(self.best.cell)

    @property
    def kind(self) -> RebalanceKind:
        """The kind of this advice, one of three; a gain of less than 2 % is below the accuracy of the model."""
        if _saves(self.best, self.none) < WORTH:
            return "nothing to win"
        once = self.once
        if once is None or _saves(once, self.none) < WORTH:
            return "plan again"
        return "plan once" if _saves(self.best, once) < WORTH else "plan again"

    @property
    def verdict(self) -> str:
        """One sentence: plan again, plan once, or nothing to win; and why."""
        best, once, none = self.best, self.once, self.none
        if best is none:
            return "Nothing to win: no plan beats experts in blocks without one."
        saves = f"{percent_saved(_saves(best, none))} of the time without plans"
        if self.kind == "nothing to win":
            return f"Nothing to win: {best.label}, the best, saves {saves}."
        if self.kind == "plan again":
            more = (
                ""
                if once is None
                else f", and {percent_saved(_saves(best, once))} of the time with the best single plan"
            )
            return f"Plan again: {best.label} saves {saves}{more}."
        assert once is not None
        saves = f"{percent_saved(_saves(once, none))} of the time without plans"
        again = [row for row in self.rows if row.fits and row.interval]
        if not again:
            return f"Plan once: {once.label} saves {saves}."
        more = _saves(min(again, key=_time), once)
        rest = f"saves {percent_saved(more)} more" if more >= _LEAST else "wins nothing"
        return f"Plan once: {once.label} saves {saves}, and to plan again {rest}."

    @cached_property
    def frame(self) -> pl.DataFrame:
        """One row a replay: redundant, interval (null: no plan), is_best, fits, speed-ups, and all figures and costs.

        `speedup` is over the replay without plans, `over_once` over the one that plans once with the same number of
        redundant experts.
        """
        once = {row.redundant: row.total_s for row in self.rows if row.interval == 0}
        facts = [
            {
                "redundant": row.redundant if row.interval is not None else None,
                "interval": row.interval,
                "is_best": row is self.best,
                "fits": row.fits,
                "speedup": _ratio(self.none.total_s, row.total_s),
                "over_once": _ratio(once[row.redundant], row.total_s)
                if row.interval and row.redundant in once
                else None,
            }
            for row in self.rows
        ]
        schema = {"redundant": pl.Int64, "interval": pl.Int64, "over_once": pl.Float64}
        figures = summary_frame([row.figures for row in self.rows]).drop("name", "speedup")
        costs = pl.DataFrame([row.found["costs"] for row in self.rows], infer_schema_length=None)
        told = pl.DataFrame(facts, schema_overrides=schema, infer_schema_length=None)
        return pl.concat([told, figures, costs], how="horizontal")

    def to_dict(self) -> dict[str, Any]:
        """Return what `rebalance.json` holds."""
        return {
            "schema": REBALANCE_SCHEMA,
            "moetrace": __version__,
            "verdict": {"kind": self.kind, "sentence": self.verdict},
            "policy": self.policy,
            "migrate": self.migrate,
            "window": self.window,
            "steps": self.steps,
            "best": _told(self.best),
            "rows": [_told(row) | {"fits": row.fits, "figures": row.figures} for row in self.rows],
            "notes": self.notes,
        }


def _told(row: Planned) -> dict[str, Any]:
    return {
        "name": row.cell.name,
        "redundant": row.redundant if row.interval is not None else None,
        "interval": row.interval,
        "total_s": row.total_s,
    }


def _time(row: Planned) -> float:
    return row.total_s


def _saves(row: Planned, other: Planned) -> float:
    """The share of another row's time that a row saves; negative if it takes longer."""
    return beyond(other.total_s, row.total_s) / other.total_s if other.total_s else 0.0


def _ratio(seconds: float, own: float) -> float | None:
    return seconds / own if own else None
