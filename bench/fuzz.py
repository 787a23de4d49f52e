"""Damage what engines record, and import it: a clean trace or one sentence, never anything else.

    python bench/fuzz.py [--importer NAME]... [--count 100000] [--seed 0] [--keep FOLDER]

The samples of an importer come from the writers of its tests (`WRITERS`). Each input is one of them with some of its
files damaged: bytes changed, parts cut, doubled or taken from another sample, numbers and JSON values replaced; also
inside of zip members, base64 texts and headers with a length, which damage from outside rarely passes. An import must
end within `HANG_S` in a trace that verifies, or in a MoetraceError of one line and an empty folder.
The same seed damages alike. `--keep` saves the inputs of failures.
"""

import argparse
import base64
import binascii
import faulthandler
import importlib
import io
import json
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

# Importer -> module (with tests/ on the path) that has `samples(folder) -> list[support.writers.Sample]`.
WRITERS = {
    "npz": "support.writers.npz",
    "bigmoeonedge": "support.writers.bigmoeonedge",
    "colibri": "support.writers.colibri",
    "fiddler": "support.writers.fiddler",
    "jsonl": "support.writers.jsonl",
    "lattice": "support.writers.lattice",
    "llamacpp": "support.writers.llamacpp",
    "megatron": "support.writers.megatron",
    "moe-cache-eval": "support.writers.moe_cache_eval",
    "sglang": "support.writers.sglang",
    "sglang-request": "support.writers.sglang_request",
    "trtllm": "support.writers.trtllm",
    "vllm": "support.writers.vllm",
}
HANG_S = 10
MEMORY_BYTES = 4 << 30  # of the process when run from the command line: a small file can't need more
MAX_MESSAGE = 2000
_NUMBERS = (-1, 0, 1, 2, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30)
_TEXTS = [*(b"%d" % n for n in _NUMBERS), b"", b"-", b"nan", b"1e999", b"0x10", b"null", b'"', b"\n", b"\xff"]
_VALUES = [*_NUMBERS, 0.5, -0.0, 1e308, 1e400, float("nan"), True, False, None]
_VALUES += ["", "x", "1", "\ud800", [], {}, [[]], [0]]


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
            end = _import(sources, form, hints, top / "out")
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


def _import(sources: list[Path], form: str | None, hints: Any, out: Path) -> str:
    """How an import into the empty folder `out` ends: "trace", "refused" or what went wrong."""
    from moetrace.importers.importing import import_traces
    from moetrace.spec.errors import MoetraceError
    from moetrace.trace import Trace

    out.mkdir()
    path = out / "trace.h5"
    try:
        with _at_most(HANG_S):
            import_traces(sources, path, format=form, hints=hints)
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


def damaged(random: Random, content: dict[str, bytes], pool: list[bytes]) -> dict[str, bytes]:
    """Files of a sample, by name, of which some are damaged, and perhaps one is missing or there twice."""
    content = dict(content)
    names = sorted(content)
    if random.random() < 0.05:
        content[random.choice(names) + "~"] = content[random.choice(names)]
    if random.random() < 0.05 and len(content) > 1:
        del content[random.choice(names)]
    for name in random.sample(sorted(content), random.choice((1, 1, 1, len(content)))):
        for _ in range(random.choice((1, 1, 1, 2, 5))):
            content[name] = damaged_bytes(random, content[name], pool)
    return content


def damaged_bytes(random: Random, data: bytes, pool: list[bytes]) -> bytes:
    """`data` with one damage that its form allows, or any."""
    ways: list[Callable[[Random, bytes, list[bytes]], bytes | None]] = [_raw, _raw]
    if data[:2] == b"PK":
        ways += [_zip] * 4
    elif _is_text(data):
        ways += [_number, _number, _lines, _json, _json]
    elif _length_header(data):
        ways += [_header, _header]
    for _ in range(4):
        if (found := random.choice(ways)(random, data, pool)) is not None:
            return found
    return _raw(random, data, pool)


def _is_text(data: bytes) -> bool:
    return b"\0" not in data[:1000] and sum(byte < 128 for byte in data[:1000]) > 0.9 * len(data[:1000])


def _raw(random: Random, data: bytes, pool: list[bytes]) -> bytes:
    start = random.randrange(len(data) + 1)
    if random.random() < 0.3:  # headers are at the beginning
        start = min(start, random.randrange(200))
    stop = min(len(data), start + random.choice((1, 1, 4, 16, 100, len(data))))
    part = data[start:stop]
    way = random.randrange(8)
    if way == 0:
        return data[:start]
    if way == 1:
        return data[:start] + data[stop:]
    if way == 2:
        return data[:start] + part * random.choice((2, 2, 3, 50 if len(part) < 10_000 else 2)) + data[stop:]
    if way == 3:
        other = random.choice(pool)
        first = random.randrange(len(other) + 1)
        return data[:start] + other[first : first + random.choice((1, 16, 1000))] + data[stop:]
    if way == 4:
        size = random.choice((1, 2, 4, 8))
        value = random.choice(_NUMBERS) % (1 << (8 * size))
        return data[:start] + value.to_bytes(size, random.choice(("little", "big"))) + data[start + size :]
    if way == 5:
        return data[:start] + random.randbytes(len(part)) + data[stop:]
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 3, 10))):
        if changed:
            at = min(start + random.randrange(64), len(changed) - 1) if way == 6 else random.randrange(len(changed))
            changed[at] ^= 1 << random.randrange(8)
    return bytes(changed)


def _number(random: Random, data: bytes, pool: list[bytes]) -> bytes | None:
    found = [match.span() for match in re.finditer(rb"-?\d+(?:\.\d+)?", data[:200_000])]
    if not found:
        return None
    start, stop = random.choice(found)
    return data[:start] + random.choice(_TEXTS) + data[stop:]


def _lines(random: Random, data: bytes, pool: list[bytes]) -> bytes | None:
    lines = data.splitlines(keepends=True)
    at, other = random.randrange(len(lines) or 1), random.randrange(len(lines) or 1)
    if len(lines) < 2:
        return None
    way = random.randrange(5)
    if way == 0:
        del lines[at]
    elif way == 1:
        lines.insert(other, lines[at])
    elif way == 2:
        lines[at], lines[other] = lines[other], lines[at]
    elif way == 3:
        lines[at] = lines[at].replace(random.choice((b",", b" ", b":", b"\n")), random.choice((b"", b",,", b"\r\n")), 1)
    else:
        fields = re.split(rb"(,)", lines[at])
        lines[at] = b"".join(random.sample(fields, len(fields)))
    return b"".join(lines)


def _json(random: Random, data: bytes, pool: list[bytes]) -> bytes | None:
    """One value of one JSON line, or of the whole, replaced, removed or doubled."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        lines = data.splitlines(keepends=True)
        at = random.randrange(len(lines) or 1)
        try:
            value = json.loads(lines[at])
        except (ValueError, RecursionError, IndexError):
            return None
        lines[at] = json.dumps(_changed(random, value, pool)).encode() + b"\n"
        return b"".join(lines)
    return json.dumps(_changed(random, value, pool)).encode()


def _changed(random: Random, value: Any, pool: list[bytes]) -> Any:
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(sorted(value))
        way = random.random()
        if way < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if way < 0.15:
            return value | {random.choice(sorted(value)): value[key]}
        return value | {key: _changed(random, value[key], pool)}
    if isinstance(value, list) and value and random.random() < 0.9:
        at, value = random.randrange(len(value)), list(value)
        way = random.random()
        if way < 0.1:
            del value[at]
        elif way < 0.2:
            value.insert(random.randrange(len(value) + 1), value[at])
        else:
            value[at] = _changed(random, value[at], pool)
        return value
    if isinstance(value, str) and len(value) > 16 and random.random() < 0.8:
        try:
            return base64.b64encode(damaged_bytes(random, base64.b64decode(value, validate=True), pool)).decode()
        except (binascii.Error, ValueError):
            pass
    return random.choice(_VALUES)


def _zip(random: Random, data: bytes, pool: list[bytes]) -> bytes | None:
    """One member damaged, missing or doubled, in an archive that is whole."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
    except Exception:  # noqa: BLE001 - damaged before
        return None
    if not members:
        return None
    names = sorted(members)
    name = random.choice(names if random.random() < 0.5 else [n for n in names if n.endswith(".pkl")] or names)
    way = random.random()
    if way < 0.05:
        del members[name]
    elif way < 0.1:
        members[random.choice(names)] = members[name]
    else:
        members[name] = damaged_bytes(random, members[name], pool)
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return whole.getvalue()


def _length_header(data: bytes) -> bool:
    return data[8:9] == b"{" and 2 <= int.from_bytes(data[:8], "little") <= len(data) - 8


def _header(random: Random, data: bytes, pool: list[bytes]) -> bytes | None:
    """A JSON header after its length in 8 bytes, as of safetensors, damaged, with its length kept right."""
    size = int.from_bytes(data[:8], "little")
    header = (random.choice((_json, _json, _number))(random, data[8 : 8 + size], pool)) or b"{}"
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


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
        start = perf_counter()
        fuzz(importer, 20, options.seed)  # imports what there is to import before memory is limited
        used = int(re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
        resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_DATA)[1]))
        tally = fuzz(importer, options.count, options.seed, options.keep)
        failed += len(tally.failures)
        print(
            f"{importer}: {options.count:,} inputs, {tally.traces:,} traces, {tally.refused:,} refused, "
            f"{len(tally.failures)} failures, {perf_counter() - start:.0f} s",
            flush=True,
        )
        for kind, number in Counter(re.sub(r"^\S+ -?\d+ ", "", failure) for failure in tally.failures).most_common(20):
            example = next(failure for failure in tally.failures if failure.endswith(kind))
            print(f"  {number} x {example}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
