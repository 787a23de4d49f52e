"""Docs name everything that there is: columns, keys, datasets, records, choices, commands."""

import re
import tomllib

import pytest
from pages import ROOT

import moetrace as mt
from moetrace.cli import COMMANDS
from moetrace.engine.plugin import ARGUMENTS
from moetrace.engine.state import ACTIVE, CELL, GROUP, UsersView
from moetrace.spec import PolicySpec, list_presets, load_system
from moetrace.spec.choices import KINDS, USER, cache_policies, legal
from moetrace.trace.schema import OTHER_PATHS, ROW_PATHS

# Fields of the records that only the engine needs.
PRIVATE = {"rows", "next_use", "turn", "here", "share", "outside_s", "ready_s"}
# Columns of tables that only some machines have.
OF_SOME_MACHINES = {"cpu_experts"}


def part_names() -> list[str]:
    return load_system("edge-ndp", {"ndp.units": 2}).part_names


def named_in(page: str) -> set[str]:
    """Everything in code marks: `a.b`, `a[i]` and `[a, b]` name a and b too."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return {word for code in re.findall(r"`([^`\n]+)`", text) for word in [code, *re.split(r"[^\w:-]+", code)]}


@pytest.fixture(scope="module")
def result():
    return mt.replay(mt.generate_trace("tiny-olmoe", requests=1, prompt=2, output=2), policies="edge-ndp")


@pytest.mark.parametrize("table", ["steps", "units", "layers", "requests", "experts"])
def test_columns_are_explained(result, table):
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    section = page.partition(f"## {table}.parquet")[2].partition("\n## ")[0]
    explained = re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]+)", section, re.MULTILINE)))
    assert [name for name in explained if name not in OF_SOME_MACHINES] == getattr(result, table).columns


def test_timeline_columns_kinds_and_tracks_are_explained():
    from moetrace.engine.cluster.cluster_tape import KINDS as CLUSTER_KINDS
    from moetrace.engine.tape import KINDS

    trace = mt.generate_trace("tiny-olmoe", requests=1, prompt=2, output=2)
    result = mt.replay(trace, policies="edge-ndp", timeline=True)
    tracks = {"steps", "layers", "link_in prefetch", "link_in activations", *part_names()} - {"cpu"}
    columns = {*result.timeline.columns, *result.timeline_counters.columns}
    assert columns | {*KINDS, "step"} | tracks <= named_in("docs/timeline.md")
    result = mt.replay(trace, system="h100-x8", policies="ep-serial", timeline=True)
    assert {*result.timeline.columns, *CLUSTER_KINDS, "gpus", "network"} <= named_in("docs/timeline.md")


def test_the_cluster_of_should_i_rebalance_has_the_constants_of_presets():
    page = (ROOT / "docs/how-to/should-i-rebalance.md").read_text(encoding="utf-8")
    own = tomllib.loads(page.partition("```toml\n")[2].partition("```")[0])
    gpu, network = load_system("h20-x32").gpu, load_system("h100-x8").network
    assert network is not None
    assert own["gpu"] == {name: getattr(gpu, name) for name in own["gpu"]}
    assert own["network"] == {name: getattr(network, name) for name in own["network"]}


def test_summary_keys_and_units_are_explained(result):
    summary = result.to_dict()
    keys = {*summary, *summary["policies"][0], *summary["policies"][0]["step_s"], *part_names()}
    assert keys <= named_in("docs/results.md")


def test_datasets_and_attributes_are_explained():
    paths = {*ROW_PATHS.values(), *(path for path, _ in OTHER_PATHS.values()), "/counts"}
    attributes = {"schema", "model", "num_experts", "top_k", "source", "created_by", "sha256"}
    assert paths | attributes <= named_in("docs/trace-format.md")


def test_arguments_of_a_policy_are_explained():
    fields = {*ARGUMENTS, *UsersView._fields, *(CELL.names or ()), *(ACTIVE.names or ()), *(GROUP.names or ())}
    assert fields - PRIVATE <= named_in("docs/policies.md")


def test_choices_parameters_and_presets_are_explained():
    choices = {*list_presets("policies"), *(choice for kind in KINDS for choice in legal(kind))}
    assert choices - {USER} <= named_in("docs/timing-model.md")
    four = {"name", "placement", "dispatch", "residency", "prefetch", "scope"}
    assert set(PolicySpec.__struct_fields__) - four <= named_in("docs/policies.md")


def test_readme_shows_every_command():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [command for command in COMMANDS if f"moetrace {command} " not in readme] == []


def test_cache_policies_and_columns_are_explained():
    from moetrace.analyze.cache.hits import cache_hits

    frame = cache_hits(mt.generate_trace("tiny-olmoe", requests=1, prompt=2, output=2), [24])
    explained = named_in("docs/cache.md")
    assert {*cache_policies(), *frame.columns} <= explained


def test_prefetch_predictors_and_columns_are_explained():
    from moetrace.analyze.prefetch.value import PREDICTORS, prefetch_value

    frame = prefetch_value(mt.generate_trace("tiny-olmoe", requests=1, prompt=2, output=2), 24)
    assert {*PREDICTORS, *frame.columns} <= named_in("docs/prefetch.md")


def test_what_to_install_is_said_for_a_clone():
    """moetrace is installed from its folder, so no extra can be asked for by the package's name."""
    pages = [*(ROOT / "moetrace").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    texts = {page.name: page.read_text(encoding="utf-8") for page in pages}
    assert not [name for name, text in texts.items() if "moetrace[" in text]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = {extra for text in texts.values() for extra in re.findall(r"pip install '\.\[(\w+)\]'", text)}
    assert {"report", "search", "dask", "engines", "capture"} <= named <= set(extras)


def test_every_finding_is_listed_and_pins_what_it_installs():
    listed = (ROOT / "findings/README.md").read_text(encoding="utf-8")
    scripts = sorted((ROOT / "findings").glob("*.sh"))
    assert re.findall(r"^\| `(\w+)` \|", listed, re.M) == [script.stem for script in scripts]
    for script in scripts:
        text = script.read_text(encoding="utf-8")
        _, title, _, versions = text.splitlines()[:4]
        assert f"| `{script.stem}` | {title.removeprefix('# ')} |" in listed and versions.startswith("# Versions: ")
        for installed in re.findall(r"pip install (.*)", text):
            assert all("==" in part for part in installed.split() if not part.startswith("--")), script.name


@pytest.mark.parametrize("path", sorted((ROOT / "docs/how-to").glob("*.md")), ids=lambda path: path.stem)
def test_a_how_to_ends_with_what_to_do_next(path):
    heads = re.findall(r"^## .*", path.read_text(encoding="utf-8"), re.MULTILINE)
    section = path.read_text(encoding="utf-8").partition("\n## What to do next\n")[2]
    assert heads[-1] == "## What to do next" and len(re.findall(r"\]\([^)]*\.md", section)) >= 2


def test_the_home_page_has_a_picture_and_three_doors_and_leads_to_every_how_to():
    home = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    doors = home.partition('<div class="grid cards" markdown>')[2].partition("</div>")[0]
    assert "](assets/" in home and len(re.findall(r"^-   \*\*\[", doors, re.MULTILINE)) == 3
    how_to = {f"how-to/{path.name}" for path in (ROOT / "docs/how-to").glob("*.md")}
    assert how_to <= set(re.findall(r"\]\(([^)#]+)", home))
