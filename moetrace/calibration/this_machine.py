"""Time this machine: experts on its CPU, reads from its disk, and copies and experts on a CUDA device if there is one.

Each expert's weights are touched in turn, in a pool larger than the caches, as a model touches them; a time is the
median of repetitions.
"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import polars as pl

from moetrace.calibration.disk import NO_DISK, disk_times
from moetrace.calibration.measured import COPY, KERNEL, Measured
from moetrace.calibration.repeated_times import Repeated, doubts_of_repeats, repeated
from moetrace.spec.errors import MoetraceError, UsageError

# (hidden, intermediate): OLMoE, Qwen3-30B, DeepSeek-V2-Lite, gpt-oss and Mixtral's, and one of launches only.
SHAPES = ((1024, 512), (2048, 768), (2048, 1024), (2048, 1408), (2880, 2880), (4096, 1536))
ACTIVE = (1, 8)
ROWS = (1, 4, 16, 64)
POOL_BYTES = 768 << 20  # above any last-level cache
COPY_BYTES = (1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26)
_LEAST_S, _LEAST_TIMES = 0.1, 5
PARTS = ("cpu", "disk", "cuda")

Report = Callable[[str], None]
Keep = Callable[[Measured], None]
_SOURCE = "this machine, moetrace calibrate --measure"


class Runner(NamedTuple):
    """Runs one layer's experts: `prepare(hidden, intermediate, experts)` returns `run(first, active, rows)`."""

    bits: int
    prepare: Callable[[int, int, int], Callable[[int, int, int], None]]


def measure(
    parts: tuple[str, ...] = PARTS,
    *,
    folder: str | Path | None = None,
    report: Report = lambda _: None,
    keep: Keep = lambda _: None,
) -> Measured:
    """Time this machine.

    Args:
        parts: Any of cpu (experts through PyTorch in bfloat16 where it is installed, else through NumPy's BLAS in
            float32), disk (reads past the page cache) and cuda (copies from pinned memory, experts in bfloat16).
            CUDA is left out where PyTorch finds no device, and a disk where all reads go through the page cache.
        folder: Where the file of 256 MiB is written that the disk is measured by. By default the temporary folder.
        report: Called with a line on the current measurement.
        keep: Called with all times so far, whenever there are more: what an interruption leaves.

    Returns:
        The times, as `calibrate` takes them.

    Raises:
        UsageError: A part is unknown.
        MoetraceError: The folder cannot be written, or nothing can be measured.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise UsageError(f"Part {unknown[0]!r} cannot be measured; use one of {', '.join(PARTS)}.")
    found = Measured({}, {}, _SOURCE, [])

    def take(frames: dict[str, pl.DataFrame], part: str, columns: tuple[str, ...], rows: Iterator[tuple]) -> None:
        taken, scatters = [], []
        for *row, scatter in rows:
            taken.append(row)
            scatters.append(scatter)
            frames[part] = pl.DataFrame(taken, schema=dict.fromkeys(columns, pl.Float64), orient="row")
            keep(found)
        found.notes.extend(doubts_of_repeats(part, scatters))

    can = {"cpu": True, "disk": not NO_DISK, "cuda": "cuda" in parts and _has_cuda()}
    if there := tuple(part for part in parts if can[part]):
        report(f"{_duration(there)}; run nothing else meanwhile.")
    if "cpu" in parts:
        runner = _torch_runner("cpu") if find_spec("torch") else _numpy_runner()
        take(found.kernels, "cpu", KERNEL, _kernels(runner, "CPU", report))
    if "disk" in parts and NO_DISK:
        found.notes.append(NO_DISK)
    elif "disk" in parts:
        report("disk: reads past the page cache")
        take(found.copies, "disk", COPY, disk_times(folder))
    if can["cuda"]:
        take(found.kernels, "gpu", KERNEL, _kernels(_torch_runner("cuda"), "CUDA device", report))
        report("CUDA device: copies from pinned memory")
        take(found.copies, "link", COPY, _cuda_copies())
    elif "cuda" in parts:
        found.notes.append("No CUDA device was found (PyTorch is needed to use one), so none was measured.")
    if not found.kernels and not found.copies:
        raise MoetraceError(" ".join(["Nothing was measured.", *found.notes]))
    return found


def to_frame(measured: Measured) -> pl.DataFrame:
    """Return measured times as one table that `read_measured` reads."""
    frames = [
        frame.select(pl.lit(part).alias("part"), pl.all())
        for frames in (measured.kernels, measured.copies)
        for part, frame in frames.items()
    ]
    return pl.concat(frames, how="diagonal")


def to_csv(measured: Measured) -> bytes:
    """Return that table as a CSV file."""
    return to_frame(measured).write_csv().encode()


def _duration(parts: tuple[str, ...]) -> str:
    """Say how long it takes: CPU and disk took 72 s on two busy cores, the disk only a few seconds of them."""
    usual = "a few seconds" if parts == ("disk",) else "about a minute"
    return f"measuring {', '.join(parts)} takes {usual}, longer on a slow machine"


def _kernels(runner: Runner, place: str, report: Report) -> Iterator[tuple]:
    """Yield a row of `KERNEL` and the scatter of its repeats for each layer."""
    for hidden, intermediate in SHAPES:
        report(f"{place}: experts of {hidden} x {intermediate}")
        experts = max(-(-POOL_BYTES * 8 // (3 * hidden * intermediate * runner.bits)), 2 * max(ACTIVE))
        run = runner.prepare(hidden, intermediate, experts)
        for active in ACTIVE:
            for count in ROWS:
                times = _repeats(_turns(run, experts, active, count))
                yield hidden, intermediate, experts, 3, active, count, runner.bits, active, *times


def _turns(run: Callable[[int, int, int], None], experts: int, active: int, rows: int) -> Iterator[None]:
    """Run a layer each time, on the experts that were not touched for longest."""
    first = 0
    while True:
        run(first, active, rows)
        yield
        first = (first + active) % (experts - active + 1)


def _repeats(turns: Iterator[None]) -> Repeated:
    next(turns)  # the first one allocates, and starts threads
    times: list[float] = []
    while len(times) < _LEAST_TIMES or sum(times) < _LEAST_S:
        start = perf_counter()
        next(turns)
        times.append(perf_counter() - start)
    return repeated(times)


def _numpy_runner() -> Runner:
    import numpy as np

    def prepare(hidden: int, intermediate: int, experts: int):
        draw = np.random.default_rng(0).random  # pages of zeros would all be one page
        gate_up = draw((experts, 2 * intermediate, hidden), np.float32)
        down = draw((experts, hidden, intermediate), np.float32)

        def run(first: int, active: int, rows: int) -> None:
            x = np.full((hidden, rows), 1e-3, np.float32)
            for expert in range(first, first + active):
                both = gate_up[expert] @ x
                gate, up = both[:intermediate], both[intermediate:]
                _ = down[expert] @ (gate / (1 + np.exp(-gate)) * up)

        return run

    return Runner(32, prepare)


def _torch_runner(device: str) -> Runner:
    import torch

    def prepare(hidden: int, intermediate: int, experts: int):
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
        gate_up = torch.rand((experts, hidden, 2 * intermediate), **options)
        down = torch.rand((experts, intermediate, hidden), **options)

        def layer(first: int, active: int, rows: int) -> None:
            """Run the active experts as one batched product for each matrix: a kernel a layer, as fused ones do."""
            x = torch.full((active, rows, hidden), 1e-3, **options)
            both = torch.bmm(x, gate_up[first : first + active])
            gate, up = both.chunk(2, dim=2)
            torch.bmm(torch.nn.functional.silu(gate) * up, down[first : first + active])
            if device == "cuda":
                torch.cuda.synchronize()

        def run(first: int, active: int, rows: int) -> None:
            with torch.inference_mode():
                layer(first, active, rows)

        return run

    return Runner(16, prepare)


def _has_cuda() -> bool:
    if not find_spec("torch"):
        return False
    import torch

    return torch.cuda.is_available()


def _cuda_copies() -> Iterator[tuple[int, float, float]]:
    """Bytes, seconds and their scatter of copies from pinned host memory to the device."""
    import torch

    for size in COPY_BYTES:
        source = torch.ones(size, dtype=torch.uint8).pin_memory()
        target = torch.empty(size, dtype=torch.uint8, device="cuda")

        def turns(source=source, target=target) -> Iterator[None]:
            while True:
                target.copy_(source, non_blocking=True)
                torch.cuda.synchronize()
                yield

        seconds, scatter = _repeats(turns())
        yield size, seconds, scatter
