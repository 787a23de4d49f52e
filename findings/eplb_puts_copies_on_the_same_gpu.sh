#!/usr/bin/env bash
# EPLB gives a GPU a second copy of an expert that it already holds.
#
# Versions: sglang 0.5.23 (the wheel; its copy of DeepSeek's EPLB), torch 2.13.0, numpy 2.4.6, Python 3.11.
# Expert parallelism copies a hot expert so that several GPUs share its rows. One would expect its copies on different
# GPUs. EPLB packs copies by weight alone: the next heaviest goes to the GPU with the least load that has a slot free,
# and no one asks what is there. The second copy takes the memory of an expert for rows that the first could serve.
# Seen: 60 experts with Zipf loads (exponent 0.7), 72 slots on 8 GPUs: no expert has more than 5 copies, and 3 of the 12
# added ones lie beside another of the same expert. 256 experts (exponent 0.6), 288 slots on 32 GPUs: 2 of the 32.
# EPLB's even loads are right, but redundant slots buy less than their number says: whoever counts memory or the unique
# experts of a GPU from the number of slots is off. Count unique experts a GPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile 'torch==2.13.0' 'numpy==2.4.6'
"$folder/venv/bin/python" -m pip install --quiet --no-compile --no-deps 'sglang==0.5.23'
"$folder/venv/bin/python" - <<'PY'
import importlib.metadata
import importlib.util

import torch

# The one file is loaded by its path, which needs torch only.
wheel = importlib.metadata.distribution("sglang")
place = wheel.locate_file("sglang/srt/eplb/eplb_algorithms/deepseek.py")
spec = importlib.util.spec_from_file_location("eplb", place)
eplb = importlib.util.module_from_spec(spec)
spec.loader.exec_module(eplb)


def beside(experts, slots, gpus, exponent):
    """Copies on a GPU that has another of the same expert, and the most copies of an expert."""
    loads = torch.tensor([[10_000 / (rank + 1) ** exponent for rank in range(experts)]])
    plan, _, copies = eplb.rebalance_experts(loads, slots, 1, 1, gpus, False)
    held = plan[0].view(gpus, slots // gpus).tolist()
    found, most = sum(len(gpu) - len(set(gpu)) for gpu in held), int(copies.max())
    shared = [gpu for gpu in held if len(set(gpu)) < len(gpu)]
    print(f"{experts} experts, {slots} slots on {gpus} GPUs: at most {most} copies of an expert;")
    print(f"  {found} of {slots - experts} added copies beside another: {shared[0]}, ...")
    return found, most


print("sglang", wheel.version, "torch", torch.__version__)
assert beside(60, 72, 8, 0.7) == (3, 5), "this has changed"
assert beside(256, 288, 32, 0.6) == (2, 7), "this has changed"
PY
