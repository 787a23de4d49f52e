"""Imports of clean files by this build beside an earlier one: processor time, interleaved, medians.

    python bench/imports_before.py COMMIT [--only NAME]... [--megabytes 30] [--rounds 7] [--write]

Each build is a process of its own that imports the same generated files in turn (`CASES` of `importing.py`; of formats
that the earlier build does not know, this one alone). A figure is the median over the rounds of one build's processor
seconds, and the ratio is the median of the ratio of each round: above 1, this build is faster. `--write` writes the
table into docs/importing.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import IO

from importing import CASES, ROOT
from markers import write_between

PAGE = ROOT / "docs" / "importing.md"
_SERVE = """
import json, sys, time
from pathlib import Path
from moetrace.importers.captured import Hints
from moetrace.importers.importing import import_traces
for line in sys.stdin:
    sources, hints, out = json.loads(line)
    start = time.process_time()
    try:
        import_traces([Path(source) for source in sources], Path(out), hints=Hints(**hints))
        print(time.process_time() - start, flush=True)
    except Exception as error:
        print(json.dumps(str(error)), flush=True)
"""


class _Build:
    """A process that imports with the package of one folder."""

    def __init__(self, folder: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-c", _SERVE]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder
        )

    def seconds(self, sources: list[Path], hints: dict[str, int], out: Path) -> float | None:
        """Processor seconds of an import; None if it is refused."""
        asked, said = self._pipes()
        asked.write(json.dumps([[str(source) for source in sources], hints, str(out)]) + "\n")
        asked.flush()
        answer = json.loads(said.readline())
        return answer if isinstance(answer, float) else None

    def stop(self) -> None:
        self._pipes()[0].close()
        self._process.wait()

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self._process.stdin and self._process.stdout
        return self._process.stdin, self._process.stdout


def _earlier(commit: str, folder: Path) -> Path:
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def compared(builds: tuple[_Build, _Build], name: str, megabytes: int, rounds: int, folder: Path) -> list[str]:
    """A row of the table of a case: name, MB/s of CPU of the earlier build and of this one, and the ratio."""
    case = CASES[name](folder, megabytes)
    size = sum(path.stat().st_size for path in case.sources) / 1e6

    def seconds(build: _Build) -> float | None:
        return build.seconds(case.sources, case.hints, folder / "out.h5")

    known = [seconds(build) is not None for build in builds]  # and what only the first import of a process pays
    assert known[0], f"{name} is refused"
    found: list[list[float]] = [[], []]
    for number in range(rounds):
        for at in (0, 1) if number % 2 else (1, 0):
            if known[at]:
                found[at].append(seconds(builds[at]) or 0.0)
    now = f"{size / median(found[0]):.0f}"
    if not known[1]:
        return [name, "", now, ""]
    ratio = median(before / now for now, before in zip(*found, strict=True))
    return [name, f"{size / median(found[1]):.0f}", now, f"{ratio:.2f}"]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("commit")
    options.add_argument("--only", action="append", choices=list(CASES))
    options.add_argument("--megabytes", type=int, default=30)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--write", action="store_true")
    options = options.parse_args()
    rows, loads = [], []
    with tempfile.TemporaryDirectory() as top:
        builds = _Build(ROOT), _Build(_earlier(options.commit, Path(top) / "before"))
        for name in options.only or CASES:
            with tempfile.TemporaryDirectory(dir=top) as folder:
                row = compared(builds, name, options.megabytes, options.rounds, Path(folder))
            loads.append(os.getloadavg()[0])
            print(*row, f"(load {loads[-1]:.1f})", flush=True)
            rows.append(row)
        for build in builds:
            build.stop()
    if options.write:
        head = ["| clean files of | MB/s before | MB/s now | ratio |", "| --- | ---: | ---: | ---: |"]
        table = "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])
        load = f"The load of the machine of two cores was {min(loads):.0f} to {max(loads):.0f}."
        write_between(PAGE, "imports", f"{table}\n\n{load}")


if __name__ == "__main__":
    main()
