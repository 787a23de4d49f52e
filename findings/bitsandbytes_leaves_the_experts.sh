#!/usr/bin/env bash
# A MoE model that Transformers loads "in 4 bit" with bitsandbytes keeps its experts in 16 bit, and nobody says so.
#
# Versions: bitsandbytes 0.50.2, transformers 5.24.0, accelerate 1.15.0, torch 2.13.0 (the CPU will do).
# Most weights of a MoE model are experts. One loaded with load_in_4bit should take little more than a quarter of its
# bytes. Transformers 5 keeps the experts of a layer in two tensors of three dimensions, and bitsandbytes replaces linear
# layers only: the attention is quantized, 95 % of the weights are not, no warning is given, and the config.json that is
# saved says load_in_4bit.
# Seen: attention uint8, experts bfloat16; 26.5 MB become 25.9, where 4 bit would be 7.5.
# A tool that takes the bits of an expert from this config.json sees experts of 4.5 bits, 3.6 times too small.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile 'torch==2.13.0' 'transformers==5.24.0'
"$folder/venv/bin/python" -m pip install --quiet --no-compile 'bitsandbytes==0.50.2' 'accelerate==1.15.0'
cd "$folder"
if ! venv/bin/python - 2> warnings.txt <<'PY'
import json
from pathlib import Path

import bitsandbytes
import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3MoeConfig

print("bitsandbytes", bitsandbytes.__version__, "transformers", transformers.__version__)
config = Qwen3MoeConfig(
    hidden_size=256, moe_intermediate_size=256, intermediate_size=512, num_experts=32, num_experts_per_tok=4,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64, vocab_size=512,
)
plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
plain.save_pretrained("plain")
quantized = AutoModelForCausalLM.from_pretrained(
    "plain", quantization_config=BitsAndBytesConfig(load_in_4bit=True), dtype=torch.bfloat16, device_map="cpu"
)
quantized.save_pretrained("quantized")
widths = {name: tensor.dtype for name, tensor in quantized.named_parameters()}
attention = widths["model.layers.0.self_attn.q_proj.weight"]
experts = {widths[f"model.layers.0.mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj")}
before, after = plain.get_memory_footprint(), quantized.get_memory_footprint()
said = json.loads(Path("quantized/config.json").read_text())["quantization_config"]["load_in_4bit"]
print(f"attention {attention}, experts {experts}, {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB after")
print("the saved config.json says load_in_4bit:", said)
assert attention == torch.uint8 and experts == {torch.bfloat16}, "this has changed"
assert after > 0.95 * before and said is True, "this has changed"
PY
then
    cat warnings.txt >&2
    exit 1
fi
if grep -i -E 'expert|not (be )?quantized|skip' warnings.txt; then
    echo "A warning says so now." >&2
    exit 1
fi
