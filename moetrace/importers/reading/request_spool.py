"""Routing that an engine returns request by request: ids [tokens, planes, top_k] on their way into one capture."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moetrace.importers.captured import Capture, Hints, Part, kept_layers, without_zero_cells
from moetrace.importers.reading.spool import Spool
from moetrace.spec.errors import MoetraceError
from moetrace.trace.schema import BLOCK_BYTES, DECODE, PREFILL, absent_id, check_sizes, expert_dtype

UNKNOWN_PHASE = "unknown: every row is taken as prefill unless --as decode --prompt P says otherwise"


class RequestSpool:
    """Requests one after the other, spooled; engines give a plane to each layer, zeros to a dense one.

    What is zero in all slots of a cell becomes absent (no router chooses an expert twice), as -1 does.
    """

    def __init__(self, hints: Hints, source: Path) -> None:
        self._hints = hints
        self._spool: Spool | None = None
        self._inner = (0, 0)  # planes, top_k
        self._num_experts = hints.need("num_experts", source)
        self._rows: list[int] = []
        self._first: list[int] = []  # position of the first row of each request
        self._prompt: list[int | None] = []
        self._used = np.zeros(0, bool)  # [planes]: some id is neither 0 nor -1

    def add(self, where: str, ids: np.ndarray, first_position: int = 0, prompt: int | None = None) -> None:
        """Add a request: integers [tokens, planes, top_k] from `first_position` on, and the tokens of its prompt.

        Raises MoetraceError, beginning with `where`, if that is none, or unlike the requests before.
        """
        if ids.ndim != 3 or ids.dtype.kind not in "iu" or not ids.size:
            raise MoetraceError(f"{where} is {ids.dtype} {ids.shape}, not integers [tokens, layers, top_k].")
        if self._spool is None:
            self._begin(where, ids)
        if ids.shape[1:] != self._inner:
            raise MoetraceError(f"{where} has {ids.shape[1:]} (layers, top_k), but what came before {self._inner}.")
        if not 0 <= first_position < 2**31 - len(ids):
            raise MoetraceError(f"{where} would begin at position {first_position}.")
        assert self._spool is not None
        rows = max(1, BLOCK_BYTES // (ids.itemsize * self._inner[0] * self._inner[1]))
        for start in range(0, len(ids), rows):
            self._spool.append(experts=self._narrow(where, start, np.asarray(ids[start : start + rows])))
        self._rows.append(len(ids))
        self._first.append(first_position)
        self._prompt.append(prompt)

    def _begin(self, where: str, ids: np.ndarray) -> None:
        planes, top_k = ids.shape[1:]
        check_sizes(where, self._num_experts, top_k, planes, len(ids), 1)
        self._inner = (planes, top_k)
        self._used = np.zeros(planes, bool)
        self._spool = Spool(self._hints, self._num_experts, planes, top_k)

    def _narrow(self, where: str, first_row: int, ids: np.ndarray) -> np.ndarray:
        """The ids in the dtype of a trace, with its mark for absent."""
        num_experts, low = self._num_experts, 0
        if ids.dtype.kind == "i":
            low = int(ids.min())
        if low < -1 or int(ids.max()) >= num_experts:
            row, layer, slot = (int(i) for i in np.argwhere((ids < -1) | (ids >= num_experts))[0])
            raise MoetraceError(
                f"{where}: token {first_row + row}, layer {layer} holds the id {ids[row, layer, slot]}, but there are "
                f"{num_experts} experts."
            )
        absent = absent_id(num_experts)
        narrow = ids.astype(expert_dtype(num_experts))
        if low < 0:
            narrow[ids == -1] = absent
        narrow = without_zero_cells(narrow, absent)
        used = narrow != absent
        if self._inner[1] == 1:
            used &= narrow > 0
        self._used |= used.reshape(len(used), -1).any(axis=0).reshape(self._inner).any(axis=1)
        return narrow

    def capture(self, model: str, facts: dict[str, Any], sources: Sequence[Path]) -> Capture:
        """All requests in a row: their layers are the planes, less the dense ones if the model's layers say so."""
        if self._spool is None or not self._used.any():
            raise MoetraceError(f"{sources[0]} holds no routing: every id is 0 or -1.")
        spool = self._spool
        layers, dropped = kept_layers(self._used, self._hints)
        facts = facts | dropped
        if any(prompt is None for prompt in self._prompt):
            facts = facts | {"phase": UNKNOWN_PHASE}
        rows = np.array(self._rows)
        number = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)
        position = number + np.repeat(self._first, rows)
        decode_from = np.array([2**31 if prompt is None else prompt for prompt in self._prompt])
        return Capture(
            model=model,
            num_experts=self._num_experts,
            top_k=self._inner[1],
            layer_index=layers,
            expert_bytes=None,
            request=np.repeat(np.arange(rows.size), rows),
            position=position,
            phase=np.where(position < np.repeat(decode_from, rows), PREFILL, DECODE).astype(np.uint8),
            optional=(),
            facts=facts,
            parts=lambda: _of_layers(spool, layers if dropped else None),
            sources=tuple(sources),
        )


def _of_layers(spool: Spool, layers: np.ndarray | None) -> Iterator[Part]:
    for part in spool.parts():
        yield part if layers is None else {"experts": part["experts"][:, layers]}
