"""Whether an importer can use an answer, seen when it comes: a server without routing is not asked for much."""

import threading
from pathlib import Path

import msgspec

from moetrace.importers import sglang_request, vllm
from moetrace.importers.captured import Hints
from moetrace.importers.reading.request_spool import RequestSpool
from moetrace.importers.reading.responses import Response
from moetrace.spec.errors import MoetraceError
from moetrace.trace.schema import check_ids

FORMATS = {"vllm": "vllm", "sglang": "sglang-request"}  # engine -> the importer of its answers


class Checker:
    """Checks answers; may be used by several threads at once.

    The first good answer says how many layers all others have: SGLang's do not say it, and a wrong number of tokens
    would pass as another number of layers, which the importer of all answers then refuses.
    """

    def __init__(self, engine: str, hints: Hints) -> None:
        self._engine, self._hints = engine, hints
        self._planes = 0
        self._lock = threading.Lock()

    def check(self, answer: bytes, where: str) -> None:
        """Raise MoetraceError, beginning with `where`, unless the importer makes rows of all of this answer.

        It also must give the numbers of prompt and output tokens, since only they separate prompt rows from output
        rows.
        """
        planes = _planes_of(answer, self._engine, where, self._hints, self._planes)
        with self._lock:
            self._planes = self._planes or planes
        if planes != self._planes:
            raise MoetraceError(f"{where} has {planes} layers, but the first answer had {self._planes}.")


def _planes_of(answer: bytes, engine: str, where: str, hints: Hints, planes: int) -> int:
    """How many layers a good answer has, with dense ones; `planes` are expected, unless that is 0."""
    try:
        response = msgspec.json.decode(answer, type=Response)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MoetraceError(f"{where} is not as expected: {str(error).rstrip('.')[:200]}.") from None
    requests = RequestSpool(hints._replace(strict=True, keep_cached=True, note=lambda _: None), Path(where))
    if engine == "sglang":
        sglang_request.add_response(requests, where, response, hints, planes)
    else:
        vllm.add_response(requests, where, response)
    capture = requests.capture("", {}, [Path(where)])
    if "phase" in capture.facts:
        raise MoetraceError(f"{where} does not say how many tokens are its prompt's and its output's.")
    row = 0
    for part in capture.parts():
        check_ids(where, row, part["experts"], capture.num_experts)
        row += len(part["experts"])
    return requests.planes
