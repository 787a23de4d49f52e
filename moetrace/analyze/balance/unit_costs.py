"""The costs of the units of a system, if a model and a system are known."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moetrace.analyze.balance.imbalance import Cost
from moetrace.analyze.balance.plans import Tier
from moetrace.analyze.sizes import expert_bytes, model_of
from moetrace.engine.machine import FIRST_HOME, machine_of
from moetrace.spec import Model, System, load_system
from moetrace.spec.errors import UsageError
from moetrace.trace.format import Trace


@dataclass(frozen=True)
class UnitCosts:
    """The costs of a unit, if a model and a system are known, and the bytes of an expert, if the model is."""

    model: Model | None
    system: System | None
    expert_bytes: np.ndarray | None  # int64 [L, E]
    weight_bytes: np.ndarray | None = None  # float64 [L, E]: the same, not rounded up

    def cost(self, share: int, shape: tuple[int, int]) -> Cost:
        """Return what a unit costs that holds an expert's part in `share`; shape: (layers, experts)."""
        if self.model is None or self.system is None:
            return Cost(0.0, 0.0, 0.0, 0.0, 0.0, np.zeros(shape))
        assert self.weight_bytes is not None
        machine = machine_of(self.model, self.system, self.weight_bytes, np.zeros(shape), share)
        rates: dict[str, Any] = {name: float(machine.device[FIRST_HOME][name]) for name in Cost._fields[:-1]}
        return Cost(expert_bytes=machine.weight_bytes, **rates)

    @property
    def link_bytes_s(self) -> float | None:
        """Bytes a second that reach the units, if the system has a link."""
        return None if self.system is None or self.system.link is None else self.system.link.bytes_s


def costs_of(
    trace: Trace, model: Model | str | Path | None, system: System | str | Path | None, tier: Tier | int | None
) -> tuple[UnitCosts, Tier]:
    """Return what the units of a system cost, and the units: those asked for, else the system's, else 8.

    Raises UsageError if the system has no units, or the sizes of experts are not known.
    """
    tier = Tier(tier) if isinstance(tier, int) else tier
    if system is None:
        return UnitCosts(None, None, expert_bytes(trace, model)), tier or Tier(8)
    system = load_system(system)
    if system.cluster is not None:
        raise UsageError(
            f"system {system.name} is a cluster, whose seconds moetrace replay says: give {system.cluster.expert_gpus} "
            "units (--units), the GPUs that hold its experts, and leave out the system."
        )
    if system.ndp is None:
        raise UsageError(f"the system {system.name} has no NDP units that could be kept busy: name another --system.")
    spec = model_of(trace, model)
    if spec is None:
        raise UsageError(
            f"seconds need a model, but {trace.shown} names {trace.model!r}, which is no preset: name one with --model."
        )
    size = expert_bytes(trace, spec)
    weight_bytes = spec.expert_bytes() if trace.expert_bytes is None else size
    return UnitCosts(spec, system, size, weight_bytes), tier or Tier(system.units)
