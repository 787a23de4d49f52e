"""The content of an advice: the best real policy, its gain, the bounds, and which of three things would help."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import polars as pl

from moetrace.batch.command import replay_command
from moetrace.batch.slo import Slo
from moetrace.batch.stages import Tried
from moetrace.results.figure_text import amount, beyond, percent
from moetrace.results.record import ADVICE_SCHEMA, COSTS
from moetrace.results.summary import summary_frame
from moetrace.spec.errors import counted
from moetrace.version import __version__

# Less than that is within what the model leaves out.
WORTH = 0.02
_KNEE = 0.9  # of the most that memory wins
Kind = Literal["change the policy", "buy memory", "nothing to win"]
_TIMES = ("total_s", "step_s", "ttft_s", "tpot_s", "itl_s")
CHOICES = ("placement", "dispatch", "residency", "prefetch", "scope")


class Size(NamedTuple):
    """Another size of the GPU's memory, and the best policy that was tried with it.

    Attributes:
        best: The policy, and how many experts it has room for.
        more_bytes: GPU memory beyond what the best policy takes now; negative for less.
        wins: Share of the best policy's time that it saves; negative where it loses.
    """

    best: Tried
    more_bytes: float
    wins: float


@dataclass(repr=False)
class Advice:
    """The best real policy of a machine for a trace, and what else would help.

    Attributes:
        ranked: All that was replayed over the whole trace with the slots that there are, in order.
        default: The better of the two policies that a replay compares by default.
        oracles: Policies that know the future, the best first: bounds, and no advice.
        sizes: Other sizes of the GPU's memory, by size.
        all_experts: Experts of the model.
        fitting: Experts that the GPU has room for, regardless of the slots asked for.
        has_link: Whether experts can be elsewhere than in the GPU's memory.
        slos: Limits that the best has to keep.
        tried: How many policies were tried.
        short_steps: Over how many of the first steps all of them were replayed.
        steps: Steps of the trace.
        usd_hour: Price of the machine by the hour; None if it is not known.
        notes: Sentences about what may not be meant so.
    """

    ranked: list[Tried]
    default: Tried | None
    oracles: list[Tried]
    sizes: list[Size]
    all_experts: int
    fitting: int
    has_link: bool
    slos: Sequence[Slo]
    tried: int
    short_steps: int
    steps: int
    usd_hour: float | None
    notes: list[str]

    def __repr__(self) -> str:
        return f"<Advice: {self.verdict} .best is {self.best.candidate.label}, .command replays it, .frame has all>"

    @property
    def best(self) -> Tried:
        """The best real policy: the fastest that keeps the limits, or what misses them least."""
        return self.ranked[0]

    @property
    def command(self) -> str:
        """The command that replays the best policy."""
        return replay_command(self.best.cell)

    @property
    def kind(self) -> Kind:
        """The kind of this advice, one of three."""
        by_policy, by_memory = self._policy_wins, self._memory_wins
        if max(by_policy, by_memory) < WORTH:
            return "nothing to win"
        return "change the policy" if by_policy >= by_memory else "buy memory"

    @property
    def verdict(self) -> str:
        """One sentence: change the policy, buy memory, or nothing to win; and why."""
        if not self.has_link:
            return "Nothing to win: all experts are in the GPU's memory, and there is nothing to decide."
        sentence = {"change the policy": _change, "buy memory": _buy, "nothing to win": _nothing}[self.kind](self)
        sentence += _lost(self)
        if self.best.miss == 0:
            return f"{sentence}."
        it = "it" if len(self.slos) == 1 else "them"
        missed = f"no policy keeps {_limits(self)}: the best misses {it} by {percent_saved(self.best.miss)}"
        return f"{sentence}; with the slots that there are, {missed}."

    @property
    def wins(self) -> float | None:
        """Share of the default policy's time that the best one saves; None without a default that runs."""
        if self.default is None:
            return None
        return beyond(self.default.total_s, self.best.total_s) / self.default.total_s

    @property
    def lossless(self) -> Tried | None:
        """The best of those over the whole trace that lose no row on the link; None if each does."""
        return next((one for one in self.ranked if not one.dropped), None)

    @property
    def larger(self) -> Size | None:
        """The smallest of the larger sizes that wins nearly the most; None if there is no larger one."""
        sizes = [size for size in self.sizes if size.best.slots > self.best.slots]
        most = min(sizes, key=lambda size: (size.best.order[:2], size.best.slots), default=None)
        return most and next(s for s in sizes if s.best.miss == most.best.miss and s.wins >= _KNEE * most.wins)

    @property
    def usd_per_million_tokens(self) -> float | None:
        """USD for a million output tokens with the best policy, where the price by the hour is known."""
        speed = self.best.figures["tokens_per_s"]
        return self.usd_hour / 3600 / speed * 1e6 if self.usd_hour is not None and speed else None

    @cached_property
    def frame(self) -> pl.DataFrame:
        """One row a policy: role, choices, slots, by how much it misses the limits, and all figures and costs.

        The role is `best`, `default`, `real`, `oracle` or `size`; equal times are there once.
        """
        rows: list[tuple[str, Tried]] = []
        for at, one in enumerate(distinct(self.ranked)):
            rows.append(("real" if at else "best", one))
        if self.default is not None:
            rows.append(("default", self.default))
        rows += [("oracle", one) for one in self.oracles] + [("size", size.best) for size in self.sizes]
        facts = [
            {"role": role, "policy": one.candidate.label, "slots": one.slots}
            | {field: getattr(one.candidate.policy, field) for field in CHOICES}
            | {"miss": one.miss if one.miss < float("inf") else None}
            for role, one in rows
        ]
        figures = summary_frame([dict(one.figures) for _, one in rows]).drop("name", "speedup")
        costs = pl.DataFrame([one.found["costs"] for _, one in rows], infer_schema_length=None)
        return pl.concat([pl.DataFrame(facts, infer_schema_length=None), figures, costs], how="horizontal")

    def to_dict(self) -> dict[str, Any]:
        """Return what `advice.json` holds."""
        best = self.best
        return {
            "schema": ADVICE_SCHEMA,
            "moetrace": __version__,
            "verdict": {"kind": self.kind, "sentence": self.verdict},
            "best": _told(best) | {"figures": best.figures, "costs": best.found["costs"]},
            "default": None if self.default is None else _told(self.default),
            "wins": self.wins,
            "work_bound_s": best.figures["work_bound_s"],
            "lower_bound_s": best.figures["lower_bound_s"],
            "clairvoyant_s": best.figures["clairvoyant_s"],
            "oracles": [_told(one) for one in self.oracles],
            "sizes": [_told(size.best) | {"more_bytes": size.more_bytes, "wins": size.wins} for size in self.sizes],
            "experts": self.all_experts,
            "slo": [{"text": slo.text, "metric": slo.metric, "limit": slo.limit} for slo in self.slos],
            "usd_hour": self.usd_hour,
            "usd_per_million_tokens": self.usd_per_million_tokens,
            "tried": self.tried,
            "finalists": len(self.ranked),
            "steps": self.steps,
            "short_steps": self.short_steps,
            "notes": self.notes,
        }

    @property
    def _policy_wins(self) -> float:
        """The gain of a change of policy; infinite if it keeps limits that the default misses."""
        if self.default is None or (self.best.miss == 0 < self.default.miss):
            return float("inf")
        return self.wins or 0.0

    @property
    def _memory_wins(self) -> float:
        """The gain of more memory over the best policy; infinite if it keeps limits that the policy misses."""
        larger = self.larger
        if larger is None:
            return 0.0
        return float("inf") if larger.best.miss == 0 < self.best.miss else larger.wins


def distinct(tried: Sequence[Tried]) -> list[Tried]:
    """Return the first of each that have the same slots and times."""
    seen: dict[Any, Tried] = {}
    for one in tried:
        seen.setdefault((one.slots, *(repr(one.figures[name]) for name in _TIMES)), one)
    return list(seen.values())


def _told(one: Tried) -> dict[str, Any]:
    policy = one.candidate.policy
    return {
        "name": one.cell.name,
        "policy": one.candidate.label,
        "preset": one.candidate.preset,
        "changes": one.candidate.changes,
        "choices": {field: getattr(policy, field) for field in CHOICES},
        "slots": one.slots,
        "total_s": one.total_s,
        **({"gate_mass_dropped": one.dropped} if "gate_mass_dropped" in one.figures else {}),
        "miss": one.miss if one.miss < float("inf") else None,
    }


def _change(advice: Advice) -> str:
    best, default, larger = advice.best, advice.default, advice.larger
    if default is None:
        return f"Change the policy: {best.candidate.label} runs on this machine, and its default does not"
    saves = f"saves {percent_saved(advice.wins or 0.0)} of {default.candidate.label}'s time"
    if best.miss == 0 < default.miss:
        saves = f"keeps {_limits(advice)}, which {default.candidate.label} misses by {percent_saved(default.miss)}"
    more = (
        f"; {_memory(advice, larger)} would save {percent_saved(larger.wins)} more"
        if larger and larger.wins >= WORTH
        else ""
    )
    return f"Change the policy: {_best(advice)} {saves}{more}"


def _buy(advice: Advice) -> str:
    best, larger = advice.best, advice.larger
    assert larger is not None
    if larger.best.miss == 0 < best.miss:
        return f"Buy memory: with {_memory(advice, larger)} {larger.best.candidate.label} keeps {_limits(advice)}"
    policy = "no other policy saves as much"
    if advice.wins is not None and advice.wins < WORTH:
        policy = "no other policy is worth the change"
    return f"Buy memory: {_memory(advice, larger)} saves {percent_saved(larger.wins)} of the time, and {policy}"


def _nothing(advice: Advice) -> str:
    best, larger, default = advice.best, advice.larger, advice.default
    name = default.candidate.label if default is not None else "the default"
    said = f"{_best(advice)} saves {percent_saved(max(advice.wins or 0.0, 0.0))} of {name}'s time"
    if default is not None and (default.candidate.label, default.slots) == (best.candidate.label, best.slots):
        said = f"no policy beats {name}"
    if larger is None:
        fit = "fit the GPU" if best.slots <= advice.fitting else "are priced as if they fitted the GPU"
        return f"Nothing to win: {said}, and all experts {fit}"
    return f"Nothing to win: {said}, and {_memory(advice, larger)} {percent_saved(max(larger.wins, 0.0))} more"


def _lost(advice: Advice) -> str:
    """Say which share of the gates the best loses on a relaxed link, beside what the default loses."""
    best, default = advice.best, advice.default
    if not best.dropped:
        return ""
    same = default is None or default.dropped == best.dropped
    beside = "" if default is None or same else f" ({default.candidate.label} {percent(default.dropped)})"
    return f"; {best.candidate.label} drops {percent(best.dropped)} of the gate mass{beside}"


def _best(advice: Advice) -> str:
    """The best policy's name, and its slots where the default has others."""
    best, default = advice.best, advice.default
    fewer = default is not None and default.slots != best.slots
    return f"{best.candidate.label} with {counted(best.slots, 'slot')}" if fewer else best.candidate.label


def _memory(advice: Advice, size: Size) -> str:
    """`96 slots (2.3 GB more)`."""
    of = "all, " if size.best.slots == advice.all_experts else ""
    more = amount(size.more_bytes, COSTS["gpu_memory_bytes"])
    return f"{counted(size.best.slots, 'slot')} ({of}{more} more)"


def _limits(advice: Advice) -> str:
    return " and ".join(slo.text for slo in advice.slos)


def percent_saved(share: float) -> str:
    """A share of the time for people: `12 %`, `3.4 %`."""
    if share == float("inf"):
        return "more than can be said"
    return percent(share, 1 if share < 0.1 else 0)
