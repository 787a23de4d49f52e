#!/usr/bin/env bash
# A key of layer and expert is wrong in Polars with 128 experts and right with 256.
#
# Versions: polars 2.1.0, Python 3.11 or later.
# Engines write expert ids as uint8 where they fit (vLLM does up to 256 experts), and a trace has fewer than 256 layers.
# The usual key of an expert, `layer * experts + expert`, does not fit, so one would expect an error or a wider type.
# Polars gives a number in an expression the type of the column, if it fits there: 128 does, so the product is a uint8
# and wraps, without a word. 256 does not fit, so there the product is a uint16. The more experts, the more right.
# Seen: expert 5 of layers 0 to 3: 5, 133, 5, 133 with 128 experts; 5, 261, 517, 773 with 256.
# With 128 experts (Qwen3-30B-A3B, gpt-oss-120b) all even layers become one layer and all odd ones another, so counts
# are too high and hit rates of a simulated cache far too good. Cast before you multiply.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'polars==2.1.0'
"$folder/venv/bin/python" - <<'PY'
import polars as pl

print("polars", pl.__version__)
choices = pl.DataFrame({"layer": [0, 1, 2, 3], "expert": [5, 5, 5, 5]}, schema={"layer": pl.UInt8, "expert": pl.UInt8})
seen = {}
for experts in (64, 128, 256):
    keys = choices.select(key=pl.col("layer") * experts + pl.col("expert"))["key"]
    cast = choices.select(key=pl.col("layer").cast(pl.UInt32) * experts + pl.col("expert"))["key"]
    seen[experts] = keys.dtype, keys.to_list()
    print(f"{experts} experts: {keys.dtype} {keys.to_list()}, {keys.n_unique()} keys; cast first: {cast.to_list()}")
    assert cast.to_list() == [layer * experts + 5 for layer in range(4)]
assert seen[64] == (pl.UInt8, [5, 69, 133, 197]), "this has changed"
assert seen[128] == (pl.UInt8, [5, 133, 5, 133]), "this has changed"
assert seen[256] == (pl.UInt16, [5, 261, 517, 773]), "this has changed"
PY
