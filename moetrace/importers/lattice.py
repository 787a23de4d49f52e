"""JSON lines of lattice: a record for each token and MoE layer, as `dump_moe_routing_trace_jsonl` writes it.

Records have layer_idx, token_idx (position in the sequence), selected_ids and gate_weights, which sum to 1
(`crates/inference/src/forward/metal_qwen35.rs`, pull request 920). The engine takes one token through all layers at a
time, so each token is a step of its own. Prompt rows are not marked: all are decode (`--as decode --prompt P` marks
the prompt). A request begins where positions do not increase. The number of experts is not said.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from moetrace.importers.captured import Capture, Hints
from moetrace.importers.reading.passes import Lines, PassBlock, Passes, check_gates, half, whole_passes
from moetrace.importers.reading.text import json_lines
from moetrace.spec.errors import MoetraceError, counted
from moetrace.trace.schema import DECODE, MAX_LAYERS

Number = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
LayerNumber = Annotated[int, msgspec.Meta(ge=0, lt=MAX_LAYERS)]


class _Choice(msgspec.Struct, gc=False):
    layer_idx: LayerNumber
    token_idx: Number
    selected_ids: list[int] | None
    gate_weights: list[float | None] | None  # null is how JSON says NaN


class _Layer(msgspec.Struct, gc=False):
    layer_idx: LayerNumber


def _shape(record: _Choice) -> tuple[int, int]:
    return len(record.selected_ids or ()), len(record.gate_weights or ())


class _Odd:
    """Counts what can't be used: records of another shape, weights that are no numbers; `--strict` refuses them."""

    def __init__(self, path: Path, strict: bool) -> None:
        self._path, self._strict = path, strict
        self.records = self.weights = 0
        self.first = ""  # record of another shape, as a sentence

    def record(self, number: int, top_k: int) -> None:
        """Count a record."""
        sentence = f"{self._path}: record {number} holds not {top_k} experts and gates, as others."
        if self._strict:
            raise MoetraceError(sentence)
        self.records += 1
        self.first = self.first or sentence

    def weigh(self, number: int, unknown: np.ndarray) -> None:
        """Count weights that are no number: bool [records, top_k], the first of which is record `number`."""
        if self._strict and unknown.any():
            at = number + int(unknown.any(axis=1).argmax())
            raise MoetraceError(f"{self._path}: record {at} has a weight that is no number.")
        self.weights += int(np.count_nonzero(unknown))

    def told(self, hints: Hints) -> dict[str, Any]:
        """Their entries in `source`, also given as notes."""
        if self.records:
            many = counted(self.records, "record")
            hints.note(f"{self._path}: {many} of another shape left absent: {self.first}")
        if self.weights:
            hints.note(f"{self._path}: {counted(self.weights, 'weight')} of NaN left unknown.")
        told = {"absent_routes_of_another_shape": self.records, "unknown_weights": self.weights}
        return {name: count for name, count in told.items() if count}


def recognize(first: bytes, name: str) -> bool:
    """Whether a file that begins with these bytes has such records."""
    line = first.split(b"\n", 1)[0].lstrip()
    return line.startswith(b"{") and all(b'"%s"' % key.encode() in line for key in _Choice.__struct_fields__)


def read(sources: Sequence[Path], hints: Hints) -> list[Capture]:
    """A capture a file."""
    return [_read(path, hints) for path in sources]


def _read(path: Path, hints: Hints) -> Capture:
    num_experts = hints.need("num_experts", path)
    layer_index, first = _layers(path, hints), next(iter(_first(path)))
    top_k, odd = _shape(first)[0], _Odd(path, hints.strict)
    passes = Passes(path, hints, (num_experts, top_k), layer_index, ("gates",))
    cut: list[str] = []
    broken: list[str] = []
    records = json_lines(path, _Choice, half(hints), cut=cut.append, broken=broken.append)
    positions: list[np.ndarray] = []
    last = -1  # position of the token before
    count = 0
    for _, lines, starts in whole_passes(path, _lines(path, records, top_k, odd), _begins):
        position = lines["token"][starts]
        begins = position <= np.r_[last, position[:-1]]
        last = int(position[-1])
        ones = np.ones(starts.size, np.int64)
        row = np.repeat(np.arange(starts.size), np.diff(np.r_[starts, lines["token"].size]))
        number = count + 1  # of the first record here
        phase = np.full(starts.size, DECODE, np.uint8)
        ids, gates = lines["experts"], lines["gates"]
        passes.add(PassBlock(lambda i, at=number: at + i, ones, row, lines["layer"], ids, phase, begins, gates))
        positions.append(position)
        count += row.size
    facts: dict[str, Any] = {"format": "lattice", "engine": "lattice", "phases": "not recorded: all decode"}
    if (cut or broken) and hints.strict:
        raise MoetraceError((broken or cut)[0])
    if broken and 2 * len(broken) >= count:
        raise MoetraceError(broken[0])
    if broken:
        facts["left_out_broken_lines"] = len(broken)
        hints.note(f"{path}: left out {counted(len(broken), 'line')} that can't be read, the first because {broken[0]}")
    if cut:
        facts["left_out_cut_lines"] = 1
        hints.note(f"{path}: left out a last line that was cut: {cut[0]}")
    if 2 * odd.records >= count:
        raise MoetraceError(odd.first)
    facts |= odd.told(hints)
    return passes.capture(facts)._replace(position=np.concatenate(positions))


def _first(path: Path) -> Iterator[_Choice]:
    """For each piece of the file, a record of the most common shape."""
    for _, records in json_lines(path, _Choice, abs, chunk_bytes=1 << 16, cut=len, broken=len):
        shapes = Counter(map(_shape, records))
        usual = max((one for one in shapes if 0 < one[0] == one[1]), key=shapes.__getitem__, default=None)
        yield from (record for record in records if _shape(record) == usual)
    raise MoetraceError(f"{path}: no record holds one gate for each expert.")


def _layers(path: Path, hints: Hints) -> np.ndarray:
    """The layers uint16 [layers] that records name."""
    seen: set[int] = set()
    for _, records in json_lines(path, _Layer, half(hints), cut=len, broken=len):
        seen.update(record.layer_idx for record in records)
    if not seen:
        raise MoetraceError(f"{path} has no records.")
    return np.array(sorted(seen), np.uint16)


def _lines(
    path: Path, found: Iterator[tuple[int, list[_Choice]]], top_k: int, odd: _Odd
) -> Iterator[tuple[int, Lines]]:
    """Records as arrays; they, not lines, are counted, since lines may be blank. One of another shape is absent."""
    count = 0
    for _, records in found:
        for at, record in enumerate(records, count + 1):
            if _shape(record) != (top_k, top_k):
                odd.record(at, top_k)
                none: list[float | None] = [0.0] * top_k
                record.selected_ids, record.gate_weights = [-1] * top_k, none
        try:
            experts = np.array(list(chain.from_iterable(r.selected_ids or () for r in records)), np.int32)
            weights = np.array(list(chain.from_iterable(r.gate_weights or () for r in records)), np.float64)
        except OverflowError:
            raise MoetraceError(f"{path}: one of the records from {count + 1} on holds an impossible id.") from None
        if records:
            gates = weights.reshape(-1, top_k)
            odd.weigh(count + 1, np.isnan(gates))
            check_gates(path, lambda i, first=count + 1: first + i, gates)
            yield (
                count + 1,
                {
                    "layer": np.array([r.layer_idx for r in records], np.int32),
                    "token": np.array([r.token_idx for r in records], np.int32),
                    "experts": experts.reshape(-1, top_k),
                    "gates": gates.astype(np.float32),
                },
            )
        count += len(records)


def _begins(lines: Lines) -> np.ndarray:
    return (np.diff(lines["layer"]) <= 0) | (np.diff(lines["token"]) != 0)
