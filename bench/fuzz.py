"""Damage what engines record, and import it: a clean trace or one sentence, never anything else.

    python bench/fuzz.py [--importer NAME]... [--count 100000] [--seed 0] [--keep FOLDER]

The samples of an importer come from the writers of its tests (`WRITERS`). Each input is one of them with some of its
files damaged: bytes changed, parts cut, doubled or taken from another sample, numbers and JSON values replaced (null,
2^70, NaN, lists in lists, ...), columns and axes of tables and arrays; also inside of zip members, base64 texts and
headers with a length, which damage from outside rarely passes. An import must end within `HANG_S` in a trace that
verifies, or in a MoetraceError of one line and an empty folder. One in `WRITTEN` traces is written as HDF5 and read
again; of others, all is done but that: the writer checks what it gets, and its file takes its name or goes.
The same seed damages alike. `--keep` saves the inputs of failures.
"""

import argparse
import faulthandler
import importlib
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from time import perf_counter, process_time
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from damage import damaged

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

# Importer -> module (with tests/ on the path) that has `samples(folder) -> list[support.writers.Sample]`.
WRITERS = {
    "npz": "support.writers.npz",
    "npy-layers": "support.writers.npy_layers",
    "bigmoeonedge": "support.writers.bigmoeonedge",
    "colibri": "support.writers.colibri",
    "fiddler": "support.writers.fiddler",
    "counts-table": "support.writers.counts_table",
    "imatrix": "support.writers.imatrix",
    "jsonl": "support.writers.jsonl",
    "lattice": "support.writers.lattice",
    "llamacpp": "support.writers.llamacpp",
    "mbolt": "support.writers.mbolt",
    "megatron": "support.writers.megatron",
    "moe-cache-lab": "support.writers.moe_cache_lab",
    "moe-cache-eval": "support.writers.moe_cache_eval",
    "sglang": "support.writers.sglang",
    "sglang-request": "support.writers.sglang_request",
    "any-table": "support.writers.any_table",
    "router-logits": "support.writers.router_logits",
    "oracle-general": "support.writers.oracle_general",
    "moe-policylang": "support.writers.moe_policylang",
    "trtllm": "support.writers.trtllm",
    "vllm": "support.writers.vllm",
}
HANG_S = 10
WRITTEN = 8
MEMORY_BYTES = 4 << 30  # of the process when run from the command line: a small file can't need more
MAX_MESSAGE = 2000


class Hang(BaseException):
    """An import took longer than `HANG_S`; no `except Exception` holds it up."""


class Tally(NamedTuple):
    """How the imports of one importer ended."""

    traces: int
    refused: int
    failures: list[str]


def fuzz(importer: str, count: int, seed: int = 0, keep: Path | None = None) -> Tally:
    """Import `count` damaged inputs, and first each sample as it is, which must give a trace."""
    from moetrace.importers.captured import Hints

    ends: Counter[str] = Counter()
    failures: list[str] = []
    parent = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a trace is synced to disk, which would take the time
    with tempfile.TemporaryDirectory(dir=parent, prefix="fuzz-") as folder:
        top = Path(folder)
        (top / "samples").mkdir()
        samples = importlib.import_module(WRITERS[importer]).samples(top / "samples")
        contents = [{path.name: path.read_bytes() for path in sample.files} for sample in samples]
        pool = [data for content in contents for data in content.values()]
        for number in range(-len(samples), count):
            random = Random(f"{seed} {importer} {number}")
            at = number % len(samples) if number < 0 else random.randrange(len(samples))
            content = contents[at] if number < 0 else damaged(random, contents[at], pool)
            source = top / "source"
            source.mkdir()
            files = [_write(source / name, data) for name, data in content.items()]
            hints = Hints(**samples[at].hints)
            sources = [source] if number % 7 == 3 else files
            form = None if number % 5 == 3 else importer
            end = _import(sources, form, hints, top / "out", written=number < 0 or number % WRITTEN == 0)
            if number < 0 and end != "trace":
                end = f"the sample itself: {end}"
            if end not in ("trace", "refused"):
                failures.append(f"{importer} {number} (seed {seed}): {end}")
                if keep:
                    shutil.copytree(source, keep / f"{importer}-{seed}-{number}", dirs_exist_ok=True)
            ends[end] += number >= 0
            shutil.rmtree(source)
    return Tally(ends["trace"], ends["refused"], failures)


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


class _NoHdf5:
    """A `Writer` without the HDF5 library, which would take most of the time."""

    def _create(self) -> None:
        self._file, self._hashes = SimpleNamespace(close=lambda: None), {}

    def _put(self, path: str, start: int, array: np.ndarray) -> None:
        pass


def _import(sources: list[Path], form: str | None, hints: Any, out: Path, written: bool) -> str:
    """How an import into the empty folder `out` ends: "trace", "refused" or what went wrong."""
    from moetrace.importers import importing
    from moetrace.spec.errors import MoetraceError
    from moetrace.trace import Trace

    out.mkdir()
    path = out / "trace.h5"
    try:
        with ExitStack() as stack:
            if not written:
                for name in ("Writer", "CountsWriter"):
                    light = type(name, (_NoHdf5, getattr(importing, name)), {})
                    stack.enter_context(patch.object(importing, name, light))
            stack.enter_context(_at_most(HANG_S))
            importing.import_traces(sources, path, format=form, hints=hints)
            if written:
                with Trace.open(path) as trace:
                    trace.verify()
        end, left = "trace", {path}
    except MoetraceError as error:
        text, left = str(error), set()
        end = "refused" if text and "\n" not in text and len(text) <= MAX_MESSAGE else f"message: {text[:300]!r}"
    except Hang:
        end, left = f"hangs for {HANG_S} s", set()
    except BaseException as error:  # a panic of polars is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        end, left = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {str(error)[:200]!r}", set()
    if rest := set(out.iterdir()) - left:
        end = f"leaves {sorted(path.name for path in rest)} ({end})"
    shutil.rmtree(out)
    return end


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--importer", action="append", choices=list(WRITERS))
    options.add_argument("--count", type=int, default=100_000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--keep", type=Path)
    options = options.parse_args()
    faulthandler.enable()
    warnings.simplefilter("error")
    failed = 0
    for importer in options.importer or WRITERS:
        start, start_cpu = perf_counter(), process_time()
        fuzz(importer, 20, options.seed)  # imports what there is to import before memory is limited
        used = int(re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
        resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_DATA)[1]))
        tally = fuzz(importer, options.count, options.seed, options.keep)
        failed += len(tally.failures)
        print(
            f"{importer}: {options.count:,} inputs, {tally.traces:,} traces, {tally.refused:,} refused, "
            f"{len(tally.failures)} failures, {perf_counter() - start:.0f} s ({process_time() - start_cpu:.0f} of CPU)",
            flush=True,
        )
        for kind, number in Counter(re.sub(r"^\S+ -?\d+ ", "", failure) for failure in tally.failures).most_common(20):
            example = next(failure for failure in tally.failures if failure.endswith(kind))
            print(f"  {number} x {example}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
