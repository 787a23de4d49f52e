#!/usr/bin/env bash
# The balance loss of Transformers can be at its least while every layer sends all of its tokens to two experts.
#
# Versions: transformers 5.23.0, torch 2.13.0, Python 3.11 or later.
# `output_router_logits=True` gives `aux_loss`, which is read as a measure of how even the routing is: top_k is even,
# more is not. One would expect the mean of the losses of the layers. It is one figure of all layers together: what
# expert 0 gets in any layer is added up, and so on, and only then compared. Layers that have collapsed onto different
# experts make an even sum.
# Seen: 8 layers of 8 experts, top-2, layer l always choosing experts l and l + 1: the loss is 2.000, as even as can
# be, and random routing has 2.001. Each of these layers alone has 8.0, as uneven as can be.
# `aux_loss` does not say that a model's experts are evenly loaded. Count choices layer by layer, from a trace.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile 'transformers==5.23.0' 'torch==2.13.0'
"$folder/venv/bin/python" - <<'PY'
import torch
import transformers
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

LAYERS = EXPERTS = 8
TOP_K, TOKENS = 2, 512


def collapsed(layer):
    logits = torch.full((TOKENS, EXPERTS), -20.0)
    logits[:, [layer, (layer + 1) % EXPERTS]] = 5.0
    return logits


def loss(layers):
    return float(load_balancing_loss_func(tuple(layers), EXPERTS, TOP_K))


each = [collapsed(layer) for layer in range(LAYERS)]
generator = torch.Generator().manual_seed(0)
drawn = [torch.randn(TOKENS, EXPERTS, generator=generator) for _ in range(LAYERS)]
print("transformers", transformers.__version__, "torch", torch.__version__)
print(f"loss of {LAYERS} collapsed layers, no two alike: {loss(each):.4f}")
print(f"loss of {LAYERS} layers of random routing:       {loss(drawn):.4f}")
print("loss of each collapsed layer alone:     ", " ".join(f"{loss([layer]):.2f}" for layer in each))
assert abs(loss(each) - TOP_K) < 1e-3 and 0 < loss(drawn) - TOP_K < 0.01, "this has changed"
assert all(abs(loss([layer]) - EXPERTS) < 1e-3 for layer in each), "this has changed"
PY
