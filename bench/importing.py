"""Speed and memory of every importer on generated files, each in a process of its own.

    python bench/importing.py [--only NAME]... [--megabytes 200] [--rounds 3] [--folder DIR]

MB/s are megabytes of the sources a second of import, hashing and writing included: by the clock, and by CPU time, which
tells the same whoever else uses the machine. The next column is how many times the CPU time of reading and hashing the
sources alone that is, in the same process. Memory is the peak of RssAnon
(`/proc/self/status`) beyond what the process had after importing a small file of the same kind. Targets: 50 MB/s for
binary forms, 20 MB/s for text; of tables, 100 MB/s for Parquet and 40 MB/s for CSV. Another format: a line in `CASES`,
a function(folder, megabytes) -> Case.
"""

import argparse
import base64
import hashlib
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "tests"):
    sys.path.insert(0, str(folder))
from any_tables import FORMS as ANY_TABLES  # noqa: E402
from any_tables import write_table  # noqa: E402

LAYERS, TOP_K, EXPERTS = 48, 8, 128  # of Qwen3-30B-A3B
TARGETS_MB_S = {"binary": 50, "text": 20, "table": 100, "table as text": 40}


class Case(NamedTuple):
    sources: list[Path]
    hints: dict[str, int]
    form: str  # a key of TARGETS_MB_S


def ids_of(rows: int, layers: int = LAYERS, seed: int = 0) -> np.ndarray:
    """Ids uint8 [rows, layers, TOP_K], none twice in a cell."""
    random = np.random.default_rng(seed)
    return np.argsort(random.random((rows, layers, EXPERTS), dtype=np.float32), -1)[..., :TOP_K].astype(np.uint8)


def rows_of(megabytes: int, row_bytes: int, most: int = 2000) -> tuple[np.ndarray, int]:
    """Ids of a few rows, and how often to repeat them for a size: drawing them all would take longer than importing."""
    rows = max(1, min(most, megabytes * 1_000_000 // row_bytes))
    return ids_of(rows), max(1, megabytes * 1_000_000 // (rows * row_bytes))


def any_table(folder: Path, megabytes: int, form: str) -> Case:
    path = write_table(folder, megabytes, form, ids_of(1000))
    return Case([path], {"num_experts": EXPERTS}, "table" if form.endswith("parquet") else "table as text")


def npz(folder: Path, megabytes: int) -> Case:
    ids, times = rows_of(megabytes, LAYERS * TOP_K)
    ids = np.tile(ids, (times, 1, 1))
    rows = np.arange(len(ids))
    meta = np.array(json.dumps({"model": "x", "num_experts": EXPERTS}))
    path = folder / "a.npz"
    np.savez(
        path,
        expert_ids=ids,
        request_id=rows // 500,
        position=rows % 500,
        phase=(rows % 500 > 100).astype(np.uint8),
        layer_index=np.arange(LAYERS),
        meta=meta,
    )
    return Case([path], {}, "binary")


def vllm_npy(folder: Path, megabytes: int) -> Case:
    ids, times = rows_of(megabytes, LAYERS * TOP_K, 1000)
    paths = [folder / f"{number}.npy" for number in range(times)]
    for path in paths:
        np.save(path, ids)
    return Case(paths, {"num_experts": EXPERTS}, "binary")


def vllm_json(folder: Path, megabytes: int) -> Case:
    from support.writers.vllm import response

    line = json.dumps(response([ids_of(1000)], 800)) + "\n"
    path = folder / "a.jsonl"
    path.write_text(with_ids(line, '"cmpl-1"', megabytes))
    return Case([path], {"num_experts": EXPERTS}, "text")


def with_ids(line: str, name: str, megabytes: int) -> str:
    """The line over and over, each time with another id: the same answer again would be left out."""
    times = max(1, megabytes * 1_000_000 // len(line))
    return "".join(line.replace(name, f'"{number}"', 1) for number in range(times))


def sglang_request(folder: Path, megabytes: int) -> Case:
    from support.writers.sglang_request import generated

    line = json.dumps(generated(ids_of(1000), 800)) + "\n"
    path = folder / "a.jsonl"
    path.write_text(with_ids(line, '"a"', megabytes))
    return Case([path], {"num_experts": EXPERTS, "top_k": TOP_K}, "text")


def sglang_base64(folder: Path, megabytes: int) -> Case:
    text = base64.b64encode(ids_of(1000).astype("<i4").tobytes())
    paths = [folder / f"{number}.b64" for number in range(max(1, megabytes * 1_000_000 // len(text)))]
    for path in paths:
        path.write_bytes(text)
    return Case(paths, {"num_experts": EXPERTS, "top_k": TOP_K, "layers": LAYERS}, "text")


def sglang_tokens(folder: Path, megabytes: int) -> Case:
    import torch

    ids, times = rows_of(megabytes, LAYERS * TOP_K * 4, 64)
    ids = ids.astype(np.int32).transpose(1, 0, 2)
    rows = ids.shape[1]
    records = [
        {
            "forward_pass_id": number,
            "rank": 0,
            "gatherer_key": "primary",
            "input_ids": [1] * rows,
            "positions": [number + 1] * rows,
            "extend_seq_lens": None,
            "forward_mode": 2,
            "topk_ids_of_layer": torch.from_numpy(ids.copy()),
            "misc_objects": [],
            "global_physical_count": torch.zeros((LAYERS, EXPERTS), dtype=torch.int32),
        }
        for number in range(times)
    ]
    path = folder / "a_0.pt"
    to_logical = torch.arange(EXPERTS).repeat(LAYERS, 1)
    torch.save({"records": records, "last_physical_to_logical_map": to_logical}, path)
    return Case([path], {}, "binary")


def sglang_stat(folder: Path, megabytes: int) -> Case:
    import torch

    counts = np.random.default_rng(0).integers(0, 9, (megabytes * 1_000_000 // (LAYERS * EXPERTS * 4), LAYERS, EXPERTS))
    content = {"rank": 0, "logical_count": torch.from_numpy(counts.astype(np.int32))}
    torch.save(content | {"average_utilization_rate_over_window": None}, folder / "a.pt")
    return Case([folder / "a.pt"], {"top_k": TOP_K}, "binary")


def _route_log(folder: Path, megabytes: int, layers: int) -> Case:
    from support.writers.jsonl import write

    path = write(folder / "one.jsonl", ids_of(max(1, 4000 // layers), layers), [max(1, 4000 // layers)])
    head, *lines = path.read_bytes().splitlines(keepends=True)
    size = sum(map(len, lines))
    path.write_bytes(head + b"".join(lines) * max(1, megabytes * 1_000_000 // size))
    return Case([path], {"num_experts": EXPERTS}, "text")


def jsonl(folder: Path, megabytes: int) -> Case:
    return _route_log(folder, megabytes, LAYERS)


def jsonl_one_layer(folder: Path, megabytes: int) -> Case:
    return _route_log(folder, megabytes, 1)


def _repeated(path: Path, text: str, megabytes: int, hints: dict[str, int], head: str = "") -> Case:
    path.write_text(head + text * max(1, megabytes * 1_000_000 // len(text)))
    return Case([path], hints, "text")


def bigmoeonedge(folder: Path, megabytes: int) -> Case:
    head = f"# route_trace v1\n# model=a.gguf arch=x n_layer={LAYERS} n_expert={EXPERTS} n_expert_used={TOP_K}\n"
    head += "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n"
    cells = ids_of(300).tolist()
    path = folder / "a.csv"
    with path.open("w") as file:
        file.write(head)
        turn = 0
        while file.tell() < megabytes * 1_000_000:
            for row, layers in enumerate(cells):
                for layer, ids in enumerate(layers):
                    start = f"{turn},1,{row},{layer},"
                    file.writelines(f"{start}{slot},{i},0.125000,{i & 1},3059712\n" for slot, i in enumerate(ids))
            turn += 1
    return Case([path], {}, "text")


def _passes() -> list:
    from support.writers.known import Pass

    return [Pass(part, len(part) > 1) for part in np.split(ids_of(812).astype(int), [512, *range(513, 812)])]


def colibri(folder: Path, megabytes: int) -> Case:
    from support.writers.colibri import route_trace

    gates = np.random.default_rng(0).random((812, LAYERS, TOP_K))
    text = route_trace(_passes(), gates, list(range(LAYERS)))
    return _repeated(folder / "a.txt", text, megabytes, {"num_experts": EXPERTS})


def lattice(folder: Path, megabytes: int) -> Case:
    from support.writers.lattice import records

    gates = np.random.default_rng(0).random((500, LAYERS, TOP_K)).astype(np.float32).astype(float)
    text = records(ids_of(500), gates, list(range(500)), list(range(LAYERS)))
    return _repeated(folder / "a.jsonl", text, megabytes, {"num_experts": EXPERTS})


def llamacpp_choices(folder: Path, megabytes: int) -> Case:
    from support.writers.llamacpp import choices

    hints = {"num_experts": EXPERTS, "top_k": TOP_K}
    return _repeated(folder / "a.csv", choices(_passes(), list(range(LAYERS))), megabytes, hints)


def llamacpp_tokens(folder: Path, megabytes: int) -> Case:
    from support.writers.llamacpp import tokens

    return _repeated(folder / "a.csv", tokens(_passes(), list(range(LAYERS))), megabytes, {"num_experts": EXPERTS})


def _megatron(folder: Path, megabytes: int, tokens: int) -> Case:
    from support.writers.megatron import records

    ids = ids_of(1000).astype(int)
    path, step = folder / "router_trace_rank0.jsonl", 0
    with path.open("w") as file:
        while file.tell() < megabytes * 1_000_000:
            first = step * tokens % (1000 - tokens)
            file.write(records(0, {(step, 0): ids[first : first + tokens]}, list(range(LAYERS))))
            step += 1
    return Case([path], {"num_experts": EXPERTS}, "text")


def megatron(folder: Path, megabytes: int) -> Case:
    return _megatron(folder, megabytes, 512)


def megatron_decode(folder: Path, megabytes: int) -> Case:
    return _megatron(folder, megabytes, 1)


def _events(folder: Path, megabytes: int, tokens: int) -> Case:
    from safetensors.numpy import save_file

    width = TOP_K if tokens == 1 else 100  # experts that a layer chooses in a cycle
    cycles = max(1, megabytes * 1_000_000 // (LAYERS * (31 + 10 * width)))
    count, random = cycles * LAYERS, np.random.default_rng(0)
    ids = np.sort(np.argsort(random.random((1000, EXPERTS)), 1)[:, :width], 1)[random.integers(0, 1000, count)]
    cycle = np.repeat(np.arange(cycles, dtype=np.int32), LAYERS)
    arrays = dict.fromkeys(("scheduler_steps", "forward_cycles"), cycle)
    arrays |= {"request_indices": cycle // 500, "phases": np.ones(count, np.uint8)}
    arrays |= {"layer_ids": np.tile(np.arange(LAYERS, dtype=np.int16), cycles), "offsets": np.arange(count + 1) * width}
    arrays |= {"token_counts": np.full(count, tokens, np.int32), "expert_ids": ids.astype(np.int16).ravel()}
    arrays |= {"assignment_counts": np.ones(ids.size, np.int32), "gate_mass": random.random(ids.size, np.float32)}
    save_file(arrays, folder / "events.safetensors")
    return Case([folder / "events.safetensors"], {"num_experts": EXPERTS, "top_k": TOP_K}, "binary")


def events(folder: Path, megabytes: int) -> Case:
    return _events(folder, megabytes, 64)


def events_of_a_token(folder: Path, megabytes: int) -> Case:
    return _events(folder, megabytes, 1)


def trtllm(folder: Path, megabytes: int) -> Case:
    from support.writers.trtllm import save

    random = np.random.default_rng(0)
    iterations = max(1, megabytes * 1_000_000 // (4 * LAYERS * EXPERTS * 8))
    counts = random.integers(0, 99, (4, iterations, LAYERS, EXPERTS))
    ranks = [{(i, layer): rank[i, layer] for i in range(iterations) for layer in range(LAYERS)} for rank in counts]
    return Case(save(folder / "run", EXPERTS, TOP_K, ranks), {}, "binary")


def trtllm_raw(folder: Path, megabytes: int) -> Case:
    from support.writers.trtllm import save

    ids = ids_of(512).astype(np.int32)
    iterations = max(1, megabytes * 1_000_000 // ids.nbytes)
    rank = {(i, layer): ids[:, layer] for i in range(iterations) for layer in range(LAYERS)}
    return Case(save(folder / "run", EXPERTS, TOP_K, [rank], raw=True), {}, "binary")


CASES: dict[str, Callable[[Path, int], Case]] = {
    "bigmoeonedge": bigmoeonedge,
    "colibri": colibri,
    "jsonl": jsonl,
    "jsonl, one layer": jsonl_one_layer,
    "lattice": lattice,
    "llamacpp, layer,expert": llamacpp_choices,
    "llamacpp, pos,layer,ids": llamacpp_tokens,
    "megatron, 512 tokens": megatron,
    "megatron, 1 token": megatron_decode,
    "moe-cache-eval, counts": events,
    "moe-cache-eval, rows": events_of_a_token,
    "npz": npz,
    "sglang per_token": sglang_tokens,
    "sglang stat": sglang_stat,
    "sglang-request, base64 files": sglang_base64,
    "sglang-request, responses": sglang_request,
    **{f"any-table, {form}": partial(any_table, form=form) for form in ANY_TABLES},
    "trtllm": trtllm,
    "trtllm, raw": trtllm_raw,
    "vllm, .npy": vllm_npy,
    "vllm, responses": vllm_json,
}


def _rss_anon() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


def measured(name: str, folder: Path) -> dict[str, float]:
    """Import the case in `folder` once, in this process."""
    from moetrace.importers.captured import Hints
    from moetrace.importers.importing import import_traces

    small = folder / "small"
    small.mkdir()
    case = CASES[name](small, 1)
    import_traces(case.sources, folder / "small.h5", hints=Hints(**case.hints))
    sources = [Path(path) for path in json.loads((folder / "sources.json").read_text())]
    peak, done, base = 0, threading.Event(), _rss_anon()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, _rss_anon())

    start = process_time()
    for path in sources:
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")
    hash_s = process_time() - start
    thread = threading.Thread(target=watch)
    thread.start()
    begin, begin_cpu = perf_counter(), process_time()
    import_traces(sources, folder / "out.h5", hints=Hints(**case.hints))
    took, cpu = perf_counter() - begin, process_time() - begin_cpu
    done.set()
    thread.join()
    size = sum(path.stat().st_size for path in sources)
    return {
        "MB/s": size / 1e6 / took,
        "MB/s of CPU": size / 1e6 / cpu,
        "x hashing": cpu / hash_s,
        "peak MB": max(0, peak - base) / 1e6,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", action="append", choices=list(CASES))
    options.add_argument("--megabytes", type=int, default=200)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--folder", type=Path, help="for the generated files; the system's temporary one if not given")
    options.add_argument("--measure", help=argparse.SUPPRESS)
    options = options.parse_args()
    if options.measure:
        print(json.dumps(measured(options.measure, options.folder)))
        return
    table = Table("format", "MB", "MB/s", "MB/s of CPU", "target", "x hashing", "peak RssAnon, MB more")
    for name in options.only or CASES:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            case = CASES[name](Path(folder), options.megabytes)
            (Path(folder) / "sources.json").write_text(json.dumps([str(path) for path in case.sources]))
            found = []
            for _ in range(options.rounds):
                with tempfile.TemporaryDirectory(dir=folder) as own:
                    (Path(own) / "sources.json").symlink_to(Path(folder) / "sources.json")
                    command = [sys.executable, __file__, "--measure", name, "--folder", own]
                    found.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
            size = sum(path.stat().st_size for path in case.sources) / 1e6
            speed, cpu, times, peak = (f"{median(one[key] for one in found):.3g}" for key in found[0])
            table.add_row(name, f"{size:.0f}", speed, cpu, str(TARGETS_MB_S[case.form]), times, peak)
            print(f"{name}: {size:.0f} MB, {speed} MB/s, {cpu} of CPU", file=sys.stderr)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
