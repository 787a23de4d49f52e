#!/usr/bin/env bash
# safetensors writes and reads tensors of FP4, but raises on any slice of one, and says another shape than torch.
#
# Versions: safetensors 0.8.0, torch 2.13.0, numpy 2.4.6, Python 3.11 or later.
# `get_slice` reads one expert out of a tensor of all experts without the rest: `get_slice(name)[expert]`. It does so
# for every dtype, one would think, as whole tensors of FP4 are written and read. torch holds two values of FP4 in an
# element; the file says the shape in values. `get_slice` reads the bytes rightly, then gives them the file's shape.
# Seen: 3 experts of 4 x 32 values: torch says [3, 4, 16], the file [3, 4, 32]; `[0]`, `[0:1]` and `[...]` all raise
# RuntimeError: shape '[3, 4, 32]' is invalid for input of size 192. The same bytes as uint8 can be sliced.
# A loader of single experts has to read FP4 as whole layers, or to take the bytes by their offsets; a count of weights
# from `get_shape` is twice that from `numel`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile 'safetensors==0.8.0' 'torch==2.13.0' 'numpy==2.4.6'
cd "$folder"
venv/bin/python - <<'PY'
import safetensors
import torch
from safetensors.torch import save_file

EXPERTS = 3
packed = torch.arange(EXPERTS * 4 * 16, dtype=torch.uint8).view(EXPERTS, 4, 16)
save_file({"fp4": packed.view(torch.float4_e2m1fn_x2), "bytes": packed.clone()}, "experts.safetensors")
print("safetensors", safetensors.__version__, "torch", torch.__version__)
with safetensors.safe_open("experts.safetensors", "pt") as file:
    whole, part = file.get_tensor("fp4"), file.get_slice("fp4")
    print(f"whole: {whole.dtype} {list(whole.shape)}; get_slice says {part.get_dtype()} {part.get_shape()}")
    assert torch.equal(whole.view(torch.uint8), packed)
    assert list(whole.shape) == [EXPERTS, 4, 16] and part.get_shape() == [EXPERTS, 4, 32], "this has changed"
    assert torch.equal(file.get_slice("bytes")[1], packed[1])
    print("expert 1 of the same bytes as uint8: read")
    for key, shown in ((1, "1"), (slice(0, 1), "0:1"), (..., "...")):
        try:
            part[key]
        except RuntimeError as error:
            print(f"[{shown}] of FP4: RuntimeError: {error}")
            assert "is invalid for input of size 192" in str(error), "this has changed"
        else:
            raise SystemExit("a slice of FP4 was read: this has changed")
PY
