#!/usr/bin/env bash
# `generate` of Transformers takes `output_router_logits=True`, computes the logits, and gives none of them back.
#
# Versions: transformers 5.24.0, torch 2.13.0 (the CPU will do).
# generate(return_dict_in_generate=True) gives the hidden states of each step for output_hidden_states=True, and the
# attention for output_attentions=True. With output_router_logits=True a MoE model should give the router logits of each
# step. The argument is accepted and reaches every forward pass, an unknown one is refused, but the result has no
# field of router logits, and no warning says so.
# Seen: hidden_states and no router_logits, of Qwen3-MoE, Mixtral and OLMoE; the forward pass made them each time.
# Whoever captures routing while a model generates needs hooks on the routers, or one forward pass over what was
# generated (which at 16 bit may choose other experts than the steps did).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile 'torch==2.13.0' 'transformers==5.24.0'
cd "$folder"
if ! venv/bin/python - 2> warnings.txt <<'PY'
import torch
import transformers
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

print("transformers", transformers.__version__)
torch.manual_seed(1)
SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 128, "num_experts_per_tok": 2, "num_experts": 8,
}
kinds = [
    Qwen3MoeConfig(**SIZES, moe_intermediate_size=32, head_dim=16),
    MixtralConfig(**{name: value for name, value in SIZES.items() if name != "num_experts"}, num_local_experts=8),
    OlmoeConfig(**SIZES),
]
for config in kinds:
    model = AutoModelForCausalLM.from_config(config)
    made = []
    model.register_forward_hook(lambda module, given, output: made.append(output.router_logits))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    result = model.generate(
        torch.arange(8)[None], return_dict_in_generate=True, output_hidden_states=True, output_router_logits=True, **options
    )
    layers = {len(logits) for logits in made}
    print(f"{config.model_type}: fields {sorted(result)}, {len(made)} passes that made router logits of {layers} layers")
    assert len(result.hidden_states) == 4 and len(made) == 4 and layers == {2}, "this has changed"
    assert not any("router" in field for field in result), "this has changed"
try:
    model.generate(torch.arange(8)[None], output_router_logit=True, max_new_tokens=1)
except ValueError as error:
    print("a wrong name is refused:", str(error).splitlines()[0][:80])
else:
    raise AssertionError("a wrong name was refused before")
PY
then
    cat warnings.txt >&2
    exit 1
fi
if grep -i 'router' warnings.txt; then
    echo "A warning says so now." >&2
    exit 1
fi
