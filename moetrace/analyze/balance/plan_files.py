"""Plans as engines read them, written, and read as `spec.plan` does."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from moetrace.analyze.balance.plans import Plan
from moetrace.spec import Model
from moetrace.spec.errors import UsageError
from moetrace.spec.plan import load_plan


def plan_bytes(plan: Plan, layer_index: np.ndarray, experts: int, form: str) -> bytes:
    """Return a plan as a file's bytes; ``layer_index`` int64 [L] is where each layer is in the model.

    `form` is "SGLang", "TensorRT-LLM", "vLLM" or "vllm-ascend". SGLang's dense layers, which it does not look at, get
    the experts in order, round and round, as its own plan has; vLLM's files have MoE layers only. Raises UsageError if
    the plan splits experts or gives units unequal numbers of slots, as no file can.
    """
    if plan.share == 1 and np.unique(plan.slots).size > 1:
        raise UsageError("the plan has layers of different numbers of slots, which plan files of engines cannot say.")
    if plan.share > 1 or (plan.expert_of_slot < 0).any():
        why = "splits experts among units" if plan.share > 1 else "gives units unequal numbers of experts"
        uneven = plan.share == 1 and int(plan.slots[0]) % plan.bins
        take = f"units that divide {plan.slots[0]} experts, or eplb" if uneven else "ep, ep-block or eplb"
        raise UsageError(f"the plan {why}, which plan files of engines cannot say: take {take}.")
    slots = plan.expert_of_slot.reshape(len(layer_index), -1)
    if form == "SGLang":
        everywhere = np.tile(np.arange(slots.shape[1]) % experts, (int(layer_index[-1]) + 1, 1))
        everywhere[layer_index] = slots
        return f'{{"physical_to_logical_map": [\n{_lines(everywhere.tolist())}\n]}}\n'.encode()
    if form == "vLLM":
        return f"[\n{_lines(slots.tolist())}\n]\n".encode()
    if form == "vllm-ascend":
        layers = [_ascend_layer(place, units) for place, units in enumerate(plan.expert_of_slot.tolist())]
        return f'{{"moe_layer_count": {len(layers)}, "layer_list": [\n{_lines(layers)}\n]}}\n'.encode()
    rows = "".join(f"  {layer}: {row}\n" for layer, row in zip(layer_index.tolist(), slots.tolist(), strict=True))
    head = f"num_slots: {slots.shape[1]}\nlayer_updates_per_iter: 0\n"
    return f"{head}initial_global_assignments:\n{rows}".encode()


def _lines(values: list[Any]) -> str:
    return ",\n".join(json.dumps(value) for value in values)


def _ascend_layer(place: int, units: list[list[int]]) -> dict[str, Any]:
    devices = [{"device_id": unit, "device_expert": experts} for unit, experts in enumerate(units)]
    return {"layer_id": place, "device_count": len(units), "device_list": devices}


def read_plan(path: Path, layer_index: np.ndarray, experts: int, units: int, model: Model | None = None) -> Plan:
    """Read the plan of a file; see `spec.plan.load_plan`."""
    return Plan(1, load_plan(path, layer_index, experts, units, model))
