"""A drawn cluster, its policy and its trace, replayed by the engine."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np
import pytest

from moetrace.engine.cluster import placed
from moetrace.engine.run import Run, run_setups
from moetrace.engine.setup import Setup
from moetrace.spec import Model, MoetraceError, PolicySpec, System, load_model, load_policy, load_system
from moetrace.spec.cluster_policy import fields_read
from moetrace.trace import Trace
from support.cluster_cases import ClusterCase


def as_trace(case: ClusterCase) -> Trace:
    drawn = case.trace
    experts = np.where(drawn.experts < 0, 255, drawn.experts)
    counts = case.model["experts"]
    sizes = np.diff(drawn.offset)
    phases = [set(drawn.row_phase[a:b].tolist()) for a, b in zip(drawn.offset[:-1], drawn.offset[1:], strict=True)]
    step_phase = np.array([2 if len(found) > 1 else found.pop() for found in phases])
    more: dict[str, Any] = {} if drawn.expert_bytes is None else {"expert_bytes": drawn.expert_bytes}
    return Trace.from_arrays(
        experts,
        num_experts=max(counts) if isinstance(counts, list) else counts,
        steps=sizes,
        phase=step_phase,
        request=drawn.request,
        position=drawn.position,
        row_phase=drawn.row_phase,
        **more,
    )


def as_specs(case: ClusterCase, folder: Path) -> tuple[Model, System, PolicySpec]:
    model = {"shared_params_per_layer": 0} | case.model
    network, cluster = dict(case.system["network"]), dict(case.system["cluster"])
    if "gpus_per_node" in network:
        cluster["gpus_per_node"] = network.pop("gpus_per_node")
    if factors := cluster.pop("factors", None):
        lines = [f"{gpu},{factor!r}\n" for gpu, factor in enumerate(factors) if factor != 1]
        (folder / "factors.csv").write_text("".join(lines))
        cluster["rate_factors"] = str(folder / "factors.csv")
    system = case.system | {"network": network, "cluster": cluster}
    policy = {"schedule": "serial"} | case.policy
    read = fields_read(policy.get("placement", "ep"), policy["schedule"], policy.get("copies"), policy.get("migrate"))
    kept = {name: value for name, value in policy.items() if name in read | {"placement"}}
    if policy.get("placement") == "plan":
        kept["plan"] = "drawn.json"
    return (
        load_model(msgspec.convert(model, Model)),
        load_system(msgspec.convert(system, System)),
        load_policy(PolicySpec(name="p"), kept),
    )


def replayed(case: ClusterCase, window: range | None = None) -> Run:
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        model, system, policy = as_specs(case, Path(folder))
        plan = None if case.plan is None else np.array(case.plan, np.int32)
        patch.setattr(placed, "load_plan", lambda *_: plan)
        (run,) = run_setups(as_trace(case), [Setup(model=model, system=system, policies=[policy], window=window)])
    if isinstance(run, MoetraceError):
        raise run
    return run
