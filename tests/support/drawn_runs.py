"""A drawn case through the engine."""

from typing import Any

from moetrace.engine.run import Run
from moetrace.spec import PolicySpec
from moetrace.trace import Trace
from support.one_run import run
from support.strategies import Case, as_arrays


def replay(case: Case, policies: list[PolicySpec], **options: Any) -> Run:
    experts = case.model.most_experts
    trace = Trace.from_arrays(num_experts=experts, **as_arrays(case.trace, experts))
    options = {"ignore_capacity": True} | options
    return run(trace, case.model, case.system, policies, slots=case.slots, **options)
