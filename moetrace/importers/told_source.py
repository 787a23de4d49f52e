"""The entries in `source` of a trace on its import: files, their hashes, and the user's options."""

import hashlib
from collections.abc import Sequence
from typing import Any

from moetrace.importers.captured import Capture, Counts, Hints
from moetrace.version import __version__

# With more files than these, `source` has one hash of all their hashes instead of each.
TOLD_FILES = 32


def said_by(hints: Hints) -> dict[str, Any]:
    """The entries in `source` for the user's options that change rows or choices."""
    said: dict[str, Any] = {"cached_rows": "kept"} if hints.keep_cached else {}
    if hints.absent_from is not None:
        said["absent_from"] = hints.absent_from
    return said | ({"absent_ids": list(hints.absent_ids)} if hints.absent_ids else {})


def facts_of(capture: Capture | Counts) -> dict[str, Any]:
    """The entries in `source` for one capture: its own facts, and hashes of its files."""
    hashes = []
    for source in capture.sources:
        with source.open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    named: dict[str, Any] = {"recorded_model": capture.model[:300]} if capture.model else {}
    if len(hashes) == 1:
        named["sha256"] = hashes[0]
    elif len(hashes) <= TOLD_FILES:
        named["sha256"] = hashes
    else:
        named |= {"merged_files": len(hashes), "sha256": _hash_of(hashes)}
    return capture.facts | named


def source_of(facts: list[dict[str, Any]], decode_after: int | None) -> dict[str, Any]:
    """The facts that all captures share, then the differing ones, one by one if they are few."""
    shared = {key: value for key, value in facts[0].items() if all(other.get(key) == value for other in facts)}
    source: dict[str, Any] = {"importer": f"moetrace {__version__}"} | shared
    if len(facts) > TOLD_FILES:
        source |= {"captures": len(facts), "sha256": _hash_of([str(own.get("sha256")) for own in facts])}
    elif len(facts) > 1:
        source["files"] = [{key: value for key, value in own.items() if key not in shared} for own in facts]
    if decode_after is not None:
        source["decode_after"] = decode_after
    return source


def _hash_of(hashes: Sequence[str]) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()
