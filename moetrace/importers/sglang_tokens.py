"""Rows of SGLang's `per_token` dumps: a step is a forward pass; which requests ran is reconstructed.

* `forward_mode` is 1 extend, 2 decode, 3 mixed, 4 idle, 5 verification of drafted tokens; more were added since, whose
  phase is prefill if the record has `extend_seq_lens`. In a mixed pass, `extend_seq_lens` has a 1 for each decode.
* A request's id is not recorded (`rids` is commented out). A segment that begins at position 0 begins a request; any
  other segment or decode at position p goes on with the request of the same rank that expects p and ran last, among
  these the one of the earliest row (a prompt only if the request was still in its prompt); without such a request, it
  begins one.
* With several ranks, each pass holds the rows of all in the order of ranks, or only of those that differ: ranks with
  the same tokens, positions and choices are tensor-parallel copies.
* SGLang keeps 8 slots for any top_k, the others hold -1 throughout: these are cut.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from moetrace.importers.captured import Capture, Hints, Part
from moetrace.importers.reading.numbering import kept_layers
from moetrace.importers.sglang_dumps import Dump, integers
from moetrace.spec.errors import MoetraceError
from moetrace.trace.schema import BLOCK_BYTES, DECODE, PREFILL, absent_id, expert_dtype

EXTEND, DECODING, MIXED_MODE, IDLE, VERIFY = 1, 2, 3, 4, 5
_REQUESTS = "reconstructed from positions: a row at position p goes on with the request that expects p and ran last"


class _Pass(NamedTuple):
    """The rows of one rank in one forward pass; rows of padding are cut."""

    where: str
    dump: Dump
    ids: np.ndarray  # int32 [layers, rows, slots], physical
    token: np.ndarray  # int64 [rows]
    position: np.ndarray  # int64 [rows]
    phase: np.ndarray  # uint8 [rows]
    lengths: list[int]  # of segments
    padding: int


def read_tokens(dumps: Sequence[Dump], hints: Hints) -> Capture:
    """One capture of all ranks, steps in the order of the numbers of forward passes."""
    passes: dict[int, dict[int, _Pass]] = defaultdict(dict)
    for dump in dumps:
        for index, record in enumerate(dump.records):
            found = _pass(dump, index, record)
            number, rank = record["forward_pass_id"], record.get("rank", 0)
            if rank in passes[number]:
                raise MoetraceError(
                    f"{found.where}: forward pass {number} of rank {rank} was there before: import dumps of one start "
                    f"of the server."
                )
            passes[number][rank] = found
    steps: list[list[tuple[int, _Pass]]] = []  # rank and pass
    told: Counter[str] = Counter()
    for number in sorted(passes):
        kept: list[tuple[int, _Pass]] = []
        for rank, one in sorted(passes[number].items()):
            told["padding_rows_dropped"] += one.padding
            if not one.token.size:
                told["idle_passes_dropped"] += 1
            elif any(_same(one, other) for _, other in kept):
                told["copies_of_ranks_dropped"] += 1
            else:
                kept.append((rank, one))
        if kept:
            steps.append(kept)
    if not steps:
        raise MoetraceError(f"{dumps[0].path} holds no tokens: start recording before the requests.")
    flat = [one for step in steps for _, one in step]
    layers, top_k, dropped = _shape(flat, hints)
    num_experts = int(dumps[0].logical.max()) + 1
    return Capture(
        model="",
        num_experts=num_experts,
        top_k=top_k,
        layer_index=layers,
        expert_bytes=None,
        request=np.array(_requests(steps)),
        position=np.concatenate([one.position for one in flat]),
        phase=np.concatenate([one.phase for one in flat]),
        optional=("token",),
        facts={
            "format": "sglang",
            "engine": "SGLang",
            "mode": "per_token",
            "ranks": len({rank for one in passes.values() for rank in one}),
            "ids": "logical, by the map at the time of the dump",
            "requests": _REQUESTS,
            **{name: count for name, count in told.items() if count},
            **dropped,
        },
        parts=lambda: _parts(flat, layers, top_k, num_experts),
        sources=tuple(dump.path for dump in dumps),
        step_rows=np.array([sum(one.token.size for _, one in step) for step in steps]),
    )


def _pass(dump: Dump, index: int, record: dict[str, Any]) -> _Pass:
    where = f"{dump.path}: record {index}"
    ids = integers(f"{where}: topk_ids_of_layer", record["topk_ids_of_layer"], 3)
    if len(ids) != len(dump.logical) or not ids.shape[2]:
        raise MoetraceError(f"{where}: topk_ids_of_layer {ids.shape} does not fit the map {dump.logical.shape}.")
    if ids.size and (ids.min() < -1 or ids.max() >= dump.logical.shape[1]):
        raise MoetraceError(f"{where}: topk_ids_of_layer has ids from {ids.min()} to {ids.max()}, which do not exist.")
    token, position = (_list(f"{where}: {name}", record.get(name)) for name in ("input_ids", "positions"))
    if not token.size == position.size == ids.shape[1]:
        raise MoetraceError(f"{where} has {token.size} input_ids, {position.size} positions, ids of {ids.shape[1]}.")
    mode, rows = record.get("forward_mode"), token.size
    if mode is not None and type(mode) is not int:
        raise MoetraceError(f"{where}: forward_mode is a {type(mode).__name__}, not a number.")
    if record.get("extend_seq_lens") is None or mode in (DECODING, IDLE):
        lengths = [1] * rows
        if mode == VERIFY and rows:  # the drafts of a request follow one another
            lengths = np.diff(np.r_[0, np.flatnonzero(np.diff(position) != 1) + 1, rows]).tolist()
        return _Pass(where, dump, ids, token, position, np.full(rows, DECODE, np.uint8), lengths, 0)
    lengths = _list(f"{where}: extend_seq_lens", record["extend_seq_lens"])
    lengths = lengths[lengths > 0]
    told = int(lengths.sum())
    if told > rows:
        raise MoetraceError(f"{where}: extend_seq_lens are of {told} tokens, but there are {rows}.")
    first = position[np.cumsum(lengths) - lengths]
    decodes = (lengths == 1) & (first > 0) if mode == MIXED_MODE else np.full(lengths.size, mode == VERIFY)
    phase = np.repeat(np.where(decodes, DECODE, PREFILL), lengths).astype(np.uint8)
    return _Pass(where, dump, ids[:, :told], token[:told], position[:told], phase, lengths.tolist(), rows - told)


def _list(where: str, values: Any) -> np.ndarray:
    """A list of int32, or a tensor, as int64 [n]; negative ones are refused by the trace, not here."""
    if not isinstance(values, list | tuple):
        return integers(where, values, 1).astype(np.int64)
    if any(type(value) is not int or not -(2**31) <= value < 2**31 for value in values):
        raise MoetraceError(f"{where} is no list of int32.")
    return np.array(values, np.int64)


def _same(one: _Pass, other: _Pass) -> bool:
    return (
        np.array_equal(one.position, other.position)
        and np.array_equal(one.token, other.token)
        and np.array_equal(one.ids, other.ids)
    )


def _shape(passes: list[_Pass], hints: Hints) -> tuple[np.ndarray, int, dict[str, Any]]:
    """Layers to keep, top_k, and what to say of dropped layers."""
    shape = passes[0].ids.shape
    used, slots = np.zeros(shape[0], bool), np.zeros(shape[2], bool)
    for one in passes:
        if one.ids.shape[2] != shape[2]:
            raise MoetraceError(f"{one.where} has {one.ids.shape[2]} slots, but the first record {shape[2]}.")
        chosen = one.ids >= 0
        used |= chosen.any(axis=(1, 2))
        slots |= chosen.any(axis=(0, 1))
    top_k = int(slots.nonzero()[0].max(initial=-1)) + 1
    if not top_k:
        raise MoetraceError(f"{passes[0].where} holds no choices: every id is -1.")
    layers, dropped = kept_layers(used, hints)
    return layers, top_k, dropped


def _requests(steps: list[list[tuple[int, _Pass]]]) -> list[int]:
    """A request for each row, numbered from 0 in the order of appearance."""
    count = 0
    request: list[int] = []
    # (rank, in its prompt, next position) -> forward passes, the last at the end, each with requests in order of rows
    expecting: dict[tuple[int, bool, int], list[tuple[int, deque[int]]]] = defaultdict(list)
    for step, ranks in enumerate(steps):
        for rank, one in ranks:
            row = 0
            ran: list[tuple[tuple[int, bool, int], int]] = []  # a request runs once in a pass
            for length in one.lengths:
                position, decodes = int(one.position[row]), bool(one.phase[row] == DECODE)
                keys = [(rank, True, position)] + ([(rank, False, position)] if decodes else [])
                who = _take(expecting, keys) if position > 0 else None
                if who is None:
                    who = count
                    count += 1
                request += [who] * length
                row += length
                ran.append(((rank, not decodes, int(one.position[row - 1]) + 1), who))
            for key, who in ran:
                waiting = expecting[key]
                if not waiting or waiting[-1][0] != step:
                    waiting.append((step, deque()))
                waiting[-1][1].append(who)
    return request


def _take(
    expecting: dict[tuple[int, bool, int], list[tuple[int, deque[int]]]], keys: list[tuple[int, bool, int]]
) -> int | None:
    """Take the first request of the latest pass that is waiting under one of the keys."""
    found = [key for key in keys if expecting.get(key)]
    if not found:
        return None
    key = max(found, key=lambda key: expecting[key][-1][0])
    requests = expecting[key][-1][1]
    who = requests.popleft()
    if not requests:
        expecting[key].pop()
    return who


def _parts(passes: list[_Pass], layers: np.ndarray, top_k: int, num_experts: int) -> Iterator[Part]:
    absent, dtype = absent_id(num_experts), expert_dtype(num_experts)
    held: list[Part] = []
    size = 0
    for one in passes:
        logical = np.concatenate([one.dump.logical, np.full((len(one.dump.logical), 1), absent)], axis=1)  # -1 is last
        ids = one.ids[layers, :, :top_k]
        experts = np.take_along_axis(logical[layers], ids.reshape(len(layers), -1), axis=1).astype(dtype)
        experts = experts.reshape(ids.shape).transpose(1, 0, 2)
        held.append({"experts": experts, "token": one.token})
        size += experts.nbytes
        if size >= BLOCK_BYTES:
            yield {name: np.concatenate([part[name] for part in held]) for name in held[0]}
            held, size = [], 0
    if held:
        yield {name: np.concatenate([part[name] for part in held]) for name in held[0]}
