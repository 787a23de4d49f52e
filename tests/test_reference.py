"""The reference of the documentation site: every command, option, public name, code and preset is in it."""

import re

import click
import pytest
import reference
from pages import ROOT

import moetrace as mt
from moetrace.lints.finding import RULES
from moetrace.spec import list_presets


@pytest.fixture(scope="module")
def pages():
    return reference.pages()


def test_commands_with_all_their_options(pages):
    commands = dict(reference.every_command())
    assert {"moetrace replay", "moetrace analyze cache"} <= commands.keys()
    sections = dict(re.findall(r"^###? (moetrace.*)\n([^#]*)", pages["reference/commands.md"], re.MULTILINE))
    assert sections.keys() == commands.keys()
    for name, context in commands.items():
        options = [option for option in context.command.get_params(context) if isinstance(option, click.Option)]
        missing = [
            flag for option in options if not option.hidden for flag in option.opts if flag not in sections[name]
        ]
        assert not missing, name


def test_every_option_has_help():
    options = [
        (name, option.name, getattr(option, "help", None))
        for name, context in reference.every_command()
        for option in context.command.get_params(context)
        if isinstance(option, click.Option) and not option.required
    ]
    assert [option for option in options if not option[2]] == []


def test_public_names(pages):
    directives = re.findall(r"^::: moetrace\.(\w+)$", pages["reference/python.md"], re.MULTILINE)
    assert sorted([*directives, "__version__"]) == sorted(mt.__all__)
    assert "\n## More\n" not in pages["reference/python.md"]


def test_public_names_have_docstrings():
    assert [name for name in mt.__all__ if name != "__version__" and not getattr(mt, name).__doc__] == []


def test_fields_of_records_are_explained(pages):
    """What "Attributes" says of each stands in the table, and nowhere else."""
    tables = re.findall(r"^\| field \|.* meaning \|\n((?:\|.*\n)+)", pages["reference/python.md"], re.MULTILINE)
    assert len(tables) >= len(["Hints", "Tier", "Profile", "Model", "System", "Gpu", "Ndp", "Link", "Cpu"])
    assert not any(row.endswith("|  |") for table in tables for row in table.splitlines())


def test_fields_of_a_policy_are_explained(pages):
    text = pages["reference/python.md"].partition("::: moetrace.PolicySpec\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| .* \| ([^|]*) \|$", text, re.MULTILINE)
    assert [name for name, _ in rows] == list(mt.PolicySpec.__struct_fields__)
    assert [name for name, meaning in rows if not meaning.strip()] == []


def test_tables_explain_what_they_list(pages):
    """Of a record's fields the last column is the default, which may be empty."""
    for name in ("policy-arguments", "columns", "lint-codes"):
        assert "|  |" not in pages[f"reference/{name}.md"], name


def test_codes_of_lint(pages):
    assert re.findall(r"^\| `([\w-]+)` \|", pages["reference/lint-codes.md"], re.MULTILINE) == list(RULES)


@pytest.mark.parametrize("kind", ["systems", "policies", "models"])
def test_presets_with_their_files(pages, kind):
    page = pages[f"reference/{kind}.md"]
    for path in sorted((ROOT / f"moetrace/spec/presets/{kind}").glob("*.toml")):
        assert f"\n## {path.stem}\n" in page
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                assert line in page
    assert {path.stem for path in (ROOT / f"moetrace/spec/presets/{kind}").glob("*.toml")} <= {*list_presets(kind)}
