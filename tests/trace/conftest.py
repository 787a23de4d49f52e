from pathlib import Path

import pytest
from support.drawn_traces import draw_trace


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "t.h5"
    draw_trace(1, 8, mixed=True).write(path)
    return path
