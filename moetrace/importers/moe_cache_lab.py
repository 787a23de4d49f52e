"""Routing traces of moe-cache-lab: JSON lines, a metadata record and one for each token and layer, version 1 or 2.

`{"record_type": "metadata", "format": "moe-cache-lab.routing-jsonl", "format_version", "model_id", ...}` says
num_experts and experts_per_token (version 1; either may be null) or routing_stages (version 2: an encoder and a
decoder, each with num_experts and assigned_experts_per_token). Selections have phase, token_position, layer,
selected_experts, selected_probabilities (or none) and token_id (or null); of version 2 also routing_stage and
assignment_state, of which "unassigned" is a token that its experts had no room for: absent (birkansit/moe-cache-lab,
src/moe_cache_lab/trace.py and trace_v2.py, commit b78e0923).

A trace is one request. The prompt (`prompt`, `decoder_prompt`) is one step, each generated token one of its own. An
encoder and a decoder are two models to a replay: the decoder is read, and the rest is counted.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from moetrace.importers.captured import SPARSEST, Capture, Hints
from moetrace.importers.reading.passes import check_gates
from moetrace.importers.reading.placeholders import Placeholders, advice
from moetrace.importers.reading.spool import Spool
from moetrace.importers.reading.text import json_lines
from moetrace.spec.errors import MoetraceError, counted
from moetrace.trace.schema import DECODE, MAX_LAYERS, MAX_ROWS, PREFILL, check_sizes

_FORMAT = b'"moe-cache-lab.routing-jsonl"'
_PROMPTS, _GENERATED = ("prompt", "decoder_prompt"), ("generated", "decoder_generated")
_MAX_POSITION = 1 << 31


class _Stage(msgspec.Struct):
    routing_stage: str
    num_experts: int
    assigned_experts_per_token: int


class _LabRecord(msgspec.Struct, gc=False):
    record_type: str
    phase: str = ""
    token_position: int = -1
    layer: int = -1
    selected_experts: list[int] = []
    selected_probabilities: list[float | None] = []
    routing_stage: str = ""
    format_version: int = 0
    model_id: str = ""
    num_experts: int | None = None
    experts_per_token: int | None = None
    routing_stages: list[_Stage] = []


class _LabTokens(NamedTuple):
    """The tokens of a trace, from a first reading."""

    position: np.ndarray  # int64 [rows], in order
    phase: np.ndarray  # uint8 [rows]
    layers: np.ndarray  # int64 [layers]
    top_k: int
    selections: int
    gates: bool  # whether any has probabilities
    other_stage: int  # selections of an encoder


def recognize(first: bytes, name: str) -> bool:
    """Whether a file that begins with these bytes is such a trace."""
    line = first.split(b"\n", 1)[0].lstrip()
    return line.startswith(b"{") and _FORMAT in line


def read(sources: Sequence[Path], hints: Hints) -> list[Capture]:
    """A capture a file."""
    return [_read(path, hints) for path in sources]


def _read(path: Path, hints: Hints) -> Capture:
    meta = _metadata(path)
    stage = next((stage for stage in meta.routing_stages if stage.routing_stage == "decoder"), None)
    experts = stage.num_experts if stage else meta.num_experts
    experts = hints.need("num_experts", path) if experts is None else experts
    found = _tokens(path, hints)
    said = stage.assigned_experts_per_token if stage else meta.experts_per_token
    if said not in (None, found.top_k):
        raise MoetraceError(f"{path} says {said} experts a token, but selections hold up to {found.top_k}.")
    rows, layers = found.position.size, found.layers.size
    check_sizes(str(path), experts, found.top_k, layers, rows, 1)
    if rows * layers > SPARSEST * found.selections + 2**16:
        raise MoetraceError(f"{path}: {found.selections} selections are too few for {rows} tokens in {layers} layers.")
    optional = ("gates",) if found.gates else ()
    spool, placeholders = Spool(hints, experts, layers, found.top_k, optional), Placeholders(experts, hints)
    spool.grow(rows)
    _fill(path, found, spool, placeholders, hints)
    facts: dict[str, Any] = {"format": "moe-cache-lab", "engine": "Transformers", "version": meta.format_version}
    if found.other_stage:
        facts["left_out_encoder_selections"] = found.other_stage
        hints.note(f"{path}: left out {counted(found.other_stage, 'selection')} of the encoder.")
    return Capture(
        model=meta.model_id[:200],
        num_experts=experts,
        top_k=found.top_k,
        layer_index=found.layers,
        expert_bytes=None,
        request=np.zeros(rows, np.int32),
        position=found.position,
        phase=found.phase,
        optional=optional,
        facts=facts | placeholders.told(str(path)),
        parts=spool.parts,
        sources=(path,),
    )


def _metadata(path: Path) -> _LabRecord:
    for _, records in json_lines(path, _LabRecord, abs, chunk_bytes=1 << 16):
        for record in records:
            if record.record_type != "metadata" or record.format_version not in (1, 2):
                break
            return record
        break
    raise MoetraceError(f"{path} must begin with metadata of format_version 1 or 2.")


def _selections(path: Path, hints: Hints) -> Iterator[tuple[int, list[_LabRecord]]]:
    """The selections, some at a time, with the number of the first (from 1, the encoder's not counted)."""
    number = 1
    for _, records in json_lines(path, _LabRecord, lambda count: hints.reading(count // 2)):
        own = [record for record in records if record.record_type != "metadata"]
        yield number, own
        number += sum(record.routing_stage != "encoder" for record in own)


def _tokens(path: Path, hints: Hints) -> _LabTokens:
    phases: dict[int, int] = {}
    layers: set[int] = set()
    top_k = selections = other = 0
    gates = False
    for number, records in _selections(path, hints):
        at = number - 1
        for record in records:
            if record.routing_stage == "encoder":
                other += 1
                continue
            at += 1
            position, phase = record.token_position, PREFILL if record.phase in _PROMPTS else DECODE
            if (
                record.record_type != "routing_selection"
                or record.phase not in _PROMPTS + _GENERATED
                or not 0 <= position < _MAX_POSITION
                or not 0 <= record.layer < MAX_LAYERS
                or phases.setdefault(position, phase) != phase
            ):
                raise MoetraceError(
                    f"{path}: selection {at} is of phase {record.phase[:20]!r}, position {position} and layer "
                    f"{record.layer}, which does not fit the others."
                )
            layers.add(record.layer)
            top_k = max(top_k, len(record.selected_experts))
            gates = gates or bool(record.selected_probabilities)
        selections = at
        if len(phases) > MAX_ROWS:
            raise MoetraceError(f"{path} has more than {MAX_ROWS} tokens.")
    if not selections or not top_k:
        raise MoetraceError(f"{path} has no selections of a decoder.")
    position = np.array(sorted(phases), np.int64)
    phase = np.array([phases[at] for at in position.tolist()], np.uint8)
    if (np.diff(phase.astype(np.int8)) < 0).any():
        raise MoetraceError(f"{path}: a token of the prompt is behind a generated one.")
    return _LabTokens(position, phase, np.array(sorted(layers)), top_k, selections, gates, other)


def _fill(path: Path, found: _LabTokens, spool: Spool, placeholders: Placeholders, hints: Hints) -> None:
    """Read the selections again, and put them at their rows."""
    top_k, seen = found.top_k, np.zeros((found.position.size, found.layers.size), bool)
    for number, records in _selections(path, hints):
        own = [record for record in records if record.routing_stage != "encoder"]
        if not own:
            continue
        row = np.searchsorted(found.position, [record.token_position for record in own])
        layer = np.searchsorted(found.layers, [record.layer for record in own])
        cells = row * found.layers.size + layer
        if np.unique(cells).size < cells.size or seen[row, layer].any():
            raise MoetraceError(f"{path}: among selections from {number} on, a token has two of one layer.")
        seen[row, layer] = True
        if any(len(record.selected_experts) not in (0, top_k) for record in own):
            raise MoetraceError(f"{path}: one of the selections from {number} on does not hold {top_k} experts.")
        try:
            ids = np.array([record.selected_experts or [-1] * top_k for record in own], np.int64)
        except OverflowError:
            raise MoetraceError(f"{path}: one of the selections from {number} on holds an impossible id.") from None
        ids, _, wrong = placeholders.checked(ids)
        if wrong is not None:
            expert, experts = int(ids[wrong]), placeholders.num_experts
            raise MoetraceError(
                f"{path}: selection {number + wrong[0]} holds the expert {expert}, but there are {experts} experts"
                f"{advice(expert, experts)}."
            )
        values = {"experts": np.where(ids < 0, placeholders.absent, ids)}
        if found.gates:
            values["gates"] = _gates(path, own, number, top_k)
        spool.put(row, layer, **values)


def _gates(path: Path, records: list[_LabRecord], number: int, top_k: int) -> np.ndarray:
    """The weights float64 [n, top_k]; NaN where a selection has no weight."""
    if any(len(record.selected_probabilities) not in (0, top_k) for record in records):
        raise MoetraceError(f"{path}: one of the selections from {number} on does not hold {top_k} probabilities.")
    gates = np.array([record.selected_probabilities or [None] * top_k for record in records], np.float64)
    gates[[not record.selected_experts for record in records]] = 0
    check_gates(path, lambda at: number + at, gates)
    return gates
