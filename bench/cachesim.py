"""libcachesim (GPL; a package of its own, from which nothing is copied) on the accesses of a trace: an oracle, a peer.

It reads records of 24 bytes from a file; objects have size 1. `hits` runs one cache over one file.
"""

from pathlib import Path
from typing import Any

import numpy as np

RECORD = np.dtype([("time", "<u4"), ("key", "<u8"), ("size", "<u4"), ("next_use", "<i8")])
# Its names of what docs/cache.md describes.
POLICIES = {
    "lru": "LRU",
    "fifo": "FIFO",
    "lfu-in-cache": "LFU",
    "belady": "Belady",
    "sieve": "Sieve",
    "s3-fifo": "S3FIFO",
    "arc": "ARC",
}


def next_accesses(keys: np.ndarray) -> np.ndarray:
    """The number of the next access to each access's key, -1 if there is none; int64 [n]."""
    order = np.argsort(keys, kind="stable")
    following = np.full(keys.size, -1, np.int64)
    same = keys[order[1:]] == keys[order[:-1]]
    following[order[:-1][same]] = order[1:][same]
    return following


def write(keys: np.ndarray, path: Path) -> Path:
    """Write accesses, int [n], as libcachesim reads them."""
    records = np.zeros(keys.size, RECORD)
    records["key"], records["size"], records["next_use"] = keys + 1, 1, next_accesses(keys)
    path.write_bytes(records.tobytes())
    return path


def reader(path: Path) -> Any:
    import libcachesim

    return libcachesim.TraceReader(str(path), libcachesim.TraceType.ORACLE_GENERAL_TRACE)


def misses(policy: str, capacity: int, source: Any, hashpower: int = 16) -> float:
    """Share of the accesses of a `reader` that miss; `hashpower` keeps its hash table small and quick."""
    import libcachesim

    source.reset()
    cache = getattr(libcachesim, POLICIES[policy])(cache_size=capacity, hashpower=hashpower)
    return cache.process_trace(source)[0]


def hits(policy: str, capacity: int, path: Path, accesses: int) -> int:
    """Hits of one cache over a file of so many accesses."""
    return accesses - round(misses(policy, capacity, reader(path)) * accesses)
