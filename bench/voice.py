"""Count words and turns of phrase that make the text of this project hard to read, for each 1,000 words.

    python bench/voice.py                       a table by room: pages, docstrings with messages, and comments
    python bench/voice.py --show docs/cache.md  the sentences too, of rooms whose name begins so
    python bench/voice.py --public              the same count of three public packages from PyPI

A room is one page, or one folder of `moetrace/`, `tests/` or `bench/`. Code, output and words in backticks are not
counted. `tests/test_voice.py` holds the limit for each room.
"""

import argparse
import ast
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PUBLIC = ("numbagg==0.9.4", "stumpy==1.13.0", "sqlite-utils==3.38")

# A short list of phrases that a reader has to read twice, each with a plain equivalent: "only" for `alone`, "recompute"
# for `anew`, "the missing experts" for `what is missing`. `^` begins a sentence, a list item or a cell.
MARKERS = {
    "Of ... at the beginning": r"^Of (?!course)",
    "What ... is, as a subject": r"^What (?!follows\b|is new\b|if\b|to\b)[^?]*$",
    "..., what ... is, as a subject": r"(?<=[,;:.] )what (?:\w+ ){1,8}(?:is|are|was|has|have|counts|stands)\b(?!\?)",
    "what is, has or stands": r"(?<!^)\bwhat (?:is|are|was|has|stands|comes|came|lies)\b(?! it\b| wrong\b)(?=[^?]*$)",
    "That is/which": r"^(?:That which|Those that|Which)\b[^?]*$",
    "anew": r"\banew\b",
    "alone": r"(?<!let )\balone\b",
    "is none": r"\b(?:is|are|be|was|were|has|have|holds?|needs?|says?|names?) none\b(?! of)",
    "so many": r"(?<!twice )(?<!times )\b(?:so|as) (?:many|much)\b(?! as| more)",
    "whatever": r"\b(?:whatever|whichever|whoever|whomever)\b",
    "told": r"\b(?:told|tells? \w+ apart)\b",
    "the other way round": r"\bother way (?:a)?round\b",
    "no more/no less": r"\b(?:not? \w+|is|are|was) no (?:more|longer one)\b|\bno more$",
    "but for": r"\bbut for\b|\bsave for\b|\ball but\b",
    "hangs on": r"\bhangs? on\b|\bhung on\b",
    "shall": r"\bshall\b",
    "has not": r"\b(?:has|have|had) not[.:;,]|\b(?:has|have|knows?) not (?:a|the|an)\b",
    "the same of": r"\bthe same of\b|\bthe like\b|\blikewise\b",
    "lest, thereof": r"\b(?:lest|thereof|therein|thereby|wherein|whereof|wherewith|thence|hence|beforehand)\b",
}
_COMPILED = {name: re.compile(pattern) for name, pattern in MARKERS.items()}
_FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2[ ]*$", re.MULTILINE | re.DOTALL)
_SENTENCE = re.compile(r"(?<=[.!?])[)\"*_]*\s+(?=[\"(*_]*[A-Z`])")
_ITEM = re.compile(r"\n\s*(?=(?:[-*] |\d+\. |#+ |\|))|\n\s*\n")
_LEAD = re.compile(r"^[\s>#*_|(\"-]*(?:\d+\. )?[\s*_(\"]*")
_SECTION = re.compile(r"^\s*(?:Args|Attributes|Returns|Raises|Examples|Yields):\s*$", re.MULTILINE)


class Text(NamedTuple):
    """One room: its sentences in one of three kinds."""

    kind: str  # "docs", "docstrings" (with messages) or "comments"
    room: str
    sentences: list[str]

    @property
    def words(self) -> int:
        return sum(len(re.findall(r"[A-Za-z][\w'-]*", sentence)) for sentence in self.sentences)

    def found(self) -> list[tuple[str, str]]:
        """Every marker with its sentence."""
        return [
            (name, sentence)
            for sentence in self.sentences
            for name, pattern in _COMPILED.items()
            for _ in pattern.finditer(sentence)
        ]


def sentences(text: str) -> list[str]:
    """Split prose into sentences; list items, headings and cells of tables are sentences, too."""
    text = re.sub(r"`+[^`]*`+", "X", text)
    found = []
    for item in _ITEM.split(text):
        for cell in item.split(" | ") if item.lstrip().startswith("|") else [item]:
            found += _SENTENCE.split(re.sub(r"\s+", " ", cell))
    stripped = (_LEAD.sub("", sentence).strip(" |") for sentence in found)
    return [sentence for sentence in stripped if re.search(r"[A-Za-z]{2}", sentence)]


def page_sentences(path: Path) -> list[str]:
    """The sentences of a Markdown or reStructuredText page, without its code and output."""
    text = path.read_text(encoding="utf-8")
    # A heading "What it costs" asks.
    text = re.sub(r"^(#+ (?:\d+\. )?What .*)$", r"\1?", text, flags=re.MULTILINE)
    text = _FENCE.sub("\n\n", re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL))
    text = re.sub(r"^(?: {4}|\t)(?! *[-*] |\s*$).*$", "", text, flags=re.MULTILINE)
    return sentences(re.sub(r"\]\([^)]*\)", "]", text).replace("[", "").replace("]", ""))


def _docstring(text: str) -> list[str]:
    lines = _SECTION.sub("\n\n", text).splitlines()
    kept, example = [], False
    for line in lines:
        example = bool(line.strip()) and (example or line.lstrip().startswith(">>>"))
        # `name: meaning` begins a sentence of its own.
        kept.append("" if example else re.sub(r"^\s+\*{0,2}\w+: ", "\n\n", line))
    return sentences("\n".join(kept))


def _joined(node: ast.Constant | ast.JoinedStr) -> str:
    if isinstance(node, ast.Constant):
        return node.value
    return "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)


def code_sentences(path: Path) -> tuple[list[str], list[str]]:
    """Sentences of a module: of its docstrings and messages (strings of three words or more), and of its comments."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    said, inside = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                said += _docstring(ast.get_docstring(node) or "")
                inside.add(first.value)
        elif isinstance(node, ast.JoinedStr):
            inside |= set(ast.walk(node)) - {node}
    for node in ast.walk(tree):
        text = isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
        if text and node not in inside and len(re.findall(r"[A-Za-z]+ ", _joined(node))) >= 2:
            said += sentences(_joined(node))
    comments, last = "", -2
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, is_apart = token.start[0], not token.line[: token.start[1]].strip()
            comments += ("\n" if is_apart and line == last + 1 else "\n\n") + token.string.lstrip("# ")
            # The next line does not go on with a comment that stands behind code.
            last = line if is_apart else -2
    return said, sentences(comments)


def _room(path: Path, package: Path) -> str:
    """The folder of a module: `analyze/cache`, and `importers` for all below it."""
    parts = path.relative_to(package).parts[:-1]
    deep = 2 if parts[:1] in (("analyze",), ("engine",), ("cli",)) else 1
    return "/".join((package.name, *parts[:deep]))


def texts(pages: list[Path], root: Path, package: Path) -> list[Text]:
    """All rooms of a tree."""
    rooms = [Text("docs", str(page.relative_to(root)), page_sentences(page)) for page in pages]
    said: dict[str, list[str]] = {}
    comments: dict[str, list[str]] = {}
    for path in sorted(package.rglob("*.py")):
        if not {"tests", "test"} & set(path.relative_to(package).parts):
            docstrings, notes = code_sentences(path)
            said.setdefault(_room(path, package), []).extend(docstrings)
            comments.setdefault(_room(path, package), []).extend(notes)
    rooms += [Text("docstrings", room, found) for room, found in said.items()]
    return rooms + [Text("comments", room, found) for room, found in comments.items()]


def own_texts() -> list[Text]:
    """The rooms of this project; `tests/` and `bench/` are read for their comments only."""
    rooms = texts([ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ROOT, ROOT / "moetrace")
    beside = [room for folder in ("tests", "bench") for room in texts([], ROOT, ROOT / folder)]
    return rooms + [room for room in beside if room.kind == "comments"]


def rate(rooms: list[Text]) -> float:
    """Markers for each 1,000 words."""
    return 1000 * sum(len(room.found()) for room in rooms) / max(sum(room.words for room in rooms), 1)


def _public(folder: Path) -> Iterator[tuple[str, list[Text]]]:
    for requirement in PUBLIC:
        name = requirement.partition("==")[0]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", name]
        subprocess.run([*command, "--dest", str(folder), requirement], check=True)
        [archive] = folder.glob(f"{name.replace('-', '[-_]')}-*.tar.gz")
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
        root = folder / archive.name.removesuffix(".tar.gz")
        pages = [*root.glob("README.*"), *(root / "docs").rglob("*.md"), *(root / "docs").rglob("*.rst")]
        yield requirement, texts(pages, root, root / name.replace("-", "_"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--show", metavar="ROOM", help="print the sentences of rooms whose name begins so")
    parser.add_argument("--public", action="store_true", help="count public packages too")
    options = parser.parse_args()
    rooms = own_texts()
    if options.show is not None:
        for room in rooms:
            if room.room.startswith(options.show):
                for name, sentence in room.found():
                    print(f"{room.kind} {room.room} [{name}] {sentence}")
        return
    print(f"{'kind':12} {'room':32} {'words':>7} {'markers':>8} {'per 1,000':>10}")
    kinds = ("docs", "docstrings", "comments")
    trees = [("all", rooms)]
    for room in sorted(rooms, key=lambda room: (kinds.index(room.kind), -rate([room]))):
        print(f"{room.kind:12} {room.room:32} {room.words:7,} {len(room.found()):8} {rate([room]):10.1f}")
    if options.public:
        with tempfile.TemporaryDirectory() as folder:
            trees += list(_public(Path(folder)))
    for name, tree in trees:
        for kind in kinds:
            part = [room for room in tree if room.kind == kind]
            words, count = sum(room.words for room in part), sum(len(room.found()) for room in part)
            print(f"{kind:12} {name:32} {words:7,} {count:8} {rate(part):10.1f}")


if __name__ == "__main__":
    main()
