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
# Serves one build: replays a trace for each line that it is sent, and answers with seconds an access (processor time,
# and by the clock), and with the seconds that the machine would take.
SERVE = """
import json, sys, time
import numpy as np
import moetrace as mt
traces, compiled = {}, set()
def replay(trace, policies, jobs):
    return mt.replay(trace, policies=policies, jobs=jobs).run.lanes[0].log.step["duration_s"].sum()
def count_ids(trace, policies, jobs):
    for block in trace.blocks():
        np.bincount(block.experts.reshape(-1), minlength=trace.num_experts)
    return 0.0
for line in sys.stdin:
    shape, policies, jobs = json.loads(line)
    key = json.dumps(shape)
    if key not in traces:
        traces[key] = mt.generate_trace("qwen3-30b-a3b", seed=0, **shape)
    work = replay if policies else count_ids
    if line not in compiled:
        compiled.add(line)
        work(traces[key], policies, jobs)
    trace = traces[key]
    start = time.process_time(), time.perf_counter()
    total_s = work(trace, policies, jobs)
    taken = time.process_time() - start[0], time.perf_counter() - start[1]
    accesses = trace.rows * trace.layers * trace.top_k
    print(json.dumps([taken[0] / accesses, taken[1] / accesses, float(total_s)]), flush=True)
"""
_DRAWN = {"zipf": 0.6, "stick": 0.3}
SHAPES: dict[str, dict[str, float]] = {
    "a request of 16 + 2,000": {"requests": 1, "prompt": 16, "output": 2000, "batch": 1, **_DRAWN},
    "256 of 16 + 24 at batch 256": {"requests": 256, "prompt": 16, "output": 24, "batch": 256, **_DRAWN},
    "256 of 64 + 192 at batch 256": {"requests": 256, "prompt": 64, "output": 192, "batch": 256, **_DRAWN},
}
# Replayed by two threads at once.
MANY = ["edge-ndp", "edge-ndp-tp", "edge-ndp-tp-lb", "monde", "ndp-ep", "ndp-tp", "hybrid", "on-demand", "fiddler"]


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

    def replay(self, shape: dict[str, float], policies: list[str], jobs: int = 1) -> tuple[float, float, float]:
        """Replay a generated trace, or count its ids if there is no policy.

        Returns processor seconds an access, seconds by the clock, and the seconds that the machine would take.
        """
        if self._process is None:
            command = [sys.executable, "-c", SERVE]
            self._process = subprocess.Popen(
                command, env=self.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([shape, policies, jobs]), file=self._process.stdin, flush=True)
        processor_s, clock_s, total_s = json.loads(self._process.stdout.readline())
        return processor_s, clock_s, total_s

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
        edge = ["edge-ndp"]
        for name, shape in SHAPES.items():
            if new.replay(shape, edge)[2] != old.replay(shape, edge)[2]:
                sys.exit(f"{name}: the two builds do not agree on the figures.")
            times = [(new.replay(shape, edge)[0], old.replay(shape, edge)[0]) for _ in range(pairs)]
            rows.append(_row_of_accesses(f"`edge-ndp`, {name}", times, "≤ 0.65x"))
            times = [(new.replay(shape, [])[0], new.replay(shape, edge)[0]) for _ in range(pairs)]
            rows.append(_row_of_accesses("- this build: NumPy counts its ids, beside `edge-ndp`", times, "the limit"))
            times = [(new.replay(shape, ["foresee"])[0], new.replay(shape, edge)[0]) for _ in range(pairs)]
            target = "≤ 2x" if shape["batch"] == 1 else ""
            rows.append(_row_of_accesses("- this build: `foresee`, beside `edge-ndp`", times, target))
            times = [(new.replay(shape, MANY, 2)[1], new.replay(shape, MANY)[1]) for _ in range(pairs)]
            what = f"- this build: {len(MANY)} policies by two threads, beside one, by the clock"
            rows.append(_row_of_accesses(what, times, "≤ 0.54x"))
        replay = ["replay", TRACE]
        times = [(new.command_s(replay, cold=True), old.command_s(replay, cold=True)) for _ in range(pairs)]
        rows.append(_row("first replay ever of `traces/tiny-olmoe.h5`", times, "≤ 1.03x"))
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


def _row_of_accesses(name: str, times: list[tuple[float, float]], target: str) -> tuple[str, ...]:
    """The same of times an access, in ns."""
    mine, theirs = (1e9 * median(column) for column in zip(*times, strict=True))
    ratio = median(a / b for a, b in times)
    return name, f"{mine:.1f} ns", f"{theirs:.1f} ns", f"{ratio:.2f}x", target
