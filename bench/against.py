"""This build beside an earlier one, interleaved in one run: what `bench/speed.py --against COMMIT` measures.

Both are installed from commits into folders of their own (this one from the work tree as it is), without their
dependencies, which are the same. Figures are processor time, so that other programs count less.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
TRACE = str(ROOT / "traces" / "tiny-olmoe.h5")
# Serves one build: replays a trace for each line that it is sent, and answers with processor seconds.
SERVE = """
import json, sys, time
import moetrace as mt
traces = {}
for line in sys.stdin:
    name, shape = json.loads(line)
    if name not in traces:
        traces[name] = mt.generate_trace("qwen3-30b-a3b", seed=0, **shape)
        mt.replay(traces[name], policies="edge-ndp", jobs=1)
    start = time.process_time()
    total_s = mt.replay(traces[name], policies="edge-ndp", jobs=1).run.lanes[0].log.step["duration_s"].sum()
    print(json.dumps([time.process_time() - start, float(total_s)]), flush=True)
"""
SHAPES = {
    "`edge-ndp`, batch 1": {"requests": 8, "prompt": 8, "output": 512, "batch": 1},
    "`edge-ndp`, batch 256": {"requests": 256, "prompt": 8, "output": 128, "batch": 256},
}


class Build:
    """An installed build, and a process of it that replays on request."""

    def __init__(self, folder: Path, commit: str | None) -> None:
        source, self.home, self.cache = folder / "source", folder / "site", folder / "cache"
        self._process: subprocess.Popen[str] | None = None
        if commit is None:
            listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
            for name in filter(None, _said(listing).decode().split("\0")):
                if (ROOT / name).is_file():
                    (source / name).parent.mkdir(parents=True, exist_ok=True)
                    (source / name).write_bytes((ROOT / name).read_bytes())
        else:
            with tarfile.open(fileobj=BytesIO(_said(["git", "archive", commit]))) as archive:
                archive.extractall(source, filter="data")
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(self.home)]
        subprocess.run([*install, str(source)], check=True)

    def environment(self, cache: Path | None = None) -> dict[str, str]:
        """Return the environment of a command of this build."""
        return os.environ | {"PYTHONPATH": str(self.home), "NUMBA_CACHE_DIR": str(cache or self.cache)}

    def replay(self, name: str, shape: dict[str, int]) -> tuple[float, float]:
        """Replay a generated trace; return processor seconds, and the seconds that the machine would take."""
        if self._process is None:
            command = [sys.executable, "-c", SERVE]
            self._process = subprocess.Popen(
                command, env=self.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([name, shape]), file=self._process.stdin, flush=True)
        seconds, total_s = json.loads(self._process.stdout.readline())
        return seconds, total_s

    def command_s(self, arguments: list[str], *, cold: bool = False) -> float:
        """Return the processor seconds of a command, of a first run ever if ``cold``."""
        with tempfile.TemporaryDirectory() as fresh:
            environment = self.environment(Path(fresh) if cold else None)
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            command = [sys.executable, "-m", "moetrace", *arguments]
            subprocess.run(command, env=environment, cwd="/", capture_output=True, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def close(self) -> None:
        """End the process."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()


@contextlib.contextmanager
def builds(commit: str) -> Iterator[tuple[Build, Build]]:
    """Install this work tree and a commit; yield them."""
    with tempfile.TemporaryDirectory() as folder:
        pair = Build(Path(folder) / "new", None), Build(Path(folder) / "old", commit)
        try:
            yield pair
        finally:
            for build in pair:
                build.close()


def against(commit: str, pairs: int) -> list[tuple[str, ...]]:
    """Return the rows of a table: the medians of both builds, and the median of the ratios of each pair."""
    rows = [("what", "this build", f"{commit[:7]}", "ratio", "target")]
    with builds(commit) as (new, old), tempfile.TemporaryDirectory() as folder:
        for name, shape in SHAPES.items():
            if new.replay(name, shape)[1] != old.replay(name, shape)[1]:
                sys.exit(f"{name}: the two builds do not agree on the figures.")
            times = [(new.replay(name, shape)[0], old.replay(name, shape)[0]) for _ in range(pairs)]
            rows.append(_row(f"{name}, a replay", times, "≤ 1.03x"))
        replay = ["replay", TRACE]
        times = [(new.command_s(replay, cold=True), old.command_s(replay, cold=True)) for _ in range(pairs)]
        rows.append(_row("first replay ever of `traces/tiny-olmoe.h5`", times, "≤ 0.55x"))
        result, page = str(Path(folder) / "result"), str(Path(folder) / "report.html")
        new.command_s([*replay, "-o", result])
        report = ["report", result, "-o", page]
        times = [(new.command_s(report, cold=True), new.command_s(report)) for _ in range(pairs)]
        rows.append(_row("`moetrace report`, this build: nothing compiled yet, beside compiled before", times, "1.0x"))
        times = [(new.command_s(["--help"]), old.command_s(["--help"])) for _ in range(pairs)]
        rows.append(_row("`moetrace --help`", times, "≤ 0.15 s"))
    return rows


def _said(command: list[str]) -> bytes:
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout


def _row(name: str, times: list[tuple[float, float]], target: str) -> tuple[str, ...]:
    mine, theirs = (median(column) for column in zip(*times, strict=True))
    ratio = median(a / b for a, b in times)
    return name, f"{mine:.3g} s", f"{theirs:.3g} s", f"{ratio:.2f}x", target
