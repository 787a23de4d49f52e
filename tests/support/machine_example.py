"""A small machine with NDP units and a CPU beside them, and a trace for it."""

import msgspec

from moetrace.spec import Model
from support.by_hand import cpu_of, model_of, one, system_of, trace_of
from support.drawn_machines import MachineCase


def example_with_units_and_a_cpu() -> MachineCase:
    parts = system_of(2)
    system = {name: vars(part) for name, part in (("gpu", parts.gpu), ("ndp", parts.ndp), ("link", parts.link))}
    system["gpu"] = {"name": "g"} | system["gpu"]
    system = {"name": "by hand", **system, "cpu": vars(cpu_of())}
    model = msgspec.convert({"name": "small"} | vars(model_of(experts=6)), Model)
    steps = [[one(0), one(1), one(2)], [one(2), one(5)], [one(1), one(1), one(4)]]
    return MachineCase(trace_of(*steps), model, system, slots=3)
