"""The reference pages of the documentation, made from the code: commands, Python, records, columns, codes, presets.

    python bench/reference.py [PAGE]     print the pages, or one, as Markdown

`bench/docsite.py` puts them into the site, so none of them is committed, and none can be out of date.
"""

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import click
import msgspec

import moetrace as mt
from moetrace.cli.commands.replay import choices
from moetrace.spec import list_presets

ROOT = Path(__file__).parents[1]
SPECS = ROOT / "moetrace/spec/presets"
MADE = "*Made from the code when this site was built.*"


def pages() -> dict[str, str]:
    """Return the Markdown of each reference page, by its path in the site."""
    made = {
        "commands": commands,
        "python": python,
        "policy-arguments": policy_arguments,
        "columns": columns,
        "lint-codes": lint_codes,
        "systems": lambda: presets("systems"),
        "policies": lambda: presets("policies"),
        "models": lambda: presets("models"),
    }
    return {f"reference/{name}.md": make() for name, make in made.items()}


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table; cells may hold Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def every_command(command: click.Command | None = None, path: str = "moetrace") -> Iterator[tuple[str, click.Context]]:
    """Yield the full name and a context of each command, groups before what they hold."""
    if command is None:
        from moetrace.cli import _group

        command = _group
    context = click.Context(command, info_name=path, help_option_names=["-h", "--help"])
    yield path, context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from every_command(below, f"{path} {name}")


def commands() -> str:
    """What `--help` says, of all commands."""
    parts = ["# Commands", f"What `--help` says, of every command. {MADE}"]
    for path, context in every_command():
        command = context.command
        parts.append(f"{'##' if path.count(' ') < 2 else '###'} {path}")
        usage = " ".join(command.collect_usage_pieces(context))
        parts.append(f"```text\n{path} {usage}\n```")
        parts.append(_paragraphs(command.help or ""))
        if path == "moetrace replay":
            parts.append(_text(choices()))
        records = [option.get_help_record(context) for option in command.get_params(context)]
        rows = [(_code(names), _text(said)) for names, said in filter(None, records) if said]
        parts.append(table(("option", "meaning"), rows))
        if isinstance(command, click.Group):
            links = []
            for name in command.list_commands(context):
                short = command.get_command(context, name).get_short_help_str(200)  # pyright: ignore
                links.append((f"[`{path} {name}`](#{f'{path}-{name}'.replace(' ', '-')})", _text(short)))
            parts.append(table(("command", ""), links))
    return "\n\n".join(parts) + "\n"


def _paragraphs(text: str) -> str:
    """A command's help as Markdown; after click's `\\b`, a paragraph's lines stay as they are."""
    parts = []
    for part in inspect.cleandoc(text).split("\n\n"):
        kept = part.removeprefix("\b\n")
        parts.append(f"```text\n{inspect.cleandoc(kept)}\n```" if kept != part else _text(part))
    return "\n\n".join(parts)


def _code(text: str) -> str:
    return f"`{text}`"


def _text(text: str) -> str:
    """Plain text for Markdown: nothing but `code` and the names of pages keep a meaning."""
    parts = re.split(r"(`[^`]*`)", text)
    plain = [re.sub(r"([*_\[\]])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]]
    parts[::2] = [re.sub(r"\bdocs/([\w-]+\.md)", r"[docs/\1](../\1)", part) for part in plain]
    return "".join(parts)


# Sections of the page on Python, in the order in which a reader needs them.
_SECTIONS = {
    "Replay": ("replay", "Result", "policy"),
    "Traces": ("Trace", "Writer"),
    "Make traces": ("generate", "generate_trace", "import_traces", "Hints", "rebatch", "select", "export"),
    "Check traces": ("lint", "Finding"),
    "Profiles": ("fit_profile", "Profile", "load_profile", "save_profile"),
    "Analyses": (
        "locality",
        "Locality",
        "cache_hits",
        "explain_hit_rate",
        "prefetch_value",
        "balance",
        "Balance",
        "Tier",
    ),
    "Many replays": (
        "advise",
        "Advice",
        "advise_rebalance",
        "RebalanceAdvice",
        "sweep",
        "Sweep",
        "search",
        "Search",
        "gate",
        "Gate",
        "report",
    ),
    "Machines": ("calibrate", "Calibrated"),
    "Specs": ("load_model", "load_system", "load_policy", "Model", "System", "PolicySpec"),
    "Errors": ("MoetraceError", "UsageError"),
}


def python() -> str:
    """A page of directives for mkdocstrings, of everything in `moetrace.__all__`."""
    public = [name for name in mt.__all__ if not name.startswith("__")]
    sections = {head: [name for name in names if name in public] for head, names in _SECTIONS.items()}
    rest = [name for name in public if not any(name in names for names in sections.values())]
    parts = [
        "# Python",
        f"Everything that `import moetrace as mt` offers. {MADE} `mt.__version__` is the version, as text.",
        "Functions that read a trace take a `Trace` or the path of its file.",
    ]
    for head, names in {**sections, "More": rest}.items():
        if names:
            parts.append(f"## {head}")
            parts += [_directive(name) for name in names]
    return "\n\n".join(parts) + "\n"


def _directive(name: str) -> str:
    """Make the directive for a name; after a record's comes a table of its fields, with their meanings."""
    thing = getattr(mt, name)
    fields = getattr(thing, "__struct_fields__", None) or getattr(thing, "_fields", None)
    if not fields:
        return f"::: moetrace.{name}"
    members = [
        f"::: moetrace.{name}.{member}\n    options:\n      heading_level: 4"
        for member, value in vars(thing).items()
        if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property))
    ]
    alone = f"::: moetrace.{name}\n    options:\n      members: false\n      show_docstring_attributes: false"
    return "\n\n".join([alone, *_fields(thing), *members])


def _fields(record: type) -> list[str]:
    """A table of a record's fields and what "Attributes" says of them; then one of each record that it holds."""
    hints = get_type_hints(record)  # without the bounds that stand in `Annotated`
    if hasattr(record, "__struct_fields__"):
        defaults = {field.name: field.default for field in msgspec.structs.fields(record) if not field.required}
    else:
        defaults = record._field_defaults  # pyright: ignore[reportAttributeAccessIssue]
    meanings = _policy_fields() if record is mt.PolicySpec else _attributes(record)[1]
    rows, held = [], []
    for name, hint in hints.items():
        kind = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", inspect.formatannotation(hint))
        kind = re.sub(r"Union\[(.*)\]", lambda union: union[1].replace(", ", " | "), kind)
        kind = re.sub(r"^Optional\[(.*)\]$", r"\1 | None", kind)
        shown = f"`{defaults[name]!r}`" if name in defaults and not callable(defaults[name]) else ""
        meaning = meanings[name] if record is mt.PolicySpec else _text(meanings.get(name, ""))
        rows.append((f"`{name}`", f"`{kind}`", shown, meaning)[: 4 if meanings else 3])
        for part in [hint, *get_args(hint)]:
            if hasattr(part, "__struct_fields__"):
                held += [f"**`{name}`**: {_text(_attributes(part)[0])}", *_fields(part)]
    return [table(("field", "type", "default", "meaning")[: len(rows[0])], rows), *held]


def _policy_fields() -> dict[str, str]:
    """What the tables of docs/policies.md and docs/cluster.md say of each field of a policy."""
    found = {
        "name": "The policy's name, in tables and files.",
        "placement": "Where experts live: a choice of [placement](../policies.md#every-choice).",
        "dispatch": "Who runs an expert: a choice of [dispatch](../policies.md#every-choice), or your own.",
        "residency": "What the GPU keeps: a choice of [residency](../policies.md#every-choice), or your own.",
        "prefetch": "What moves ahead of time: a choice of [prefetch](../policies.md#every-choice).",
        "scope": "`layer`: each layer has its own share of the slots; `global`: all layers share them; "
        "[`request`](../policies.md): and caches start cold with each request.",
    }
    for page, section, of in (("policies", "\n| parameter |", ""), ("cluster", "\n| field |", "On a cluster: ")):
        text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8").partition(section)[2].partition("\n\n")[0]
        for names, *cells in re.findall(r"^\| (`[^|]*`) \| ([^|]*) \| ([^|]*) \|(?: ([^|]*) \|)?$", text, re.MULTILINE):
            meaning = f"{of}{cells[0]}" if of else f"For {cells[0]}: {cells[2]}"
            for name in re.findall(r"`(\w+)`", names):
                before = f"{found[name]} " if of and name in found else ""
                found[name] = before + re.sub(r"\]\((?!\.\./|http)", "](../", meaning).rstrip(".") + "."
    return found


def _attributes(record: type) -> tuple[str, dict[str, str]]:
    """Split a record's docstring: what stands before "Attributes", and what is said of each field there."""
    text, _, fields = (inspect.getdoc(record) or "").partition("\n\nAttributes:\n")
    return text, dict(re.findall(r"^    (\w+): (.*(?:\n     .*)*)", fields.partition("\n\n")[0], re.MULTILINE))


def policy_arguments() -> str:
    """Types of what a policy's function is given, with what docs/policies.md says of each field."""
    from moetrace.engine import state

    arguments, fields = _arguments()
    kinds = {"view": inspect.get_annotations(state.UsersView)}
    for name, dtype in {"state": state.CELL, "view.active": state.ACTIVE, "view.groups": state.GROUP}.items():
        kinds[name] = {field: dtype[field] for field in dtype.names or ()}
    parts = [
        "# What a policy sees",
        f"The types of `state`, `view`, `layer`, `load` and `plan`. {MADE} Times are in seconds, sizes in bytes. "
        "How to write a policy: [Policies, and writing your own](../policies.md).",
        table(("argument", "type", "meaning"), arguments),
    ]
    for head, meanings in fields.items():
        kind = kinds[head.partition("[")[0]]
        names = {int: "int64", float: "float64"}
        rows = [(f"`{name}`", f"`{names.get(kind[name], kind[name])}`", said) for name, said in meanings.items()]
        parts += [f"## {head}", table(("field", "type", "meaning"), rows)]
    return "\n\n".join(parts) + "\n"


def _arguments() -> tuple[list[tuple[str, ...]], dict[str, dict[str, str]]]:
    """Return the rows of the table of arguments in docs/policies.md, and by argument what it says of each field."""
    text = (ROOT / "docs/policies.md").read_text(encoding="utf-8").partition("\n| argument |")[2].partition("\n\n")[0]
    rows, fields = [], {}
    for names, kind, meaning in re.findall(r"^\| (`.*?) \| (.*?) \| (.*) \|$", text, re.MULTILINE):
        if names.startswith("`."):
            fields.setdefault(rows[-1][0].strip("`"), {}).update(
                dict.fromkeys(re.findall(r"`\.(\w+)`", names), meaning)
            )
        else:
            rows.append((names, kind, meaning))
    return rows, fields


def _explained(page: str, section: str) -> dict[str, str]:
    """Return what the table of a section says of the names in its first column."""
    text = (ROOT / page).read_text(encoding="utf-8")
    text = text.partition(f"\n## {section}")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]*) \|(?: [^|]* \|)*? ([^|]+) \|$", text, re.MULTILINE)
    return {name: meaning for names, meaning in rows for name in re.findall(r"`([\w-]+)`", names)}


def columns() -> str:
    """Columns of a replay's frames with their types, from a replay of four rows."""
    trace = mt.generate_trace("tiny-olmoe", requests=1, prompt=2, output=2)
    result = mt.replay(trace, policies="edge-ndp")
    parts = [
        "# Columns of results",
        f"The frames of a `Result`, and of the Parquet files of `moetrace replay -o DIR`. {MADE} "
        "What the words mean: [Results](../results.md) and [the timing model](../timing-model.md).",
    ]
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    for name in ("summary", *re.findall(r"^## (\w+)\.parquet", text, re.MULTILINE)):
        frame = getattr(result, name)
        explained = _summary_columns() if name == "summary" else _explained("docs/results.md", f"{name}.parquet")
        rows = []
        for column, kind in frame.schema.items():
            rows.append((f"`{column}`", f"`{kind}`", explained.get(column, "")))
        head = "`result.summary`, a row for each policy" if name == "summary" else f"`result.{name}`, `{name}.parquet`"
        parts += [f"## {name}", head, table(("column", "type", "meaning"), rows)]
    return "\n\n".join(parts) + "\n"


def _summary_columns() -> dict[str, str]:
    """What the record of figures says of each column of a summary."""
    from moetrace.results.record import COLUMNS

    return {"name": "the policy"} | {name: figure.meaning for name, figure in COLUMNS.items()}


def lint_codes() -> str:
    """Every code of `moetrace lint`, from `RULES`."""
    from moetrace.lints.finding import LEVELS, RULES

    explained = _explained_codes()
    parts = [
        "# Codes of lint",
        f"What `moetrace lint` and `mt.lint` can find. {MADE} How sure it is, and why: [Lint](../lint.md).",
    ]
    for level in LEVELS:
        rows = [
            (f"`{code}`", explained.get(code, ""), _text(rule.effect), _text(rule.fix or "-"))
            for code, rule in RULES.items()
            if rule.level == level
        ]
        parts += [f"## {level.capitalize()}s", table(("code", "what it is", "what it does", "fix"), rows)]
    return "\n\n".join(parts) + "\n"


def _explained_codes() -> dict[str, str]:
    text = (ROOT / "docs/lint.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^\| `([\w-]+)` \| (?:error|warning|note) \| ([^|]+) \|", text, re.MULTILINE))


def presets(kind: str) -> str:
    """Every preset of a kind: its values, and the comments of its TOML file, which say where they are from."""
    parts = [
        f"# {kind.capitalize()}",
        f"The presets, as their files are: comments say where each value is from. {MADE} "
        f"`moetrace show {_SINGULAR[kind]} NAME` prints one with what follows from it; a copy with other values, "
        f"given by its path, is as good as a preset.",
    ]
    for name in list_presets(kind):
        text = next(SPECS.glob(f"{kind}/{name}.toml"), None)
        if text is None:  # a second name of another
            continue
        lead, body = _lead(text.read_text(encoding="utf-8"))
        parts += [f"## {name}", lead, f"```toml\n{body}```"]
    return "\n\n".join(parts) + "\n"


_SINGULAR = {"systems": "system", "policies": "policy", "models": "model"}


def _lead(text: str) -> tuple[str, str]:
    """Split the comment that a file begins with, as a paragraph, from the rest."""
    lines = text.splitlines(keepends=True)
    count = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return _text(" ".join(line.lstrip("# ").strip() for line in lines[:count])), "".join(lines[count:])


if __name__ == "__main__":
    for path, page in pages().items():
        if len(sys.argv) < 2 or sys.argv[1] in path:
            print(page)
