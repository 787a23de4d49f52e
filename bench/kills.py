"""Kill commands at random moments, and look what is left: nothing finished lost, nothing half accepted, no process.

    nice python bench/kills.py [--kills 100] [--seed 0] [--only COMMAND] [--show]

Writes the table of docs/security.md, section "Kills" (`--show` only prints it). Each command writes over an older
output of its own. A run to its end first, with a warm compile cache, says how long it takes and what it writes. Then
each kill is one of SIGKILL, SIGTERM, SIGHUP and SIGINT in turn, half of them at any moment of the run, and half of them
within 100 ms after the first hidden file of the output appears, where the writing is. SIGINT and SIGHUP go to
the whole process group, as a terminal sends them; SIGKILL and SIGTERM only to the command.

What is read afterwards is read by moetrace's own readers: it must be the older output or the new one, whole. A replay
and a sweep, which leave more than one file, are then run again, and must end with the new one.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from markers import write_between

from moetrace.batch.baseline import read_baseline
from moetrace.batch.sweep_folder import SweepFolder
from moetrace.results.folder import read_cells, read_sweep
from moetrace.results.publish import COMMITTED, file_in
from moetrace.results.record import RESULT_FILES
from moetrace.results.replayed import read_replayed
from moetrace.results.swept import read_swept
from moetrace.trace import Trace

ROOT = Path(__file__).parents[1]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
MARK = "MOETRACE_KILLS"
AFTER_S = 0.1  # of the first hidden file
GRACE_S = 10.0  # for processes to end after their command
LIMIT_S = 300.0
MADE = ["--model", "tiny-olmoe", "--batch", "8"]
SWEEP = 'trace = "t.h5"\npolicy = ["monde", "edge-ndp", "on-demand"]\nslots = {slots}\n'


@dataclass(frozen=True)
class Run:
    """What a command does that nobody kills: how long it takes, and what is read before and after it."""

    seconds: float
    older: object
    new: object


@dataclass(frozen=True)
class Case:
    """A command, its output, the older one that it is run over, and what our readers say of it.

    `read` raises if the output is half, and returns what it holds. `watched` is where hidden files appear. `resumes`:
    what a kill leaves is picked up by the next run.
    """

    name: str
    words: list[str]
    older: list[str]
    output: str
    read: Callable[[Path], object]
    watched: str = "."
    resumes: bool = False


def trace_of(path: Path) -> object:
    with Trace.open(path) as trace:
        trace.verify_hashes()
        return trace.content_sha256


def result_of(folder: Path) -> object:
    """The bytes of each file as our readers find it, after they accepted all."""
    read_replayed(folder)
    read_cells(folder)
    files = {name: file_in(folder, name) for name in RESULT_FILES}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if path.exists()}


def sweep_of(folder: Path) -> object:
    """Which tables lie in a sweep's folder; every cell in it must be whole, or refused."""
    kept = SweepFolder(folder, reads=True)
    cells = sorted(path.stem for path in (folder / "cells").glob("*.json") if not path.name.startswith("."))
    half = [key for key in cells if kept.finished(key) is None]
    if half:
        raise ValueError(f"{len(half)} half cells")
    read_swept(folder)
    read_cells(folder)
    return sorted(cell["name"] for cell in read_sweep(folder)[0].cells)


def page_of(path: Path) -> object:
    page = path.read_bytes()
    if not page.endswith(b"</html>\n"):
        raise ValueError("half a page")
    return hashlib.sha256(page).hexdigest()


CASES = [
    Case("import", ["import", "n.npz", "-o", "out.h5"], ["import", "o.npz", "-o", "out.h5"], "out.h5", trace_of),
    Case(
        "generate",
        [
            "generate",
            "out.h5",
            "--model",
            "tiny-olmoe",
            "--requests",
            "64",
            "--prompt",
            "32",
            "--output",
            "128",
            "--batch",
            "8",
        ],
        ["generate", "out.h5", *MADE, "--requests", "2", "--prompt", "8", "--output", "8"],
        "out.h5",
        trace_of,
    ),
    Case(
        "replay -o",
        ["replay", "t.h5", "--slots", "48", "-o", "out"],
        ["replay", "t.h5", "--slots", "8", "--policy", "on-demand", "--timeline", "-o", "out"],
        "out",
        result_of,
        "out",
        True,
    ),
    Case(
        "sweep -o",
        ["sweep", "new.toml", "--jobs", "2", "-o", "out"],
        ["sweep", "old.toml", "--jobs", "2", "-o", "out"],
        "out",
        sweep_of,
        "out",
        True,
    ),
    Case(
        "gate --update",
        ["gate", "new", "--baseline", "out.json", "--update"],
        ["gate", "old", "--baseline", "out.json", "--update"],
        "out.json",
        read_baseline,
    ),
    Case("report -o", ["report", "new", "-o", "out.html"], ["report", "old", "-o", "out.html"], "out.html", page_of),
]


def environment(mark: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), MARK: mark}


def moetrace(words: list[str], folder: Path, mark: str = "") -> subprocess.Popen:
    with (folder / "stderr.txt").open("wb") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "moetrace", *words],
            cwd=folder,
            env=environment(mark),
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )


def finished(words: list[str], folder: Path) -> float:
    """Run to the end; return how long that took."""
    start = time.monotonic()
    code = moetrace(words, folder).wait(LIMIT_S)
    if code:
        raise SystemExit(f"moetrace {' '.join(words)} ended with {code}: {(folder / 'stderr.txt').read_text()}")
    return time.monotonic() - start


def inputs(folder: Path) -> None:
    """Write what the commands read."""
    for name, requests, slots in (("t", 32, 0), ("o", 2, 8), ("n", 64, 48)):
        sizes = ["--requests", f"{requests}", "--prompt", "32", "--output", "64"]
        finished(["generate", f"{name}.h5", *MADE, *sizes], folder)
        if slots:
            finished(["export", f"{name}.h5", "-o", f"{name}.npz"], folder)
            finished(["replay", "t.h5", "--slots", f"{slots}", "-o", {"o": "old", "n": "new"}[name]], folder)
    (folder / "old.toml").write_text(SWEEP.format(slots=[8]))
    (folder / "new.toml").write_text(SWEEP.format(slots=[8, 16, 24, 32, 40, 48]))


def hidden(folder: Path) -> set[Path]:
    """Hidden files in a folder, and in the cells of a sweep; those in hidden folders, too."""
    found = {path for place in (folder, folder / "cells") for path in place.glob(".*") if path.is_file()}
    return found | set(folder.glob(".moetrace-*/*"))


def alive(mark: str) -> list[int]:
    """Processes that began with this mark in their environment."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:  # it has ended, or is another user's
                continue
    return found


def killed(case: Case, folder: Path, number: int, run: Run, chance: random.Random) -> Counter:
    """Kill one run, and say what was seen."""
    mark, sign = f"{os.getpid()}-{case.name}-{number}", SIGNALS[number % len(SIGNALS)]
    watched = folder / case.watched
    known = hidden(watched)
    process = moetrace(case.words, folder, mark)
    start = time.monotonic()
    if number // len(SIGNALS) % 2:
        while process.poll() is None and not hidden(watched) - known and time.monotonic() - start < LIMIT_S:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, AFTER_S))
    else:
        time.sleep(chance.uniform(0, run.seconds))
    saw = Counter(kills=1, ended_first=process.poll() is not None)
    if process.poll() is None:
        group = sign in (signal.SIGHUP, signal.SIGINT)
        (os.killpg if group else os.kill)(process.pid, sign)
    process.wait(LIMIT_S)
    deadline = time.monotonic() + GRACE_S
    while (left := alive(mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    saw["processes"] = len(left)
    for one in left:
        os.kill(one, signal.SIGKILL)
    errors = (folder / "stderr.txt").read_text(errors="replace")
    if "Traceback" in errors and f"{os.sep}moetrace{os.sep}" in errors:  # not while Python itself still starts
        saw["tracebacks"] = 1
        print(f"  {case.name}, {sign.name}:\n{errors}", file=sys.stderr)
    return saw + Counter(hidden_left=bool(hidden(watched) - known)) + looked_at(case, folder, run)


def looked_at(case: Case, folder: Path, run: Run) -> Counter:
    """Say whether the output is the older one, or the new one, or neither; and whether the next run ends well."""
    try:
        now = case.read(folder / case.output)
    except Exception as error:  # noqa: BLE001  every error is counted and shown
        print(f"  {case.name}: {type(error).__name__}: {error}", file=sys.stderr)
        return Counter(refused=1)
    saw = Counter(older=now == run.older, new=now == run.new, mixed=now not in (run.older, run.new))
    if case.resumes:
        finished(case.words, folder)
        waits = os.path.lexists(folder / case.output / COMMITTED)
        saw["not_finished"] = waits or case.read(folder / case.output) != run.new
    return saw


def table(found: dict[str, Counter]) -> str:
    """The table of the page."""
    heads = {
        "kills": "kills",
        "ended_first": "ended before",
        "older": "older output",
        "new": "new output",
        "mixed": "mixed or lost",
        "refused": "refused by a reader",
        "processes": "processes left",
        "tracebacks": "tracebacks",
        "not_finished": "not mended by the next run",
        "hidden_left": "left a hidden file",
    }
    lines = [f"| command | {' | '.join(heads.values())} |", f"| --- |{' ---: |' * len(heads)}"]
    found = {**found, "all": sum(found.values(), Counter())}
    for name, counts in found.items():
        label = name if name == "all" else f"`moetrace {name}`"
        lines.append(f"| {label} | {' | '.join(f'{counts[key]:,}' for key in heads)} |")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=100)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", metavar="COMMAND", help="kill this one only, and print only")
    options.add_argument("--show", action="store_true", help="print only")
    options = options.parse_args()
    found: dict[str, Counter] = {}
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        base = Path(name) / "base"
        base.mkdir()
        inputs(base)
        for at, case in enumerate(CASES):
            if options.only not in (None, case.name):
                continue
            finished(case.older, base)
            whole = shutil.copytree(base, Path(name) / "whole")
            finished(case.words, whole)  # compiles
            shutil.rmtree(whole)
            seconds = finished(case.words, shutil.copytree(base, whole))
            run = Run(seconds, case.read(base / case.output), case.read(whole / case.output))
            if run.older == run.new:
                raise SystemExit(f"{case.name}: the new output does not differ from the older one.")
            shutil.rmtree(whole)
            print(f"{case.name}: {seconds:.1f} s", file=sys.stderr)
            found[case.name] = Counter()
            for number in range(at, options.kills, len(CASES)):
                folder = shutil.copytree(base, Path(name) / "one")
                chance = random.Random(f"{options.seed} {case.name} {number}")
                found[case.name] += killed(case, folder, number // len(CASES), run, chance)
                shutil.rmtree(folder)
            output = base / case.output
            shutil.rmtree(output) if output.is_dir() else output.unlink()
    print(table(found))
    if not (options.show or options.only):
        write_between(ROOT / "docs" / "security.md", "kills", table(found))
    bad = sum(counts[key] for counts in found.values() for key in ("mixed", "refused", "processes", "not_finished"))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
