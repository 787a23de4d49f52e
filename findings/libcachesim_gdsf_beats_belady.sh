#!/usr/bin/env bash
# GDSF of libCacheSim has fewer misses than its Belady, which is said to be the best that there is.
#
# Versions: libcachesim 0.3.5, Python 3.11 or later.
# Greedy-Dual-Size-Frequency on objects of one size is LFU with aging: it cannot beat the optimum. But it does not
# always admit what it missed: an object that would be the next to go is not taken in at all, no admission policy being
# set. Belady, as LRU and LFU, always takes it in and has to evict another. So they do not play by the same rules, and
# the bound holds for the others only.
# Seen: one slot, one hot expert and 400 that come once: Belady misses 801 of 1,205 accesses, GDSF 401.
# An expert that a layer needs and that is not resident is fetched into a slot by most engines. A hit rate of GDSF is
# one of an engine that can also compute it elsewhere. Compare it with a bound that may bypass, too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'libcachesim==0.3.5'
cd "$folder"
venv/bin/python - <<'PY'
import struct
from pathlib import Path

import libcachesim as lib

HOT = 1
accesses = [HOT] * 5
for once in range(2, 402):
    accesses += [once, HOT, HOT]

# oracleGeneral: time u32, object u64, size u32, index of its next access i64, or -1.
following, rows = {}, []
for index in range(len(accesses) - 1, -1, -1):
    rows.append(struct.pack("<IQIq", index, accesses[index], 1, following.get(accesses[index], -1)))
    following[accesses[index]] = index
Path("accesses.bin").write_bytes(b"".join(reversed(rows)))


def misses(policy):
    reader = lib.TraceReader("accesses.bin", lib.TraceType.ORACLE_GENERAL_TRACE)
    return round(policy(1, hashpower=16).process_trace(reader)[0] * len(accesses))


print("libcachesim", lib.__version__)
seen = {policy.__name__: misses(policy) for policy in (lib.LRU, lib.LFU, lib.Belady, lib.GDSF)}
print(f"one slot, {len(accesses):,} accesses; misses: {seen}")
cache = lib.GDSF(1, hashpower=16)
held = []
for drawn in (HOT, HOT, HOT, 2):
    cache.get(lib.Request(obj_id=drawn, obj_size=1))
    held = [each for each in (HOT, 2) if cache.find(lib.Request(obj_id=each, obj_size=1), False)]
print(f"GDSF after three accesses to {HOT} and a missed one to 2 holds {held}")
assert seen == {"LRU": 801, "LFU": 801, "Belady": 801, "GDSF": 401} and held == [HOT], "this has changed"
PY
