"""The model of a trace, and the sizes of its experts."""

from pathlib import Path

import numpy as np

from moetrace.spec import Model, check_shape, list_presets, load_model
from moetrace.trace.format import Trace


def own_experts(trace: Trace) -> np.ndarray:
    """Return how many experts each layer of a trace has, int64 [L]."""
    if trace.layer_experts is None:
        return np.full(trace.layers, trace.num_experts)
    return trace.layer_experts.astype(np.int64)


def model_of(trace: Trace, model: Model | str | Path | None = None) -> Model | None:
    """Return `model`, else the preset that the trace names, or None if it names no preset.

    Raises UsageError if the model does not have the layers and experts of the trace.
    """
    if model is None and trace.model not in list_presets("models"):
        return None
    spec = load_model(model if model is not None else trace.model)
    check_shape(trace.shown, trace.layers, trace.num_experts, spec)
    return spec


def expert_bytes(trace: Trace, model: Model | str | Path | None = None) -> np.ndarray | None:
    """Bytes of each expert, int64 [layers, experts]: the trace's own, else those of `model` or the preset it names.

    None if neither is known. Raises UsageError if a `model`, used or not, is not a model or not that of the trace.
    """
    if trace.expert_bytes is not None:
        if model is not None:
            model_of(trace, model)
        shape = (trace.layers, trace.num_experts)
        return np.ascontiguousarray(np.broadcast_to(trace.expert_bytes.reshape(trace.layers, -1), shape))
    spec = model_of(trace, model)
    return None if spec is None else np.ceil(spec.expert_bytes()).astype(np.int64)
