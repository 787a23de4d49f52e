#!/usr/bin/env bash
# JetMoE gives three tensors of router logits a layer, two of them the same and of attention.
#
# Versions: transformers 5.23.0, torch 2.13.0, Python 3.11 or later.
# `router_logits` of a MoE model in Transformers is a tuple of one tensor for each MoE layer. JetMoE also routes its
# attention heads, by a router of the same class. Its attention layer returns the logits, and the router inside is
# recorded, too: so a layer has those of attention, those of attention again, and those of its MLP.
# Seen: 2 layers, 6 tensors; numbers 0 and 1 are equal, and so are 3 and 4. Number l is not layer l.
# The balance loss counts attention twice. Whoever takes number l for MLP layer l has the routing of other routers from
# the first tensor on. Take every third, from number 2, or hook the routers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile 'transformers==5.23.0' 'torch==2.13.0'
"$folder/venv/bin/python" - <<'PY'
import torch
import transformers
from transformers import JetMoeConfig, JetMoeForCausalLM

LAYERS = 2
config = JetMoeConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=LAYERS,
    num_key_value_heads=2,
    kv_channels=8,
    intermediate_size=16,
    num_local_experts=4,
    num_experts_per_tok=2,
    bos_token_id=1,
    eos_token_id=2,
)
torch.manual_seed(0)
model = JetMoeForCausalLM(config).eval()
called = []
for name, module in model.named_modules():
    if name.endswith("router"):
        module.register_forward_hook(lambda _module, _input, output, name=name: called.append((name, output[4])))
with torch.no_grad():
    logits = model(torch.arange(3, 9)[None], output_router_logits=True).router_logits
print("transformers", transformers.__version__, "torch", torch.__version__)
print(f"{LAYERS} layers, {len(called)} calls of routers, {len(logits)} tensors of router logits:")
whose = [next(name for name, made in called if torch.equal(made, tensor)) for tensor in logits]
for number, name in enumerate(whose):
    print(f"  {number}: {name}")
of_layer = ["self_attention.experts.router", "self_attention.experts.router", "mlp.router"]
expected = [f"model.layers.{layer}.{name}" for layer in range(LAYERS) for name in of_layer]
assert whose == expected and len(called) == 2 * LAYERS, "this has changed"
PY
