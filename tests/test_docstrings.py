"""Docstrings of public names: each parameter is described, what comes back, what is raised; and every example runs."""

import ast
import contextlib
import dataclasses
import doctest
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pages import ROOT

import moetrace as mt

SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Examples")
MANY = 3  # parameters, from which on a function has all sections
# Names that may lack sections, and why.
WITHOUT = {
    "Trace.__init__": "says which functions to use instead",
    "PolicySpec": "docs/policies.md describes each field, and the reference shows that",
}


def _parts(thing: type) -> Iterator[tuple[str, Any]]:
    """The public functions, methods and properties of a class, its constructor included."""
    for name, value in vars(thing).items():
        function = getattr(value, "__func__", None) or getattr(value, "func", None) or getattr(value, "fget", value)
        if inspect.isfunction(function) and (name == "__init__" or not name.startswith("_")):
            yield name, function


def _public() -> dict[str, Any]:
    """Every public name and each of its methods, the function itself where it is wrapped."""
    found = {}
    for name in mt.__all__:
        thing = getattr(mt, name)
        if inspect.isclass(thing):
            found[name] = thing
            # Methods that `dataclass` makes have no docstring; the class has "Attributes".
            parts = {} if _fields(thing) is None else {"__init__"}
            found |= {f"{name}.{part}": value for part, value in _parts(thing) if part not in parts}
        elif callable(thing):
            found[name] = inspect.unwrap(thing)
    return found


def _fields(thing: Any) -> list[str] | None:
    """The public fields of a record, None if it is none."""
    if dataclasses.is_dataclass(thing):
        return [field.name for field in dataclasses.fields(thing) if not field.name.startswith("_")]
    fields = getattr(thing, "__struct_fields__", None) or getattr(thing, "_fields", None)
    return None if fields is None else list(fields)


def _sections(text: str) -> dict[str, str]:
    """The sections of a docstring in Google's style by name, without their indentation."""
    found = re.findall(rf"^({'|'.join(SECTIONS)}):\n((?:    .*\n|\n)+)", f"{text}\n", re.MULTILINE)
    return {name: textwrap.dedent(body).strip() for name, body in found}


def _items(section: str) -> dict[str, str]:
    """The items of a section, `name: meaning`."""
    return dict(re.findall(r"^\*{0,2}(\w+)(?: \(.*?\))?: (.*(?:\n .*)*)", section, re.MULTILINE))


PUBLIC = _public()
SAID = {name: _sections(inspect.getdoc(thing) or "") for name, thing in PUBLIC.items()}


def _parameters(count: range) -> dict[str, list[str]]:
    """The parameters of public functions that have as many."""
    found = {}
    for name, thing in PUBLIC.items():
        if not inspect.isclass(thing):
            parameters = [one for one in inspect.signature(thing).parameters if one not in ("self", "cls")]
            if len(parameters) in count and name not in WITHOUT:
                found[name.removesuffix(".__init__")] = parameters
    return found


PARAMETERS = _parameters(range(MANY, 100))
FEW = _parameters(range(1, MANY))


def _function(name: str) -> Callable:
    return PUBLIC.get(f"{name}.__init__") or PUBLIC[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_each_parameter_is_described(name):
    assert list(_items(SAID[name].get("Args", ""))) == PARAMETERS[name]


@pytest.mark.parametrize("name", FEW)
def test_each_of_few_parameters_is_described_or_named(name):
    """A section says what each is, or a sentence names each."""
    text = inspect.getdoc(_function(name)) or ""
    described = list(_items(SAID[name].get("Args", "")))
    assert described == FEW[name] or not [one for one in FEW[name] if f"`{one}`" not in text]


@pytest.mark.parametrize("name", [name for name, thing in PUBLIC.items() if inspect.isclass(thing)])
def test_each_attribute_is_described(name):
    """What a class annotates, or its constructor sets, stands in "Attributes"."""
    thing = PUBLIC[name]
    named = {one for part in thing.__mro__[:-1] for one in vars(part).get("__annotations__", {})}
    if "__init__" in vars(thing) and not _fields(thing):
        named |= set(re.findall(r"\bself\.(\w+)(?:: [^=\n]+)? = ", inspect.getsource(thing.__init__)))
    public = {one for one in named if not one.startswith("_")}
    described = _items(SAID[name].get("Attributes", "")).keys()
    assert name in WITHOUT or public <= described


@pytest.mark.parametrize("name", [name for name in PUBLIC if not name.endswith(".__init__")])
def test_there_is_a_docstring(name):
    assert PUBLIC[name].__doc__


@pytest.mark.parametrize("name", PARAMETERS)
def test_returned_values_are_described(name):
    nothing = inspect.signature(_function(name)).return_annotation in (None, "None")
    assert ("Returns" in SAID[name]) == (not nothing)
    # The site would take text before a colon for a type.
    assert ": " not in SAID[name].get("Returns", "").partition("\n")[0]


@pytest.mark.parametrize("name", PARAMETERS)
def test_raised_errors_are_described(name):
    body = ast.parse(textwrap.dedent(inspect.getsource(_function(name))))
    raised = {
        node.exc.func.id
        for node in ast.walk(body)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
    }
    said = _items(SAID[name].get("Raises", ""))
    assert raised <= said.keys() <= {"MoetraceError", "UsageError"}


@pytest.mark.parametrize("name", PARAMETERS)
def test_there_is_an_example(name):
    assert ">>> " in SAID[name].get("Examples", "")


@pytest.mark.parametrize("name", [name for name, thing in PUBLIC.items() if _fields(thing) and name not in WITHOUT])
def test_each_field_of_a_record_is_described(name):
    assert list(_items(SAID[name].get("Attributes", ""))) == _fields(PUBLIC[name])


@pytest.mark.parametrize("name", PUBLIC)
def test_sections_are_in_order_and_their_names_are_known(name):
    text = inspect.getdoc(PUBLIC[name]) or ""
    heads = re.findall(r"^([A-Z]\w+):$", text, re.MULTILINE)
    assert heads == [section for section in SECTIONS if section in heads]


@pytest.mark.parametrize("name", [name for name, said in SAID.items() if "Examples" in said])
def test_examples_run_and_print_what_they_show(name, tmp_path):
    (tmp_path / "traces").symlink_to(ROOT / "traces")
    [test] = doctest.DocTestFinder(recurse=False).find(PUBLIC[name], name, globs={})
    shown: list[str] = []
    with contextlib.chdir(tmp_path):
        doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=shown.append)
    assert "".join(shown) == ""
