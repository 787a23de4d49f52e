"""Replays of the oracle of version 2 on the machine of `by_hand`, in milliseconds.

An expert is 1 MB: 1 ms on the GPU, 2 ms on a unit or the CPU, 4 ms on the link; a row costs 0.1 ms on the GPU, 1 ms on
a unit; dense is 1 ms.
"""

from types import SimpleNamespace

import pytest

from support.by_hand import cpu_of, model_of, one, system_of
from support.tiers_oracle import from_specs, replay


def system_with(units=0, cpu=None, **parts):
    """The machine of by_hand with changed parts: gpu={...}, link={...}, ndp={...}, host={...}, disk={...}."""
    system = system_of(units)
    system.cpu = cpu_of(**cpu) if cpu is not None else None
    for name in ("host", "disk", "remote"):
        setattr(system, name, SimpleNamespace(**parts[name]) if name in parts else None)
    for name in ("gpu", "link", "ndp"):
        vars(getattr(system, name) or SimpleNamespace()).update(parts.get(name, {}))
    return system


def run(trace, system, model=None, slots=0, user=None, regret=False, take=None, **policy):
    model = model or model_of(experts=int(trace.experts.max()) + 1, activation_bytes=0)
    spec = SimpleNamespace(**({"placement": "ep", "dispatch": "gpu", "residency": "none"} | policy))
    machine, plain = from_specs(trace, model, system, spec, slots, dispatch=user, cpu_takes_part=take)
    return replay(trace, machine, plain, dispatch=user, regret=regret)


def moe_ms(*args, **options):
    return run(*args, **options).per_step("moe_s") * 1e3


def rows_of(*counts):
    """A step of one layer in which expert e has counts[e] rows."""
    return [one(e) for e, count in enumerate(counts) for _ in range(count)]


def exactly(value):
    return pytest.approx(value, rel=1e-12)
