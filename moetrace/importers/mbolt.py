"""Routing logs of mbolt's patch of llama.cpp (`MBOLT_TRACE`): a binary record for each forward pass and MoE layer.

Little-endian 32-bit integers: the magic `MBLT`, version 1 and the experts of a layer, then records of layer, k,
n_tokens and ids [n_tokens, k] (doramirdor/mbolt, mbolt/patches/llama.cpp-mbolt-trace.patch, commit 0d3209b1; read there
by mbolt/src/mbolt/trace.py). A pass begins where the layer does not increase. llama.cpp computes the last layer of a
prompt for the tokens whose output is wanted only, so its record may have fewer: they are taken to be the last ones, the
others are absent there. A last record that was cut, as a process that is killed leaves it, is left out. Passes of one
token decode. Requests are not recorded: a prompt after a decode begins one.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moetrace.importers.captured import Capture, Hints
from moetrace.importers.reading.passes import PassBlock, Passes
from moetrace.spec.errors import MoetraceError
from moetrace.trace.schema import MAX_LAYERS

_MAGIC = b"MBLT\x01\0\0\0"
_HEADER = 3  # words of the file, and of a record
_BLOCK_CELLS = 1 << 18  # that are handed on together


class _BinaryRecords(NamedTuple):
    """Where the records of a file are."""

    layer: np.ndarray  # int64 [records]
    tokens: np.ndarray  # int64 [records]
    start: np.ndarray  # int64 [records]: the word at which the ids begin
    top_k: int
    cut: bool  # whether the last one is not whole, and left out


def recognize(first: bytes, name: str) -> bool:
    """Whether a file that begins with these bytes is such a log."""
    return first.startswith(_MAGIC)


def read(sources: Sequence[Path], hints: Hints) -> list[Capture]:
    """A capture a file."""
    return [_read(path, hints) for path in sources]


def _read(path: Path, hints: Hints) -> Capture:
    count = path.stat().st_size // 4
    words = np.memmap(path, "<i4", "r", shape=(count,)) if count else np.zeros(0, "<i4")
    if count < _HEADER or bytes(words[:2]) != _MAGIC:
        raise MoetraceError(f"{path} does not begin as a log of mbolt, version 1, does.")
    records = _records(path, words)
    if records.cut and hints.strict:
        raise MoetraceError(f"{path}: record {records.layer.size}, the last one, is cut.")
    experts = int(words[2]) or hints.need("num_experts", path)
    layers = np.unique(records.layer)
    passes = Passes(path, hints, (experts, records.top_k), layers.astype(np.uint16))
    fewer = 0
    for block, short in _blocks(path, words, records):
        passes.add(block)
        fewer += short
    hints.reading(path.stat().st_size)
    facts: dict[str, Any] = {"format": "mbolt", "engine": "llama.cpp", "requests": "not recorded"}
    if fewer:
        facts["absent_rows_of_last_layer"] = fewer
    if records.cut:
        facts["left_out_cut_records"] = 1
        hints.note(f"{path}: left out a last record that was cut.")
    return passes.capture(facts)


def _records(path: Path, words: np.ndarray) -> _BinaryRecords:
    """Walk from record to record; raise MoetraceError for one that no router writes."""
    found: list[tuple[int, int, int]] = []
    at, top_k = _HEADER, 0
    while at + _HEADER <= len(words):
        layer, k, tokens = words[at : at + _HEADER].tolist()
        top_k = top_k or k
        if not (0 <= layer < MAX_LAYERS and 0 < k < 1 << 16 and tokens >= 0) or k != top_k:
            raise MoetraceError(
                f"{path}: record {len(found)} is of layer {layer} with {tokens} tokens of {k} experts, which does not "
                f"fit the others."
            )
        if at + _HEADER + tokens * k > len(words):
            before, rows = found[-1][:2] if found else (layer, 0)  # a later layer has no more tokens
            if (layer > before and tokens > rows) or not _may_be_ids(words[at + _HEADER :], k, int(words[2])):
                raise MoetraceError(
                    f"{path}: record {len(found)} is of {tokens} tokens, more than are left, and the rest is not "
                    f"part of one record: the file is damaged there."
                )
            break
        if tokens:
            found.append((layer, tokens, at + _HEADER))
        at += _HEADER + tokens * k
    if not found:
        raise MoetraceError(f"{path} has no records of routing.")
    layer, tokens, start = np.array(found, np.int64).T
    return _BinaryRecords(layer, tokens, start, top_k, at < len(words))


def _may_be_ids(words: np.ndarray, k: int, experts: int) -> bool:
    """Whether words may be the ids of successive tokens, of which none chooses an expert twice."""
    if words.min(initial=0) < -1 or words.max(initial=-1) >= (experts or 1 << 16):
        return False
    ids = np.sort(words[: words.size // k * k].reshape(-1, k), axis=1)
    return not ((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)).any()


def _blocks(path: Path, words: np.ndarray, records: _BinaryRecords) -> Iterator[tuple[PassBlock, int]]:
    """Yield whole passes, some at a time, and how many tokens their last layers leave out."""
    first = np.flatnonzero(np.r_[True, np.diff(records.layer) <= 0])  # record of each pass
    stop = np.r_[first[1:], records.layer.size]
    rows = np.maximum.reduceat(records.tokens, first)
    short = np.repeat(rows, stop - first) - records.tokens
    last = np.zeros(short.size, bool)
    last[stop - 1] = True
    if (short[~last] > 0).any():
        at = int(np.flatnonzero((short > 0) & ~last)[0])
        wanted = int(records.tokens[at] + short[at])
        raise MoetraceError(f"{path}: record {at} has {records.tokens[at]} tokens, but others of its pass {wanted}.")
    ends = np.cumsum(records.tokens)
    begin = 0
    while begin < first.size:
        before = int(ends[first[begin] - 1]) if first[begin] else 0
        end = max(begin + 1, int(np.searchsorted(ends[stop - 1], before + _BLOCK_CELLS, side="right")))
        own = slice(int(first[begin]), int(stop[end - 1]))
        tokens, start = records.tokens[own], records.start[own]
        offset = np.repeat(np.cumsum(rows[begin:end]) - rows[begin:end], stop[begin:end] - first[begin:end])
        cell = np.arange(int(tokens.sum())) - np.repeat(np.cumsum(tokens) - tokens, tokens)
        row = cell + np.repeat(offset + short[own], tokens)
        ids = np.concatenate([words[at : at + n * records.top_k] for at, n in zip(start, tokens, strict=True)])
        number = np.repeat(np.arange(own.start, own.stop), tokens)
        yield (
            PassBlock(
                lambda i, number=number: int(number[i]),
                rows[begin:end],
                row,
                np.repeat(records.layer[own], tokens),
                ids.reshape(-1, records.top_k),
            ),
            int(short[own].sum()),
        )
        begin = end
