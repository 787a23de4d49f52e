"""Memory of the commands that read a trace, over one that is larger than what they may allocate.

    python bench/memory.py [--file BIG.h5] [--gigabytes 4] [--limit-mib 1024] [--write docs/cache.md] [NAME ...]
    python bench/memory.py --all [--file BIG.h5] [--gigabytes 3] [--model MODEL] [--write docs/security.md] [NAME ...]
    python bench/memory.py --replays 2000

Each command is a process of its own, which may allocate `--limit-mib` of private memory and no more (RLIMIT_DATA).
The table shows how much anonymous memory it had at most (of /proc/PID/smaps_rollup, some fifty times a second; pages
of the trace itself belong to the system's cache and do not count), what its temporary files, which have no name, took
on the disk, and how long it ran. `export bin` writes 24 bytes for each choice, so for 3 GB it takes 72 GB of disk, or
36 GB of a model whose ids have two bytes. Without `--file`, a synthetic trace is written and removed again. Without
names, the analyses of docs/cache.md are measured; with `--all`, every command that reads a trace. `--replays` runs
small replays in one process and prints what it has resident as they go.
"""

import argparse
import contextlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from markers import write_between

POLICIES = ("lru", "fifo", "lfu", "belady", "sieve", "arc")
ANALYSES = {
    **{f"cache {policy}": ["cache", "--capacity", "1536", "--policy", policy] for policy in POLICIES},
    "cache --curve": ["cache", "--curve", "--format", "csv"],
    "balance": ["balance"],
    "prefetch": ["prefetch"],
}
for _policy in ("sieve", "arc"):  # defined one access at a time
    ANALYSES[f"cache {_policy}"].append("--sequential")
# TRACE stands for the trace, OUT for a file that is removed again.
COMMANDS = {
    "info": ["info", "TRACE"],
    "info --verify": ["info", "TRACE", "--verify"],
    "lint": ["lint", "TRACE"],
    **{f"export {end}": ["export", "TRACE", "-o", f"OUT.{end}"] for end in ("npz", "parquet", "bin", "json")},
    "rebatch": ["rebatch", "TRACE", "-o", "OUT.h5", "--batch", "32", "--chunk", "512"],
    "replay": ["replay", "TRACE", "--system", "rtx4090-offload", "--policy", "on-demand", "--ignore-capacity"],
    "replay --policy edge-ndp": ["replay", "TRACE", "--policy", "edge-ndp", "--ignore-capacity"],
    **{f"analyze {name}": ["analyze", name, "TRACE"] for name in ("cache", "balance", "locality", "prefetch")},
}
COMMANDS["analyze cache"] += ["--capacity", "1536"]


def anonymous_bytes(process: int) -> int:
    """What a process has allocated and touched; 0 if it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Anonymous:"):
                return int(line.split()[1]) << 10
    return 0


def temporary_bytes(process: int) -> int:
    """What files without a name, which a process has open, take on the disk."""
    total = 0
    with contextlib.suppress(OSError):
        for file in Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(OSError):
                facts = file.stat()
                total += facts.st_blocks * 512 if facts.st_nlink == 0 else 0
    return total


def resident_bytes() -> int:
    """What this process has resident."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def replays(number: int) -> None:
    """Replay a shipped trace again and again in this process; print what is resident after each tenth."""
    import moetrace

    trace = Path(__file__).parents[1] / "traces" / "tiny-olmoe.h5"
    print("| replays | resident MiB |", "| --- | --- |", sep="\n", flush=True)
    for done in range(1, number + 1):
        moetrace.replay(trace, policies=["edge-ndp"])
        if done % max(1, number // 10) == 0:
            print(f"| {done} | {resident_bytes() / 2**20:.1f} |", flush=True)


def measure(arguments: list[str], limit_bytes: int) -> tuple[int, int, float]:
    """Run a command of moetrace; return the most anonymous and temporary bytes, and seconds."""
    start_s, anonymous, temporary = time.perf_counter(), 0, 0
    process = subprocess.Popen(
        [sys.executable, "-m", "moetrace", *arguments],
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes)),
    )
    while process.poll() is None:
        anonymous = max(anonymous, anonymous_bytes(process.pid))
        temporary = max(temporary, temporary_bytes(process.pid))
        time.sleep(0.02)
    if process.returncode not in (0, 3):  # 3: lint found something
        raise SystemExit(f"{' '.join(arguments)} failed: {process.returncode}")
    return anonymous, temporary, time.perf_counter() - start_s


def big_trace(folder: Path, model: str, gigabytes: float) -> Path:
    """Write a trace of a model."""
    from moetrace import load_model

    path, known = folder / "big.h5", load_model(model)
    row_bytes = known.moe_layers * known.top_k * (1 if known.experts < 256 else 2)
    requests = max(16, round(gigabytes * 1e9 / row_bytes / 4200))
    shape = ["--requests", str(requests), "--prompt", "3000", "--output", "1200", "--batch", "16"]
    command = [sys.executable, "-m", "moetrace", "generate", str(path), "--model", model, *shape]
    subprocess.run(command, check=True)
    return path


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("analyses", nargs="*", metavar="NAME")
    options.add_argument("--all", action="store_true", help="measure every command that reads a trace")
    options.add_argument("--replays", type=int, metavar="N", help="only replay N times in one process")
    options.add_argument("--file", type=Path)
    options.add_argument("--gigabytes", type=float, default=4)
    options.add_argument("--model", default="qwen3-30b-a3b", help="of the synthetic trace")
    options.add_argument("--limit-mib", type=int, default=1024)
    options.add_argument("--write", type=Path, metavar="PAGE.md", help="write the table between the page's markers")
    given = options.parse_args()
    known = COMMANDS if given.all else {name: ["analyze", how[0], "TRACE", *how[1:]] for name, how in ANALYSES.items()}
    if unknown := set(given.analyses) - set(known):
        options.error(f"there is no {unknown.pop()!r}; known are {', '.join(known)}")
    os.nice(19)
    if given.replays:
        replays(given.replays)
        return
    with tempfile.TemporaryDirectory() as folder:
        trace = given.file or big_trace(Path(folder), given.model, given.gigabytes)
        lines = [
            f"A trace of {trace.stat().st_size / 1e9:.1f} GB; processes may allocate {given.limit_mib} MiB:",
            "",
            f"| {'command' if given.all else 'analysis'} | anonymous MiB | temporary file, MiB | s |",
            "| --- | --- | --- | --- |",
        ]
        print(*lines, sep="\n", flush=True)
        for name in given.analyses or known:
            output = Path(folder) / "OUT"
            arguments = [one.replace("TRACE", str(trace)).replace("OUT", str(output)) for one in known[name]]
            anonymous, temporary, seconds = measure(arguments, given.limit_mib << 20)
            for made in Path(folder).glob("OUT*"):
                made.unlink()
            lines.append(f"| {name} | {anonymous / 2**20:.0f} | {temporary / 2**20:.0f} | {seconds:.0f} |")
            print(lines[-1], flush=True)
    if given.write:
        write_between(given.write, "memory", "\n".join(lines))


if __name__ == "__main__":
    main()
