#!/usr/bin/env bash
# The MoE operator of ONNX Runtime takes the softmax of its input `router_probs`.
#
# Versions: onnxruntime 1.31.1, onnx 1.23.2, numpy 2.4.6, Python 3.11 or later; on the CPU.
# The operator com.microsoft.MoE has an input named `router_probs`, [tokens, experts]. So one gives it probabilities:
# the softmax of the router's output. The operator takes them for logits. Its softmax makes them nearly even; the same
# experts are chosen, but with other weights, so nothing looks broken. Its description does not say so.
# Seen: for probabilities 0.7, 0.2, 0.1, 0, top-2, normalized, the two experts get 0.62 and 0.38 in place of 0.78 and
# 0.22. Given the logarithms, it gives the latter.
# A model that was exported with its softmax runs with gates that are too even, and gates that are traced outside the
# operator are not those that it used. Give it logits.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'onnxruntime==1.31.1' 'onnx==1.23.2' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper

EXPERTS = 4


def session():
    """A model of experts of which only expert 0 gives anything: 1, so that the output is its weight."""
    node = helper.make_node(
        "MoE",
        ["x", "router_probs", "first", "", "second"],
        ["y"],
        domain="com.microsoft",
        k=2,
        activation_type="identity",
        normalize_routing_weights=1,
    )
    graph = helper.make_graph(
        [node],
        "moe",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1]),
            helper.make_tensor_value_info("router_probs", TensorProto.FLOAT, [1, EXPERTS]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1])],
        [
            helper.make_tensor("first", TensorProto.FLOAT, [EXPERTS, 1, 1], [1.0] * EXPERTS),
            helper.make_tensor("second", TensorProto.FLOAT, [EXPERTS, 1, 1], [1.0, 0.0, 0.0, 0.0]),
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def weight_of_expert_0(scores):
    feeds = {"x": np.ones((1, 1), np.float32), "router_probs": scores[None]}
    return float(session().run(None, feeds)[0][0, 0])


probabilities = np.array([0.7, 0.2, 0.1, 1e-9], np.float32)
given, logs = weight_of_expert_0(probabilities), weight_of_expert_0(np.log(probabilities))
print("onnxruntime", onnxruntime.__version__)
print(f"top-2 of {[round(float(p), 3) for p in probabilities]}, normalized: expert 0 should have {0.7 / 0.9:.4f}")
print(f"expert 0 has {given:.4f} given these, and {logs:.4f} given their logarithms")
softmax_again = float(np.exp(0.7) / (np.exp(0.7) + np.exp(0.2)))
assert abs(given - softmax_again) < 1e-4 and abs(logs - 0.7 / 0.9) < 1e-4, "this has changed"
PY
