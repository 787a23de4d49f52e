"""Plans in JSON: SGLang's, vLLM's expert map and vllm-ascend's.

* SGLang (`--init-expert-location FILE.json`, sglang/srt/eplb/expert_location.py): `physical_to_logical_map`, for each
  layer of the model, dense ones included, the expert in each slot.
* vLLM (`eplb_config.initial_expert_map_path`, pull request 49572 at f957c37, not merged when this was written): a list,
  the expert in each slot of every MoE layer, or a list of such lists, one for each MoE layer.
* vllm-ascend (`eplb_config.expert_map_path`, read by `expert_file_to_tensor` of vllm_ascend/eplb/core/eplb_utils.py,
  written by `_export_tensor_to_file` of eplb/adaptor/vllm_adaptor.py, commit 0011ce33): `layer_list`, an entry for each
  of `moe_layer_count` MoE layers, has a `device_list` whose entries have the experts of a unit, `device_expert`. Place
  in these lists decides; `layer_id` and `device_id` repeat it.
"""

from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import UNSET, Meta, UnsetType

from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.spec.model import Model

_Slots = list[Annotated[int, Meta(ge=0, le=65535)]]


class _SGLang(msgspec.Struct):
    physical_to_logical_map: list[_Slots]


class _AscendDevice(msgspec.Struct):
    device_expert: _Slots
    device_id: int | UnsetType = UNSET


class _AscendLayer(msgspec.Struct):
    device_list: list[_AscendDevice]
    layer_id: int | UnsetType = UNSET
    device_count: int | UnsetType = UNSET


class _Ascend(msgspec.Struct):
    layer_list: list[_AscendLayer]
    moe_layer_count: int


def rows_of_json(path: Path, text: str, layer_index: np.ndarray, units: int, model: Model | None) -> list[list[int]]:
    """Return the slots of each layer of `layer_index` (int64 [L]); arguments and errors are those of `load_plan`."""
    try:
        if text.lstrip().startswith("["):
            return _of_vllm(path, text, layer_index, model)
        if '"layer_list"' in text:
            ascend = msgspec.json.decode(text, type=_Ascend)
        else:
            return _of_sglang(path, msgspec.json.decode(text, type=_SGLang), layer_index, model)
    except (msgspec.MsgspecError, RecursionError) as error:
        why = str(error).rstrip(".")[:200]
        raise MoetraceError(f"{path} is no plan of SGLang's, vLLM's or vllm-ascend's: {why}.") from None
    return _of_moe_layers(path, _of_ascend(path, ascend, units), layer_index, model)


def _of_sglang(path: Path, plan: _SGLang, layer_index: np.ndarray, model: Model | None) -> list[list[int]]:
    rows = plan.physical_to_logical_map
    if len(rows) == len(layer_index):
        return rows
    if len(rows) > layer_index[-1]:
        check_numbers(path, set(range(len(rows))), layer_index, model)
        return [rows[layer] for layer in layer_index]
    raise MoetraceError(f"{path} has {len(rows)} layers, but the trace has layers up to {layer_index[-1]}.")


def _of_vllm(path: Path, text: str, layer_index: np.ndarray, model: Model | None) -> list[list[int]]:
    if text.lstrip()[1:].lstrip().startswith("["):
        return _of_moe_layers(path, msgspec.json.decode(text, type=list[_Slots]), layer_index, model)
    return [msgspec.json.decode(text, type=_Slots)] * len(layer_index)


def _of_ascend(path: Path, plan: _Ascend, units: int) -> list[list[int]]:
    if plan.moe_layer_count != len(plan.layer_list):
        raise MoetraceError(f"{path}: moe_layer_count is {plan.moe_layer_count}, but there are {len(plan.layer_list)}.")
    for place, layer in enumerate(plan.layer_list):
        devices = layer.device_list
        if layer.layer_id not in (place, UNSET) or any(d.device_id not in (at, UNSET) for at, d in enumerate(devices)):
            raise MoetraceError(f"{path}: entry {place} of layer_list must have layer_id {place} and devices in order.")
        if layer.device_count not in (len(devices), UNSET):
            raise MoetraceError(f"{path}: device_count of layer {place} is not the number of its devices.")
        if len(devices) != units:
            raise UsageError(
                f"{path} is a plan for {len(devices)} units, not {units}: set the units to {len(devices)}."
            )
        sizes = {len(device.device_expert) for device in devices}
        if len(sizes) > 1:
            raise MoetraceError(
                f"{path}: units of layer {place} have from {min(sizes)} to {max(sizes)} slots, but need equally many."
            )
    return [[expert for device in layer.device_list for expert in device.device_expert] for layer in plan.layer_list]


def _of_moe_layers(path: Path, rows: list[list[int]], layer_index: np.ndarray, model: Model | None) -> list[list[int]]:
    """Take the rows of the trace's layers from those of all MoE layers of a model, which have no numbers."""
    if len(rows) == len(layer_index):
        return rows
    numbers = None if model is None else model.layer_index
    if model is not None and numbers is not None and np.isin(layer_index, numbers).all():
        mtp = 0 if model.mtp_layers is UNSET else model.mtp_layers
        if len(numbers) <= len(rows) <= len(numbers) + mtp:
            return [rows[place] for place in np.searchsorted(numbers, layer_index)]
    raise MoetraceError(
        f"{path} has a row for each of {len(rows)} MoE layers, but the trace has {len(layer_index)}, and no model says "
        f"which these are: name it with --model, or keep only the rows of the trace's layers."
    )


def check_numbers(path: Path, has: set[int], layer_index: np.ndarray, model: Model | None) -> None:
    """Raise unless the layers that a plan `has` beside those of the trace are known to be no MoE layers of the trace.

    That is known if the plan has all layers of a model whose MoE layers the trace has; if no model tells, if they
    are before the last and so dense. TensorRT-LLM's files leave dense layers out: where such a plan begins as the trace
    does, in a layer that is not the first, both count alike.
    """
    layers = layer_index.tolist()
    if has == set(layers):
        return
    numbers = None if model is None else model.layer_index
    if model is not None and numbers is not None and model.all_layers is not None:
        stop = model.all_layers + (0 if model.mtp_layers is UNSET else model.mtp_layers)
        if np.isin(layers, numbers).all() and has.issuperset(numbers.tolist()) and max(has) < stop:
            return
        why = f"and {model.name} has MoE layers from {numbers[0]} to {numbers[-1]}: "
    else:
        if max(has) == layers[-1] or min(has) == layers[0] > 0:
            return
        why = "and nothing says which of them these are: name the model with --model, "
    raise MoetraceError(
        f"{path} has {len(has)} layers ({min(has)} to {max(has)}), but the trace has {len(layers)} ({layers[0]} to "
        f"{layers[-1]}), {why}number the trace as the plan (`moetrace select --first-layer N`), or keep only its "
        f"layers in the plan."
    )
