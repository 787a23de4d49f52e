"""`moetrace warm`: what it runs is all that commands compile, and it says nothing of what it runs."""

from pathlib import Path

import pytest

from moetrace.cli import main
from moetrace.jit.compile import PURE_PYTHON, Kernel

SHIPPED = Path(__file__).parents[2] / "traces"
compiled = pytest.mark.skipif(PURE_PYTHON, reason="nothing is compiled")


@pytest.fixture
def called(monkeypatch) -> set[tuple[str, str]]:
    """Name and types of each kernel that Python calls."""
    from numba import typeof

    seen: set[tuple[str, str]] = set()
    call = Kernel.__call__

    def note(kernel: Kernel, *arguments):
        seen.add((kernel.py_func.__qualname__, str(tuple(map(typeof, arguments)))))
        return call(kernel, *arguments)

    monkeypatch.setattr(Kernel, "__call__", note)
    return seen


@compiled
def test_commands_need_nothing_more(called, tmp_path, capsys):
    main(["warm"])
    out, err = capsys.readouterr()
    names = [line.split(":")[0] for line in err.splitlines() if "ready, after" in line]
    assert names == ["analyze", "generate", "replay"] and not out
    warmed = set(called)
    called.clear()
    for trace in (SHIPPED / "tiny-olmoe.h5", SHIPPED / "mixtral-8x7b-b16.h5"):
        main(["replay", str(trace), "-o", str(tmp_path / "result")])
        main(["replay", str(trace), "--system", "rtx4090-ddr5", "--set", "system.host.memory_gb=1000"])
        main(["analyze", "cache", str(trace), "--capacity", "20"])
        main(["analyze", "balance", str(trace), "--units", "4"])
        main(["analyze", "balance", str(trace), "--units", "8", "--redundant", "8", "--copies", "row"])
        main(["analyze", "prefetch", str(trace), "--capacity", "20"])
        main(["analyze", "locality", str(trace), "--no-pairs"])
    sizes = ["--requests", "2", "--prompt", "3", "--output", "4"]
    main(["generate", str(tmp_path / "g.h5"), "--model", "deepseek-v3", *sizes])
    main(["replay", str(tmp_path / "g.h5"), "--ignore-capacity", "--slots", "500"])
    main(["analyze", "cache", str(tmp_path / "g.h5"), "--capacity", "300"])
    assert len(called) > 20 and not (called - warmed)


@compiled
def test_only_named_commands_are_made_ready(called, capsys):
    main(["warm", "sweep", "replay"])
    assert {line.split(":")[0] for line in capsys.readouterr().err.splitlines()} == {"replay"}
    with pytest.raises(SystemExit) as stop:
        main(["warm", "lint"])
    assert stop.value.code == 2
