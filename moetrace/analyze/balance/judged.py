"""A plan on its way through the steps that it is judged on."""

from dataclasses import dataclass

import numpy as np

from moetrace.analyze.balance import fan_out, imbalance
from moetrace.analyze.balance.imbalance import Cost, ImbalanceTally, Least
from moetrace.analyze.balance.loads import Loads, StepChoices
from moetrace.analyze.balance.plans import Copies, Plan

FIXED, GIVEN, KEPT, REMADE, CLAIRVOYANT = "fixed", "given", "kept", "re-made", "clairvoyant"


@dataclass
class JudgedPlan:
    """A plan, or a series of plans, on its way through the judged steps."""

    placement: str
    plan_is: str  # FIXED, GIVEN, KEPT, REMADE or CLAIRVOYANT
    plan: Plan
    cost: Cost
    tally: ImbalanceTally
    moved_bytes: np.ndarray  # int64 [L]
    copies: Copies
    least: Least  # shared by plans with the same numbers of bins and slots
    fan_out: np.ndarray  # int64 [L, len(fan_out.SUMS)]
    interval: int | None = None  # a new plan is made after this number of judged steps

    def judge(self, loads: Loads, turn: int, period: np.ndarray) -> None:
        """Add the steps of `loads` to the tally; copies of an expert share its rows evenly."""
        imbalance.judge(loads, self.copies, self.plan.bins, turn, period, self.cost, self.tally)

    def judge_rows(self, choices: StepChoices, seed: int, turn: int, period: np.ndarray) -> None:
        """Add the steps of `choices` to the tally; a row goes to a copy by its place, or by lot if `seed` >= 0."""
        imbalance.judge_rows(choices, self.copies, self.plan.bins, seed, turn, period, self.cost, self.tally)

    def count_fan_out(self, choices: StepChoices, rule: int, turn: int, unit_nodes: np.ndarray) -> None:
        """Count on how many units and nodes the rows of `choices` are; `unit_nodes` int64 [units], of each its node."""
        fan_out.count(choices, self.copies, unit_nodes.reshape(self.plan.bins, -1), rule, turn, self.fan_out)
