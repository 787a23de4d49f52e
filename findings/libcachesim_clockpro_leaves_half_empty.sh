#!/usr/bin/env bash
# Clock-Pro of libCacheSim fills one half of the cache, by a default that is not the one that its help names.
#
# Versions: libcachesim 0.3.5, Python 3.11 or later.
# Any policy of a cache of N slots is expected to hold N objects once it is warm. ClockPro holds only the share that
# its parameter `init_ratio_cold` gives; the rest stays empty for good. Its docstring says that the default is 1, where
# the cache does fill. The default in the code is 0.5.
# Seen: 100 slots, 100,000 accesses to 1,000 objects: LRU holds 100, ClockPro 50, ClockPro with init_ratio_cold=1 100.
# Its miss ratio is that of a cache of half the size. In a table of policies for an expert cache it comes last, which
# says nothing about Clock-Pro. Ask a simulated cache how many objects it holds (`get_n_obj`) before you compare it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'libcachesim==0.3.5'
"$folder/venv/bin/python" - <<'PY'
import inspect
import random

import libcachesim as lib

SLOTS, OBJECTS = 100, 1000
weights = [(rank + 1) ** -0.8 for rank in range(OBJECTS)]
draws = random.Random(0).choices(range(OBJECTS), weights=weights, k=100_000)


def run(cache):
    most = hits = 0
    for drawn in draws:
        hits += cache.get(lib.Request(obj_id=drawn, obj_size=1))
        most = max(most, cache.get_n_obj())
    return most, 1 - hits / len(draws)


print("libcachesim", lib.__version__)
caches = {
    "LRU": lib.LRU(SLOTS, hashpower=16),
    "ClockPro": lib.ClockPro(SLOTS, hashpower=16),
    "ClockPro, init_ratio_cold=1": lib.ClockPro(SLOTS, hashpower=16, init_ratio_cold=1),
}
seen = {}
for name, cache in caches.items():
    seen[name], ratio = run(cache)
    print(f"{name:28} most objects in {SLOTS} slots: {seen[name]:4}, miss ratio {ratio:.3f}")
default = inspect.signature(lib.ClockPro).parameters["init_ratio_cold"].default
help_says = "init_ratio_cold: initial ratio of cold pages (default: 1)" in lib.ClockPro.__doc__
print(f"init_ratio_cold is {default} if not given; the docstring says 1: {help_says}")
assert list(seen.values()) == [SLOTS, SLOTS // 2, SLOTS] and default == 0.5 and help_says, "this has changed"
PY
