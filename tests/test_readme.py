"""README and docs: every code block runs, shows what it really prints, and links to something that is there."""

import re

import pytest
from pages import PAGES, ROOT, run_page


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_blocks_run_and_print_what_the_page_shows(path, tmp_path):
    """If only an output differs, and should: `python bench/pages.py` writes it."""
    assert run_page(path, tmp_path) == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [*PAGES, ROOT / "traces/README.md"], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path):
    targets = re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (path.parent / target).exists()]
    assert not missing


def test_readme_has_the_two_commands_that_do_everything():
    """`.ci/run` takes them from there."""
    commands = re.findall(r"^python -m pip install .*", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [command.partition(" && ")[2].split()[0] for command in commands] == ["moetrace", "pytest"]
