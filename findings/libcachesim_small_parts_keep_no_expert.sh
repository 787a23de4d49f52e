#!/usr/bin/env bash
# Four policies of libCacheSim keep nothing, and say a miss ratio of 1, where one expert is large beside the cache.
#
# Versions: libcachesim 0.3.5, Python 3.11 or later.
# S3-FIFO, Clock2Q+, W-TinyLFU and LIRS divide the cache: a small part takes what is new. Of a cache for a handful of
# objects one would expect that the small part has room for one of them. It is a share of the bytes, rounded down: 10 %
# for S3-FIFO and Clock2Q+, 1 % for W-TinyLFU and LIRS. An object that is as large as the part, or larger, is never
# admitted. Nothing is raised; only LIRS prints a warning.
# Seen: with 8 or 10 slots all four miss every time; with 64, W-TinyLFU and LIRS do; with 200, none does.
# A cache of a layer has 8 to 64 experts, so the comparison of policies that people make first shows S3-FIFO and
# W-TinyLFU, two of the best, as the worst. Compare them where a hundredth of the cache holds more than an expert;
# S3-FIFO also with a larger `small_size_ratio`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'libcachesim==0.3.5'
"$folder/venv/bin/python" - <<'PY'
import random

import libcachesim as lib

EXPERT_BYTES = 3 * 2048 * 768 * 2  # gate, up and down of Qwen3-30B-A3B in 16 bits
EXPERTS = 512
draws = random.Random(0).choices(range(EXPERTS), weights=[1 / (rank + 1) for rank in range(EXPERTS)], k=20_000)


def miss_ratio(policy, slots):
    cache = policy(slots * EXPERT_BYTES, hashpower=16)
    hits = sum(cache.get(lib.Request(obj_id=expert, obj_size=EXPERT_BYTES)) for expert in draws)
    return 1 - hits / len(draws)


print("libcachesim", lib.__version__)
print(f"{'slots':>12}{'LRU':>12}{'S3FIFO':>12}{'Clock2QPlus':>12}{'WTinyLFU':>12}{'LIRS':>12}")
seen = {}
for slots in (8, 10, 64, 200):
    policies = (lib.LRU, lib.S3FIFO, lib.Clock2QPlus, lib.WTinyLFU, lib.LIRS)
    seen[slots] = [miss_ratio(policy, slots) for policy in policies]
    print(f"{slots:>12}" + "".join(f"{ratio:12.3f}" for ratio in seen[slots]), flush=True)
assert all(ratios[0] < 0.9 for ratios in seen.values()), "LRU hits at every size"
assert all(seen[slots][1:] == [1, 1, 1, 1] for slots in (8, 10)), "this has changed"
assert max(seen[64][1:3]) < 1 and seen[64][3:] == [1, 1], "this has changed"
assert max(seen[200]) < 1, "this has changed"
PY
