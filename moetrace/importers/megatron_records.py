"""The records of Megatron-LM's router traces: a first reading finds layers, passes and unusable records."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np

from moetrace.importers.captured import Hints
from moetrace.importers.reading.passes import half
from moetrace.importers.reading.text import json_lines
from moetrace.spec.errors import MoetraceError
from moetrace.trace.schema import MAX_LAYERS

UNKNOWN = -1  # tokens of a record that can't be used
_PLAIN = b"0123456789,-[] \n\t\r"  # what lists of numbers are written with


class Outline(msgspec.Struct, gc=False):
    """A record without its ids; what may be missing of one that can't be used has a default."""

    step: Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
    layer: Annotated[int, msgspec.Meta(ge=0, lt=MAX_LAYERS)]
    num_tokens: int | None = None
    topk: int | None = None
    top_indices: msgspec.Raw = msgspec.Raw(b"null")
    rank: int = 0
    block: str = "decoder"

    def odd(self, top_k: int | None) -> str:
        """Say what keeps the record, by a count of its brackets, from being of `top_k` experts a token; "" if nothing.

        Rows that are of other lengths, but equally many, are found by the second reading.
        """
        raw = bytes(self.top_indices)
        if self.topk is None:
            return "has no topk"
        if self.topk != top_k:
            return f"has topk {self.topk}, but others {top_k}"
        if self.num_tokens is None or raw.count(b"[") - 1 != self.num_tokens or raw.translate(None, _PLAIN):
            return "does not hold the ids of the num_tokens that it says"
        return ""


class Whole(Outline, gc=False):
    """A record with its ids."""

    top_indices: list[list[int]] = []  # type: ignore[assignment]


OUTLINE: Any = Outline | None  # a line may hold null
WHOLE: Any = Whole | None


class RankRecords(NamedTuple):
    """The fields of a file's records except the ids; mtp blocks left out.

    A run is records that follow one another and are of one step and micro-batch: mostly a record of each layer.
    """

    path: Path
    rank: int
    layer: np.ndarray  # uint16 [records]
    records: np.ndarray  # int32 [runs]
    step: np.ndarray  # int32 [runs]
    batch: np.ndarray  # int32 [runs]: number of the micro-batch within the step
    tokens: np.ndarray  # int32 [runs]: of each record; UNKNOWN if it can't be used
    padding: np.ndarray  # int32 [runs]: how many of them, the last ones, are -1 in every slot
    top_k: int
    content: np.ndarray  # int64 [records]: a hash of the ids; 0 if they can't be used
    left_out: int  # records of mtp blocks
    lost: list[str]  # lines that are no record, as sentences
    odd: str = ""  # the first record that can't be used, as a sentence

    def is_copy_of(self, other: "RankRecords") -> bool:
        """Whether the records are those of `other`, as far as both can be used."""
        both = (self.layer, self.step, self.batch), (other.layer, other.step, other.batch)
        if self.content.size != other.content.size or not np.array_equal(self.layer, other.layer):
            return False
        (_, *mine), (_, *others) = both
        if any(
            not np.array_equal(np.repeat(one, self.records), np.repeat(two, other.records))
            for one, two in zip(mine, others, strict=True)
        ):
            return False
        known = (self.content != 0) & (other.content != 0)
        return bool((self.content == other.content)[known].all())


def outline(path: Path, hints: Hints) -> RankRecords:
    """Read a file for the first time; ids are only counted, which tells how much there will be."""
    found = _Outlines(path, hints)
    for _, records in json_lines(path, OUTLINE, half(hints), bad=found.lose):
        found.add(records)
    return found.joined()


class _Outlines:
    """Gathers the records of a file."""

    def __init__(self, path: Path, hints: Hints) -> None:
        self._path, self._hints = path, hints
        self._runs = _Runs(path)
        self._ranks: set[int] = set()
        self._top_k: int | None = None
        self._content: list[np.ndarray] = []
        self._left_out = self._number = self._seen_lost = 0
        self._lost: list[str] = []
        self._near_lost: list[tuple[int, int]] = []  # first and last step that a line which is no record may be of
        self._odd = ""

    def lose(self, sentence: str) -> None:
        """Take note of a line that is no record."""
        if self._hints.strict:
            raise MoetraceError(sentence)
        self._lost.append(sentence)

    def add(self, found: Sequence[Outline | None]) -> None:
        """Add successive records; a null is not a record."""
        before = self._runs.step
        records = [record for record in found if record is not None]
        for _ in range(len(found) - len(records)):
            self.lose(f"{self._path}: a line after record {self._number} is null.")
        number = self._number = self._number + len(records)
        mine = [record for record in records if record.block == "decoder"]
        self._left_out += len(records) - len(mine)
        self._ranks |= {record.rank for record in mine}
        if len(self._ranks) > 1:
            raise MoetraceError(f"{self._path}: records up to {number} differ in rank.")
        if self._near_lost and mine and self._near_lost[-1][1] < 0:
            self._near_lost[-1] = self._near_lost[-1][0], mine[0].step
        if mine:
            self._add(mine)
        if len(self._lost) > self._seen_lost:  # some are lost before their piece comes here
            self._near_lost.append((before, -1))
            self._seen_lost = len(self._lost)

    def _add(self, records: list[Outline]) -> None:
        if self._top_k is None:
            said = Counter(record.topk for record in records if record.topk is not None)
            self._top_k = next((top_k for top_k, _ in said.most_common(1)), None)
        raws = [bytes(record.top_indices) for record in records]
        text = b"".join(raws)
        plain, marks = not text.translate(None, _PLAIN), b"-" in text
        tokens = [
            record.num_tokens
            if plain and record.topk == self._top_k is not None and raw.count(b"[") - 1 == record.num_tokens
            else self._tokens(record)
            for record, raw in zip(records, raws, strict=True)
        ]
        known = [number != UNKNOWN for number in tokens]
        padding = (
            [_padding(raw) if ok and b"-" in raw else 0 for raw, ok in zip(raws, known, strict=True)] if marks else 0
        )
        content = [hash(raw) or 1 if ok else 0 for raw, ok in zip(raws, known, strict=True)]
        step, layer = ([getattr(record, name) for record in records] for name in ("step", "layer"))
        table = np.array([step, layer, tokens], np.int64).T
        self._runs.add(table, np.array(padding, np.int64) * np.ones(len(records), np.int64), self._number)
        self._content.append(np.array(content, np.int64))

    def _tokens(self, record: Outline) -> int | None:
        """The tokens of a record that says whether it can be used."""
        if why := record.odd(self._top_k):
            self._take_odd(f"{self._path}: the record of step {record.step}, layer {record.layer} {why}.")
            return UNKNOWN
        return record.num_tokens

    def _take_odd(self, sentence: str) -> None:
        if self._hints.strict:
            raise MoetraceError(sentence)
        self._odd = self._odd or sentence

    def joined(self) -> RankRecords:
        """The content of the file; raise MoetraceError if a bad line makes the order ambiguous."""
        rank = next(iter(self._ranks), 0)
        if not 0 <= rank < 2**31:
            raise MoetraceError(f"{self._path} is of rank {rank}.")
        layers, sizes, steps, batches, tokens, padding = self._runs.joined()
        for first, last in self._near_lost:
            near = (steps >= first) & (steps <= (last if last >= 0 else 2**31))
            if (batches[near] > 0).any():
                raise MoetraceError(
                    f"{self._lost[0].rstrip('.')}, and with several micro-batches in a step nothing tells of which one "
                    f"it was: leave that step out."
                )
        content = np.concatenate([np.zeros(0, np.int64), *self._content])
        return RankRecords(
            self._path,
            rank,
            layers,
            sizes,
            steps,
            batches,
            tokens,
            padding,
            self._top_k or 0,
            content,
            self._left_out,
            self._lost,
            self._odd,
        )


def _padding(raw: bytes) -> int:
    """How many of the last tokens have -1 in every slot, as a CUDA graph pads a batch."""
    try:
        rows = msgspec.json.decode(raw, type=list[list[int]])
    except (msgspec.MsgspecError, RecursionError):
        return 0  # the second reading finds it
    return next((number for number, row in enumerate(reversed(rows)) if set(row) != {-1}), len(rows))


class _Runs:
    """Gathers records into runs: the n-th record of a layer in a step is of its n-th micro-batch."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.step = -1  # the last one so far
        self._count = np.zeros(MAX_LAYERS, np.int32)  # of its records, of each layer
        self._layers: list[np.ndarray] = []
        self._runs: list[np.ndarray] = []

    def add(self, records: np.ndarray, padding: np.ndarray, number: int) -> None:
        """Add records int64 [n, (step, layer, tokens)], their padding int64 [n]; `number` is that of the last one."""
        if not len(records):
            return
        step, layer, tokens = records.T
        if (np.diff(np.r_[self.step, step]) < 0).any():
            raise MoetraceError(
                f"{self._path}: among the records up to {number}, steps go back: import one run at a time."
            )
        batch = _nth(step, layer) + np.where(step == self.step, self._count[layer], 0)
        if step[-1] != self.step:
            self.step = int(step[-1])
            self._count[:] = 0
        self._count += np.bincount(layer[step == self.step], minlength=MAX_LAYERS).astype(np.int32)
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
