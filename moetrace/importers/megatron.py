"""Routing traces of Megatron-LM: `router_trace_rank{N}.jsonl`, a JSON line for each step, block and layer of a rank.

Records have step, stage, block (decoder or mtp), layer, rank, num_tokens, topk and top_indices [tokens, topk], and may
have places in sidecar files, which are not read (`megatron/core/transformer/moe/router_trace.py`, commit 059f0f5c).
Blocks of multi-token prediction are left out. The n-th record of a layer in a step is of its n-th micro-batch.

Ranks that name the same layers hold different tokens (data or sequence parallel), which follow one another in the order
of ranks; a rank whose records equal those of another (tensor parallel) is a copy and left out. Ranks that name other
layers are pipeline stages: the first of each stage belong together, and so on. A micro-batch of all ranks is one step.
Tokens at the end of a micro-batch that are -1 in all layers are padding, and left out. A record whose ids are missing
or of another shape leaves its cells absent; a line that is no record at all is left out.
Answers of the inference server are read by `megatron_answers`.
Neither requests nor phases are recorded: a rank's tokens of a step are the prefill of a request of their own, or, if it
is one token, the decode that continues the request before. The number of experts is not said.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from moetrace.importers.captured import FIRST_BYTES, SPARSEST, Capture, Hints
from moetrace.importers.megatron_answers import KEY, read_answers
from moetrace.importers.megatron_records import OUTLINE, UNKNOWN, WHOLE, Outline, RankRecords, outline
from moetrace.importers.reading.events import first_value
from moetrace.importers.reading.passes import half
from moetrace.importers.reading.placeholders import Placeholders, advice
from moetrace.importers.reading.spool import Spool
from moetrace.importers.reading.text import first_bytes, json_lines
from moetrace.spec.errors import MoetraceError, counted
from moetrace.trace.schema import DECODE, PREFILL, check_sizes

_KEYS = (b'"step"', b'"layer"', b'"num_tokens"', b'"topk"', b'"top_indices"')


_ROWS = msgspec.json.Decoder(list[list[int]])  # of a record


class _OddRecords:
    """Counts records that can't be used, whose cells are absent; `--strict` refuses them."""

    def __init__(self, ranks: Sequence[RankRecords], hints: Hints) -> None:
        self._strict, self._note = hints.strict, hints.note
        self.records = sum(int(rank.records[rank.tokens == UNKNOWN].sum()) for rank in ranks)
        self.first = next((rank.odd for rank in ranks if rank.odd), "")
        self._all = sum(rank.layer.size for rank in ranks)
        self._lost = [sentence for rank in ranks for sentence in rank.lost]

    def take(self, sentence: str, records: int = 1) -> None:
        """Count further ones."""
        if self._strict:
            raise MoetraceError(sentence)
        self.records += records
        self.first = self.first or sentence

    def told(self, where: str) -> dict[str, Any]:
        """Their entries in `source`, also given as notes. Raise MoetraceError if they are half of all or more."""
        if 2 * self.records >= self._all:
            raise MoetraceError(self.first)
        told: dict[str, Any] = {}
        if self.records:
            told["absent_routes_of_another_shape"] = self.records
            self._note(f"{where}: {counted(self.records, 'record')} of another shape left absent: {self.first}")
        if self._lost:
            told["left_out_lines"] = len(self._lost)
            self._note(f"{where}: left out {counted(len(self._lost), 'line')} that can't be read: {self._lost[0]}")
        return told


def recognize(first: bytes, name: str) -> bool:
    """Whether a file that begins with these bytes has such records, or answers of the inference server."""
    if _is_answers(first):
        return True
    line = first.split(b"\n", 1)[0].lstrip()
    return line.startswith(b"{") and all(key in line for key in _KEYS)


def _is_answers(first: bytes) -> bool:
    return KEY in first and first_value(first).startswith((b"{", b"["))


def read(sources: Sequence[Path], hints: Hints) -> list[Capture]:
    """A capture of all ranks a folder; one of all answers, if the sources are such."""
    answers = [path for path in sources if _is_answers(first_bytes(path, FIRST_BYTES))]
    if answers:
        if len(answers) < len(sources):
            raise MoetraceError(f"{answers[0]} holds answers of the server, but others do not: import them separately.")
        return [read_answers(sources, hints)]
    folders: dict[Path, list[Path]] = {}
    for path in sources:
        folders.setdefault(path.parent, []).append(path)
    return [_read(paths, hints) for paths in folders.values()]


def _read(paths: Sequence[Path], hints: Hints) -> Capture:
    num_experts = hints.need("num_experts", paths[0])
    ranks = sorted((outline(path, hints) for path in paths), key=lambda rank: rank.rank)
    ranks = [rank for rank in ranks if rank.layer.size]
    if not ranks:
        raise MoetraceError(f"{paths[0]} has no records of decoder layers.")
    for rank in ranks:
        if not rank.top_k:  # no record says it
            raise MoetraceError(rank.odd or f"{rank.path} has records of 0 experts a token.")
    for one, other in pairwise(ranks):
        if one.rank == other.rank:
            raise MoetraceError(f"{one.path} and {other.path} both hold rank {one.rank}: import one run at a time.")
        if one.top_k != other.top_k:
            raise MoetraceError(f"{one.path} and {other.path} differ in topk.")
    layer_index = np.unique(np.concatenate([rank.layer for rank in ranks]))
    kept, column = _columns(ranks)
    check_sizes(str(kept[0].path), num_experts, kept[0].top_k, layer_index.size, 1, 1)
    odd = _OddRecords(kept, hints)
    table = _Batches(kept, column, odd)
    cells = sum(int((np.maximum(rank.tokens, 0).astype(np.int64) * rank.records).sum()) for rank in kept)
    if table.rows * layer_index.size > SPARSEST * cells + 2**16:
        raise MoetraceError(f"{kept[0].path}: records are too few for {table.rows} tokens in all layers.")
    spool = Spool(hints, num_experts, layer_index.size, kept[0].top_k)
    spool.grow(table.rows)
    placeholders = Placeholders(num_experts, hints)
    for rank, *rows in zip(kept, table.first_rows, table.kept, strict=True):
        entry = np.searchsorted(layer_index, rank.layer).astype(np.uint16)
        _fill(spool, rank, entry, rows, placeholders, (odd, hints))
    facts: dict[str, Any] = {"format": "megatron", "engine": "Megatron-LM", "ranks": len(kept)}
    facts["requests"] = "not recorded: the tokens of a rank and step are one, a single token continues it"
    if left_out := sum(rank.left_out for rank in ranks):
        facts["left_out_mtp_records"] = left_out
    if table.padding:
        facts["left_out_padding_rows"] = table.padding
        hints.note(f"{paths[0]}: left out {counted(table.padding, 'row')} of padding (-1 in every slot).")
    facts |= odd.told(str(paths[0])) | placeholders.told(str(paths[0]))
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


def _columns(ranks: list[RankRecords]) -> tuple[list[RankRecords], list[int]]:
    """The ranks without copies, and which of the ranks of its stage each is."""
    stages: dict[tuple[int, ...], list[RankRecords]] = {}
    for rank in ranks:
        stage = stages.setdefault(tuple(np.unique(rank.layer).tolist()), [])
        if stage and (lost := [*stage[0].lost, *rank.lost]):
            raise MoetraceError(
                f"{lost[0].rstrip('.')}, and nothing tells whether {rank.path} is a copy of {stage[0].path}: import "
                f"one of them."
            )
        if not any(rank.is_copy_of(other) for other in stage):
            stage.append(rank)
    width = len(next(iter(stages.values())))
    for stage in stages.values():
        if len(stage) != width:
            one, other = ranks[0].path, stage[0].path
            raise MoetraceError(
                f"{one} and {other} hold other layers, but there are {width} and {len(stage)} ranks of such, which do "
                f"not belong together."
            )
    kept = [(rank, column) for stage in stages.values() for column, rank in enumerate(stage)]
    return [rank for rank, _ in kept], [column for _, column in kept]


class _Batches:
    """The rows of all micro-batches of all ranks: where the tokens of each run begin, and what each row is."""

    def __init__(self, ranks: list[RankRecords], column: list[int], odd: _OddRecords) -> None:
        sizes = [rank.step.size for rank in ranks]
        step, nth, tokens, padding, records = (
            np.concatenate([getattr(rank, name) for rank in ranks]).astype(np.int64)
            for name in ("step", "batch", "tokens", "padding", "records")
        )
        named, (_, step) = step, np.unique(step, return_inverse=True)
        width, deep = max(column) + 1, int(nth.max()) + 1
        if (int(step.max()) + 1) * width * deep >= 2**62:
            raise MoetraceError(f"{ranks[0].path}: there are too many micro-batches.")
        forward = step * deep + nth
        key, batch = np.unique(forward * width + np.repeat(column, sizes), return_inverse=True)
        size = _most_common(batch, tokens, records)  # of each batch
        wrong = (tokens != size[batch]) & (tokens != UNKNOWN)
        for at in np.flatnonzero(wrong).tolist():
            rank = ranks[int(np.searchsorted(np.cumsum(sizes), at, side="right"))]
            sentence = (
                f"{rank.path}: a layer of step {named[at]} has {tokens[at]} tokens, but "
                f"another one in the same micro-batch has {abs(size[batch][at])}."
            )
            if size[batch][at] < 0:
                raise MoetraceError(sentence)
            odd.take(sentence, int(records[at]))
        used = (tokens == size[batch]) & (tokens != UNKNOWN)
        size = np.maximum(size, 0)
        # A token is padding if it is in every layer: a router may drop one of a layer.
        padded = size.copy()
        np.minimum.at(padded, batch[used], padding[used])
        self.padding, size = int(padded.sum()), size - padded
        self.rows = int(size.sum())
        if not 0 < self.rows < 2**31:
            raise MoetraceError(
                odd.first or f"{ranks[0].path}: there are {self.rows} tokens, but must be 1 to {2**31 - 1}."
            )
        starts = np.cumsum(size) - size
        self.first_rows = np.split(starts[batch], np.cumsum(sizes)[:-1])
        # Tokens that are no padding, or UNKNOWN of records that can't be used.
        self.kept = np.split(np.where(used, size[batch], UNKNOWN), np.cumsum(sizes)[:-1])
        _, forward = np.unique(key // width, return_inverse=True)
        step_rows = np.bincount(forward, weights=size).astype(np.int64)
        self.step_rows = step_rows[step_rows > 0]
        self.phase = np.repeat(np.where(size == 1, DECODE, PREFILL).astype(np.uint8), size)
        request, position = _requests(key % width, size)
        self.request = np.repeat(request, size)
        self.position = np.repeat(position - starts, size) + np.arange(self.rows)


def _most_common(batch: np.ndarray, tokens: np.ndarray, records: np.ndarray) -> np.ndarray:
    """Return the tokens that more than half of the records of each batch have, as far as they are known.

    Args:
        batch: For each run, from 0, int64 [runs].
        tokens: For each of its records, or UNKNOWN, int64 [runs].
        records: How many, int64 [runs].

    Returns:
        int64 [batches]: the tokens; 0 if all are UNKNOWN, and less than 0 (-tokens) if no more than half agree.
    """
    known = tokens != UNKNOWN
    pairs, which = np.unique(np.stack([batch[known], tokens[known]]), axis=1, return_inverse=True)
    votes = np.bincount(which.ravel(), weights=records[known])
    size, most, all_votes = (np.zeros(int(batch.max()) + 1, np.int64) for _ in range(3))
    np.add.at(all_votes, pairs[0], votes.astype(np.int64))
    np.maximum.at(most, pairs[0], votes.astype(np.int64))
    best = votes == most[pairs[0]]
    size[pairs[0][best]] = pairs[1][best]
    return np.where(2 * most > all_votes, size, -size)


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
    rank: RankRecords,
    entry: np.ndarray,
    rows: Sequence[np.ndarray],
    placeholders: Placeholders,
    told: tuple[_OddRecords, Hints],
) -> None:
    """Read a file again and put its ids at their rows; `rows` are of each run the first, and how many to keep."""
    (first, kept), (odd, hints) = rows, told
    done = number = 0
    ends = np.cumsum(rank.records)
    for _, found in json_lines(rank.path, (WHOLE, OUTLINE), half(hints), bad=len):
        records = [record for record in found if record is not None and record.block == "decoder"]
        number += len(found)
        run = np.searchsorted(ends, np.arange(done, done + len(records)), side="right")
        used = kept[run] != UNKNOWN
        layers, run = entry[done : done + len(records)][used], run[used]
        done += len(records)
        if not run.size:
            continue
        taken = [record for record, use in zip(records, used.tolist(), strict=True) if use]
        ids = _flat(rank, _ids_of(rank, taken, odd), placeholders, (number - len(found), number))
        size = rank.tokens[run].astype(np.int64)
        starts = np.cumsum(size) - size
        row = np.arange(len(ids)) + np.repeat(first[run] - starts, size)
        layers = np.repeat(layers, size)
        if (kept[run] < size).any():
            real = np.arange(len(ids)) < np.repeat(starts + kept[run], size)
            row, layers, ids = row[real], layers[real], ids[real]
        spool.put(row, layers, experts=ids)


def _ids_of(rank: RankRecords, records: list[Outline], odd: _OddRecords) -> list[list[list[int]]]:
    """The ids of records; -1 in all slots of one whose rows are of another length."""
    found = [rows if type(rows := record.top_indices) is list else _rows_of(rows) for record in records]
    for at, (record, rows) in enumerate(zip(records, found, strict=True)):
        if set(map(len, rows)) - {rank.top_k} or len(rows) != record.num_tokens:
            where = f"{rank.path}: the record of step {record.step}, layer {record.layer}"
            odd.take(f"{where} has rows that are not of {rank.top_k} experts.")
            found[at] = [[-1] * rank.top_k] * (record.num_tokens or 0)
    return found


def _rows_of(text: msgspec.Raw) -> list[list[int]]:
    try:
        return _ROWS.decode(text)
    except msgspec.MsgspecError:
        return [[]]


def _flat(
    rank: RankRecords, records: list[list[list[int]]], placeholders: Placeholders, between: tuple[int, int]
) -> np.ndarray:
    """The ids [tokens, top_k] of some of the records `between`, with the mark of a trace for absent."""
    rows: Iterator[list[int]] = chain.from_iterable(records)
    count = sum(map(len, records))
    try:
        ids = np.fromiter(chain.from_iterable(rows), np.int64, count * rank.top_k).reshape(count, rank.top_k)
    except OverflowError:
        ids = np.full((1, 1), -2)
    ids, negative, wrong = placeholders.checked(ids)
    if wrong is not None:
        experts = placeholders.num_experts
        raise MoetraceError(
            f"{rank.path}: one of the records {between[0] + 1} to {between[1]} holds an expert that is not 0 to "
            f"{experts - 1}{advice(int(ids[wrong]), experts)}."
        )
    return np.where(ids < 0, placeholders.absent, ids) if negative else ids
