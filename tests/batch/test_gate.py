"""`gate`: the verdict on each cell, what changed, tolerances, and what an update writes."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gate_folders import FIGURES, TRACE, replay, summary, sweep

import moetrace as mt
from moetrace.batch.baseline import read_baseline
from moetrace.batch.metrics import DEFAULT_METRICS, DEFAULT_OPTIONAL, METRICS, Tolerances
from moetrace.results.optional_figures import need_of
from moetrace.results.record import ACCOUNTS, OPTIONAL

MONDE = "tiny-olmoe/edge-ndp/monde"


def accepted(tmp_path, *policies, metrics=None, **changed):
    """Path of a baseline of a replay's folder."""
    path = tmp_path / "baseline.json"
    mt.gate(replay(tmp_path / "before", *policies, **changed), path, update=True, metrics=metrics)
    return path


def judged(tmp_path, *policies, baseline=None, tolerance=(), fail_on=("worse", "missing", "changed"), **changed):
    """The gate's word on a replay's folder, by default against that of FIGURES."""
    path = baseline or accepted(tmp_path)
    return mt.gate(replay(tmp_path / "now", *policies, **changed), path, tolerance=tolerance, fail_on=fail_on)


@pytest.mark.parametrize(
    ("changed", "verdict", "red"),
    [
        ({}, "same", False),
        ({"total_s": 13.0}, "worse", True),
        ({"total_s": 12.9}, "better", False),
        ({"hit_rate": 0.70}, "worse", True),
        ({"hit_rate": 0.72}, "better", False),
        ({"total_s": 1.0, "hit_rate": 0.7}, "worse", True),  # one worse outweighs all that is better
        ({"hit_rate": None}, "changed", True),
        ({"prefetch_bytes": 7.0, "speedup": 9.0}, "same", False),  # not gated by default
        ({"total_s": 12.957496905156987 * (1 + 1e-12)}, "same", False),
        ({"total_s": 12.957496905156987 * (1 + 1e-8)}, "worse", True),
    ],
)
def test_a_cell_is_judged_by_its_metrics(tmp_path, changed, verdict, red):
    found = judged(tmp_path, changed)
    assert [cell.verdict for cell in found.cells] == [verdict]
    assert found.failed == ((MONDE,) if red else ())
    assert found.passed is not red


def test_metrics_without_a_direction_only_change(tmp_path):
    baseline = accepted(tmp_path, {}, metrics=["prefetch_bytes", "utilization.ndp"])
    (cell,) = judged(tmp_path, {"prefetch_bytes": 1.0}, baseline=baseline).cells
    assert cell.verdict == "changed"
    assert [(one.metric, one.value, one.verdict) for one in cell.metrics] == [
        ("prefetch_bytes", 1.0, "changed"),
        ("utilization.ndp", 0.5, "same"),
    ]


def test_new_and_missing_cells(tmp_path):
    found = judged(tmp_path, {"name": "monde"}, {"name": "other"}, baseline=accepted(tmp_path, {}, {"name": "gone"}))
    assert [(cell.name.rpartition("/")[2], cell.verdict) for cell in found.cells] == [
        ("monde", "same"),
        ("other", "new"),
        ("gone", "missing"),
    ]
    assert found.failed == ("tiny-olmoe/edge-ndp/gone",)
    assert found.counts == {"worse": 0, "missing": 1, "changed": 0, "better": 0, "new": 1, "same": 1}


@pytest.mark.parametrize(
    ("policy", "changed", "inputs", "why"),
    [
        (
            {"choices": {"dispatch": "hot", "residency": "lru"}},
            {},
            ("policy",),
            "policy changed: residency none -> lru",
        ),
        ({}, {"system": {"link": {"bandwidth_gb_s": 50.0}}}, ("system",), "link.bandwidth_gb_s 55 -> 50"),
        ({}, {"system": {"cpu": {"cores": 4}}}, ("system",), "system changed: cpu.cores none -> 4"),
        ({}, {"slots": 47}, ("slots",), "slots changed: 48 -> 47"),
        ({}, {"model": {"name": "tiny-olmoe", "experts": 64}}, ("model",), "model changed: experts 32 -> 64"),
    ],
)
def test_the_input_that_changed_is_named(tmp_path, policy, changed, inputs, why):
    found = judged(tmp_path, policy, **changed)
    (cell,) = found.cells
    assert (cell.verdict, cell.inputs) == ("changed", inputs)
    assert why in cell.why
    assert found.failed
    # Worse stays worse, and says which input did it.
    (cell,) = judged(tmp_path, policy | {"total_s": 14.0}, **changed).cells
    assert (cell.verdict, cell.inputs) == ("worse", inputs)
    assert why in cell.why


def test_the_content_of_a_policys_files_is_an_input(tmp_path):
    """Of a sweep, that is: it notes the hash of each, and other inputs that a cell may have."""
    baseline = tmp_path / "b.json"
    files, choices = {"policy.dispatch": "12" * 32}, FIGURES["choices"] | {"dispatch": "policies/idea.py:mine"}
    cells = {"a": summary({"choices": choices})}
    mt.gate(sweep(tmp_path / "s", cells, files=files, ignore_capacity=True), baseline, update=True)
    assert mt.gate(tmp_path / "s", baseline).passed
    edited = sweep(tmp_path / "s", cells, files={"policy.dispatch": "34" * 32}, ignore_capacity=False)
    (cell,) = mt.gate(edited, baseline).cells
    assert (cell.verdict, cell.inputs) == ("changed", ("files", "ignore_capacity"))
    assert "files changed: idea.py (policy.dispatch) 121212121212 -> 343434343434" in cell.why
    assert "ignore_capacity changed: true -> none" in cell.why


def test_a_new_name_is_no_change(tmp_path):
    cells = {"a": summary()}
    baseline = tmp_path / "b.json"
    mt.gate(sweep(tmp_path / "one", cells), baseline, update=True)
    renamed = summary({"name": "my-monde"}, model={"name": "mine", "experts": 32}, system={"name": "my-machine"})
    assert [cell.verdict for cell in mt.gate(sweep(tmp_path / "two", {"a": renamed}), baseline).cells] == ["same"]


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ({"moetrace": "0.2.0"}, "only the code changed: moetrace 0.1.0 -> 0.2.0"),
        ({"engine": "f" * 64}, "only the code changed: the engine, eeeeeeeeeeee -> ffffffffffff"),
        ({}, "no recorded input changed"),
    ],
)
def test_if_only_the_code_changed_it_says_so(tmp_path, code, why):
    baseline = tmp_path / "b.json"
    mt.gate(sweep(tmp_path / "one", {"a": summary(), "b": summary()}), baseline, update=True)
    found = mt.gate(sweep(tmp_path / "two", {"a": summary({"total_s": 14.0}), "b": summary()}, **code), baseline)
    assert [cell.verdict for cell in found.cells] == ["worse", "same"]
    assert why in found.cells[0].why
    assert found.notes == ()
    quiet = mt.gate(sweep(tmp_path / "two", {"a": summary(), "b": summary()}, **code), baseline)
    assert quiet.passed
    assert len(quiet.notes) == (1 if code else 0)


def test_a_failed_cell_is_missing(tmp_path):
    baseline = tmp_path / "b.json"
    mt.gate(sweep(tmp_path / "one", {"a": summary(), "b": summary()}), baseline, update=True)
    now = sweep(tmp_path / "two", {"a": summary(), "b": "it does not fit.", "c": "nor does this."})
    found = mt.gate(now, baseline)
    assert [cell.verdict for cell in found.cells] == ["same", "missing", "new"]
    assert found.cells[1].why == "it failed: it does not fit"
    assert found.failed == ("b",)
    updated = mt.gate(now, baseline, update=True)
    assert (updated.dropped, updated.passed) == (("b",), True)
    assert [name for name, cell in read_baseline(baseline).cells.items() if cell.failed] == ["b", "c"]
    # A machine may never be able to run a cell of a grid: once that is accepted, it is the same.
    again = mt.gate(now, baseline, fail_on=["worse", "missing", "changed", "better", "new"])
    assert (again.passed, again.counts["same"]) == (True, 3)
    assert again.notes == ("of the cells that are the same, 2 failed, as when the baseline was made.",)
    works = mt.gate(sweep(tmp_path / "two", dict.fromkeys("abc", summary())), baseline)
    assert [(cell.verdict, cell.why) for cell in works.cells] == [("same", ""), *[("new", "it failed before")] * 2]


def test_fail_on_chooses_the_verdicts_that_fail(tmp_path):
    better = {"total_s": 12.0}
    assert judged(tmp_path, better, fail_on=["better", "new"]).failed == (MONDE,)
    assert judged(tmp_path, {"total_s": 14.0}, fail_on="missing").passed
    assert judged(tmp_path, better, fail_on="any").failed == (MONDE,)
    with pytest.raises(mt.UsageError, match="tolerance is a text"):
        judged(tmp_path, better, tolerance=5)
    assert judged(tmp_path, better, {"name": "x"}, fail_on="new").failed == ("tiny-olmoe/edge-ndp/x",)


def test_a_baseline_of_another_trace_is_refused(tmp_path):
    baseline = accepted(tmp_path)
    other = {"sha256": "cd" * 32, "model": "mixtral-8x7b", "rows": 4096}
    with pytest.raises(mt.UsageError, match=r"of another trace.*tiny-olmoe \(16,414 rows, abab.*mixtral-8x7b \(4,096"):
        judged(tmp_path, baseline=baseline, trace=other)
    mt.gate(tmp_path / "now", baseline, update=True)
    assert mt.gate(tmp_path / "now", baseline).passed
    # With one trace in common, the others changed.
    cells = {"a": summary(), "b": summary()}
    mt.gate(sweep(tmp_path / "s", cells), baseline, update=True)
    found = mt.gate(sweep(tmp_path / "t", cells | {"b": summary(trace=other)}), baseline)
    assert [cell.verdict for cell in found.cells] == ["same", "changed"]
    assert "trace changed: model tiny-olmoe -> mixtral-8x7b" in found.cells[1].why


def test_a_trace_without_a_hash_is_known_by_its_facts(tmp_path):
    none = {"sha256": None}
    baseline = accepted(tmp_path, {}, trace=none)
    assert judged(tmp_path, baseline=baseline, trace=none).passed
    with pytest.raises(mt.UsageError, match="another trace"):
        judged(tmp_path, baseline=baseline, trace=none | {"rows": 1})


@pytest.mark.parametrize(
    ("texts", "metric", "baseline", "allowed"),
    [
        ((), "total_s", 10.0, 1e-8),
        (("0.5%",), "total_s", 10.0, 0.05),
        (("0.5%", "total_s=0.1%"), "total_s", 10.0, 0.01),
        (("0.5%", "total_s=0.1%"), "decode_s", 10.0, 0.05),
        (("total_s=0.1%", "total_s=0.002"), "total_s", 1.0, 0.002),
        (("total_s=0.1%", "total_s=0.002"), "total_s", 10.0, 0.01),
        (("ttft_s=1%",), "ttft_s.p99", 2.0, 0.02),
        (("ttft_s=1%", "ttft_s.p99=2%"), "ttft_s.p99", 2.0, 0.04),
        (("hit_rate=0.01",), "hit_rate", 0.0, 0.01),
        (("0%",), "total_s", 10.0, 0.0),
        ((" total_s = 1e-3 ",), "total_s", 10.0, 1e-3),
        (("demand_bytes=1e9",), "demand_bytes", 0.0, 1e9),
    ],
)
def test_the_nearest_tolerance_counts(texts, metric, baseline, allowed):
    assert math.isclose(Tolerances(texts).of(metric, baseline), allowed, rel_tol=1e-12)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0.5", "in which metric's unit"),
        ("-1%", "not negative"),
        ("nan%", "not negative"),
        ("1e999%", "not negative"),
        ("total_s=", "A tolerance is"),
        ("total_s=1%%", "A tolerance is"),
        ("total=1%", "the nearest is 'total_s'"),
        ("speedup=1%", "names no metric"),
        ("1--e", "A tolerance is"),
    ],
)
def test_a_bad_tolerance_is_one_sentence(text, words):
    with pytest.raises(mt.UsageError, match=words):
        Tolerances([text])


@given(
    st.floats(1e-6, 1e6),
    st.floats(-0.5, 0.5),
    st.floats(0, 60),
    st.sampled_from([name for name in METRICS if METRICS[name].better]),
)
def test_exactly_figures_beyond_the_tolerance_move(baseline, share, percent, metric):
    from moetrace.batch.verdict import _moved

    value = baseline * (1 + share)
    found = _moved(metric, baseline, value, Tolerances([f"{percent!r}%"])).verdict
    within = abs(value - baseline) <= percent / 100 * baseline
    more_is_better = METRICS[metric].better == "higher"
    assert found == ("same" if within else "better" if (value > baseline) == more_is_better else "worse")


@settings(deadline=None, max_examples=50)  # it writes files
@given(st.floats(0, 1e12), st.floats(0, 1))
def test_figures_come_back_from_the_file_to_the_bit(tmp_path_factory, total_s, hit_rate):
    folder = tmp_path_factory.getbasetemp() / "bits"
    folder.mkdir(exist_ok=True)
    (folder / "b.json").unlink(missing_ok=True)
    now = replay(folder / "now", {"total_s": total_s, "hit_rate": hit_rate})
    mt.gate(now, folder / "b.json", update=True)
    assert read_baseline(folder / "b.json").cells[MONDE].metrics["total_s"] == total_s
    exact = mt.gate(now, folder / "b.json", tolerance="0%")
    assert [cell.verdict for cell in exact.cells] == ["same"]


def test_the_file_is_sorted_and_its_diff_is_of_what_moved(tmp_path):
    path = accepted(tmp_path, {"name": "b"}, {"name": "a"}, {"name": "c"})
    before = path.read_text()
    assert before.isascii()
    raw = json.loads(before)
    assert list(raw["cells"]) == sorted(raw["cells"])
    assert raw["cells"]["tiny-olmoe/edge-ndp/a"]["inputs"]["slots"] == 48
    assert raw["cells"]["tiny-olmoe/edge-ndp/a"]["inputs"]["trace"] == "abababababab"
    assert set(raw["cells"]["tiny-olmoe/edge-ndp/a"]["metrics"]) == set(DEFAULT_METRICS)
    assert raw["specs"]["abababababab"] == {key: TRACE[key] for key in ("model", "rows", "steps", "requests")}
    now = replay(tmp_path / "now", {"name": "b"}, {"name": "a", "total_s": 9.0}, {"name": "c"})
    mt.gate(now, path, update=True)
    after = path.read_text()
    moved = [(old, new) for old, new in zip(before.splitlines(), after.splitlines(), strict=True) if old != new]
    assert [old.replace('"total_s": 12.957496905156987', '"total_s": 9') for old, _ in moved] == [moved[0][1]]


def test_an_update_within_rounding_leaves_the_file(tmp_path):
    path = accepted(tmp_path)
    before = path.read_bytes(), path.stat().st_mtime_ns
    now = replay(tmp_path / "now", {"total_s": FIGURES["total_s"] * (1 + 3e-16), "hit_rate": 0.71 * (1 + 1e-12)})
    mt.gate(now, path, update=True)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_an_update_keeps_the_metrics_that_are_gated(tmp_path):
    path = accepted(tmp_path, metrics=["total_s", "misses"])
    mt.gate(tmp_path / "before", path, update=True)
    assert read_baseline(path).metrics == ("total_s", "misses")
    mt.gate(tmp_path / "before", path, update=True, metrics=["hit_rate", "total_s"])
    assert read_baseline(path).metrics == ("total_s", "hit_rate")
    with pytest.raises(mt.UsageError, match="has no misses"):
        mt.gate(tmp_path / "before", path, metrics=["misses"])
    assert len(mt.gate(tmp_path / "before", path, metrics=["hit_rate"]).cells[0].metrics) == 1


def test_a_refused_update_changes_nothing(tmp_path):
    path = accepted(tmp_path)
    before = path.read_bytes()
    with pytest.raises(mt.MoetraceError, match="every cell failed"):
        mt.gate(sweep(tmp_path / "s", {"a": "no."}), path, update=True)
    with pytest.raises(mt.MoetraceError, match="total_s wants a finite number"):
        mt.gate(replay(tmp_path / "now", {"total_s": "x"}), path, update=True)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.endswith(".tmp")] == []


def test_frames_and_plain_values_say_the_same(tmp_path):
    found = judged(tmp_path, {"total_s": 14.0}, {"name": "x"})
    assert repr(found) == "<Gate failed: 2 cells: 1 worse, 1 new; .frame and .metrics are frames>"
    assert found.frame.rows() == [
        (MONDE, "worse", True, "", found.cells[0].why),
        ("tiny-olmoe/edge-ndp/x", "new", False, "", "not in the baseline"),
    ]
    moved = found.metrics.filter(cell=MONDE, metric="total_s").row(0, named=True)
    assert (moved["verdict"], moved["value"], moved["unit"]) == ("worse", 14.0, "s")
    assert moved["relative"] == pytest.approx(14.0 / FIGURES["total_s"] - 1)
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (plain["schema"], plain["passed"], plain["failed"]) == ("moetrace.gate/1", False, [MONDE])
    assert [one["metric"] for one in plain["cells"][0]["metrics"]] == [one.metric for one in found.cells[0].metrics]


def test_energy_is_compared_where_the_folder_has_it(tmp_path):
    now, path = replay(tmp_path / "now", {"energy_j": 21.0, "energy_per_token_j": None}), tmp_path / "baseline.json"
    energy = ["energy_j", "energy_per_token_j"]
    mt.gate(
        replay(tmp_path / "then", {"energy_j": 20.0, "energy_per_token_j": None}), path, metrics=energy, update=True
    )
    (cell,) = mt.gate(now, path).cells
    assert (cell.verdict, [one.metric for one in cell.metrics if one.verdict == "worse"]) == ("worse", ["energy_j"])
    assert mt.gate(now, path, tolerance="energy_j=1").passed
    # The system of one cell lost its [energy]: its figure is no longer defined.
    there = summary({"energy_j": 20.0, "energy_per_token_j": 1.0})
    lost = sweep(tmp_path / "lost", {"a": there, MONDE: summary()})
    assert {cell.name: cell.verdict for cell in mt.gate(lost, path).cells}[MONDE] == "changed"
    with pytest.raises(mt.UsageError, match=r"no cell has price_usd, as no system has \[price\]: add that table"):
        mt.gate(now, path, metrics=["price_usd"])


@pytest.mark.parametrize("metric", sorted(OPTIONAL & {*METRICS}))
def test_a_metric_that_no_cell_has_is_refused_with_the_missing_option(tmp_path, metric):
    need = need_of(metric)
    with pytest.raises(mt.UsageError) as error:
        mt.gate(replay(tmp_path / "now"), tmp_path / "b.json", metrics=[metric], update=True)
    said = f"no cell has {metric}, as no {need.what}: {need.add}, or compare other metrics."
    assert str(error.value) == f"{tmp_path / 'now'}: {said}"
    assert not (tmp_path / "b.json").exists()


def test_needs_are_sentences(tmp_path):
    assert need_of("total_s") is None
    assert need_of("disk_bytes") == ("system has [disk]", "add that table to the system")
    assert need_of("resent_bytes") == ("system has link.loss", "set it in the system")
    assert need_of("moved_s") == ('policy has prefetch = "relayout"', "set it in a policy")
    assert need_of("regret") == ("replay was asked for it", "replay with --regret")


def test_metrics_are_those_of_a_real_summary():
    trace = mt.generate_trace("tiny-olmoe", requests=1, prompt=2, output=2)
    rates = {"system.energy.gpu.idle_w": 20, "system.energy.gpu.active_w": 360, "system.price.usd_hour": 0.5}
    figures = mt.replay(trace, policies="edge-ndp", slots=48, overrides=rates).to_dict()["policies"][0]
    paths = {
        f"{name}.{inner}" if isinstance(value, dict) else name
        for name, value in figures.items()
        for inner in (value if isinstance(value, dict) else [""])
    }
    assert paths - {path for path in paths if path.startswith("choices.")} - {
        "name",
        "speedup",
        "break_even_tokens",
    } == set(METRICS) - (OPTIONAL - {*ACCOUNTS})


def test_a_new_baseline_holds_optional_figures_that_a_cell_has(tmp_path):
    def some(dropped: float, **others: float) -> dict:
        return {"gate_mass_dropped": dropped, "resent_bytes": 0.0} | others

    path = tmp_path / "baseline.json"
    mt.gate(replay(tmp_path / "then", some(0.02), {"name": "x", "remote_usd": 1e-6, "cold_s": 2.0}), path, update=True)
    held = {*next(iter(json.loads(path.read_text())["cells"].values()))["metrics"]}
    assert held == {*DEFAULT_METRICS, "gate_mass_dropped", "resent_bytes", "remote_usd", "cold_s"}
    assert mt.gate(replay(tmp_path / "then", some(0.02), {"name": "x", "remote_usd": 1e-6, "cold_s": 2.0}), path).passed
    faster = some(0.03, total_s=FIGURES["total_s"] / 2)
    cell, other = mt.gate(
        replay(tmp_path / "now", faster, {"name": "x", "remote_usd": 2e-6, "cold_s": 2.0}), path
    ).cells
    assert cell.verdict == other.verdict == "worse"
    assert [one.metric for one in cell.metrics if one.verdict == "worse"] == ["gate_mass_dropped"]
    assert [one.metric for one in other.metrics if one.verdict == "worse"] == ["remote_usd"]


def test_default_optional_metrics_have_a_direction_and_are_optional():
    assert {*DEFAULT_OPTIONAL} <= OPTIONAL & {*METRICS} and not {*DEFAULT_OPTIONAL} & {*DEFAULT_METRICS}
    assert all(METRICS[name].better for name in DEFAULT_OPTIONAL)
