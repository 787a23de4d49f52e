"""How a replay is run again: a command and the TOML files that it needs, only from `summary.json`, without paths."""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from moetrace.results.record import Summary, choices_of
from moetrace.spec import (
    Model,
    MoetraceError,
    System,
    UsageError,
    canonical,
    check_fits,
    list_presets,
    load_model,
    load_policy,
    load_system,
)
from moetrace.spec.errors import printable
from moetrace.spec.load import AUTO, FILE_FIELDS
from moetrace.spec.toml_text import toml


class Again(NamedTuple):
    """A command line, the files that it names (name -> content), and what else is needed."""

    command: str
    files: dict[str, str]
    notes: list[str]


def again(summary: Summary) -> Again:
    """Say how to run this replay again; specs equal to a preset are named, the others come as TOML."""
    files: dict[str, str] = {}
    notes = [f"TRACE.h5 stands for the trace{_hash(summary)}."]
    words = ["moetrace", "replay", "TRACE.h5"]
    words += ["--model", _named_or_file("model", summary.model, files)]
    words += ["--system", _named_or_file("system", summary.system, files)]
    for kind, spec in (("model", summary.model), ("system", summary.system)):
        if named := ", ".join(map(printable, dict.fromkeys(_files_in(spec)))):
            notes.append(f"{kind}.toml also needs {named}, which is not in a result, beside it.")
    for number, policy in enumerate(summary.policies, start=1):
        if _is_preset_policy(policy.name, policy.choices):
            words += ["--policy", policy.name]
            continue
        name = f"policy-{number}.toml"
        files[name] = toml({"name": policy.name} | policy.choices)
        words += ["--policy", name]
        needed = [*_files_in(policy.choices)]
        own = [str(value).partition(":")[0] for value in policy.choices.values() if ".py:" in str(value)]
        if needed or own:
            named = ", ".join(map(printable, dict.fromkeys(needed + own)))
            notes.append(f"{printable(policy.name)} also needs {named}, which is not in a result, beside {name}.")
    words += [] if summary.of_cluster else ["--slots", str(summary.slots)]
    words += [*(["--ignore-capacity"] if _overflows(summary) else []), "-o", "results"]
    return Again(" ".join(shlex.quote(printable(word)) for word in words), files, notes)


def _files_in(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the files that the fields of a spec name, those of its tables too."""
    for field, value in values.items():
        if isinstance(value, dict):
            yield from _files_in(value)
        elif field in FILE_FIELDS and isinstance(value, str) and value != AUTO:
            yield value


def _hash(summary: Summary) -> str:
    sha256 = summary.trace.sha256
    if not sha256:
        return ""
    return f": `moetrace info TRACE.h5 --format json` must say that its content_sha256 is {printable(sha256)}"


def _overflows(summary: Summary) -> bool:
    """Whether the experts do not fit the units, as far as the specs say."""
    try:
        model, system = msgspec.convert(summary.model, Model), msgspec.convert(summary.system, System)
        check_fits(model, system, model.expert_bytes())
    except UsageError:
        return True
    except (msgspec.ValidationError, MoetraceError, ArithmeticError):
        return False
    return False


def _named_or_file(kind: str, values: dict[str, Any], files: dict[str, str]) -> str:
    """Return the preset that has these values, or a TOML file's name, which joins `files`."""
    name = str(values.get("name"))
    load = load_model if kind == "model" else load_system
    if name in list_presets(f"{kind}s") and canonical(load(name)) == values:
        return name
    files[f"{kind}.toml"] = toml(values)
    return f"{kind}.toml"


def _is_preset_policy(name: str, choices: dict[str, Any]) -> bool:
    try:
        return name in list_presets("policies") and choices_of(load_policy(name)) == choices
    except MoetraceError:
        return False
