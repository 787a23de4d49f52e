"""Routing traces of Megatron-LM: `router_trace_rank{N}.jsonl`, a JSON line for each step, block and layer of a rank.

Records have step, stage, block (decoder or mtp), layer, rank, num_tokens, topk and top_indices [tokens, topk], and may
have places in sidecar files, which are not read (`megatron/core/transformer/moe/router_trace.py`, commit 059f0f5c).
Blocks of multi-token prediction are left out. The n-th record of a layer in a step is of its n-th micro-batch.

Ranks that name the same layers hold different tokens (data or sequence parallel), which follow one another in the order
of ranks; a rank whose records equal those of another (tensor parallel) is a copy and left out. Ranks that name other
layers are pipeline stages: the first of each stage belong together, and so on. A micro-batch of all ranks is one step.
Tokens at the end of a micro-batch that are -1 in all layers are padding, and left out.
Answers of the inference server are read by `megatron_answers`.
Neither requests nor phases are recorded: a rank's tokens of a step are the prefill of a request of their own, or, if it
is one token, the decode that continues the request before. The number of experts is not said.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from moetrace.importers.captured import FIRST_BYTES, SPARSEST, Capture, Hints
from moetrace.importers.megatron_answers import KEY, read_answers
from moetrace.importers.reading.passes import half
from moetrace.importers.reading.placeholders import Placeholders, advice
from moetrace.importers.reading.spool import Spool
from moetrace.importers.reading.text import first_bytes, json_lines
from moetrace.importers.vllm import without_event
from moetrace.spec.errors import MoetraceError, counted
from moetrace.trace.schema import DECODE, MAX_LAYERS, PREFILL, check_sizes

_KEYS = (b'"step"', b'"layer"', b'"num_tokens"', b'"topk"', b'"top_indices"')


class _Outline(msgspec.Struct, gc=False):
    step: int
    layer: int
    num_tokens: int
    topk: int
    top_indices: msgspec.Raw
    rank: int = 0
    block: str = "decoder"


class _Record(msgspec.Struct, gc=False):
    num_tokens: int
    topk: int
    top_indices: list[list[int]]
    block: str = "decoder"


class _RankRecords(NamedTuple):
    """What the records of a file say but for the ids; mtp blocks left out.

    A run is records that follow one another and are of one step and micro-batch: mostly a record of each layer.
    """

    path: Path
    rank: int
    layer: np.ndarray  # uint16 [records]
    records: np.ndarray  # int32 [runs]
    step: np.ndarray  # int32 [runs]
    batch: np.ndarray  # int32 [runs]: number of the micro-batch within the step
    tokens: np.ndarray  # int32 [runs]: of each record
    padding: np.ndarray  # int32 [runs]: how many of them, the last ones, are -1 in every slot
    top_k: int
    digest: bytes
    left_out: int  # records of mtp blocks


def recognize(first: bytes, name: str) -> bool:
    """Whether a file that begins with these bytes has such records, or answers of the inference server."""
    if _is_answers(first):
        return True
    line = first.split(b"\n", 1)[0].lstrip()
    return line.startswith(b"{") and all(key in line for key in _KEYS)


def _is_answers(first: bytes) -> bool:
    return KEY in first and without_event(first).startswith((b"{", b"["))


def read(sources: Sequence[Path], hints: Hints) -> list[Capture]:
    """A capture of all ranks a folder; one of all answers, if the sources are such."""
    answers = [path for path in sources if _is_answers(first_bytes(path, FIRST_BYTES))]
    if answers:
        if len(answers) < len(sources):
            raise MoetraceError(f"{answers[0]} holds answers of the server, but others do not: import them apart.")
        return [read_answers(sources, hints)]
    folders: dict[Path, list[Path]] = {}
    for path in sources:
        folders.setdefault(path.parent, []).append(path)
    return [_read(paths, hints) for paths in folders.values()]


def _read(paths: Sequence[Path], hints: Hints) -> Capture:
    num_experts = hints.need("num_experts", paths[0])
    ranks = sorted((_outline(path, hints) for path in paths), key=lambda rank: rank.rank)
    ranks = [rank for rank in ranks if rank.layer.size]
    if not ranks:
        raise MoetraceError(f"{paths[0]} has no records of decoder layers.")
    for one, other in pairwise(ranks):
        if one.rank == other.rank:
            raise MoetraceError(f"{one.path} and {other.path} both hold rank {one.rank}: import one run at a time.")
        if one.top_k != other.top_k:
            raise MoetraceError(f"{one.path} and {other.path} differ in topk.")
    layer_index = np.unique(np.concatenate([rank.layer for rank in ranks]))
    kept, column = _columns(ranks)
    check_sizes(str(kept[0].path), num_experts, kept[0].top_k, layer_index.size, 1, 1)
    table = _Batches(kept, column)
    cells = sum(int((rank.tokens.astype(np.int64) * rank.records).sum()) for rank in kept)
    if table.rows * layer_index.size > SPARSEST * cells + 2**16:
        raise MoetraceError(f"{kept[0].path}: records are too few for {table.rows} tokens in all layers.")
    spool = Spool(hints, num_experts, layer_index.size, kept[0].top_k)
    spool.grow(table.rows)
    placeholders = Placeholders(num_experts, hints)
    for rank, *rows in zip(kept, table.first_rows, table.kept, strict=True):
        entry = np.searchsorted(layer_index, rank.layer).astype(np.uint16)
        _fill(spool, rank, entry, rows, placeholders, hints)
    facts: dict[str, Any] = {"format": "megatron", "engine": "Megatron-LM", "ranks": len(kept)}
    facts["requests"] = "not recorded: the tokens of a rank and step are one, a single token continues it"
    if left_out := sum(rank.left_out for rank in ranks):
        facts["left_out_mtp_records"] = left_out
    if table.padding:
        facts["left_out_padding_rows"] = table.padding
        hints.note(f"{paths[0]}: left out {counted(table.padding, 'row')} of padding (-1 in every slot).")
    facts |= placeholders.told(str(paths[0]))
    if len(kept) < len(ranks):
        facts["left_out_ranks_that_are_copies"] = [rank.rank for rank in ranks if rank not in kept]
    return Capture(
        model="",
        num_experts=num_experts,
        top_k=kept[0].top_k,
        layer_index=layer_index,
        expert_bytes=None,
        request=table.request,
        position=table.position,
        phase=table.phase,
        optional=(),
        facts=facts,
        parts=spool.parts,
        sources=tuple(paths),
        step_rows=table.step_rows,
    )


def _outline(path: Path, hints: Hints) -> _RankRecords:
    """Read a file for the first time; ids are only counted, which tells how much there will be."""
    seen: set[tuple[int, int]] = set()  # (rank, top_k)
    digest = hashlib.sha256()
    number = left_out = 0
    runs = _Runs(path)
    for _, records in json_lines(path, _Outline, half(hints)):
        padded: dict[int, int] = {}  # by number, of the records that hold a -1
        for record in records:
            number += 1
            raw = bytes(record.top_indices)
            if raw.count(b"[") - 1 != record.num_tokens or not 0 <= record.step < 2**31:
                raise MoetraceError(f"{path}: record {number} does not hold the num_tokens, or step, that it says.")
            if not 0 <= record.layer < MAX_LAYERS:
                raise MoetraceError(f"{path}: record {number} is of layer {record.layer}.")
            if record.block == "decoder":
                digest.update(b"%d %d " % (record.step, record.layer) + raw)
                seen.add((record.rank, record.topk))
                if b"-" in raw:
                    padded[number] = _padding(raw)
        mine = [(r.step, r.layer, r.num_tokens) for r in records if r.block == "decoder"]
        left_out += len(records) - len(mine)
        if len(seen) > 1:
            raise MoetraceError(f"{path}: records up to {number} differ in rank or topk.")
        padding = np.zeros(len(mine), np.int64)
        if padded:
            first = number - len(records) + 1
            numbers = [at for at, record in enumerate(records, first) if record.block == "decoder"]
            padding[:] = [padded.get(at, 0) for at in numbers]
        runs.add(np.array(mine, np.int64).reshape(-1, 3), padding, number)
    rank, top_k = next(iter(seen), (0, 0))
    if not 0 <= rank < 2**31:
        raise MoetraceError(f"{path} is of rank {rank}.")
    layers, sizes, steps, batches, tokens, padding = runs.joined()
    return _RankRecords(path, rank, layers, sizes, steps, batches, tokens, padding, top_k, digest.digest(), left_out)


def _padding(raw: bytes) -> int:
    """How many of the last tokens have -1 in every slot, as a CUDA graph pads a batch."""
    try:
        rows = msgspec.json.decode(raw, type=list[list[int]])
    except (msgspec.MsgspecError, RecursionError):
        return 0  # the second reading refuses it
    return next((number for number, row in enumerate(reversed(rows)) if set(row) != {-1}), len(rows))


class _Runs:
    """Gathers records into runs: the n-th record of a layer in a step is of its n-th micro-batch."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._step = -1  # the last one so far
        self._count = np.zeros(MAX_LAYERS, np.int32)  # of its records, of each layer
        self._layers: list[np.ndarray] = []
        self._runs: list[np.ndarray] = []

    def add(self, records: np.ndarray, padding: np.ndarray, number: int) -> None:
        """Add records int64 [n, (step, layer, tokens)], their padding int64 [n]; `number` is that of the last one."""
        if not len(records):
            return
        step, layer, tokens = records.T
        if (np.diff(np.r_[self._step, step]) < 0).any():
            raise MoetraceError(
                f"{self._path}: among the records up to {number}, steps go back: import one run at a time."
            )
        batch = _nth(step, layer) + np.where(step == self._step, self._count[layer], 0)
        if step[-1] != self._step:
            self._step = int(step[-1])
            self._count[:] = 0
        self._count += np.bincount(layer[step == self._step], minlength=MAX_LAYERS).astype(np.int32)
        table = np.stack([step, batch, tokens])
        begins = (np.diff(table) != 0).any(axis=0)
        if padding.any():
            begins |= np.diff(padding) != 0
        starts = np.r_[0, np.flatnonzero(begins) + 1]
        sizes = np.diff(np.r_[starts, len(records)])
        self._layers.append(layer.astype(np.uint16))
        self._runs.append(np.stack([sizes, *table[:, starts], padding[starts]]).astype(np.int32))

    def joined(self) -> tuple[np.ndarray, ...]:
        """Layers of all records; records, step, micro-batch, tokens and padding of all runs."""
        layers = np.concatenate([np.zeros(0, np.uint16), *self._layers])
        return layers, *np.concatenate([np.zeros((5, 0), np.int32), *self._runs], axis=1)


def _nth(step: np.ndarray, layer: np.ndarray) -> np.ndarray:
    """How many records before each have the same step and layer."""
    order = np.lexsort((layer, step))  # stable
    alike = np.r_[False, (np.diff(step[order]) == 0) & (np.diff(layer[order]) == 0)]
    starts = np.flatnonzero(~alike)
    nth = np.empty(step.size, np.int64)
    nth[order] = np.arange(step.size) - np.repeat(starts, np.diff(np.r_[starts, step.size]))
    return nth


def _columns(ranks: list[_RankRecords]) -> tuple[list[_RankRecords], list[int]]:
    """The ranks but for copies, and which of the ranks of its stage each is."""
    stages: dict[tuple[int, ...], dict[bytes, _RankRecords]] = {}
    for rank in ranks:
        stages.setdefault(tuple(np.unique(rank.layer).tolist()), {}).setdefault(rank.digest, rank)
    width = len(next(iter(stages.values())))
    for stage in stages.values():
        if len(stage) != width:
            one, other = ranks[0].path, next(iter(stage.values())).path
            raise MoetraceError(
                f"{one} and {other} hold other layers, but there are {width} and {len(stage)} ranks of such, which do "
                f"not belong together."
            )
    kept = [(rank, column) for stage in stages.values() for column, rank in enumerate(stage.values())]
    return [rank for rank, _ in kept], [column for _, column in kept]


class _Batches:
    """The rows of all micro-batches of all ranks: where the tokens of each run begin, and what each row is."""

    def __init__(self, ranks: list[_RankRecords], column: list[int]) -> None:
        sizes = [rank.step.size for rank in ranks]
        step, nth, tokens, padding = (
            np.concatenate([getattr(rank, name) for rank in ranks]).astype(np.int64)
            for name in ("step", "batch", "tokens", "padding")
        )
        named, (_, step) = step, np.unique(step, return_inverse=True)
        width, deep = max(column) + 1, int(nth.max()) + 1
        if (int(step.max()) + 1) * width * deep >= 2**62:
            raise MoetraceError(f"{ranks[0].path}: there are too many micro-batches.")
        forward = step * deep + nth
        key, first, batch = np.unique(
            forward * width + np.repeat(column, sizes), return_index=True, return_inverse=True
        )
        size = tokens[first]  # of each batch
        if (wrong := size[batch] != tokens).any():
            at = int(wrong.argmax())
            rank = ranks[int(np.searchsorted(np.cumsum(sizes), at, side="right"))]
            raise MoetraceError(
                f"{rank.path}: a layer of step {named[at]} has {tokens[at]} tokens, but "
                f"another one in the same micro-batch has {size[batch][at]}."
            )
        # A token is padding if it is in every layer: a router may drop one of a layer.
        padded = size.copy()
        np.minimum.at(padded, batch, padding)
        self.padding, size = int(padded.sum()), size - padded
        self.rows = int(size.sum())
        if not 0 < self.rows < 2**31:
            raise MoetraceError(f"{ranks[0].path}: there are {self.rows} tokens, but must be 1 to {2**31 - 1}.")
        starts = np.cumsum(size) - size
        self.first_rows = np.split(starts[batch], np.cumsum(sizes)[:-1])
        self.kept = np.split(size[batch], np.cumsum(sizes)[:-1])  # tokens that are no padding
        _, forward = np.unique(key // width, return_inverse=True)
        step_rows = np.bincount(forward, weights=size).astype(np.int64)
        self.step_rows = step_rows[step_rows > 0]
        self.phase = np.repeat(np.where(size == 1, DECODE, PREFILL).astype(np.uint8), size)
        request, position = _requests(key % width, size)
        self.request = np.repeat(request, size)
        self.position = np.repeat(position - starts, size) + np.arange(self.rows)


def _requests(column: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Request and first position of each batch: one token continues the request of its column."""
    order = np.argsort(column, kind="stable")
    begins = np.r_[True, (np.diff(column[order]) != 0) | (size[order][1:] != 1)]
    number = np.cumsum(begins)
    before = np.cumsum(size[order]) - size[order]
    request, position = np.empty(size.size, np.int64), np.empty(size.size, np.int64)
    request[order] = number
    position[order] = before - before[begins][number - 1]
    return request, position


def _fill(
    spool: Spool,
    rank: _RankRecords,
    entry: np.ndarray,
    rows: Sequence[np.ndarray],
    placeholders: Placeholders,
    hints: Hints,
) -> None:
    """Read a file again and put its ids at their rows; `rows` are of each run the first, and how many to keep."""
    first, kept = rows
    padded = bool((kept < rank.tokens).any())
    done, number = 0, 0
    ends = np.cumsum(rank.records)
    for _, found in json_lines(rank.path, _Record, half(hints)):
        records = [record for record in found if record.block == "decoder"]
        for record in records:
            if set(map(len, record.top_indices)) - {rank.top_k}:
                raise MoetraceError(f"{rank.path}: record {number + 1} and on have rows not of {rank.top_k} experts.")
        number += len(found)
        if not records:
            continue
        run = np.searchsorted(ends, np.arange(done, done + len(records)), side="right")
        layers = entry[done : done + len(records)]
        done += len(records)
        ids = _flat(rank, records, placeholders, number - len(found))
        size = rank.tokens[run].astype(np.int64)
        starts = np.cumsum(size) - size
        row = np.arange(len(ids)) + np.repeat(first[run] - starts, size)
        layers = np.repeat(layers, size)
        if padded:
            real = np.arange(len(ids)) < np.repeat(starts + kept[run], size)
            row, layers, ids = row[real], layers[real], ids[real]
        spool.put(row, layers, experts=ids)


def _flat(rank: _RankRecords, records: list[_Record], placeholders: Placeholders, before: int) -> np.ndarray:
    """The ids [tokens, top_k] of some records, with the mark of a trace for absent."""
    rows: Iterator[list[int]] = chain.from_iterable(record.top_indices for record in records)
    count = sum(len(record.top_indices) for record in records)
    try:
        ids = np.fromiter(chain.from_iterable(rows), np.int64, count * rank.top_k).reshape(count, rank.top_k)
    except OverflowError:
        ids = np.full((1, 1), -2)
    ids, negative, wrong = placeholders.checked(ids)
    if wrong is not None:
        experts = placeholders.num_experts
        raise MoetraceError(
            f"{rank.path}: one of the records {before + 1} to {before + len(records)} holds an expert that is not 0 to "
            f"{experts - 1}{advice(int(ids[wrong]), experts)}."
        )
    return np.where(ids < 0, placeholders.absent, ids) if negative else ids
