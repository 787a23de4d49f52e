"""Routing that an engine returns request by request: ids [tokens, planes, top_k] on their way into one capture."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from moetrace.importers.captured import Capture, Hints, without_zero_cells
from moetrace.importers.reading.conversations import Conversations, Request, Stretch, blocks_of
from moetrace.importers.reading.numbering import kept_layers
from moetrace.importers.reading.placeholders import Placeholders, advice, check_width
from moetrace.importers.reading.spool import Spool
from moetrace.importers.reading.told import Told, first_position, shared_out, stopped_in_prompt
from moetrace.spec.errors import MoetraceError, counted
from moetrace.trace.schema import BLOCK_BYTES, DECODE, PREFILL, absent_id, check_sizes, expert_dtype

UNKNOWN_PHASE = "unknown: every row is taken as prefill unless --as decode --prompt P says otherwise"
# Reasons to leave an answer out, after its number.
NO_ROUTING, OTHER_SHAPE, UNREADABLE = "without routing", "of another shape", "that can't be read"


class RequestSpool:
    """Answers one after the other, spooled; engines give a plane to each layer, zeros to a dense one.

    A cell of zeros in all slots becomes absent (no router chooses an expert twice), as -1 does. Rows that are
    padding in all layers, or that no forward pass computed, are left out and counted, and so are answers without
    routing; answers that continue an earlier one are of the same request.
    """

    def __init__(self, hints: Hints, source: Path) -> None:
        self._hints, self._source = hints, source
        self._spool: Spool | None = None
        self._inner = (0, 0)  # planes, top_k
        self._num_experts = hints.need("num_experts", source)
        self._absent = absent_id(self._num_experts)
        self._placeholders = Placeholders(self._num_experts, hints)
        self._requests: list[Request] = []
        self._turns = 0  # requests of these that became turns of others
        self._stretches: list[tuple[int, Stretch]] = []  # in order of the spool, each with the number of its request
        self._conversations = Conversations(self._absent, self._stored)
        self._used = np.zeros(0, bool)  # [planes]: some id is neither 0 nor -1
        self._counts: Counter[str] = Counter()
        self._reasons: dict[str, str] = {}  # the first sentence, of each reason to leave an answer out
        self._starts: set[int] = set()  # first positions that the numbers of tokens tell

    @property
    def planes(self) -> int:
        """How many layers, with dense ones, the answers have; 0 before the first answer."""
        return self._inner[0]

    def leave_out(self, why: str, sentence: str) -> None:
        """Count an answer that can't be used, for a reason of few words; `--strict` refuses it with the sentence."""
        if self._hints.strict:
            raise MoetraceError(sentence)
        self._counts[why] += 1
        self._reasons.setdefault(why, sentence)

    def unreadable(self, sentence: str) -> None:
        """Count an answer that is damaged."""
        self.leave_out(UNREADABLE, sentence)

    def add(self, where: str, ids: np.ndarray, told: Told | None = None) -> None:
        """Add an answer's integers [tokens, planes, top_k]; one of another shape than those before is left out.

        Raises MoetraceError, beginning with `where`, if it does not fit what it says of itself, or the experts.
        """
        told = told or Told()
        if not self._fits(where, ids):
            return
        first = self._first(where, len(ids), told)
        compared = (first, told, lambda rows: self._narrow(where, 0, ids[rows]), len(ids))
        with self._placeholders.uncounted():  # what is only compared; rows are counted when they are appended
            request, parts_first = self._conversations.found(*compared), False
            if request and first + len(ids) <= request.begin:  # the decode server of a later turn was read first
                earlier = self._conversations.earlier(*compared)
                if earlier and earlier is not request:
                    self._join(earlier, request)
                    request, parts_first = earlier, True
        kept = self._kept(request, first, len(ids), told, parts_first)
        if not kept and request:
            self._counts["repeated"] += 1
        fresh = request is None
        request = request or Request(len(self._requests))
        end, last = request.end, np.zeros(0, np.uint8)
        for rows in kept:
            last = self._append(where, ids, rows, (request, first, told.prompt))
        if not last.size:
            return
        if fresh:
            self._requests.append(request)
        else:
            self._counts["joined"] += 1
        request.prompt = request.prompt if told.prompt is None else told.prompt
        self._conversations.add(request, told, last if request.end > end else None)

    def _fits(self, where: str, ids: np.ndarray) -> bool:
        """Whether the array is of the shape of those before; else it is left out."""
        if ids.ndim == 3 and not ids.size:
            self.leave_out(NO_ROUTING, f"{where} is empty: its shape is {ids.shape}.")
        elif ids.ndim != 3 or ids.dtype.kind not in "iu":
            what = f"{where} is {ids.dtype} {ids.shape}, not integers [tokens, layers, top_k]."
            self.leave_out(OTHER_SHAPE, what)
        else:
            check_width(where, ids.dtype, self._num_experts)
            if self._spool is None:
                self._begin(where, ids)
            if ids.shape[1:] == self._inner:
                return True
            what = f"{where} has {ids.shape[1:]} (layers, top_k), but the earlier ones have {self._inner}."
            self.leave_out(OTHER_SHAPE, what)
        return False

    def finish(self, told: Told) -> bool:
        """The numbers of an answer that came in chunks without any, as the last tells them; whether there is one."""
        requests = self._conversations.choices(told)
        if not requests or told.prompt is None or told.output is None:
            return False
        stretches = [stretch for request in requests for stretch in request.stretches]
        if any(stretch.prompt is not None for stretch in stretches):
            return False
        where = str(self._source)
        numbers = [told] * len(requests)
        if len(requests) > 1:
            arrays = [
                np.concatenate([self._stored(s, s.first, s.first + s.rows) for s in r.stretches]) for r in requests
            ]
            numbers = shared_out(where, arrays, [told._replace(choices=len(requests))] * len(requests))
        for request, own in zip(requests, numbers, strict=True):
            shift = first_position(where, request.end, own)
            request.prompt = own.prompt
            request.shift(shift)
            request.stretches = [
                stretch._replace(first=stretch.first + shift, prompt=own.prompt) for stretch in request.stretches
            ]
            for at, stretch in zip(request.places, request.stretches, strict=True):
                self._stretches[at] = (request.number, stretch)
        return True

    def _begin(self, where: str, ids: np.ndarray) -> None:
        planes, top_k = ids.shape[1:]
        check_sizes(where, self._num_experts, top_k, planes, len(ids), 1)
        self._inner = (planes, top_k)
        self._used = np.zeros(planes, bool)
        self._spool = Spool(self._hints, self._num_experts, planes, top_k)

    def _first(self, where: str, rows: int, told: Told) -> int:
        """The position of the first row."""
        known = self._conversations.of_id(told)
        if told.prompt is None and told.start is None and told.chunk and known:
            return known.end
        first = first_position(where, rows, told)
        self._counts["stopped"] += stopped_in_prompt(rows, told)
        if told.prompt is not None and told.output and not told.chunk:
            lacking = told.prompt + told.output - 1 - first - rows
            self._counts["lacking"] += max(lacking, 0)
        if not 0 <= first < 2**31 - rows:
            raise MoetraceError(f"{where} would begin at position {first}.")
        self._counts["last"] += first > 0 and told.start is None and told.cached != first and not (told.chunk or known)
        self._starts.add(first)
        return first

    def _join(self, earlier: Request, later: Request) -> None:
        """Make a request that is a later turn of another one a part of it."""
        for at in later.places:
            self._stretches[at] = (earlier.number, self._stretches[at][1])
        self._conversations.forget(later)
        earlier.take(later)
        self._turns += 1

    def _kept(
        self, request: Request | None, first: int, rows: int, told: Told, parts_first: bool
    ) -> list[tuple[int, int]]:
        """The rows (from, to) that are new: not computed before this answer, and not there already.

        `parts_first` says that later rows of the same turn are there already.
        """
        cached = min(told.cached or 0, first + rows if told.prompt is None else told.prompt)
        kept = 0 if self._hints.keep_cached else min(max(cached - first, 0), rows)
        self._counts["cached"] += kept
        ranges = [(kept, rows)]
        if request:
            turn = told.prompt is not None and (request.prompt is None or told.prompt > request.prompt)
            if not turn or (told.cached is None and not self._hints.keep_cached):
                # A turn repeats all before its end; but one server may bring the rows before those of another.
                free = [(first + kept, first + rows)]
                if turn and not parts_first:
                    free = [(max(start, request.end), stop) for start, stop in free]
                else:
                    free = request.unclaimed(*free[0])
                ranges = [(start - first, stop - first) for start, stop in free]
                fresh = sum(max(stop - start, 0) for start, stop in ranges)
                self._counts["cached" if turn else "again"] += rows - kept - fresh
            # Otherwise repeated rows that were not cached were recomputed.
        return [(start, stop) for start, stop in ranges if start < stop]

    def _append(
        self, where: str, ids: np.ndarray, kept: tuple[int, int], whose: tuple[Request, int, int | None]
    ) -> np.ndarray:
        """Append rows (from, to), without padding, to a request; return the last of them."""
        request, first, prompt = whose
        assert self._spool is not None
        at_once = max(1, BLOCK_BYTES // (ids.itemsize * self._inner[0] * self._inner[1]))
        last = np.zeros(0, np.uint8)
        for start in range(kept[0], kept[1], at_once):
            narrow = self._narrow(where, start, np.asarray(ids[start : min(start + at_once, kept[1])]))
            padding = self._padding(narrow)
            if padding is None:
                runs = [(0, len(narrow))]
            else:
                self._counts["padding"] += int(padding.sum())
                edges = np.flatnonzero(np.diff(np.r_[True, padding, True].astype(np.int8))).reshape(-1, 2)
                runs = [(int(a), int(b)) for a, b in edges]
            for a, b in runs:
                self._use(narrow[a:b])
                self._stretch(request, Stretch(self._spool.rows, first + start + a, b - a, prompt))
                self._spool.append(experts=narrow[a:b])
                last = narrow[b - 1]
        return last

    def _stretch(self, request: Request, stretch: Stretch) -> None:
        """Add a stretch; blocks of one answer that follow one another become one."""
        if self._stretches and self._stretches[-1][0] == request.number and request.stretches:
            before = request.stretches[-1]
            if (before.row + before.rows, before.first + before.rows, before.prompt) == (
                stretch.row,
                stretch.first,
                stretch.prompt,
            ):
                stretch = before._replace(rows=before.rows + stretch.rows)
                for held in (self._stretches, request.stretches, request.places):
                    held.pop()
        request.places.append(len(self._stretches))
        self._stretches.append((request.number, stretch))
        request.stretches.append(stretch)
        request.claim(stretch.first, stretch.first + stretch.rows)
        request.begin = min(request.begin, stretch.first)
        request.end = max(request.end, stretch.first + stretch.rows)

    def _narrow(self, where: str, first_row: int, ids: np.ndarray) -> np.ndarray:
        """The ids in the dtype of a trace, with its mark for absent."""
        ids, negative, wrong = self._placeholders.checked(ids)
        if wrong is not None:
            row, layer, slot = wrong
            expert = int(ids[row, layer, slot])
            raise MoetraceError(
                f"{where}: token {first_row + row}, layer {layer} holds the id {expert}, but there are "
                f"{self._num_experts} experts{advice(expert, self._num_experts, ids.shape[-1])}."
            )
        narrow = ids.astype(expert_dtype(self._num_experts))
        if negative:
            narrow[ids == -1] = self._absent
        return without_zero_cells(narrow, self._absent)

    def _padding(self, narrow: np.ndarray) -> np.ndarray | None:
        """Bool [rows]: all slots of all layers hold one and the same id, or none; None if there is no such row."""
        top_k = self._inner[1]
        rows = np.flatnonzero(narrow[:, -1, 0] == (narrow[:, -1, 1] if top_k > 1 else self._absent))
        if not rows.size:
            return None
        some = narrow[rows].reshape(rows.size, -1)
        low, high = some.min(axis=1), np.where(some == self._absent, 0, some).max(axis=1)
        alike = low == self._absent
        if top_k > 1 and self._inner[0] > 1:  # one cell that holds an expert twice may be damage
            slots = narrow[rows]
            alike |= (low == high) & (slots == slots[..., :1]).all(axis=(1, 2))
        if not alike.any():
            return None
        padding = np.zeros(len(narrow), bool)
        padding[rows[alike]] = True
        return padding

    def _use(self, narrow: np.ndarray) -> None:
        used = narrow != self._absent
        if self._inner[1] == 1:
            used &= narrow > 0
        self._used |= used.reshape(len(used), -1).any(axis=0).reshape(self._inner).any(axis=1)

    def _stored(self, stretch: Stretch, first: int, stop: int) -> np.ndarray:
        assert self._spool is not None
        start = stretch.row - stretch.first
        return self._spool.read(start + first, start + stop)["experts"]

    def capture(self, model: str, facts: dict[str, Any], sources: Sequence[Path]) -> Capture:
        """All requests in a row: their layers are the planes, less the dense ones if the model's layers say so."""
        self._check_kept(sources[0])
        assert self._spool is not None
        spool = self._spool
        layers, dropped = kept_layers(self._used, self._hints)
        facts = facts | dropped | self._told()
        unknown = {number for number, stretch in self._stretches if stretch.prompt is None}
        requests = len(self._requests) - self._turns
        if 0 < len(unknown) < requests:
            facts["requests_of_unknown_phase"] = len(unknown)
            self._hints.note(
                f"{sources[0]}: {len(unknown)} of {counted(requests, 'request')} do not tell how long their "
                f"prompts are: all their rows are taken as prefill."
            )
        if unknown:
            facts["phase"] = UNKNOWN_PHASE
        numbers, stretches = zip(*self._in_order(), strict=True)
        rows = np.array([stretch.rows for stretch in stretches])
        starts = np.array([stretch.first for stretch in stretches]) - np.cumsum(rows) + rows
        position = np.arange(rows.sum()) + np.repeat(starts, rows)
        decode_from = np.array([2**31 if stretch.prompt is None else stretch.prompt for stretch in stretches])
        return Capture(
            model=model,
            num_experts=self._num_experts,
            top_k=self._inner[1],
            layer_index=layers,
            expert_bytes=None,
            request=np.repeat(numbers, rows),
            position=position,
            phase=np.where(position < np.repeat(decode_from, rows), PREFILL, DECODE).astype(np.uint8),
            optional=(),
            facts=facts,
            parts=lambda: blocks_of(spool, stretches, layers if dropped else None),
            sources=tuple(sources),
        )

    def _in_order(self) -> list[tuple[int, Stretch]]:
        """The stretches in time order: of a request, a server that decodes may have answered before its prefill."""
        found = list(self._stretches)
        for request in self._requests:
            if any(a.first > b.first and b.prompt == a.prompt for a, b in pairwise(request.stretches)):
                ordered = sorted(request.stretches, key=lambda stretch: (stretch.prompt or 0, stretch.first))
                for at, stretch in zip(sorted(request.places), ordered, strict=True):
                    found[at] = (request.number, stretch)
        return found

    def _check_kept(self, source: Path) -> None:
        """Raise if nothing is left, or if fewer answers are of the first one's shape than of others."""
        reasons = list(self._reasons.values())
        if self._stretches and self._counts[OTHER_SHAPE] > len(self._requests) // 2:
            raise MoetraceError(self._reasons[OTHER_SHAPE])
        if not self._stretches and self._counts["cached"]:
            raise MoetraceError(f"{source} holds no rows that a forward pass computed: keep them with --keep-cached.")
        if not self._stretches and reasons:
            raise MoetraceError(reasons[0])
        if self._spool is None:
            raise MoetraceError(f"{source} holds no routing: no part of an answer in it has routed_experts.")
        if not self._stretches or not self._used.any():
            raise MoetraceError(f"{source} holds no routing: every id is 0 or -1.")

    def _told(self) -> dict[str, Any]:
        """The entries in `source` on rows left out, joined or moved, also given as notes."""
        source, counts, note = self._source, self._counts, self._hints.note
        facts = self._placeholders.told(str(source))
        if left_out := {why: counts[why] for why in self._reasons}:
            facts["left_out_answers"] = left_out
            parts = " and ".join(f"{counted(count, 'answer')} {why}" for why, count in left_out.items())
            note(f"{source}: left out {parts}, the first because {next(iter(self._reasons.values()))}")
        if counts["padding"]:
            facts["left_out_padding_rows"] = counts["padding"]
            note(f"{source}: left out {counted(counts['padding'], 'row')} of padding (one id, or none, in all slots).")
        if counts["cached"]:
            facts["left_out_cached_rows"] = counts["cached"]
            note(
                f"{source}: left out {counted(counts['cached'], 'row')} of cached or repeated prompts, which no "
                f"forward pass computed: keep them with --keep-cached."
            )
        if counts["lacking"]:
            facts["lacking_rows"] = counts["lacking"]
            note(f"{source}: {counted(counts['lacking'], 'row')} at the end lack in answers that tell their first one.")
        if counts["stopped"]:
            facts["aborted_in_their_prompts"] = counts["stopped"]
            what = counted(counts["stopped"], "answer")
            note(f"{source}: {what} aborted within the prompt: rows are taken as the first ones of the prompt.")
        if counts["last"]:
            what = counted(counts["last"], "answer")
            note(f"{source}: {what} with fewer rows than tokens and without a first position: taken as the last ones.")
        if counts["again"]:
            facts["left_out_rows_of_earlier_parts"] = counts["again"]
        if counts["repeated"]:
            facts["left_out_repeated_answers"] = counts["repeated"]
            again = counted(counts["repeated"], "answer")
            note(
                f"{source}: left out {again} with the rows of an earlier one of the same request; choices of one "
                f"request are distinguished by their index."
            )
        if counts["joined"]:
            facts["joined_answers"] = counts["joined"]
            continued = counted(counts["joined"], "answer")
            note(f"{source}: {continued} joined to the request of an earlier one, which it continues.")
        if self._starts - {0}:
            facts["first_position"] = f"{min(self._starts)} to {max(self._starts)}, from the numbers of tokens"
        return facts
