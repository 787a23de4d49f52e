"""Weights of few bits: what codebooks, sparse weights and scales add, and bits of single experts from a file."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.spec.load import data_lines

MIN_BITS, MAX_BITS = 1e-6, 64

Bits = Annotated[float, Meta(ge=MIN_BITS, le=MAX_BITS)]
StoredBits = Annotated[float, Meta(ge=0, le=64)]
Starts = Annotated[float, Meta(ge=0, le=1000)]

HEADER = ["layer", "expert", "bits"]

# Fields of a table of bits: one that switches a feature on, and those that are read only with it.
_READ_WITH = (("sparse", ("index_bits", "sparse_value_bits")), ("group", ("scale_bits",)), ("scale_bits", ("group",)))
_MEANING = {
    "sparse": "the share of weights that are stored by themselves",
    "group": "the number of weights that share a scale",
    "scale_bits": "the bits of a scale",
}


class WeightBits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Bits of an expert's weight and of the values stored beside it (docs/timing-model.md, section 1).

    Attributes:
        bits: Bits of the weight itself, b.
        codebook_bits: Bits of each of the 2^b values of a codebook, v; each output channel has one. 0: none.
        sparse: Share of the weights that are stored a second time, by themselves, s.
        index_bits: Bits of the place of such a weight, i.
        sparse_value_bits: Bits of its value.
        group: Weights that share a scale, g. 0: no scales.
        scale_bits: Bits of a scale, and of a zero point if there is one, q.
    """

    bits: Bits
    codebook_bits: StoredBits = 0.0
    sparse: Annotated[float, Meta(ge=0, le=1)] = 0.0
    index_bits: StoredBits = 32.0
    sparse_value_bits: StoredBits = 16.0
    group: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    scale_bits: StoredBits = 0.0

    def average(self, bits: np.ndarray, codebooks_per_weight: float) -> np.ndarray:
        """Return the average bits of a weight, with ``bits`` for b: `b + v*2^b*c + s*(value + i) + q/g`."""
        beside = self.sparse * (self.sparse_value_bits + self.index_bits)
        beside += self.scale_bits / self.group if self.group else 0.0
        codebooks = self.codebook_bits * codebooks_per_weight * np.exp2(bits) if self.codebook_bits else 0.0
        return bits + codebooks + beside


def without_defaults(raw: dict[str, Any]) -> None:
    """Take out of a model's raw values what says the same as if it was not set, so that both have one identity.

    A share of sparse weights of 0 also takes out the fields that only sparse weights use; scale bits or a group of 0 do
    the same for scales: such a 0 may be one of several values that are compared.
    """
    table = raw.get("weight_bits")
    if isinstance(table, Mapping):
        unread = {name for off, names in _READ_WITH for name in names if _is_zero(table.get(off))}
        if "sparse" in table and _is_zero(table["sparse"]):
            raw.pop("sparse_launches", None)
        defaults = {field.name: field.default for field in msgspec.structs.fields(WeightBits)}
        raw["weight_bits"] = {
            key: value
            for key, value in table.items()
            if key not in unread and not (_is_number(value) and value == defaults.get(key))
        }
    if _is_zero(raw.get("sparse_launches")):
        del raw["sparse_launches"]


def check_read(table: WeightBits, has_launches: bool, where: str) -> None:
    """Raise a UsageError if a field of the table, or `sparse_launches`, stands without the one that it goes with."""
    if has_launches and not table.sparse:
        raise UsageError(
            f"{where}: sparse_launches applies to weights with a sparse share only: set weight_bits.sparse, or remove "
            "sparse_launches."
        )
    defaults = WeightBits(bits=1)
    for beside, names in _READ_WITH:
        for name in names:
            if not getattr(table, beside) and getattr(table, name) != getattr(defaults, name):
                raise UsageError(
                    f"{where}: weight_bits.{name} changes nothing without weight_bits.{beside}: set that "
                    f"({_MEANING[beside]}), or remove weight_bits.{name}."
                )


def read_expert_bits(path: str | Path, layer_experts: np.ndarray) -> np.ndarray:
    """Read the bits of single experts: lines of `layer,expert,bits` in any order, with that header or without.

    Args:
        path: CSV file. Blank lines and lines that begin with `#` are skipped.
        layer_experts: Experts of each MoE layer; int64 [layers].

    Returns:
        float64 [layers, most experts]; NaN where the file says nothing.

    Raises:
        MoetraceError: The file cannot be read, or a line is not as the model wants it.
    """
    bits = np.full((len(layer_experts), int(layer_experts.max())), np.nan)
    lines = list(data_lines(path, HEADER))
    if not lines:
        raise MoetraceError(
            f"{path}: has no line of {','.join(HEADER)}: write one for each expert with bits of its own."
        )
    for number, cells in lines:
        layer, expert, value = _cells(f"{path}, line {number}", cells)
        if layer >= len(layer_experts):
            raise MoetraceError(
                f"{path}, line {number}: names MoE layer {layer}, but the model has {len(layer_experts)}, "
                f"counted from 0."
            )
        if expert >= layer_experts[layer]:
            raise MoetraceError(
                f"{path}, line {number}: names expert {expert} of MoE layer {layer}, but the model has "
                f"{layer_experts[layer]} there, counted from 0."
            )
        if not np.isnan(bits[layer, expert]):
            raise MoetraceError(
                f"{path}, line {number}: names expert {expert} of MoE layer {layer} a second time: remove one line."
            )
        bits[layer, expert] = value
    return bits


def check_codebook_bits(table: WeightBits, own: np.ndarray | None, where: str, file: object) -> None:
    """Raise a UsageError unless bits that number the values of a codebook are whole; ``own``: those of a file."""
    if table.codebook_bits == 0:
        return
    if not table.bits.is_integer():
        raise UsageError(
            f"{where}: weight_bits.bits wants a whole number where codebook_bits is above 0, got {table.bits:g}."
        )
    broken = [] if own is None else own[~np.isnan(own) & (own % 1 > 0)]
    if len(broken):
        raise UsageError(
            f"{file}: bits wants whole numbers where weight_bits.codebook_bits is above 0, got {broken[0]:g}."
        )


def _cells(where: str, cells: list[str]) -> tuple[int, int, float]:
    """Return layer, expert and bits of a line."""
    try:
        layer, expert, bits = int(cells[0]), int(cells[1]), float(cells[2])
    except (ValueError, IndexError):
        layer, expert, bits = -1, -1, math.nan
    if len(cells) != len(HEADER) or layer < 0 or expert < 0:
        raise MoetraceError(f"{where}: wants {','.join(HEADER)}, as 0,5,3.")
    if not MIN_BITS <= bits <= MAX_BITS:
        raise MoetraceError(f"{where}: wants bits from {MIN_BITS:g} to {MAX_BITS}, got {bits:g}.")
    return layer, expert, bits


def _is_zero(value: object) -> bool:
    return _is_number(value) and value == 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
