"""Records of choices: what they say is true, they are light, and another package may bring one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import choice_tables
import pytest

from moetrace.spec import PolicySpec, load_policy
from moetrace.spec.choices import (
    FOLDERS,
    KINDS,
    cache_policies,
    choices_of,
    described,
    find,
    legal,
    planned_placements,
    resolve,
)
from moetrace.spec.errors import MoetraceError
from moetrace.spec.policy import parameters

ROOT = Path(__file__).parents[2]
EVERY = [(kind, name) for kind in KINDS for name in choices_of(kind)]


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_parts_that_a_record_names_exist(kind, name):
    record = choices_of(kind)[name]
    assert record.kind == kind and record.name == name and record.meaning
    assert set(record.parameters) <= set(parameters()) < set(PolicySpec.__struct_fields__)
    assert bool(record.letter) == bool(record.largest) and (record.bare or record.letter)
    assert ":" in name or find(kind, f"{name}:3") is record
    if kind in ("placement", "dispatch"):
        assert record.hook or record.instead or getattr(record, "tiers_hook", None)
    if kind == "placement" and record.planner:
        assert resolve(record.planner).make
    if kind == "dispatch":
        assert all(partner in legal(of) for of, partner in record.partners)
    if kind == "residency":
        assert set(record.prefetches) <= set(choices_of("prefetch"))
    if kind == "prefetch":
        assert set(record.residencies) <= set(choices_of("residency"))


def test_references_of_cache_policies_lead_somewhere():
    assert [name for name, policy in cache_policies().items() if not callable(resolve(policy.replays))] == []


def test_orders_are_those_that_messages_have():
    assert planned_placements() == ("ep", "ep-block", "ep-lpt", "eplb", "eplb-hierarchical", "tp", "tp:g")
    assert legal("prefetch") == ("none", "prefill", "online:m", "foresee", "oracle:d", "relayout")
    assert [*cache_policies()][:5] == ["lru", "fifo", "sieve", "s3-fifo", "arc"]


def test_a_file_a_choice():
    for kind, folder in FOLDERS.items():
        files = sorted(path.stem for path in (ROOT / "moetrace/engine" / folder).glob("[a-z]*.py"))
        assert files == sorted(name.replace("-", "_").replace(":", "_") for name in choices_of(kind))


def test_reading_all_records_imports_nothing_heavy():
    code = (
        "import sys; from moetrace.spec.choices import KINDS, described; [described(kind) for kind in KINDS];"
        "print(*sorted({'numba', 'llvmlite', 'polars', 'h5py', 'click', 'rich'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_help_of_all_commands_reads_no_record():
    code = (
        "import sys; from moetrace.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "records = ('moetrace.engine', 'moetrace.spec.choices', 'numpy')\n"
        "print([name for name in sys.modules if name.startswith(records)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n")


def test_tables_of_the_page_are_up_to_date():
    page = choice_tables.PAGE.read_text(encoding="utf-8")
    for folder, text in choice_tables.tables(built_in=True).items():
        assert f"<!-- {folder}:begin -->\n{text}\n<!-- {folder}:end -->" in page, "run python bench/choice_tables.py"


HOOK = """
def two_touch(state, view, layer, load, plan):
    for i in range(load.size):
        cell = state[layer, view.active[i].expert]
        cell.admit = cell.memory > 0
        cell.memory = view.step + 1
        cell.score = cell.memory
"""
MODULE = f"""
from moetrace.spec.choices import Residency
{HOOK}

RECORD = Residency(
    name="two-touch", meaning="the GPU keeps what came twice", hook=two_touch, parameters=("alpha",),
    prefetches=("oracle",),
)
"""


class Package:
    """A folder with an installed package of one module, which brings a residency."""

    def __init__(self, folder: Path, module: str = MODULE, name: str = "two_touch") -> None:
        self.folder, self.module = folder, folder / "site" / f"{name}.py"
        self.said = ""
        about = folder / "site" / f"{name}-1.0.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[moetrace.choices]\n{name.replace('_', '-')} = {name}\n")
        self.module.write_text(module)

    def run(self, *command: object, code: int = 0) -> str:
        """Run Python with the package on its path; return its stdout, or its stderr if it failed."""
        path = os.pathsep.join([str(self.folder / "site"), str(ROOT)])
        environment = os.environ | {"PYTHONPATH": path, "COLUMNS": "200"}
        arguments = [sys.executable, *map(str, command)]
        done = subprocess.run(arguments, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        self.said = done.stderr
        return done.stderr if code else done.stdout

    def moetrace(self, *arguments: object, code: int = 0) -> str:
        return self.run("-m", "moetrace", *arguments, code=code)


def test_a_package_of_one_file_brings_a_residency(tmp_path):
    package = Package(tmp_path)
    (tmp_path / "mine.toml").write_text('name = "mine"\nresidency = "two-touch"\nprefetch = "oracle:1"\nalpha = 0.5\n')
    (tmp_path / "own.py").write_text(HOOK)
    (tmp_path / "own.toml").write_text('name = "own"\nresidency = "own.py:two_touch"\nprefetch = "oracle:1"\n')

    rows = {row["name"]: row for row in json.loads(package.moetrace("list", "residencies", "--format", "json"))}
    assert rows["two-touch"]["meaning"] == "the GPU keeps what came twice"
    assert rows["two-touch"]["goes_with"] == "prefetch none, oracle:d" and rows["two-touch"]["used_by"] == "replay"
    assert "two-touch" in package.moetrace("replay", "--help")
    shown = package.moetrace("show", "policy", "mine.toml")
    assert "the GPU keeps what came twice" in shown and "alpha" in shown
    assert "two-touch" in package.run(ROOT / "bench/choice_tables.py", "--print")
    refused = package.moetrace("show", "policy", "mine.toml", "--set", "policy.prefetch=online:1", code=2)
    assert "got residency two-touch, which goes with prefetch none or oracle:d." in refused

    package.moetrace("generate", "t.h5", "--model", "tiny-olmoe", "--requests", 2, "--prompt", 4, "--output", 12)
    replay = ("replay", "t.h5", "--slots", 24, "--format", "json", "--policy")
    found = json.loads(package.moetrace(*replay, "mine.toml", "--policy", "own.toml", "--policy", "on-demand"))
    mine, own, lru = found["policies"]
    assert mine["total_s"] == own["total_s"] != lru["total_s"]

    (tmp_path / "grid.toml").write_text(
        'trace = "t.h5"\npolicy = "on-demand"\nslots = 24\n[set]\npolicy.residency = ["lru", "two-touch"]\n'
    )
    sweep = ("sweep", "grid.toml", "-o", "out", "--format", "json", "--jobs", 1)
    first, again = package.moetrace(*sweep), package.moetrace(*sweep)
    assert "two-touch" in first and first == again
    package.module.write_text(MODULE.replace("cell.memory > 0", "False"))
    assert package.moetrace(*sweep) != first  # a figure of the function as it was is not used again


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (MODULE.replace('"two-touch"', '"lru"'), "packages moetrace and two-touch both bring a residency called lru"),
        ("RECORD = 3\n", "brings two_touch, which must be a Placement, Dispatch, Residency or Prefetch"),
        ("1 / 0\n", "brings choices, but two_touch cannot be read: ZeroDivisionError: division by zero."),
        ("raise SystemExit('no GPU')\n", "brings choices, but two_touch cannot be read: SystemExit: no GPU."),
        (MODULE.replace('"two-touch"', '"Two:touch"'), "a residency whose name is not of lower-case letters"),
    ],
)
def test_an_unusable_record_of_a_package_is_skipped_with_a_note(tmp_path, module, says):
    package = Package(tmp_path, module)
    rows = json.loads(package.moetrace("list", "residencies", "--format", "json"))
    assert [row["name"] for row in rows] == [*choices_of("residency")]
    assert says in package.said and package.said.startswith("moetrace: note: ") and package.said.count("\n") == 1
    assert {row["name"]: row["meaning"] for row in rows}["lru"] == find("residency", "lru").meaning


def test_a_broken_package_ends_only_what_names_it(tmp_path):
    Package(tmp_path, "print('hello')\n1 / 0\n", "broken")
    package = Package(tmp_path)
    package.moetrace("show", "policy", "on-demand", "--set", "policy.residency=two-touch")
    assert package.said == "hello\n"
    for command in (("replay", "--help"), ("analyze", "cache", "--help"), ("analyze", "balance", "--help")):
        said = package.moetrace(*command)
        assert "hello" not in said and ("two-touch" in said) == (command[0] == "replay")
        assert package.said.count("moetrace: note: The package broken brings choices") == 1

    refused = package.moetrace("show", "policy", "on-demand", "--set", "policy.residency=broken", code=1)
    assert refused.endswith("package broken brings choices, but broken cannot be read: "
                            "ZeroDivisionError: division by zero.\n")  # fmt: skip
    assert "Traceback" not in refused and "note" not in refused
    unknown = package.moetrace("show", "policy", "on-demand", "--set", "policy.residency=two-tuch", code=2)
    assert "two-touch" in unknown and "note: The package broken" in unknown


def test_a_built_in_choice_imports_no_package(tmp_path):
    package = Package(tmp_path, "raise SystemExit('imported')\n")
    package.moetrace("generate", "t.h5", "--model", "tiny-olmoe", "--requests", 2, "--prompt", 4, "--output", 4)
    for command in (
        ("show", "policy", "edge-ndp", "--format", "json"),
        ("analyze", "cache", "t.h5", "--capacity", 48, "--policy", "lru", "--format", "json"),
        ("replay", "t.h5", "--slots", 24, "--policy", "on-demand", "--format", "json"),
    ):
        json.loads(package.moetrace(*command))
        assert "imported" not in package.said, command


def test_output_of_a_package_is_not_data(tmp_path):
    package = Package(tmp_path, "print('hello')\n" + MODULE)
    rows = json.loads(package.moetrace("list", "residencies", "--format", "json"))
    assert "two-touch" in [row["name"] for row in rows] and package.said == "hello\n"


def test_a_name_that_two_packages_bring_is_that_of_neither(tmp_path):
    Package(tmp_path, MODULE, "other")
    package = Package(tmp_path)
    rows = json.loads(package.moetrace("list", "residencies", "--format", "json"))
    assert "two-touch" not in [row["name"] for row in rows]
    refused = package.moetrace("show", "policy", "on-demand", "--set", "policy.residency=two-touch", code=1)
    assert refused.count("packages other and two-touch both bring a residency called two-touch: rename or") == 1


def test_a_choice_that_a_worker_lacks_is_one_sentence():
    from moetrace.engine.plugin import load_hook

    with pytest.raises(MoetraceError, match="There is no residency 'two-touch'; known are none, static, "):
        load_hook("residency", "two-touch")


def test_an_unknown_name_is_refused_with_the_known_names():
    with pytest.raises(MoetraceError, match="residency wants one of none, static"):
        load_policy(PolicySpec(name="mine"), {"residency": "two-touch"})


def test_lists_say_what_a_choice_needs():
    said = {row["name"]: row["goes_with"] for kind in ("placement", "prefetch") for row in described(kind)}
    assert said["striped"] == said["mixed"] == "systems with [ndp]"
    assert said["ep"] == "any" and said["relayout"] == "placement mixed, residency ewma"
