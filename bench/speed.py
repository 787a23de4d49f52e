"""Speed of the replay on one core, beside a NumPy histogram of the same trace in the same run; and its memory.

    python bench/speed.py [--rounds 5] [--quick] [--write docs/speed.md]
    python bench/speed.py --against COMMIT [--rounds 7] [--write docs/speed.md]
    python bench/speed.py --clusters [--rounds 7] [--write docs/speed.md]

Every case is timed once a round, in turn, and the table shows medians. `--quick` leaves out the trace of 2 GB;
`--write` puts the table between the markers of a Markdown file. `--against` measures this work tree beside another
commit instead, processor time, interleaved; `--clusters` measures a cluster, in the same way, and its memory.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import numpy as np
from against import against
from markers import write_between

from moetrace.engine.decoded import Decoded, needs_of
from moetrace.engine.run import run_setups
from moetrace.engine.setup import Setup
from moetrace.generators import generate, generate_trace
from moetrace.spec import PolicySpec, load_model, load_policy, load_system
from moetrace.trace import Trace
from moetrace.trace.schema import DECODE

MODEL = load_model("qwen3-30b-a3b")
SYSTEM = load_system("edge-ndp")
POLICY = [load_policy("edge-ndp")]
THREE_DEVICES, TRIMOE = load_system("h100-amx-dimm"), [load_policy("trimoe")]
# name, shape, target in ns an access
CASES = [
    ("batch 1, 512 in, 512 out", {"requests": 8, "prompt": 512, "output": 512, "batch": 1}, 50),
    ("batch 1, 8 in, 512 out", {"requests": 8, "prompt": 8, "output": 512, "batch": 1}, 50),
    ("batch 256, 512 in, 512 out", {"requests": 256, "prompt": 512, "output": 512, "batch": 256}, 8),
    ("batch 256, 8 in, 512 out", {"requests": 256, "prompt": 8, "output": 512, "batch": 256}, 8),
]
# DeepSeek-V3 on 16 GPUs: 58 layers of 256 experts, top 8. Schedule, target in ns an access.
LARGE, SIXTEEN = load_model("deepseek-v3"), load_system("h200-x16")
SCHEDULES = [("serial", 12), ("pipeline:2,2", 20)]
COMMAND = [sys.executable, "-m", "moetrace"]
ROOT = Path(__file__).parents[1]


def seconds(function, *arguments) -> float:
    start = perf_counter()
    function(*arguments)
    return perf_counter() - start


def replay(trace: Trace) -> None:
    run_setups(trace, [Setup(model=MODEL, system=SYSTEM, policies=POLICY)])


def replay_on_three(trace: Trace) -> None:
    run_setups(trace, [Setup(model=MODEL, system=THREE_DEVICES, policies=TRIMOE)])


def histogram(trace: Trace) -> None:
    """Count rows per step, layer and expert: the least that any analysis of a trace does."""
    layer = np.arange(trace.layers)[None, :, None]
    for block in trace.blocks():
        step = np.repeat(np.arange(block.steps), np.diff(block.offset))[:, None, None]
        bins = (step * trace.layers + layer) * trace.num_experts + block.experts
        np.bincount(bins.ravel(), minlength=block.steps * trace.layers * trace.num_experts)


def speed(rounds: int) -> list[tuple[str, ...]]:
    rows = []
    for name, shape, target in CASES:
        trace = generate_trace(MODEL, seed=0, **shape)
        accesses = trace.rows * trace.layers * trace.top_k
        replay(trace)  # compiles
        ours, theirs = [], []
        for _ in range(rounds):
            ours.append(seconds(replay, trace))
            theirs.append(seconds(histogram, trace))
        ns = median(ours) / accesses * 1e9
        ratio = median(a / b for a, b in zip(ours, theirs, strict=True))
        rows.append((f"`edge-ndp`, {name}", f"{ns:.1f} ns an access", f"{ratio:.2f}x", f"≤ {target} ns"))
    return rows


def three_devices(rounds: int) -> tuple[str, ...]:
    """GPU, CPU and units share each layer: beside the replay of `edge-ndp` in the same run."""
    trace = generate_trace(MODEL, seed=0, requests=256, prompt=8, output=60, batch=256)
    accesses = trace.rows * trace.layers * trace.top_k
    times = [(seconds(replay_on_three, trace), seconds(replay, trace)) for _ in range(rounds + 1)][1:]
    ns = median(ours for ours, _ in times) / accesses * 1e9
    ratio = median(ours / theirs for ours, theirs in times)
    name = "`trimoe` on `h100-amx-dimm`, batch 256, 8 in, 60 out, to `edge-ndp`"
    return name, f"{ns:.1f} ns an access", f"{ratio:.2f}x", "≤ 3x"


def from_file(rounds: int, folder: Path) -> tuple[str, ...]:
    path = folder / "file.h5"
    generate(path, MODEL, requests=512, prompt=512, output=512, batch=256, seed=0)
    ratios = []
    with Trace.open(path) as trace:
        offset = [np.diff(block.offset) for block in trace.blocks()]
        block = [trace.read(name, 0, trace.rows) for name in ("experts", "request", "position")]
        experts, request, position = (np.array(array) for array in block)
        memory = Trace.from_arrays(
            experts,
            num_experts=trace.num_experts,
            request=request,
            position=position,
            steps=np.concatenate(offset),
            phase=trace.phase,
        )
        for _ in range(rounds + 1):
            ratios.append(seconds(replay, trace) / seconds(replay, memory))
        path.unlink()
    return (
        f"a file of {experts.nbytes / 1e6:.0f} MB, to the same in memory",
        f"{median(ratios[1:]):.2f}x",
        "",
        "≤ 1.1x",
    )


def anonymous_memory(folder: Path) -> tuple[str, ...]:
    """Replay a trace of 2 GB at batch 1, results written, and watch the process's anonymous memory."""
    path = folder / "large.h5"
    generate(path, MODEL, requests=5120, prompt=512, output=512, batch=1, seed=0)
    size = path.stat().st_size
    most_gb = most_anonymous_gb(["replay", str(path), "--policy", "edge-ndp", "-o", str(folder / "out")])
    path.unlink()
    return f"a trace of {size / 1e9:.2f} GB, files written", f"{most_gb:.2f} GB anonymous", "", "< 1 GB"


def most_anonymous_gb(arguments: list[str]) -> float:
    """Run a command and return the most of anonymous memory that its process had."""
    command = [*COMMAND, *arguments, "--format", "json"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    most = [0]

    def watch() -> None:
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            most[0] = max([most[0], *(int(line.split()[1]) for line in status.splitlines() if "RssAnon" in line)])
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    if process.wait():
        sys.exit("The replay of the large trace failed.")
    watcher.join()
    return most[0] / 1e6


def clusters(rounds: int) -> list[tuple[str, ...]]:
    """Decode steps of 256 rows, from ids to figures, and how much of that makes the ids ready: processor time."""
    drawn = generate_trace(LARGE, requests=256, prompt=1, output=65, batch=256, seed=0)
    request, position = (drawn.read(name, 0, drawn.rows) for name in ("request", "position"))
    order = np.lexsort((request, position))[256:]  # all requests at the same place; without their prompts
    steps = np.full(len(order) // 256, 256)
    trace = Trace.from_arrays(
        drawn.read("experts", 0, drawn.rows)[order],
        num_experts=LARGE.experts,
        steps=steps,
        phase=np.full(len(steps), DECODE),
        request=request[order],
        position=position[order],
    )
    accesses = trace.rows * trace.layers * trace.top_k
    policies = [load_policy("ep-serial", {"schedule": schedule}) for schedule, _ in SCHEDULES]

    def decode() -> None:
        for _ in Decoded(trace, needs_of(policies, [SIXTEEN])).batches():
            pass

    def work(policy: PolicySpec) -> None:
        run_setups(trace, [Setup(model=LARGE, system=SIXTEEN, policies=[policy])])

    works = [lambda: histogram(trace), decode, *(lambda policy=policy: work(policy) for policy in policies)]
    spent: list[list[float]] = [[] for _ in works]
    for _ in range(rounds + 1):  # the first one compiles
        for one, of_one in zip(works, spent, strict=True):
            begun_s = process_time()
            one()
            of_one.append((process_time() - begun_s) / accesses * 1e9)
    counted, *others = (of_one[1:] for of_one in spent)
    names = [("making ids ready for any policy of a cluster", ""), *((f"`{s}`", f"≤ {ns} ns") for s, ns in SCHEDULES)]
    return [
        (
            name,
            f"{median(ns):.1f} ns an access",
            f"{median(a / b for a, b in zip(ns, counted, strict=True)):.2f}x",
            target,
        )
        for (name, target), ns in zip(names, others, strict=True)
    ]


def memory_of_clusters(folder: Path) -> tuple[str, ...]:
    """Anonymous memory of the replay of a cluster over a file, and over one of four times as many steps."""
    most_gb = []
    for output in (500, 2000):
        path = folder / f"{output}.h5"
        generate(path, LARGE, requests=256, prompt=8, output=output, batch=256, seed=0)
        arguments = ["replay", str(path), "--system", SIXTEEN.name, "--policy", "ep-serial", "--jobs", "1"]
        most_gb.append(most_anonymous_gb([*arguments, "-o", str(folder / str(output))]))
        path.unlink()
    shown = " and ".join(f"{gb:.3f} GB" for gb in most_gb)
    return "anonymous memory, 256 requests of 8 + 500 and of 8 + 2,000", shown, f"{most_gb[1] / most_gb[0]:.2f}x", "1x"


def start_up(rounds: int) -> list[tuple[str, ...]]:
    trace = str(ROOT / "traces" / "tiny-olmoe.h5")
    cases = [
        ("`moetrace --help`", [*COMMAND, "--help"], 0.15),
        ("`moetrace replay traces/tiny-olmoe.h5 --slots 48`", [*COMMAND, "replay", trace, "--slots", "48"], 1.5),
    ]
    times = [[] for _ in cases]
    for _ in range(rounds + 1):
        for (_, command, _), of_case in zip(cases, times, strict=True):
            of_case.append(seconds(lambda c=command: subprocess.run(c, capture_output=True, check=True)))
    return [
        (f"{name}, compiled before", f"{median(of_case[1:]):.2f} s", "", f"≤ {target} s")
        for (name, _, target), of_case in zip(cases, times, strict=True)
    ]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--quick", action="store_true")
    options.add_argument("--write", type=Path)
    options.add_argument("--against", metavar="COMMIT")
    options.add_argument("--clusters", action="store_true")
    options = options.parse_args()
    if options.against:
        show(against(options.against, options.rounds), "against", options.write)
        return
    if options.clusters:
        rows = [
            ("what, DeepSeek-V3 on `h200-x16`, decode at batch 256", "measured", "times a NumPy histogram", "target")
        ]
        rows += clusters(options.rounds)
        with tempfile.TemporaryDirectory() as folder:
            rows.append(memory_of_clusters(Path(folder)))
        show(rows, "clusters", options.write)
        return
    rows = [("what, Qwen3-30B-A3B on one core", "measured", "times a NumPy histogram", "target")]
    rows += speed(options.rounds)
    rows.append(three_devices(options.rounds))
    with tempfile.TemporaryDirectory() as folder:
        rows.append(from_file(options.rounds, Path(folder)))
        if not options.quick and Path("/proc").is_dir():
            rows.append(anonymous_memory(Path(folder)))
    rows += start_up(options.rounds)
    show(rows, "speed", options.write)


def show(rows: list[tuple[str, ...]], name: str, page: Path | None) -> None:
    """Print a table, and put it between the markers of a page if there is one."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "| --- " * len(rows[0]) + "|")
    print("\n".join(lines))
    if page:
        write_between(page, name, "\n".join(lines))


if __name__ == "__main__":
    main()
