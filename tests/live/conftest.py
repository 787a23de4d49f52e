"""What tests of `moetrace record` share."""

import pytest
from support.engine_server import EngineServer
from support.recorded import PROMPTS, written

from moetrace.live import crew


@pytest.fixture(params=["vllm", "sglang"])
def engine(request):
    return request.param


@pytest.fixture
def serve():
    """Start servers that end with the test."""
    started: list[EngineServer] = []

    def serve(engine: str, **given) -> EngineServer:
        started.append(EngineServer(engine, **given))
        return started[-1]

    yield serve
    for server in started:
        server.close()


@pytest.fixture
def prompts(tmp_path):
    return written(tmp_path, PROMPTS)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(crew, "FIRST_WAIT_S", 0.01)
