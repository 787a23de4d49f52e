"""Sweeps: each cell is what its replay alone is, and every input counts."""

import errno
import io
import json
import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from support.sweeps import files

import moetrace as mt
from moetrace.batch import cell as cell_module
from moetrace.batch import work
from moetrace.batch.cell_frame import pareto_marks
from moetrace.engine import decoded as decoded_module
from moetrace.engine.decoded import needs_of
from moetrace.engine.demand import demand_of
from moetrace.engine.setup import Setup
from moetrace.engine.tiers.tier_layout import new_layout
from moetrace.jit.fingerprint import room_fingerprint
from moetrace.spec import load_model, load_policy, load_system
from moetrace.trace.atomic import AtomicFile

ROOT = Path(__file__).parents[2]
TINY, MIXTRAL = (str(ROOT / "traces" / f"{name}.h5") for name in ("tiny-olmoe", "mixtral-8x7b-b16"))


def test_cells_are_what_their_replays_are(small, tmp_path):
    grid = {
        "trace": [small, MIXTRAL],
        "system": ["edge-ndp", "h100-dimm-ndp"],
        "policy": ["monde", "edge-ndp"],
        "slots": [8, 48],
        "set": {"system": {"ndp": {"units": [4, 8]}}, "policy": {"edge-ndp": {"scope": "global"}}},
        "ignore_capacity": True,
    }
    found = mt.sweep(grid, tmp_path / "out")
    assert (len(found.cells), found.computed, found.reused, found.failed) == (32, 32, 0, {})
    for row in found.cells.iter_rows(named=True):
        alone = mt.replay(
            small if row["trace"] == "small" else MIXTRAL,
            system=row["system"],
            policies=row["policy"],
            slots=row["slots"],
            overrides={"system.ndp.units": row["system.ndp.units"]}
            | ({"policy.scope": "global"} if row["policy"] == "edge-ndp" else {}),
            ignore_capacity=True,
        )
        assert found.results[row["name"]] == json.loads(json.dumps(alone.to_dict()))
        cell = json.loads((tmp_path / "out" / "cells" / f"{row['cell']}.json").read_text())
        assert cell["result"] == found.results[row["name"]]
        assert cell["inputs"]["trace"] == alone.to_dict()["trace"]["sha256"]
        units = alone.units.filter(pl.col("unit").str.starts_with("link"))
        assert row["link_bytes"] == pytest.approx(units["bytes"].sum(), rel=1e-12)
        assert {**row, "speedup": 1.0}.items() >= alone.summary.drop("name").row(0, named=True).items()
    frame = found.cells.filter(policy="edge-ndp")
    base = found.cells.filter(policy="monde")
    assert frame["speedup"].to_list() == pytest.approx((base["total_s"] / frame["total_s"]).to_list())
    assert pl.read_parquet(tmp_path / "out" / "cells.parquet").equals(found.cells)
    listed = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert listed == json.loads(json.dumps(found.to_dict()))
    assert listed["schema"] == "moetrace.sweep/1"
    assert [one["name"] for one in listed["cells"]] == found.cells["name"].to_list()


def test_jobs_change_no_byte_and_nothing_is_done_twice(small, tmp_path):
    grid = {"trace": [small, MIXTRAL], "policy": ["monde", "on-demand", "edge-ndp"], "slots": [0, 4, 8]}
    seen = []
    for jobs in (1, 2, 4):
        found = mt.sweep(grid, tmp_path / f"{jobs}", jobs=jobs)
        seen.append(files(tmp_path / f"{jobs}"))
        assert (found.computed, found.reused) == (18, 0)
    assert seen[0] == seen[1] == seen[2]
    again = mt.sweep(grid, tmp_path / "4", jobs=4)
    assert (again.computed, again.reused) == (0, 18)
    assert files(tmp_path / "4") == seen[0]
    more = mt.sweep(grid | {"slots": [4, 8, 9]}, tmp_path / "4")
    assert (more.computed, more.reused, more.unused) == (6, 12, 6)


def test_a_thousand_configurations_decode_their_trace_once(tmp_path, monkeypatch):
    trace = mt.generate_trace("qwen3-30b-a3b", requests=1, prompt=2, output=2)
    trace.write(tmp_path / "t.h5")
    decoded, read = [], []
    monkeypatch.setattr(decoded_module, "demand_of", lambda *args: decoded.append(args) or demand_of(*args))
    blocks = mt.Trace.compared_blocks
    monkeypatch.setattr(mt.Trace, "compared_blocks", lambda *args, **more: read.append(args) or blocks(*args, **more))
    found = mt.sweep({"trace": str(tmp_path / "t.h5"), "policy": "on-demand", "slots": list(range(1000))})
    assert (found.computed, len(decoded), len(read)) == (1000, 1, 1)


def test_a_trace_too_large_to_keep_is_read_once_a_task(small, monkeypatch):
    grid = {"trace": small, "policy": ["monde", "belady.toml"], "slots": list(range(6))}
    whole = mt.sweep(grid | {"policy": "monde"})
    reads = []
    blocks = mt.Trace.compared_blocks
    monkeypatch.setattr(mt.Trace, "compared_blocks", lambda *args, **more: reads.append(args) or blocks(*args, **more))
    monkeypatch.setattr(work, "KEEP_BYTES", 0)
    streamed = mt.sweep(grid | {"policy": "monde"})
    assert len(reads) == 1
    monkeypatch.setattr(work, "LOGS_BYTES", 1)
    one_by_one = mt.sweep(grid | {"policy": "monde"})
    assert len(reads) == 7
    assert whole.cells.equals(streamed.cells)
    assert whole.cells.equals(one_by_one.cells)


def test_cells_that_fail_are_named_and_the_others_go_on(small, tmp_path):
    (tmp_path / "bad.py").write_text(
        "def bad(state, view, layer, load, plan):\n    if view.step > 3:\n        plan[load.size] = 1\n"
    )
    (tmp_path / "s.toml").write_text(
        f'trace = ["{small}", "none.h5"]\nsystem = ["edge-ndp", "rtx4090-offload"]\npolicy = ["monde", "bad.py:bad"]\n'
    )
    found = mt.sweep(tmp_path / "s.toml", tmp_path / "out")
    assert found.computed == 1
    assert list(found.results) == ["small/edge-ndp/monde"]
    assert found.failed["small/edge-ndp/bad"].startswith("Policy bad failed: IndexError")
    assert "needs NDP units" in found.failed["small/rtx4090-offload/monde"]
    assert found.failed["none/edge-ndp/monde"] == "there is no file none.h5."
    frame = pl.read_parquet(tmp_path / "out" / "cells.parquet")
    assert frame["error"].null_count() == 1
    assert frame["cell"].null_count() == 7
    assert str(tmp_path) not in (tmp_path / "out" / "sweep.json").read_text()
    (tmp_path / "bad.py").write_text("def bad(state, view, layer, load, plan):\n    pass\n")
    mended = mt.sweep(tmp_path / "s.toml", tmp_path / "out")
    assert (mended.computed, mended.reused) == (1, 1)
    assert mt.sweep({"trace": "none.h5"}).cells["pareto"].to_list() == [None, None]


@pytest.mark.parametrize("first", ["bad.py:bad", "refused.toml"])
def test_speedups_are_against_the_first_policy_or_nobody(small, tmp_path, first):
    """Whether that failed while it ran, or before."""
    (tmp_path / "bad.py").write_text("def bad(state, view, layer, load, plan):\n    plan[load.size] = 1\n")
    (tmp_path / "refused.toml").write_text('name = "refused"\nplacement = "tp:7"\n')
    (tmp_path / "s.toml").write_text(f'trace = "{small}"\npolicy = ["{first}", "monde", "edge-ndp"]\n')
    found = mt.sweep(tmp_path / "s.toml")
    assert len(found.failed) == 1
    assert found.cells["speedup"].to_list() == [None, None, None]
    assert mt.sweep({"trace": small, "policy": ["monde", "edge-ndp"]}).cells["speedup"][0] == 1.0


def test_every_input_counts(small, tmp_path):
    """What changes a result changes its name; what does not, does not."""
    own = "import moetrace\ndef own(state, view, layer, load, plan):\n    pass\n"
    (tmp_path / "own.py").write_text(own)
    (tmp_path / "hot.csv").write_text("0,1\n")
    (tmp_path / "static.toml").write_text('name = "static"\nresidency = "static"\nstatic = "hot.csv"\n')
    sweep = tmp_path / "s.toml"
    sweep.write_text(f'trace = "{small}"\npolicy = ["own.py:own", "static.toml"]\nslots = 48\n')

    def redone() -> int:
        found = mt.sweep(sweep, tmp_path / "out")
        assert not found.failed
        return found.computed

    assert redone() == 2
    assert redone() == 0
    (tmp_path / "own.py").write_text(own + "# another\n")
    assert redone() == 1
    (tmp_path / "hot.csv").write_text("0,2\n")
    assert redone() == 1
    with mt.Trace.open(small) as trace:
        trace.write(tmp_path / "z.h5", compress="zstd")
    sweep.write_text(sweep.read_text().replace(small, "z.h5"))
    assert redone() == 0
    sweep.write_text(sweep.read_text() + "[set]\nsystem.gpu.launch_us = 6.0\n")
    assert redone() == 2


def test_the_files_that_a_policy_names_are_known():
    named = {"loads": "l.csv", "plan": "p.json", "static": "s.csv"}
    model, system = mt.load_model("tiny-olmoe"), mt.load_system("edge-ndp")
    setup = Setup(model=model, system=system, policies=[mt.PolicySpec(name="a", **named)])
    assert cell_module.files_of(setup) == {f"policy.{field}": path for field, path in named.items()}


def test_imports_beside_a_policy_count(tmp_path):
    (tmp_path / "own.py").write_text("from helper import x\nimport numpy\n")
    before = cell_module.digest(str(tmp_path / "own.py"))
    (tmp_path / "helper.py").write_text("import own\n")
    with_helper = cell_module.digest(str(tmp_path / "own.py"))
    (tmp_path / "helper.py").write_text("import own\nx = 1\n")
    assert len({before, with_helper, cell_module.digest(str(tmp_path / "own.py"))}) == 3


def test_other_code_shares_nothing(small, tmp_path, monkeypatch):
    """Be it of the engine, or of what derives bytes from a spec or figures from a log."""
    assert mt.sweep({"trace": small}, tmp_path).computed == 2
    others = {"room_fingerprint": lambda _: "another", "__version__": "9"}
    for unused, (name, other) in enumerate(others.items(), 1):
        monkeypatch.setattr(cell_module, name, other)
        found = mt.sweep({"trace": small}, tmp_path)
        assert (found.computed, found.unused) == (2, 2 * unused)


def test_the_code_includes_each_room_that_makes_figures():
    code = cell_module.code_fingerprint()
    assert {room_fingerprint(room) for room in ("jit", "engine", "spec", "trace", "results")} <= {*code}


def test_a_worker_of_other_code_is_refused(small):
    model, system = mt.load_model("tiny-olmoe"), mt.load_system("edge-ndp")
    setup = Setup(model=model, system=system, policies=[mt.load_policy("monde")])
    (outcome,) = work.work(work.Task(small, "", needs_of([]), [("key", setup, {})], ["another"]))
    assert outcome.found is None
    assert "a worker runs another moetrace" in str(outcome.error)


def test_a_trace_changed_under_its_hashes_gives_no_stale_result(tmp_path):
    path = tmp_path / "t.h5"
    mt.generate(path, "tiny-olmoe", requests=2, prompt=4, output=6)
    assert mt.sweep({"trace": str(path)}, tmp_path / "out").computed == 2
    data = bytearray(path.read_bytes())
    with mt.Trace.open(path) as trace:
        at = data.find(trace.read("experts", 0, 10).tobytes())
    data[at], data[at + 1] = data[at + 1], data[at]
    path.write_bytes(data)
    found = mt.sweep({"trace": str(path)}, tmp_path / "out")
    assert (found.computed, found.reused) == (0, 0)
    assert all("/experts differs from its sha256" in error for error in found.failed.values())


def test_a_damaged_cell_is_replayed_again(small, tmp_path):
    before = mt.sweep({"trace": small}, tmp_path)
    whole = files(tmp_path)
    for damage in (b"", b"{}", b"[" * 100_000, b"\xff"):
        next((tmp_path / "cells").iterdir()).write_bytes(damage)
        found = mt.sweep({"trace": small}, tmp_path)
        assert (found.computed, found.reused) == (1, 1)
        assert files(tmp_path) == whole
    assert found.cells.equals(before.cells)


def empty(cell: dict) -> None:
    cell["costs"] = {}


def faster(cell: dict) -> None:
    cell["result"]["policies"][0]["total_s"] /= 2


def of_others(cell: dict) -> None:
    cell["inputs"]["slots"] += 1


@pytest.mark.parametrize("edit", [empty, faster, of_others])
def test_a_cell_that_was_edited_is_replayed_again(small, tmp_path, edit):
    mt.sweep({"trace": small}, tmp_path)
    whole = files(tmp_path)
    path = next((tmp_path / "cells").iterdir())
    cell = json.loads(path.read_text())
    edit(cell)
    path.write_text(json.dumps(cell))
    found = mt.sweep({"trace": small}, tmp_path)
    assert (found.computed, found.reused) == (1, 1)
    assert files(tmp_path) == whole


def test_equal_cells_are_replayed_once(small):
    found = mt.sweep({"trace": small, "policy": "monde", "slots": [192, 500]})
    assert (found.computed, len(found.cells)) == (1, 2)


def test_evaluate_needs_no_folder_and_takes_a_part_of_a_trace():
    from moetrace.engine.setup import Setup
    from moetrace.spec import load_model, load_policy, load_system

    setup = Setup(model=load_model("tiny-olmoe"), system=load_system("edge-ndp"), policies=[load_policy("monde")])
    with mt.Trace.open(TINY) as trace:
        (first,) = work.evaluate(trace.head(100), [setup])
        (whole,) = work.evaluate(trace, [setup])
    assert isinstance(first, dict)
    assert isinstance(whole, dict)
    assert first["result"]["trace"]["steps"] == 100
    assert first["result"]["policies"][0]["total_s"] < whole["result"]["policies"][0]["total_s"]


def test_the_front_against_a_slow_oracle(small):
    frame = mt.sweep({"trace": [small, MIXTRAL], "slots": [0, 4, 8, 32, 64], "set": {"system.ndp.units": [4, 6]}}).cells
    assert not frame["fits"].all()
    for cost in ("gpu_memory_bytes", "link_bytes"):
        marks = pareto_marks(frame, cost).to_list()
        rows = list(frame.select("trace", "total_s", cost, "fits").iter_rows())
        for at, ((trace, seconds, spent, fits), mark) in enumerate(zip(rows, marks, strict=True)):
            others = [(s, c, i) for i, (t, s, c, could) in enumerate(rows) if t == trace and could and i != at]
            beaten = any(s <= seconds and c <= spent and (s < seconds or c < spent or i < at) for s, c, i in others)
            assert mark is (fits and not beaten)


def test_prices_are_the_sum_of_what_a_system_lists(small):
    listed = {"system.price.gpu.usd_hour": [1.0, 1.25], "system.price.ndp.usd_gb_hour": 0.0078125}
    frame = mt.sweep({"trace": small, "policy": "monde", "set": listed}, pareto="price").cells
    assert frame["price"].to_list() == [2.5, 2.75]  # 6 units of 32 GB
    assert frame["pareto"].to_list() == [True, False]
    assert mt.sweep({"trace": small}, pareto="price").cells["pareto"].to_list() == [False, False]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"jobs": 0}, "jobs is 0"), ({"pareto": "cost"}, "pareto wants one of"), ({"jobs": None}, "jobs is None")],
)
def test_refused_options(options, words):
    with pytest.raises(mt.UsageError, match=words):
        mt.sweep({"trace": TINY}, **options)


def test_an_unknown_policy_of_a_field_is_named(small):
    with pytest.raises(mt.UsageError, match=r"no policy of the sweep is called 'edge' .the nearest is 'edge-ndp'"):
        mt.sweep({"trace": small, "set": {"policy.edge.scope": "global"}})


def test_a_read_only_folder_is_one_sentence(small, tmp_path, monkeypatch):
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(mt.MoetraceError, match="could not be written: Permission denied"):
            mt.sweep({"trace": small}, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(mt.UsageError, match="is a file, but a sweep is written into a folder"):
        mt.sweep({"trace": small}, tmp_path / "file")

    def refused(self, path, follow):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(AtomicFile, "__init__", refused)
    with pytest.raises(mt.MoetraceError, match="could not be written: Read-only file system"):
        mt.sweep({"trace": small}, tmp_path / "new")


def test_a_wrong_grid_leaves_no_folder(small, tmp_path):
    with pytest.raises(mt.UsageError, match="spede"):
        mt.sweep({"trace": small, "spede": 1}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tables_are_whole_or_not_there(small, tmp_path):
    found = mt.sweep({"trace": small}, tmp_path)
    file = io.BytesIO()
    found.cells.write_parquet(file)
    assert pl.read_parquet(file.getvalue()).columns == pl.read_parquet(tmp_path / "cells.parquet").columns
    assert found.cells.columns[:8] == ["name", "cell", "trace", "model", "system", "policy", "slots", "error"]
    assert found.cells.columns[-4:] == ["gpu_memory_bytes", "link_bytes", "price", "pareto"]


@pytest.mark.parametrize(
    ("systems", "note"),
    [
        (["edge-ndp", "h100-sxm", "l40s"], "Constants of h100-sxm, l40s are calibrated, those of edge-ndp are not: "),
        (["h100-sxm", "l40s"], None),
        (["edge-ndp", "h100-dimm-ndp"], None),
    ],
)
def test_calibrated_machines_beside_others_are_noted(tmp_path, systems, note):
    mt.generate_trace("tiny-olmoe", requests=1, prompt=2, output=2).write(tmp_path / "t.h5")
    swept = mt.sweep({"trace": str(tmp_path / "t.h5"), "system": systems, "policy": "on-demand", "slots": 48})
    assert not swept.failed
    assert (swept.notes[0].startswith(note) if note else not swept.notes) and swept.to_dict()["notes"] == swept.notes


def test_state_above_a_disk_and_of_moves_is_counted():
    """What numpy's arrays of host memory and of a layout take, within what a task counts on for them."""
    trace = mt.generate_trace("tiny-olmoe", requests=1, prompt=2, output=2)
    keys = trace.layers * trace.num_experts
    model = load_model("tiny-olmoe")

    def state(system, policy, changed):
        setup = Setup(model=model, system=load_system(system, changed), policies=[load_policy(policy)])
        return work.state_bytes(trace, setup)

    disk = {"disk.bandwidth_gb_s": 7.0, "disk.latency_us": 100.0, "host.slots": 60}
    assert state("rtx4090-ddr5", "hybrid", disk) == state("rtx4090-ddr5", "hybrid", {}) + 60 * keys
    assert state("edge-ndp", "trimoe", {}) == state("edge-ndp", "monde", {}) + 64 * keys
    layout = new_layout(trace.layers, trace.num_experts, 6, 1e9, 0.5)
    assert sum(part.nbytes for part in layout[:7] if isinstance(part, np.ndarray)) <= 64 * keys
