#!/usr/bin/env bash
# A config.json of Qwen3-MoE loses `num_experts` when Transformers saves it again.
#
# Versions: transformers 5.23.0, Python 3.11 or later (torch is not needed).
# A Qwen3-MoE model is published with `"num_experts": 128` in its config.json. Loaded and saved without a change, as a
# fine-tune, a merge or a quantizer does it, the file should say the same. It says `"num_local_experts": 128`, and has
# no `num_experts`: in Python both names still work, since one stands for the other. Qwen2-MoE and OLMoE keep theirs.
# Seen: num_experts before, num_local_experts after; for Qwen2-MoE num_experts both times.
# A tool that reads the JSON itself finds no experts in such a model, or takes a default, and sees a dense one or the
# wrong count. Look for both names.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile 'transformers==5.23.0'
cd "$folder"
venv/bin/python - 2> warnings.txt <<'PY'
import json
from pathlib import Path

import transformers

print("transformers", transformers.__version__)


def names(kind):
    published = {"model_type": kind, "num_experts": 96, "num_experts_per_tok": 8, "num_hidden_layers": 4}
    Path(kind).mkdir()
    Path(kind, "config.json").write_text(json.dumps(published))
    config = transformers.AutoConfig.from_pretrained(kind)
    assert config.num_experts == 96
    config.save_pretrained(f"{kind}-saved")
    saved = json.loads(Path(f"{kind}-saved", "config.json").read_text())
    found = {name: saved[name] for name in ("num_experts", "num_local_experts") if name in saved}
    print(f"{kind}: num_experts before, {found} after")
    return found


assert names("qwen3_moe") == {"num_local_experts": 96}, "this has changed"
assert names("qwen2_moe") == names("olmoe") == {"num_experts": 96}, "this has changed"
PY
