"""Fuzz every reader of strangers' files, guided by the branches that an input reaches (atheris, libFuzzer).

    python -m pip install atheris
    python bench/guided.py [--reader NAME]... [--seconds 3600] [--jobs 1] [--keep FOLDER] [--write]

The time is shared by the readers. Each runs in a process of its own with a ceiling of memory. An input is a sample with
damage (`damage.py`) or one that libFuzzer changed. A reader must end within `HANG_S`, in a result or in a MoetraceError
of one line; anything else ends its process, and the input is kept. `--write` writes the figures into docs/security.md.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "tests", ROOT / "bench"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

HANG_S = 60
MEMORY_MB = 4096
MAX_MESSAGE = 4000


class Reader(NamedTuple):
    """What is fuzzed: samples by file name, and what reads a folder in which the file of that name is damaged."""

    prepare: Callable[[Path], dict[str, bytes]]
    read: Callable[[Path, str], object]


def _small_trace(folder: Path) -> Path:
    import moetrace as mt

    trace = mt.generate_trace("tiny-olmoe", requests=2, prompt=6, output=6)
    path = folder / "trace.h5"
    trace.write(path)
    return path


def _traces(folder: Path) -> dict[str, bytes]:
    import h5py
    import numpy as np

    import moetrace as mt

    plain = _small_trace(folder)
    packed, counts, foreign = folder / "packed.h5", folder / "counts.h5", folder / "foreign.h5"
    with mt.Trace.open(plain) as trace:
        trace.write(packed, compress="zstd")
        with h5py.File(foreign, "w") as file:
            for name in ("schema", "model", "source", "created_by"):
                file.attrs[name] = {"schema": "moetrace/1", "source": "{}"}.get(name, "tiny-olmoe")
            file.attrs["num_experts"], file.attrs["top_k"] = np.int64(trace.num_experts), np.int64(trace.top_k)
            for name in ("experts", "request", "position"):
                place = name if name == "experts" else f"rows/{name}"
                file[place] = trace.read(name, 0, trace.rows)
            file["steps/offset"], file["steps/phase"], file["layers/index"] = (
                trace.offset,
                trace.phase,
                trace.layer_index,
            )
    from moetrace.trace.writer import CountsWriter

    with CountsWriter(counts, model="tiny-olmoe", num_experts=4, top_k=2, layers=2, rows=3, steps=3, source={}) as file:
        file.append_counts(np.full((3, 2, 4), 1), np.ones(3, np.int64), np.full(3, 2, np.uint8))
    return {path.name: path.read_bytes() for path in (plain, packed, counts, foreign)}


def _read_trace(folder: Path, name: str) -> None:
    import moetrace as mt

    with mt.Trace.open(folder / name) as trace:
        if trace.content_sha256 is not None:
            trace.verify()
        mt.lint(trace)
        for _ in trace.count_blocks() if "counts" in trace.has else trace.blocks():
            pass


def _specs(folder: Path) -> dict[str, bytes]:
    from importlib import resources

    found = {}
    for kind in ("models", "systems", "policies"):
        presets = resources.files("moetrace.spec").joinpath("presets", kind)
        for path in sorted(presets.iterdir(), key=lambda path: path.name)[:6]:
            found[f"{kind}-{path.name}"] = path.read_bytes()
    found["sweep-a.toml"] = (ROOT / "bench/ci/sweep.toml").read_bytes()
    profiles = ROOT / "moetrace/generators/profiles"
    found |= {f"profile-{path.name}": path.read_bytes() for path in sorted(profiles.glob("*.toml"))[:2]}
    return found


def _read_spec(folder: Path, name: str) -> None:
    import moetrace as mt
    from moetrace.batch.grid import load_grid

    path, kind = folder / name, name.partition("-")[0]
    load = {
        "models": mt.load_model,
        "systems": mt.load_system,
        "policies": lambda path: mt.load_policy(path, code=False),
        "sweep": load_grid,
        "profile": mt.load_profile,
    }[kind]
    load(path)


def _results(folder: Path) -> dict[str, bytes]:
    import moetrace as mt

    with mt.Trace.open(_small_trace(folder)) as trace:
        mt.replay(trace, policies=["monde", "edge-ndp"], slots=24, timeline=True).write(folder / "result")
    files = sorted((folder / "result").iterdir())
    return {f"result-{path.name}": path.read_bytes() for path in files}


def _read_result(folder: Path, name: str) -> None:
    import moetrace as mt
    from moetrace.results.replayed import read_replayed
    from moetrace.show.charts.one_step import one_step

    result = folder / "damaged"
    shutil.copytree(folder / "result", result)
    try:
        (result / name.removeprefix("result-")).write_bytes((folder / name).read_bytes())
        replayed = read_replayed(result)
        if replayed.steps is not None:
            replayed.steps.collect()
        one_step(result / "timeline.json.gz", replayed.sha256)
        mt.gate(result, folder / "baseline.json", update=True)
    finally:
        shutil.rmtree(result)


def _gates(folder: Path) -> dict[str, bytes]:
    import moetrace as mt

    found = _results(folder)
    mt.gate(folder / "result", folder / "b.json", update=True)
    return {"baseline.json": (folder / "b.json").read_bytes(), "summary.json": found["result-summary.json"]}


def _read_gate(folder: Path, name: str) -> None:
    import moetrace as mt

    if name == "baseline.json":
        mt.gate(folder / "result", folder / name)
        return
    (folder / "alone").mkdir(exist_ok=True)
    (folder / "alone/summary.json").write_bytes((folder / name).read_bytes())
    mt.gate(folder / "alone", folder / "b.json")


def _tables(folder: Path) -> dict[str, bytes]:
    ones = "\n".join(",".join(["1"] * 8) for _ in range(2)).encode()
    plan = b'{"physical_to_logical_map": [[0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0]]}'
    yaml = b"num_slots: 8\ninitial_global_assignments:\n  0: [0, 1, 2, 3, 4, 5, 6, 7]\n  1: [0, 1, 2, 3, 4, 5, 6, 7]\n"
    layers = (ROOT / "tests/calibration/layers.csv").read_bytes().split(b"\n", 1)[1]
    return {"loads.csv": ones, "static.csv": b"0,1\n1,2\n", "plan.json": plan, "plan.yaml": yaml, "times.csv": layers}


def _read_table(folder: Path, name: str) -> None:
    import numpy as np

    import moetrace as mt
    from moetrace.spec import load_loads, load_static
    from moetrace.spec.plan import load_plan

    path = folder / name
    if name == "loads.csv":
        load_loads(path, 2, 8)
    elif name == "static.csv":
        load_static(path, 2, 8)
    elif name == "times.csv":
        mt.calibrate(path, "h200")
    else:
        load_plan(path, np.arange(2), 8, 4)


def _models(folder: Path) -> dict[str, bytes]:
    """Return configurations, and headers of weight files; `_read_model` lengthens these as their tensors need."""
    from support.gguf_files import moe_tensors, write_gguf

    path = ROOT / "tests/spec/model_files/released.json"
    released = [row["config"] for row in json.loads(path.read_text()).values()]
    found = {f"{number}.json": json.dumps(config).encode() for number, config in enumerate(released[:12])}
    for name in ("qwen3moe", "deepseek2"):
        file = folder / f"{name}.gguf"
        write_gguf(file, name, *moe_tensors(name, [{}, {"down": "Q6_K"}], experts=2, hidden=256))
        found[file.name] = file.read_bytes().rstrip(b"\0")
    tensor = {"dtype": "BF16", "shape": [32, 64], "data_offsets": [0, 4096]}
    parts = [f"{expert}.{part}_proj" for expert in range(4) for part in ("gate", "up", "down")]
    names = [f"model.layers.{layer}.mlp.experts.{part}.weight" for layer in range(2) for part in parts]
    header = json.dumps(dict.fromkeys(names, tensor)).encode()
    found["0.safetensors"] = len(header).to_bytes(8, "little") + header
    return found


def _read_model(folder: Path, name: str) -> None:
    import moetrace as mt

    path = folder / "model" / ("config.json" if name.endswith(".json") else f"model{Path(name).suffix}")
    shutil.rmtree(path.parent, ignore_errors=True)
    path.parent.mkdir()
    shutil.copyfile(folder / name, path)
    if not name.endswith(".json"):
        os.truncate(path, path.stat().st_size + (8 << 20))
        config = {"model_type": "qwen3_moe", "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2}
        config |= {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 96, "vocab_size": 100}
        config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        (path.parent / "config.json").write_text(json.dumps(config))
    mt.load_model(path)


READERS = {
    "traces": Reader(_traces, _read_trace),
    "specs": Reader(_specs, _read_spec),
    "results": Reader(_results, _read_result),
    "baselines": Reader(_gates, _read_gate),
    "tables": Reader(_tables, _read_table),
    "models": Reader(_models, _read_model),
}


def damage_once(data: bytes, seed: int, pool: list[bytes], most: int) -> bytes:
    """Return the file number and a damaged file."""
    from damage import damaged_bytes

    return (data[:1] + damaged_bytes(Random(seed), data[1:], pool))[:most]


def child(name: str, seconds: int, keep: Path) -> None:
    """Fuzz one reader in this process until the time is over; never returns."""
    import atheris

    reader = READERS[name]
    folder = Path(tempfile.mkdtemp(prefix="guided-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    prepared = subprocess.run([sys.executable, __file__, "--prepare", name, "--keep", str(folder)], check=False)
    if prepared.returncode:
        sys.exit("The samples could not be made.")
    # Numba compiles no code that atheris has changed.
    kernels = [path for path in (ROOT / "moetrace").rglob("*.py") if "@kernel" in path.read_text(encoding="utf-8")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in kernels]
    with atheris.instrument_imports(include=["moetrace"], exclude=names):
        import moetrace as mt

        for module in ("lints", "show.report", "batch.gate", "batch.grid", "spec.model_files", "calibration"):
            __import__(f"moetrace.{module}")
    samples = {path.name: path.read_bytes() for path in (folder / "samples").iterdir()}
    names, pool = sorted(samples), list(samples.values())
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, file in enumerate(names):
        (folder / file).write_bytes(samples[file])
        reader.read(folder, file)  # a sample itself is read well
        (corpus / file).write_bytes(bytes([number]) + samples[file])

    def one_input(data: bytes) -> None:
        file = names[data[0] % len(names)] if data else names[0]
        (folder / file).write_bytes(data[1:])
        try:
            reader.read(folder, file)
        except mt.MoetraceError as error:
            if "\n" in str(error) or not 0 < len(str(error)) < MAX_MESSAGE:
                raise AssertionError(f"a message of {len(str(error))} characters: {str(error)[:300]!r}") from error
        finally:
            (folder / file).write_bytes(samples[file])

    def changed(data: bytes, most: int, seed: int) -> bytes:
        return damage_once(data, seed, pool, most) if data and seed % 4 else atheris.Mutate(data, most)

    options = [f"-max_total_time={seconds}", f"-timeout={HANG_S}", f"-rss_limit_mb={MEMORY_MB}", "-print_final_stats=1"]
    largest = max(map(len, pool)) + 4096
    argv = [sys.argv[0], *options, f"-max_len={largest}", f"-artifact_prefix={keep}/{name}-", "-seed=1", str(corpus)]
    atheris.Setup(argv, one_input, custom_mutator=changed)
    atheris.Fuzz()


def fuzzed(name: str, seconds: int, keep: Path) -> tuple[str, ...]:
    """Fuzz a reader in a process of its own; return the cells of its row."""
    command = [sys.executable, __file__, "--child", name, "--seconds", str(seconds), "--keep", str(keep)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    (keep / f"{name}.txt").write_text(done.stdout[-20_000:] + done.stderr[-200_000:])
    inputs = re.search(r"stat::number_of_executed_units:\s+(\d+)", done.stderr)
    branches = re.findall(r" cov: (\d+)", done.stderr)
    # An input that takes 10 s or more is kept too, as slow-unit: on a busy machine many do, and it is no failure.
    failures = sum("-slow-unit-" not in path.name for path in keep.glob(f"{name}-*"))
    ended = "well" if done.returncode == 0 and not failures else f"code {done.returncode}"
    return (
        name,
        f"{int(inputs[1]):,}" if inputs else "?",
        branches[-1] if branches else "?",
        f"{seconds} s",
        str(failures),
        ended,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", action="append", choices=list(READERS))
    parser.add_argument("--seconds", type=int, default=3600, help="for all readers together")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--prepare", help=argparse.SUPPRESS)
    options = parser.parse_args()
    keep = options.keep or Path(tempfile.mkdtemp(prefix="fuzz-"))
    keep.mkdir(parents=True, exist_ok=True)
    if options.prepare:
        (keep / "samples").mkdir()
        for file, data in READERS[options.prepare].prepare(keep).items():
            (keep / "samples" / file).write_bytes(data)
        return 0
    if options.child:
        child(options.child, options.seconds, keep)
    names = options.reader or list(READERS)
    each = max(1, options.seconds // len(names))
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(lambda name: fuzzed(name, each, keep), names))
    from reference import table

    text = table(("reader", "inputs", "branches reached", "time", "failures", "ended"), rows)
    print(text, f"\nkept in {keep}" if any(row[-1] != "well" for row in rows) else "")
    if options.write:
        from markers import write_between

        write_between(ROOT / "docs/security.md", "fuzz", text)
    return int(any(row[-1] != "well" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
