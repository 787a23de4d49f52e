"""What the tests of `moetrace record` share: servers that end with the test, and a folder with prompts."""

import contextlib
from types import SimpleNamespace

import pytest
from support.engine_server import EXPERTS, TOP_K, EngineServer

from moetrace.importers.captured import Hints
from moetrace.recording.asks import Settings
from moetrace.recording.live import record
from moetrace.spec.errors import MoetraceError
from moetrace.trace import Trace

PROMPTS = [f"the prompt of number {n} has" + " words" * (n % 3) for n in range(12)]


@pytest.fixture
def serve():
    """Start a server; it is ended with the test."""
    with contextlib.ExitStack() as stack:

        def serve(engine="vllm", **options) -> EngineServer:
            server = EngineServer(engine, **options)
            stack.callback(server.close)
            return server

        yield serve


@pytest.fixture
def recorded(tmp_path):
    """Record from a server into one trace; return what was noted, the trace (None if refused) and the sentence."""

    def recorded(server, prompts=PROMPTS, *, name="prompts.txt", **options):
        path, out, notes = tmp_path / name, tmp_path / "out.h5", []
        path.write_text(prompts if isinstance(prompts, str) else "".join(f"{prompt}\n" for prompt in prompts))
        asked = {key: options.pop(key) for key in Settings._fields if key in options}
        hints = {"num_experts": EXPERTS, "top_k": TOP_K, "note": notes.append} | options.pop("hints", {})
        options = {"timeout_s": 20.0, "retries": 0} | options
        url = server if isinstance(server, str) else server.url
        settings = Settings(**({"max_tokens": 4} | asked))
        said = SimpleNamespace(notes=notes, out=out, answers=tmp_path / "out.h5.answers.jsonl", trace=None, error="")
        try:
            said.failed = record(url, path, out, hints=Hints(**hints), settings=settings, **options)
        except MoetraceError as error:
            assert not out.exists() and "\n" not in str(error) and str(error).endswith("."), str(error)
            said.error = str(error)
            return said
        with Trace.open(out) as trace:
            trace.verify()
        said.trace = Trace.open(out)
        return said

    return recorded
