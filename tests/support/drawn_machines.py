"""Random machines of version 2 of the timing model: a CPU, launches, rooflines, efficiencies, an overhead.

A machine is a plain dict, as its TOML file would be, so that the oracle and the engine each read it in their own way.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import msgspec
from hypothesis import strategies as st

from support.oracle import OracleTrace
from support.strategies import RESIDENCIES, Case, cases

LAUNCHES, ROOFLINES = ("expert", "layer"), ("max", "sum")
AT_HOME = ("ndp", "home", "in-place", "hot", "balance", "optimal", "fiddler")


@dataclass
class MachineCase:
    """One replay but for its policy, on a machine as a TOML file describes it; slots always given."""

    trace: OracleTrace
    model: Any
    system: dict[str, Any]
    slots: int

    @property
    def plain(self) -> SimpleNamespace:
        """The machine as the oracle reads it."""
        parts = {"cpu": None, "ndp": None, "host": None} | self.system
        return SimpleNamespace(
            **{name: SimpleNamespace(**part) if isinstance(part, dict) else part for name, part in parts.items()}
        )


@st.composite
def machine_cases(draw, max_steps: int = 8, max_experts: int = 8) -> MachineCase:
    """Draw a case, and give its machine some of the fields of version 2."""
    case: Case = draw(cases(max_steps=max_steps, max_experts=max_experts, max_units=3))
    system = {name: part for name, part in msgspec.to_builtins(case.system).items() if part is not None}
    gpu, link = system["gpu"], system["link"]
    gpu |= draw(fields(launch=LAUNCHES, roofline=ROOFLINES, layer_overhead_us=(0.0, 150.0)))
    link |= draw(fields(efficiency=(1.0, 0.6)))
    if "ndp" not in system:
        link |= draw(fields(host_read=(False, True)))
    share = {"compute_efficiency": (1.0, 0.7), "memory_efficiency": (1.0, 0.55)}
    if "ndp" in system:
        kinds = {"launch": LAUNCHES, "roofline": ROOFLINES}
        system["ndp"] |= draw(fields(**kinds, **share))
    if "ndp" not in system or draw(st.booleans(), label="a CPU beside units"):
        # As fast as the link, more or less, so that reading host memory is the bottleneck in some and not in others.
        rate = link["bandwidth_gb_s"] * draw(st.sampled_from([0.5, 0.9, 1.5, 4.0]))
        tflops = gpu["tflops"] * draw(st.sampled_from([0.02, 0.25, 1.0]))
        system["cpu"] = {"tflops": tflops, "bandwidth_gb_s": rate, "command_us": draw(st.sampled_from([0.0, 80.0]))}
        system["cpu"] |= draw(fields(launch=LAUNCHES, roofline=ROOFLINES, **share))
    return MachineCase(case.trace, case.model, system, case.slots)


@st.composite
def fields(draw, **choices: tuple) -> dict[str, Any]:
    """Draw each field from its choices, of which the first is the default; a default is as often not written."""
    drawn = {name: draw(st.sampled_from(values), label=name) for name, values in choices.items()}
    return {name: value for name, value in drawn.items() if value != choices[name][0] or draw(st.booleans())}


def machine_policies(case: MachineCase) -> st.SearchStrategy[dict[str, Any]]:
    """Draw a policy that runs on the machine, as a TOML file describes it; each dispatch as often as the others."""
    has_home = "ndp" in case.system or "cpu" in case.system
    return st.sampled_from(("gpu", *AT_HOME) if has_home else ("gpu",)).flatmap(lambda kind: _policies(case, kind))


@st.composite
def _policies(draw, case: MachineCase, dispatch: str) -> dict[str, Any]:
    chosen: dict[str, Any] = {"placement": "ep", "dispatch": dispatch}
    if "ndp" in case.system:
        chosen["placement"] = draw(st.sampled_from(["ep", "ep-block", "tp"]))
    if dispatch == "in-place":
        rows = draw(st.none() | st.integers(1, 6), label="gpu_rows")
        chosen |= {} if rows is None else {"gpu_rows": rows}
    if dispatch == "hot":
        return chosen
    chosen["scope"] = draw(st.sampled_from(["layer", "global"]))
    layers = min(case.slots // case.model.most_experts, case.model.moe_layers)
    if layers and draw(st.integers(0, 4)) == 0:
        end = draw(st.sampled_from(["first", "last"]))
        kept = {"gpu_layers": draw(st.integers(1, layers)), "gpu_layers_end": end}
        return chosen | {"residency": "static-layers"} | kept
    known = {pair: variants for pair, variants in RESIDENCIES.items() if pair[0] != "static"}
    residency, prefetch = draw(st.sampled_from(list(known)))
    variant = draw(st.sampled_from(known[residency, prefetch]))
    return chosen | {"residency": residency, "prefetch": prefetch} | variant


def plain_policy(policy: dict[str, Any]) -> SimpleNamespace:
    """The policy as the oracle reads it."""
    defaults = {"placement": "ep", "residency": "none", "prefetch": "none", "scope": "layer", "prefetch_blocks": False}
    numbers = {"half_life": None, "alpha": 0.3, "p": 1.0, "seed": 0, "gpu_rows": None}
    numbers |= {"most_count": None, "evicted_share": None}
    files = {"loads": None, "plan": None, "static": None}
    return SimpleNamespace(**(defaults | numbers | files | policy))
