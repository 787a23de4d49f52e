#!/usr/bin/env bash
# GGUF calls a model of 30.5 billion weights `128x1.8B`, whose product is 230 billion.
#
# Versions: gguf 0.19.0, Python 3.11 or later.
# `general.size_label` of a MoE model, which is also in the names of files, has the form EXPERTSxSIZE. As 8x7B for
# Mixtral it reads as a product, or nearly so. SIZE is one expert of every layer and all that is not an expert:
# embeddings, attention, LM head. With many small experts nearly all of SIZE is counted as many times as there are
# experts. It is neither the weights of an expert nor those that a token uses.
# Seen: tensors of the shapes of Qwen3-30B-A3B: 30.5 billion weights, 0.23 an expert, 1.54 outside; label 128x1.8B.
# Who sizes memory or ranks models by the label takes this one for 7.5 times as large. Add up the tensors.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'gguf==0.19.0'
cd "$folder"
venv/bin/python - <<'PY'
import importlib.metadata
from math import prod

import gguf
import numpy as np

LAYERS, EXPERTS, HIDDEN, WIDTH, VOCABULARY = 48, 128, 2048, 768, 151_936
shapes = {"token_embd": (VOCABULARY, HIDDEN), "output": (VOCABULARY, HIDDEN)}
for layer in range(LAYERS):
    shapes |= {
        f"blk.{layer}.attn_q": (4096, HIDDEN),
        f"blk.{layer}.attn_k": (512, HIDDEN),
        f"blk.{layer}.attn_v": (512, HIDDEN),
        f"blk.{layer}.attn_output": (HIDDEN, 4096),
        f"blk.{layer}.ffn_gate_inp": (EXPERTS, HIDDEN),
        f"blk.{layer}.ffn_gate_exps": (EXPERTS, WIDTH, HIDDEN),
        f"blk.{layer}.ffn_up_exps": (EXPERTS, WIDTH, HIDDEN),
        f"blk.{layer}.ffn_down_exps": (EXPERTS, HIDDEN, WIDTH),
    }
writer = gguf.GGUFWriter("never-written.gguf", "qwen3moe")
for name, shape in shapes.items():
    writer.add_tensor_info(f"{name}.weight", shape, np.dtype(np.float16), 2 * prod(shape))
counted = writer.get_total_parameter_count()
label = gguf.size_label(*counted)
weights = sum(map(prod, shapes.values()))
count, size = label.split("x")
product = int(count) * float(size.removesuffix("B")) * 1e9
print("gguf", importlib.metadata.version("gguf"))
print(f"weights {weights:,}; counted (all, outside experts, of one expert, experts): {counted}")
print(f"label {label}: {product:,.0f}, {product / weights:.1f} times as many")
assert counted[0] == weights and label == "128x1.8B" and product > 7 * weights, "this has changed"
PY
