"""The engine alone: a trace through policies on a machine, without frames."""

from typing import Any

from moetrace.engine.run import Run, run_setups
from moetrace.engine.setup import Setup
from moetrace.spec import Model, PolicySpec, System
from moetrace.spec.errors import MoetraceError
from moetrace.trace import Trace


def run(
    trace: Trace,
    model: Model,
    system: System,
    policies: list[PolicySpec],
    *,
    jobs: int = 1,
    progress: Any = None,
    **options: Any,
) -> Run:
    """Replay; raise what the engine returns as an error. `options` are further fields of the setup."""
    setup = Setup(model=model, system=system, policies=policies, **{k: v for k, v in options.items() if v is not None})
    (finished,) = run_setups(trace, [setup], jobs=jobs, progress=progress)
    if isinstance(finished, MoetraceError):
        raise finished
    return finished
