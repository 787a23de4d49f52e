"""Route logs in JSON lines, as patches of vLLM's `FusedMoE` write them (`VLLM_LOG_MOE=routes.jsonl`).

Layout as three public patches share it (vLLM 0.6.6, 0.11.2 and 0.15.1): a line
`{"type": "meta", "model_id", "vllm_version", "torch_version", "device", "seed", "layers_logged", "top_k"}`, in one of
them with `num_experts`, then a line for each token and logged layer,
`{"type": "route", "req_id", "token_idx", "layer", "topk_ids", "topk_weights"}`, layer by layer within a forward pass.

* The n-th route of each layer is of the n-th token, so that tokens need no key. In two of the patches `token_idx` is
  the row within the call, so it restarts with each forward pass, which gives the steps, and `req_id` is always the
  same; in the third it counts on, and is taken as the position.
* Phases are not recorded: every row is prefill unless `--as decode --prompt P` says otherwise.
* vLLM's warm-up is in these logs: thousands of leading rows that are all alike. The import keeps them; lint finds them.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from moetrace.importers.captured import MAX_WEIGHT, SPARSEST, Capture, Hints, Part
from moetrace.importers.reading.placeholders import Placeholders, advice
from moetrace.importers.reading.request_spool import UNKNOWN_PHASE
from moetrace.importers.reading.spool import GrowingArray, Spool
from moetrace.importers.reading.text import json_lines
from moetrace.spec.errors import MoetraceError, counted
from moetrace.trace.schema import BLOCK_BYTES, MAX_EXPERTS, PREFILL, absent_id, check_sizes, expert_dtype

MAX_LAYERS = 256  # each has temporary files of its own
_MOST_REFERENCES = 8  # layers that are tried
CHUNK_BYTES = 4 << 20  # its records take about five times as much as Python objects
Number = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Id = Annotated[int, msgspec.Meta(ge=-1, le=MAX_EXPERTS)]


class RouteHeader(msgspec.Struct, tag="meta"):
    """The header, once for each start of the engine."""

    model_id: str = ""
    vllm_version: str = ""
    num_experts: int | None = None
    top_k: Any = None


class Route(msgspec.Struct, tag="route", gc=False):
    """One token in one layer."""

    token_idx: Number
    layer: Annotated[int, msgspec.Meta(ge=0, lt=65535)]
    topk_ids: list[Id] | None
    topk_weights: list[float | None] | None = None  # null is how JSON says NaN
    req_id: str | int = ""


_LINE: Any = RouteHeader | Route
_Shape = tuple[int, int]  # ids of a route, and weights, -1 for none


def _shape(route: Route) -> _Shape:
    return len(route.topk_ids or ()), -1 if route.topk_weights is None else len(route.topk_weights)


def recognize(first: bytes, name: str) -> bool:
    """Whether a file that begins with these bytes has a route, or such a header, after headers of any kind."""
    for line in first.lstrip().split(b"\n"):
        try:
            record = msgspec.json.decode(line, type=_LINE)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return False
        if isinstance(record, Route) or b'"layers_logged"' in line or b'"vllm_version"' in line:
            return True
    return False


def read(sources: Sequence[Path], hints: Hints) -> list[Capture]:
    """A capture a file."""
    return [_read(path, hints) for path in sources]


def _read(path: Path, hints: Hints) -> Capture:
    """The capture of a file; if a line of the layer that tells the tokens was lost, another layer tells them."""
    try:
        return _Log(path, hints).capture()
    except _LostTokenError:
        found = json_lines(path, _LINE, abs, CHUNK_BYTES, cut=len, broken=len)
        layers = {route.layer: None for _, routes in found for route in routes if isinstance(route, Route)}
        for reference in list(layers)[1:_MOST_REFERENCES]:
            with suppress(_LostTokenError):
                return _Log(path, hints._replace(reading=abs), reference).capture()
        raise


class _LostTokenError(MoetraceError):
    """A line that was lost was of the layer whose routes say what each row is."""


class _Log:
    """The routes of a file, spooled by layer as they come; `reference` is the layer that tells the tokens."""

    def __init__(self, path: Path, hints: Hints, reference: int | None = None) -> None:
        self._reference = reference  # by default the first one
        self._early: list[Route] = []  # routes of tokens that the reference layer has not reached yet
        self._path, self._hints = path, hints
        self._meta = RouteHeader()
        self._num_experts = self._top_k = 0
        self._shapes: dict[int, _Shape] = {}  # of the routes of a layer
        self._full: _Shape = (0, -1)  # of one with top_k
        self._most = 0  # ids of a route that was used
        self._whole = False  # whether there was a piece of nothing but full routes
        self._optional: tuple[str, ...] = ()
        self._layers: dict[int, Spool] = {}  # the first is the one whose routes say what each row is
        self._requests: dict[str | int, int] = {}
        self._request, self._token = GrowingArray(), GrowingArray()  # of each row
        self._runs_on, self._last = True, -1  # token_idx counts up by 1 from line to line, across all layers
        self._cut_line = ""  # what is wrong with the last line
        self._broken: list[str] = []  # and with others that can't be read
        self._odd: MoetraceError | None = None  # of the first odd route
        self._mended = 0  # routes that these lines lack
        self._unknown_gates = self._odd_routes = self._routes = 0  # the last, before those that are being added
        for _, records in json_lines(path, _LINE, hints.reading, CHUNK_BYTES, cut=self._cut, broken=self._lose):
            for record in records:
                if isinstance(record, RouteHeader):
                    self._meta = record
            routes = [record for record in records if isinstance(record, Route)]
            if routes:
                self._add(routes)
                self._routes += len(routes)
        if self._early:
            self._add([], last=True)
        if self._early:
            raise _LostTokenError(self._broken[0])

    def _cut(self, sentence: str) -> None:
        if self._hints.strict:
            raise MoetraceError(sentence)
        self._cut_line = sentence

    def _lose(self, sentence: str) -> None:
        if self._hints.strict:
            raise MoetraceError(sentence)
        self._broken.append(sentence)

    def _add(self, routes: list[Route], last: bool = False) -> None:
        if not self._layers:
            self._begin(routes)
        routes, self._early = self._early + routes, []
        choices, weights = self._choices(routes)
        layer = np.fromiter((route.layer for route in routes), np.int64, len(routes))
        token = np.fromiter((route.token_idx for route in routes), np.int64, len(routes))
        number = self._requests
        request = np.fromiter((number.setdefault(r.req_id, len(number)) for r in routes), np.int64, len(routes))
        self._runs_on &= bool((np.diff(token, prepend=self._last) == 1).all())
        self._last = int(token[-1])
        # The reference first, then the others in the order in which they come: all layers of a pass follow it.
        _, first_at = np.unique(layer, return_index=True)
        for index in dict.fromkeys([*self._layers, *layer[np.sort(first_at)].tolist()]):
            of_layer = np.flatnonzero(layer == index)
            if self._reference is not None and index != self._reference:
                told = self._token.size - (self._layers[index].rows if index in self._layers else 0)
                told = max(0, told - (0 if last else len(self._broken) - self._mended))  # which may stand before
                self._early += [routes[at] for at in of_layer[told:].tolist()]
                of_layer = of_layer[:told]
            if of_layer.size:
                arrays = {"experts": choices[of_layer, None]}
                if weights is not None:
                    arrays["gates"] = weights[of_layer, None]
                self._append(index, of_layer, request[of_layer], token[of_layer], arrays)

    def _begin(self, routes: list[Route]) -> None:
        self._num_experts = self._meta.num_experts or self._hints.need("num_experts", self._path)
        weights = Counter(weights for ids, weights in map(_shape, routes) if ids and weights in (-1, ids))
        if not weights:
            ids, of_first = _shape(routes[0])
            raise self._wrong(0, f"has {of_first} weights for {ids} ids" if ids else "has no ids, as others")
        self._optional = () if weights.most_common(1)[0][0] < 0 else ("gates",)
        self._learn(routes)
        self._most = max(ids for ids, _ in self._shapes.values())
        # The layer with the most ids may come later.
        header = self._meta.top_k if type(self._meta.top_k) is int else 0
        self._top_k = max(self._most, min(max(header, self._hints.top_k or 0), self._num_experts))
        self._full = (self._top_k, self._top_k if self._optional else -1)
        check_sizes(str(self._path), self._num_experts, self._top_k, 1, 1, 1)
        self._placeholders = Placeholders(self._num_experts, self._hints)
        self._sizes = self._hints, self._num_experts, 1, self._top_k, self._optional
        self._layers = {} if self._reference is None else {self._reference: Spool(*self._sizes)}

    def _learn(self, routes: list[Route]) -> None:
        """Record the usual shape of the layers that have no shape yet."""
        found: dict[int, Counter[_Shape]] = defaultdict(Counter)
        for (layer, (ids, weights)), number in Counter((route.layer, _shape(route)) for route in routes).items():
            if layer not in self._shapes and ids and weights == (ids if self._optional else -1):
                found[layer][ids, weights] = number
        self._shapes |= {layer: shapes.most_common(1)[0][0] for layer, shapes in found.items()}

    def _choices(self, routes: list[Route]) -> tuple[np.ndarray, np.ndarray | None]:
        """Ids and weights [routes, top_k] in the dtypes of a trace."""
        self._leave_out_odd(routes)
        shape, size = (len(routes), self._top_k), len(routes) * self._top_k
        ids = np.fromiter(chain.from_iterable(r.topk_ids or () for r in routes), np.int32, size).reshape(shape)
        ids, negative, wrong = self._placeholders.checked(ids)
        if wrong is not None:
            number, expert = wrong[0], int(ids[wrong])
            advised = advice(expert, self._num_experts)
            raise self._wrong(number, f"has the id {expert}, but there are {self._num_experts} experts{advised}")
        narrow = ids.astype(expert_dtype(self._num_experts))
        if negative:
            narrow[ids < 0] = absent_id(self._num_experts)
        if not self._optional:
            return narrow, None
        gates = np.fromiter(chain.from_iterable(r.topk_weights or () for r in routes), np.float64, size).reshape(shape)
        if (unknown := np.isnan(gates)).any():  # null, as which NaN was read
            if self._hints.strict:
                raise self._wrong(int(unknown.any(axis=1).argmax()), "has a weight that is no number")
            self._unknown_gates += int(unknown.sum())
        if (beyond := (np.abs(gates) > MAX_WEIGHT).any(axis=1)).any():
            raise self._wrong(int(np.argmax(beyond)), f"has a weight beyond {MAX_WEIGHT:g}")
        return narrow, gates.astype(np.float16)

    def _leave_out_odd(self, routes: list[Route]) -> None:
        """Make routes of another shape than others of their layer absent: their tokens must still be counted.

        Layers may choose fewer experts than others: the rest of their slots is absent.
        """
        if self._all_full(routes):
            self._most, self._whole = self._top_k, True
            return
        if not self._whole:
            self._learn(routes)
        for number, route in enumerate(routes):
            shape, expected = _shape(route), self._shapes.get(route.layer, self._full)
            if shape == expected and shape[0] <= self._top_k:
                kept, gates = route.topk_ids or [], route.topk_weights or []
                self._most = max(self._most, shape[0])
            else:
                many = "no" if shape[1] < 0 else shape[1]
                what = f"has {shape[0]} ids and {many} weights, unlike others of its layer"
                self._odd = self._odd or self._wrong(number, what)
                self._odd_routes += 1
                if self._hints.strict:
                    raise self._odd
                kept, gates = [], []
            route.topk_ids = kept + [-1] * (self._top_k - len(kept))
            none: list[float | None] = [0.0] * (self._top_k - len(gates))
            route.topk_weights = gates + none if self._optional else None

    def _all_full(self, routes: list[Route]) -> bool:
        """Whether all have `top_k` ids, and weights where the log has such; a call for each would take a tenth."""
        if set(map(len, [route.topk_ids or () for route in routes])) != {self._full[0]}:
            return False
        if not self._optional:
            return {route.topk_weights is None for route in routes} == {True}
        return set(map(len, [route.topk_weights or () for route in routes])) == {self._full[1]}

    def _append(self, index: int, at: np.ndarray, request: np.ndarray, token: np.ndarray, arrays: Part) -> None:
        """Append routes of one layer, `at` among those being added, if they are of the first layer's tokens."""
        if index not in self._layers:
            if len(self._layers) == MAX_LAYERS:
                raise MoetraceError(f"{self._path} has more than {MAX_LAYERS} layers.")
            self._layers[index] = Spool(*self._sizes)
        reference, spool = next(iter(self._layers)), self._layers[index]
        if index == reference:
            self._request.add(request)
            self._token.add(token)
        if self._broken and index != reference:
            at, request, token, arrays = self._with_lost(spool.rows, at, request, token, arrays)
        rows = slice(spool.rows, spool.rows + at.size)
        known = self._request.array[rows]
        other = known != request[: known.size]
        if not self._runs_on:
            other |= self._token.array[rows] != token[: known.size]
        if self._broken and (other.any() or known.size < at.size):
            raise _LostTokenError(self._broken[0])
        if other.any() or known.size < at.size:
            number = int(at[int(np.argmax(other)) if other.any() else known.size])
            raise self._wrong(number, f"of layer {index} is of another token than that of layer {reference}")
        spool.append(**arrays)

    def _with_lost(
        self, row: int, at: np.ndarray, request: np.ndarray, token: np.ndarray, arrays: Part
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, Part]:
        """Routes of one layer from `row` on, with absent ones for tokens whose lines may have been lost."""
        requests, tokens = self._request.array[row:], self._token.array[row:]
        shift, place = 0, np.arange(at.size)
        for number, key in enumerate(zip(request.tolist(), token.tolist(), strict=True)):
            most = min(len(self._broken) - self._mended, tokens.size - number - 1)
            while shift < most and (requests[number + shift], tokens[number + shift]) != key:
                shift += 1
            place[number] += shift
        size = at.size + shift
        if not shift or size > tokens.size:
            return at, request, token, arrays
        self._mended += shift
        lost = {"experts": self._placeholders.absent, "gates": 0}
        filled = {name: np.full((size, *array.shape[1:]), lost[name], array.dtype) for name, array in arrays.items()}
        new_request, new_token, new_at = requests[:size].copy(), tokens[:size].copy(), np.zeros(size, np.int64)
        new_request[place], new_token[place], new_at[place] = request, token, at
        for name, array in arrays.items():
            filled[name][place] = array
        return new_at, new_request, new_token, filled

    def _wrong(self, number: int, what: str) -> MoetraceError:
        return MoetraceError(f"{self._path}: route {self._routes + number} (from 0) {what}.")

    def _told(self) -> dict[str, Any]:
        """The entries in `source` on absent routes and unknown weights, also given as notes."""
        facts, note = self._placeholders.told(str(self._path)), self._hints.note
        if self._odd:
            facts["absent_routes_of_another_shape"] = self._odd_routes
            routes = counted(self._odd_routes, "route")
            note(f"{self._path}: {routes} of another shape are absent, the first because {self._odd}")
        if self._cut_line:
            facts["left_out_cut_lines"] = 1
            note(f"{self._path}: left out a last line that was cut: {self._cut_line}")
        if self._broken:
            facts["left_out_broken_lines"] = len(self._broken)
            lines = counted(len(self._broken), "line")
            note(f"{self._path}: left out {lines} that can't be read, the first because {self._broken[0]}")
        if self._unknown_gates:
            facts["unknown_weights"] = self._unknown_gates
            note(f"{self._path}: {counted(self._unknown_gates, 'weight')} of NaN left unknown in the trace.")
        return facts

    def _note_batches(self, step_rows: np.ndarray | None, requests: int) -> None:
        """Say what the log does not know of a continuous batch, whose rows are of several requests."""
        if requests > 1:
            return
        if step_rows is not None:
            what = f"requests are not recorded, so the rows of all {step_rows.size:,} passes are taken as one"
            what += "; --as decode --steps A:B says which passes decode"
        else:
            what = "neither forward passes nor requests are recorded: all rows are taken as one prompt in one step"
            what += "; --as decode --prompt P tells a prompt apart, if it is one request and no continuous batch"
        self._hints.note(f"{self._path}: {what}.")

    def capture(self) -> Capture:
        if self._broken and len(self._broken) * 2 >= self._routes:
            raise MoetraceError(self._broken[0])
        if not self._layers:
            raise MoetraceError(f"{self._path} has no lines of routing.")
        rows = self._token.size
        if rows * len(self._layers) > SPARSEST * self._routes:
            raise MoetraceError(
                f"{self._path}: {self._routes} routes are too few for {rows} tokens in {len(self._layers)} layers."
            )
        if self._odd and self._odd_routes * 2 >= self._routes:
            raise self._odd
        for spool in self._layers.values():
            spool.grow(rows)
        layers = np.array(sorted(self._layers))
        request, token = self._request.array, self._token.array
        facts: dict[str, Any] = {"format": "jsonl", "engine": "vLLM", "phase": UNKNOWN_PHASE}
        if self._meta.vllm_version:
            facts["version"] = self._meta.vllm_version[:100]
        facts |= self._told()
        order = np.argsort(request, kind="stable")
        same = request[order][1:] == request[order][:-1]
        counts_on = bool((np.diff(token[order])[same] > 0).all())
        step_rows = None
        if counts_on:
            position = token
            facts["passes"] = "not recorded: token_idx only counts up"
        else:
            facts["requests"] = "not recorded: token_idx is the row within a forward pass"
            begins = np.r_[True, (np.diff(token) != 1) | (np.diff(request) != 0)]
            step_rows = np.diff(np.r_[np.flatnonzero(begins), rows])
            position = np.empty(rows, np.int32)
            first = np.maximum.accumulate(np.where(np.r_[True, ~same], np.arange(rows), 0))
            position[order] = np.arange(rows) - first
        self._note_batches(step_rows, int(np.unique(request).size))
        return Capture(
            model=self._meta.model_id[:200],
            num_experts=self._num_experts,
            top_k=self._most,
            layer_index=layers,
            expert_bytes=None,
            request=request,
            position=position,
            phase=np.full(rows, PREFILL, np.uint8),
            optional=self._optional,
            facts=facts,
            parts=lambda: _parts([self._layers[index] for index in layers.tolist()], rows, self._most),
            sources=(self._path,),
            step_rows=step_rows,
        )


def _parts(layers: list[Spool], rows: int, top_k: int) -> Iterator[Part]:
    """The rows of all layers side by side, some MiB at a time."""
    at_once = max(1, BLOCK_BYTES // sum(spool.row_bytes for spool in layers))
    for start in range(0, rows, at_once):
        parts = [spool.read(start, min(start + at_once, rows)) for spool in layers]
        yield {name: np.concatenate([part[name][..., :top_k] for part in parts], axis=1) for name in parts[0]}
