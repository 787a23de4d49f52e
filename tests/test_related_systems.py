"""Figures of related systems: what docs/related-systems.md says that holds, and what the presets of each do."""

import re
import shlex

import neighbours
import pytest
from neighbours_links import dropped, layer_bits, resends, robot
from neighbours_tiers import TRIMOE, decode_over_monde, edge_ndp, hot_of, trimoe_times
from pages import ROOT

import moetrace as mt
from moetrace.cli import main
from moetrace.spec.participants import check_policy

FAST = [name for name in neighbours.SYSTEMS if name not in neighbours.SLOW]


@pytest.mark.parametrize("system", FAST)
def test_figures_of_the_page_hold(system):
    figures = neighbours.SYSTEMS[system]()
    assert [figure for figure in figures if figure.holds is False] == []
    page = (ROOT / "docs/related-systems.md").read_text(encoding="utf-8")
    assert neighbours.figures_table(figures) in page, "run python bench/neighbours.py --write"


def test_the_seed_on_one_request():
    """As on the page, with one request a model instead of eight."""
    assert all(figure.holds for figure in edge_ndp(requests=1))
    decode = decode_over_monde(1).decode
    for units in (3, 4, 5, 6):
        tp, balance, prefetch, whole = (decode[policy][units] for policy in decode)
        assert 1 < tp <= balance < prefetch <= whole * (1 + 1e-12)
    gains = [decode["edge-ndp-tp-prefetch"][units] / decode["edge-ndp-tp"][units] for units in (3, 6)]
    assert gains[0] > gains[1]  # the paper: prefetch gains less with more DIMMs


@pytest.mark.parametrize("active", range(1, 129, 6))
def test_the_ratio_of_monde_on_its_machine(active):
    """32 GB/s over 32 + 512: the H of a whole replay is ceil(E/17)."""
    assert hot_of(active) == -(-active // 17)


@pytest.mark.parametrize("batch", [256, 512])
def test_each_part_of_trimoe_pays(batch):
    times = trimoe_times("qwen3-235b-a22b", batch, output=16, moe_layers=4)
    assert min(times[policy] for policy in TRIMOE) > 1


@pytest.mark.parametrize(("loss", "packets"), [(0.01, 1), (0.5, 3)])
def test_rounds_of_a_whole_replay(loss, packets):
    mean, expected, error = resends(loss, packets)
    assert abs(mean - expected) <= error


@pytest.mark.parametrize("loss", [0.01, 0.2])
def test_gates_that_a_whole_replay_drops(loss):
    share, expected, error = dropped(loss)
    assert abs(share - expected) <= error


def test_bits_of_squeezellm_grow():
    bits = [layer_bits(bits, sparse) for bits in (2, 3, 4) for sparse in (0.0, 0.0045)]
    assert bits == sorted(bits)


def test_sharing_a_layer_beats_either_side():
    found = robot(0.1, 0.3)
    assert found.both["total_s"] < found.local["total_s"] == pytest.approx(0.1)
    assert found.offloaded["total_s"] == pytest.approx(0.3)
    # Offloaded the robot idles, and local it never does.
    assert found.offloaded["energy_j"] == pytest.approx(4.79 * 0.3) and found.local["energy_j"] == pytest.approx(1.507)


def test_presets_go_together():
    pairs = {"a6000-xeon": ("n-cpu-moe", "ktransformers", "fiddler", "hybrid", "haq"), "rtx4090-ddr5": ("haq",)}
    pairs |= {"h100-amx-dimm": ("trimoe", *TRIMOE), "edge-robot": ("resident", "ktransformers", "hybrid")}
    for system, policies in pairs.items():
        for policy in policies:
            check_policy(mt.load_policy(policy), mt.load_system(system))


def test_experts_of_mixtral_at_8_bits_fit_where_haq_runs():
    model = mt.load_model("mixtral-8x7b", {"weight_bits": 8, "dense_weight_bits": 8})
    trace = mt.generate_trace(profile="mixtral-8x7b", requests=1, prompt=8, output=8)
    result = mt.replay(trace, model=model, system="rtx4090-ddr5", policies="haq")
    row = result.summary.row(0, named=True)
    assert 0 < row["hit_rate"] < 1 and row["demand_bytes"] == 0


def test_commands_of_the_page_run(tmp_path, monkeypatch, capsys):
    """In one process, and with fewer rows than the page has."""
    (tmp_path / "traces").symlink_to(ROOT / "traces")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/related-systems.md").read_text(encoding="utf-8").replace("\\\n", "")
    commands = re.findall(r"^\$ moetrace (.*)$", page, re.MULTILINE)
    assert len(commands) == 14
    for command in commands:
        arguments = shlex.split(command.replace("--output 24", "--output 1"))
        try:
            main(arguments)
        except SystemExit as stop:
            assert not stop.code, (command, capsys.readouterr().err)


def test_a_name_of_a_trace_stands_for_one_trace():
    """So that who runs the commands of several pages in one folder replays what each page means."""
    made: dict[str, set[str]] = {}
    for path in (ROOT / "docs/related-systems.md", *(ROOT / "docs/how-to").glob("*.md")):
        text = path.read_text(encoding="utf-8").replace("\\\n", "")
        found = re.findall(r"moetrace generate (\S+\.h5) (.*)", text)
        found += [
            (name, f"{source} {more}") for source, name, more in re.findall(r"select (\S+) -o (\S+\.h5)(.*)", text)
        ]
        for name, how in found:
            made.setdefault(name, set()).add(" ".join(how.split()))
    assert {"halo.h5", "robot.h5", "trimoe.h5", "remoe.h5", "pi.h5"} <= made.keys()
    assert {name: how for name, how in made.items() if len(how) > 1} == {}


def test_hits_on_other_prompts_are_shown_and_not_judged():
    hits, rule, _ = neighbours.SYSTEMS["HybriMoE"]()
    assert hits.what.startswith("hits of LRU") and hits.holds is None
    assert rule.holds and rule.judged.startswith("direction")


def test_the_page_names_every_system_policy_and_marker():
    page = (ROOT / "docs/related-systems.md").read_text(encoding="utf-8")
    assert re.findall(r"<!-- ([\w-]+):begin -->", page) == ["related", *map(neighbours.slug, neighbours.SYSTEMS)]
    for policies, _, _ in neighbours.PRESETS.values():
        assert all(policy in page for policy in re.findall(r"`[\w-]+`", policies))
