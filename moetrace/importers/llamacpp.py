"""CSV of llama.cpp's moe-trace tools, which have no header: the chosen experts of each layer, pass by pass.

Two layouts. `layer,expert`, a line a choice (`examples/moe-trace` of pull request 28544): a pass lists its layers in
order, each with top_k lines a token, so that top_k must be known to separate tokens. `pos,layer,id0,id1,...`, a line
a token and layer (`tools/moe-trace` of the fork thecodacus/llama.cpp, commit 380d831d): prompt tokens have a negative
position, -1 being the last of its batch, decoded ones count from 0. Neither says the number of experts.

In a prompt the last layer routes only the tokens whose output is wanted, the last ones: the others are absent there.
The first tool reads the ids of a prompt as if they were contiguous, though they are a view into sorted rows of all
experts: then every num_experts / top_k tokens of a prompt choose each expert once, and only the first of a pass is
real. Such rows are kept; `flat_view` in the facts tells of them. Its decoded tokens, and the second tool, are right.

Before its first prompt llama.cpp warms up with a pass of one or two tokens that runs every expert of every layer. In
the first layout it looks like a prompt of num_experts / top_k tokens or twice that number, read flat, with equally few
choices: a pass in which each layer lists every expert once (or twice) is left out and reported, anywhere in the file,
because a restarted server appends to its file.
"""

import math
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl

from moetrace.importers.captured import Capture, Hints
from moetrace.importers.reading.passes import Lines, PassBlock, Passes, half, layers_of, whole_passes
from moetrace.importers.reading.table import CutLines, numbers, tables
from moetrace.importers.reading.text import first_bytes
from moetrace.spec.errors import MoetraceError

_HEADER = re.compile(rb"layer,expert|pos,layer(,\w{1,20})+")
_LINE = re.compile(rb"\d{1,9},\d{1,9}|-?\d{1,9},\d{1,9}(,\d{1,9})+")
_LINES_SEEN = 8
_WARM_UP_BYTES = 1 << 20  # two tokens through 94 layers of 512 experts take 400 kB

_CHANCE = 1e-6  # that a pass runs every expert of every layer, below which it is no pass of tokens

# Number of each line, lines, and where passes begin.
_Passes = tuple[np.ndarray, Lines, np.ndarray]


def recognize(first: bytes, name: str) -> bool:
    """Whether a file that begins with these bytes is such a CSV: the first lines are whole numbers, alike in number."""
    lines = first.split(b"\n")
    lines = [line.removesuffix(b"\r") for line in (lines[:-1] or lines)[: _LINES_SEEN + 1]]
    data = lines[1:] if _HEADER.fullmatch(lines[0]) else lines
    commas = [line.count(b",") for line in lines]
    of_warm_up = commas.count(commas[0]) if _HEADER.fullmatch(lines[0]) is None and commas[0] > 2 else len(commas)
    alike = commas == commas[:1] * of_warm_up + commas[-1:] * (len(commas) - of_warm_up)
    if not data or not alike or commas[-1] > commas[0] or not all(map(_LINE.fullmatch, data)):
        return False
    return len(data) < len(lines) or _in_order([list(map(int, line.split(b",")[:2])) for line in data], commas[-1] > 1)


def _in_order(lines: list[list[int]], by_token: bool) -> bool:
    """Whether first lines without a header go through layers, or positions, as passes do: they may be any matrix."""
    first = [line[0] for line in lines]
    if not by_token:  # layers, which begin again with each pass
        return all(later >= before or later == first[0] for before, later in pairwise(first))
    # A prompt has positions up to -1, decoded tokens count from 0; then comes the next layer, or pass.
    layers = [line[1] for line in lines]
    goes_on = (later - before in (0, 1) or later <= 0 for before, later in pairwise(first))
    deeper = (below > above for above, below in pairwise(layers))
    return first[0] <= 0 and min(layers) >= 0 and all(on or down for on, down in zip(goes_on, deeper, strict=True))


def read(sources: Sequence[Path], hints: Hints) -> list[Capture]:
    """A capture a file."""
    return [_read(path, hints) for path in sources]


def _read(path: Path, hints: Hints) -> Capture:
    begin = first_bytes(path, _WARM_UP_BYTES)
    first = begin.split(b"\n", 1)[0]
    if b"," not in first:
        raise MoetraceError(f"{path}: line 1 is neither 'layer,expert' nor 'pos,layer,id0,id1,...'.")
    num_experts = hints.need("num_experts", path)
    header = int(_HEADER.fullmatch(first.rstrip(b"\r")) is not None)
    wide = _wide_lines(begin, num_experts)
    header += wide
    width = begin.split(b"\n", header + 1)[wide].count(b",") + 1
    top_k = hints.need("top_k", path) if width == 2 else width - 2
    names = ["layer", "e0"] if width == 2 else ["pos", "layer", *(f"e{slot}" for slot in range(top_k))]
    only = {name: pl.Int32 if name == "layer" else None for name in names}
    cut = CutLines(path, hints)
    layer_index = layers_of(path, tables(path, only, half(hints), header=header, cut=cut))
    if width == 2 and layer_index.size == 1:
        raise MoetraceError(f"{path} has one layer, of which 'layer,expert' can't tell where a pass ends.")
    passes = Passes(path, hints, (num_experts, top_k), layer_index)
    found = tables(path, dict.fromkeys(names, pl.Int32), half(hints), header=header, cut=cut)
    lines = ((line, numbers(table)) for line, table in found)
    flat, parts = _Flat(path, num_experts), _Parts(path, num_experts, top_k)
    warm = _WarmUp(path, (num_experts, top_k), layer_index.size, wide)
    for block in _choices(path, lines, top_k, warm, cut) if width == 2 else _tokens(path, lines, top_k):
        flat.look(block)
        if width == 2:
            parts.look(block)
        passes.add(block)
    facts = {"format": "llamacpp", "engine": "llama.cpp", "layout": "layer,expert" if width == 2 else "pos,layer,ids"}
    facts |= flat.facts() | ({} if flat.permuted else parts.facts(hints))
    return passes.capture(facts | warm.facts(hints) | cut.told())


def _wide_lines(begin: bytes, num_experts: int) -> int:
    """How many first lines `pos,layer,id0,...` are of a warm-up: with all experts, where a later one has fewer."""
    for count, line in enumerate(begin.split(b"\n")[:-1]):
        fields = line.rstrip(b"\r").split(b",")
        if len(fields) != num_experts + 2 or len(set(fields[2:])) != num_experts:
            return count if 3 <= len(fields) < num_experts + 2 else 0
    return 0


class _WarmUp:
    """Leaves out passes whose layers each list every expert once, or twice."""

    def __init__(self, path: Path, sizes: tuple[int, int], layers: int, lines: int) -> None:
        self._path, self._layers = path, layers
        self._num_experts, top_k = sizes
        self.lines, self._passes = lines, int(lines > 0)
        self._first = lines > 0  # whether only the first pass was one
        # A pass may do so by chance, each of its tokens choosing other experts, if experts and layers are few.
        choices = math.lgamma(self._num_experts + 1) - math.lgamma(self._num_experts - top_k + 1)
        of_chance = layers * (math.lgamma(self._num_experts + 1) - self._num_experts / top_k * choices)
        self._anywhere = self._num_experts % top_k != 0 or of_chance < math.log(_CHANCE)

    def without(self, passes: Iterator[tuple[int, Lines, np.ndarray]]) -> Iterator[_Passes]:
        """Passes except warm-ups: each line's number, lines, and where passes begin."""
        only: list[_Passes] = []  # warm-ups, as long as there is nothing else
        first = True
        for line, lines, starts in passes:
            number = np.arange(line, line + lines["layer"].size)
            warm = self._found(lines, starts)
            warm[1 if first else 0 :] &= self._anywhere
            if not warm.any():
                only, first = [], False
                yield number, lines, starts
                continue
            sizes = np.diff(np.r_[starts, number.size])
            only = [*only, (number, lines, starts)] if warm.all() and (first or only) else []
            self.lines += int(sizes[warm].sum())
            self._first = first and not warm[1:].any() and self._passes == 0
            self._passes += int(warm.sum())
            first = False
            if not warm.all():
                kept = ~np.repeat(warm, sizes)
                sizes = sizes[~warm]
                yield number[kept], {name: array[kept] for name, array in lines.items()}, np.cumsum(sizes) - sizes
        if only:
            self.lines = self._passes = 0
            yield from only

    def _found(self, lines: Lines, starts: np.ndarray) -> np.ndarray:
        """Whether each pass is a warm-up, bool [passes]."""
        layer, experts, every = lines["layer"], lines["e0"], self._num_experts
        stops = np.r_[starts[1:], layer.size]
        of_experts, rest = np.divmod(stops - starts, every)
        warm = (rest == 0) & (of_experts >= self._layers) & (of_experts <= 2 * self._layers)
        for number in np.flatnonzero(warm).tolist():
            start, stop = int(starts[number]), int(stops[number])
            sizes = np.diff(np.r_[0, np.flatnonzero(np.diff(layer[start:stop])) + 1, stop - start])
            fits = sizes.size == self._layers and np.isin(sizes, (every, 2 * every)).all()
            warm[number] = fits and (np.sort(experts[start:stop].reshape(-1, every), axis=1) == np.arange(every)).all()
        return warm

    def facts(self, hints: Hints) -> dict[str, str]:
        """Their entry in `source`, if there was one, also given as a note."""
        if not self.lines:
            return {}
        one = self._passes == 1
        which = "the first pass" if self._first and one else f"{self._passes} pass{'' if one else 'es'}"
        hints.note(
            f"{self._path}: left out {which} ({self.lines:,} lines), in which every layer runs each of its "
            f"{self._num_experts} experts: llama.cpp's warm-up, or a prompt that was read flat and is no choice either."
        )
        return {"left_out_warm_up": f"{which}, {self.lines} lines: every layer runs every expert"}


def _choices(
    path: Path, tables: Iterator[tuple[int, Lines]], top_k: int, warm: _WarmUp, cut: CutLines
) -> Iterator[PassBlock]:
    """The passes of lines `layer,expert`: rows of one layer follow one another, `top_k` lines each."""
    passes = warm.without(whole_passes(path, tables, lambda lines: np.diff(lines["layer"]) < 0))
    for number, lines, starts in passes:
        layer, experts = lines["layer"], lines["e0"]
        runs = np.r_[0, np.flatnonzero(np.diff(layer)) + 1]  # where a pass begins, so does a run
        sizes = np.diff(np.r_[runs, layer.size])
        if (uneven := sizes % top_k != 0).any():
            at = int(uneven.argmax())
            sentence = (
                f"{path}: layer {layer[runs[at]]} has {sizes[at]} lines from {number[runs[at]]} on, which is no "
                f"multiple of top_k ({top_k})."
            )
            if at == 0 or at < sizes.size - 1 or next(passes, None) is not None:
                raise MoetraceError(sentence)
            cut(sentence, int(sizes[at]))  # of a prompt, the tokens that are there are not known
            layer, experts = layer[: runs[at]], experts[: runs[at]]
            runs, sizes, starts = runs[:at], sizes[:at], starts[starts < runs[at]]
        runs, sizes, first = runs // top_k, sizes // top_k, starts // top_k
        step = np.searchsorted(first, runs, side="right") - 1  # of each run
        step_rows = np.maximum.reduceat(sizes, np.searchsorted(runs, first))
        # A run shorter than its pass has only its last tokens.
        shift = (np.cumsum(step_rows) - step_rows)[step] + step_rows[step] - sizes - runs
        row = np.arange(layer.size // top_k) + np.repeat(shift, sizes)
        ids = experts.reshape(-1, top_k)
        yield PassBlock(lambda at, number=number: int(number[at * top_k]), step_rows, row, layer[::top_k], ids)


def _tokens(path: Path, tables: Iterator[tuple[int, Lines]], top_k: int) -> Iterator[PassBlock]:
    """The passes of lines `pos,layer,id0,id1,...`."""
    last = -1  # position that was decoded last
    for line, lines, starts in whole_passes(path, tables, _token_begins):
        pos, layer = lines["pos"].astype(np.int64), lines["layer"]
        decoded = pos[starts]
        jumps = (decoded >= 0) & (decoded != 0) & (decoded != np.r_[last, decoded[:-1]] + 1)
        if jumps.any():
            at = int(starts[int(jumps.argmax())])
            raise MoetraceError(f"{path}: line {line + at}: position {pos[at]} does not follow the one before.")
        low, high = (function.reduceat(pos, starts) for function in (np.minimum, np.maximum))
        step_rows = high - low + 1
        count = np.diff(np.r_[starts, pos.size])
        if (gaps := step_rows > count).any():
            at = int(starts[int(gaps.argmax())])
            raise MoetraceError(f"{path}: the pass from line {line + at} on lacks positions.")
        row = pos + np.repeat(np.cumsum(step_rows) - step_rows - low, count)
        ids = np.stack([lines[f"e{slot}"] for slot in range(top_k)], axis=1)
        phase = (decoded >= 0).astype(np.uint8)
        begins = (decoded == 0) & (np.r_[last, decoded[:-1]] >= 0)
        last = int(decoded[-1])
        yield PassBlock(lambda at, line=line: line + at, step_rows, row, layer, ids, phase, begins)


def _token_begins(lines: Lines) -> np.ndarray:
    pos, layer = lines["pos"], lines["layer"]
    again = (layer[1:] < layer[:-1]) | ((layer[1:] == layer[:-1]) & (pos[1:] <= pos[:-1]))
    return again | ((pos[1:] != pos[:-1]) & ((pos[1:] >= 0) | (pos[:-1] >= 0)))


class _Flat:
    """Looks for prompts that were read flat from sorted rows: their ids, as they follow, are a permutation."""

    def __init__(self, path: Path, num_experts: int) -> None:
        self._path, self._num_experts = path, num_experts
        self.long_enough = self.permuted = 0

    def look(self, block: PassBlock) -> None:
        """Count the layers of the passes in a block whose first ids are each expert once."""
        row, layer, ids = block.row, block.layer, block.experts
        runs = np.r_[0, np.flatnonzero((np.diff(layer) != 0) | (np.diff(row) != 1)) + 1]
        sizes = np.diff(np.r_[runs, row.size])
        top_k = ids.shape[1]
        everyone = np.arange(self._num_experts)
        long_enough = (sizes >= 2) & (sizes * top_k >= self._num_experts)
        for start, size in zip(runs[long_enough].tolist(), sizes[long_enough].tolist(), strict=True):
            first = ids[start : start + size].reshape(-1)[: self._num_experts]
            self.long_enough += 1
            if not np.array_equal(np.sort(first), everyone):
                continue
            self.permuted += 1
            ordered = np.sort(ids[start : start + size], axis=1)
            if (ordered[:, 1:] == ordered[:, :-1]).any():
                raise MoetraceError(
                    f"{self._path}: the prompt in line {block.line_of(start)} and on was read flat from rows of all "
                    f"experts, so it has tokens with an expert twice: only lines of decoded tokens can be imported."
                )

    def facts(self) -> dict[str, str]:
        """What to tell of it, if anything."""
        if not self.permuted:
            return {}
        found = f"{self.permuted} of {self.long_enough}"
        return {"flat_view": f"in {found} layers of prompts, the ids are a permutation: read flat, not real choices"}


class _Parts:
    """Looks for tokens that are parts of one: a token never chooses an expert twice, so they would share none."""

    def __init__(self, path: Path, num_experts: int, top_k: int) -> None:
        self._path, self._num_experts, self._top_k = path, num_experts, top_k
        self._tokens = dict.fromkeys(range(2, num_experts // top_k + 1), 0)  # by the parts of a token, how many

    def look(self, block: PassBlock) -> None:
        """Keep the numbers of parts that the tokens of each layer and pass in a block allow."""
        if not self._tokens:
            return
        layer, ids = block.layer, block.experts
        runs = np.r_[0, np.flatnonzero((np.diff(layer) != 0) | (np.diff(block.row) != 1)) + 1]
        common = int(np.gcd.reduce(np.diff(np.r_[runs, layer.size])))
        for parts in list(self._tokens):
            ordered = np.sort(ids.reshape(-1, parts * self._top_k), axis=1) if common % parts == 0 else None
            if ordered is None or (ordered[:, 1:] == ordered[:, :-1]).any():
                del self._tokens[parts]
            else:
                self._tokens[parts] += len(ordered)

    def facts(self, hints: Hints) -> dict[str, str]:
        """Their entry in `source`, if there are more than by chance, also given as a note."""
        likely = [parts for parts, tokens in self._tokens.items() if tokens * self._of_one(parts) < math.log(_CHANCE)]
        if not likely:
            return {}
        parts = max(likely)
        what = f"every {parts} tokens that follow one another in a layer share no expert, and no pass ends between them"
        hints.note(
            f"{self._path}: {what}: top_k looks like {parts * self._top_k}, not {self._top_k}, which makes prompts of "
            f"decoded tokens."
        )
        return {"top_k": what}

    def _of_one(self, parts: int) -> float:
        """The logarithm of the chance that this number of tokens shares no expert; popular experts make it less."""
        every, each = self._num_experts, self._top_k
        ways = [math.log(math.comb(every - number * each, each)) for number in range(parts)]
        return sum(ways) - parts * ways[0]
