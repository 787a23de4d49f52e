"""Run every code block of Markdown pages, and write what they print into the pages.

    python bench/pages.py [PAGE...]  run README.md and the pages of docs/, and rewrite the outputs that they show

A block marked `sh` is run by bash, one marked `python` in one namespace a page, both in an empty folder with the
shipped `traces/`. A `python` or `toml` block that begins with a comment `# NAME.py` or `# NAME.toml` becomes that file
instead. A `text` block shows what the block before it printed on stdout. `tests/test_readme.py` runs pages in the same
way and compares.
"""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COLUMNS = 96
# .ci/run tries commands that install or run the tests, in an environment of its own.
_INSTALLS = re.compile(r"^python -m pip install \S+(?: && pytest| && |$)", re.MULTILINE)
_FILE = re.compile(r"# (\S+\.(?:py|toml))\n")


class _Run:
    """One page on its way: where its blocks run, what the last one printed, and which outputs to put where."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.printed = ""
        self.outputs: list[tuple[int, int, str]] = []

    def shell(self, example: Example) -> None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        process = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", _INSTALLS.sub("", example.parsed)],
            cwd=self.folder,
            env=os.environ | {"PATH": path, "COLUMNS": str(COLUMNS), "NO_COLOR": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if process.returncode:
            raise RuntimeError(f"{example.path}:{example.line}: exit code {process.returncode}\n{process.stderr}")
        self.printed = process.stdout

    def python(self, example: Example) -> None:
        if _FILE.match(example.parsed):
            self.file(example)
            return
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(io.StringIO()) as stdout:
            PythonEvaluator()(example)
        self.printed = stdout.getvalue()

    def file(self, example: Example) -> None:
        if name := _FILE.match(example.parsed):
            (self.folder / name[1]).write_text(example.parsed, encoding="utf-8")

    def output(self, example: Example) -> None:
        start = example.region.start + example.parsed.offset
        text = "\n".join(line.rstrip() for line in self.printed.rstrip("\n").split("\n")) + "\n"
        self.outputs.append((start, start + len(example.parsed), text))


def run_page(path: Path, folder: Path) -> str:
    """Run the blocks of the page at `path` in `folder`; return the page as it should be. A block that fails raises."""
    (folder / "traces").symlink_to(ROOT / "traces")
    copy = Path(shutil.copy(path, folder))  # code that a page holds is kept beside it once compiled
    run = _Run(folder)
    kinds = {"sh": run.shell, "python": run.python, "toml": run.file, "text": run.output}
    document = Sybil([CodeBlockParser(kind, evaluator) for kind, evaluator in kinds.items()]).parse(copy)
    for example in document.examples():
        example.evaluate()
    page = path.read_text(encoding="utf-8")
    for start, end, text in reversed(run.outputs):
        page = page[:start] + text + page[end:]
    return page


def main() -> None:
    for path in [Path(page).resolve() for page in sys.argv[1:]] or PAGES:
        with tempfile.TemporaryDirectory() as folder:
            path.write_text(run_page(path, Path(folder)), encoding="utf-8")


if __name__ == "__main__":
    main()
