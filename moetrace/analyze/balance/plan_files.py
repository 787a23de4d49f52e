"""Plans as engines read them, SGLang's JSON and TensorRT-LLM's YAML: written, and read as `spec.plan` does."""

from pathlib import Path

import numpy as np

from moetrace.analyze.balance.plans import Plan
from moetrace.spec import Model
from moetrace.spec.errors import UsageError
from moetrace.spec.plan import load_plan


def plan_bytes(plan: Plan, layer_index: np.ndarray, experts: int, form: str) -> bytes:
    """Return a plan as a file's bytes; ``layer_index`` int64 [L] is where each layer is in the model.

    SGLang's dense layers, which it does not look at, get the experts in order, round and round, as its own plan has.
    Raises UsageError if the plan splits experts or gives units unequal numbers of slots, as no file can.
    """
    if plan.share == 1 and np.unique(plan.slots).size > 1:
        raise UsageError("the plan has layers of different numbers of slots, which plan files of engines cannot say.")
    if plan.share > 1 or (plan.expert_of_slot < 0).any():
        why = "splits experts among units" if plan.share > 1 else "gives units unequal numbers of experts"
        raise UsageError(f"the plan {why}, which plan files of engines cannot say: take ep, ep-block or eplb.")
    slots = plan.expert_of_slot.reshape(len(layer_index), -1)
    if form == "SGLang":
        everywhere = np.tile(np.arange(slots.shape[1]) % experts, (int(layer_index[-1]) + 1, 1))
        everywhere[layer_index] = slots
        rows = ",\n".join(str(row) for row in everywhere.tolist())
        return f'{{"physical_to_logical_map": [\n{rows}\n]}}\n'.encode()
    rows = "".join(f"  {layer}: {row}\n" for layer, row in zip(layer_index.tolist(), slots.tolist(), strict=True))
    head = f"num_slots: {slots.shape[1]}\nlayer_updates_per_iter: 0\n"
    return f"{head}initial_global_assignments:\n{rows}".encode()


def read_plan(path: Path, layer_index: np.ndarray, experts: int, units: int, model: Model | None = None) -> Plan:
    """Read the plan of a file; see `spec.plan.load_plan`."""
    return Plan(1, load_plan(path, layer_index, experts, units, model))
