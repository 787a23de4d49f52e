"""The report of what only some replays have: lost rows, a disk, functions, watts."""

import re

import polars as pl
import pytest

import moetrace as mt
from moetrace.results.record import TIMELINE_FILE
from moetrace.results.replayed import replayed_of
from moetrace.show.charts import parts
from moetrace.show.charts.one_step import one_step
from moetrace.show.report.page import number, percent

pytest.importorskip("altair")
pytest.importorskip("vl_convert")


@pytest.fixture(scope="module")
def of_some(tmp_path_factory):
    """Pages of a lossy link, a disk, functions, and watts: HTML, and each result."""
    trace = mt.generate_trace("tiny-olmoe", requests=3, prompt=4, output=6, batch=3)
    watts = {"system.energy.gpu.idle_w": 20, "system.energy.gpu.active_w": 360}
    asked = {
        "lossy": ("edge-pi-cluster", ["edge-ndp"], {}),
        "disk": ("rtx4090-nvme", ["on-demand"], {"system.host.memory_gb": 1.0}),
        "functions": ("remoe", ["all-cpu", "remoe"], {}),
        "watts": ("rtx4090-ddr5", ["hybrid"], watts),
    }
    pages = {}
    for name, (system, policies, changes) in asked.items():
        found = mt.replay(trace, system=system, policies=policies, slots=48, overrides=changes)
        path = tmp_path_factory.mktemp("page") / "page.html"
        mt.report(found, path)
        pages[name] = (path.read_text(), found)
    return pages


def card(page: str, place: int = 0) -> dict[str, str]:
    """The figures of a policy's card."""
    article = page.split("<article")[1 + place].partition("</article>")[0]
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", article))


def test_cards_and_words_have_the_figures_that_a_replay_has(of_some):
    page, found = of_some["lossy"]
    dropped = found.summary["gate_mass_dropped"][0]
    assert dropped > 0 and card(page)["Gate mass dropped"] == f"{100 * dropped:.1f} %"
    assert f"It drops {100 * dropped:.1f} % of the gate mass, which no time counts." in page
    assert "Resent, GB" not in card(page) and "a policy that loses more may look better" in page
    page, found = of_some["disk"]
    assert card(page)["Read from disk, GB"] == number(found.summary["disk_bytes"][0] / 1e9)
    assert {"Disk busy", "Host hits"} <= {*card(page)} and "a host hit is" in page and "gate mass" not in page
    page, found = of_some["functions"]
    usd = found.summary["remote_usd"][1]
    assert usd > 0 and card(page, 1)["Price of functions, USD"] == number(usd) and "Cold start" in card(page, 1)
    assert "Cold start" not in card(page, 0) and "machine's own price is not in it" in parsed_text(page)
    page, found = of_some["watts"]
    assert card(page)["Energy, J"] == number(found.summary["energy_j"][0]) and "idle watts" in page


def parsed_text(page: str) -> str:
    return page.replace("&#x27;", "'")


def test_where_the_time_goes_has_the_cold_start_and_sums_up(of_some):
    _, found = of_some["functions"]
    drawn = parts(replayed_of(found))
    rows = {row["policy"]: row for row in drawn.table.to_dicts()}
    assert rows["remoe"]["cold start, s"] == found.summary["cold_s"][1] > 0 == rows["all-cpu"]["cold start, s"]
    assert [rows[name]["all, s"] for name in ("all-cpu", "remoe")] == pytest.approx(found.summary["total_s"].to_list())
    assert "cold start of machine and functions" in drawn.words
    _, without = of_some["watts"]
    assert "cold" not in parts(replayed_of(without)).words


def test_one_step_has_slices_of_every_kind(tmp_path):
    trace = mt.generate_trace("tiny-olmoe", requests=8, prompt=2, output=3, batch=8)
    machines = ("h100-amx-dimm", "trimoe", 20), ("remoe", "remoe", 20), ("h100-x8", "two-batch-overlap", None)
    for system, policy, slots in machines:
        found = mt.replay(trace, system=system, policies=policy, slots=slots, timeline=True)
        found.write(tmp_path / policy)
        drawn = one_step(tmp_path / policy / TIMELINE_FILE)
        last = found.timeline.filter(pl.col("step") == trace.steps - 1)
        counts = dict(drawn.table.group_by("kind").agg(pl.sum("slices")).rows())
        assert counts == dict(last.filter(~pl.col("kind").is_in(["step", "layer"])).group_by("kind").len().rows())


def test_a_small_share_is_not_zero_percent():
    assert [percent(share) for share in (None, 0.0, 0.0003, 0.034)] == ["–", "0.0 %", "0.03 %", "3.4 %"]
