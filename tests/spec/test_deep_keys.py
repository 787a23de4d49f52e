"""Keys of very many parts, however they hide; files that are too large, or no files."""

import os
import time

import pytest

from moetrace.spec import MoetraceError, load_policy
from moetrace.spec.deep_keys import has_deep_key
from moetrace.spec.errors import UsageError

KEY, TRIPLE = ".".join("a" * 40), '"' * 3


@pytest.mark.parametrize(
    "text",
    [
        f"{KEY} = 1",
        f"[{KEY}]",
        "a . b " * 40,
        f'x = {{ a = {TRIPLE} " {TRIPLE}, {KEY} = 1, b = {TRIPLE} " {TRIPLE} }}',
        f'"\\"".{KEY}."\\"" = 1',
        ".".join(["'a\",'"] * 40) + " = 1",
        f"a = 1 # 'x\n{KEY} = 1",
    ],
)
def test_is_found(text):
    assert has_deep_key(text)


@pytest.mark.parametrize(
    "text",
    [
        f"x = '{KEY}'",
        f"# {KEY}",
        f"x = {TRIPLE}\n{KEY} {TRIPLE}",
        "x = [" + ", ".join(['"a.b.toml"', "1.5"] * 40) + "]",
        "x = 1 # " + "." * 80,
        "a.b = 1\n" * 90,
    ],
)
def test_is_none(text):
    assert not has_deep_key(text)


def test_hostile_files_are_one_sentence_soon(tmp_path):
    path = tmp_path / "p.toml"
    start = time.monotonic()
    for text, says in (
        (".".join("a" * 400_000) + " = 1", "a key has more than 32 parts"),
        (" " * 900_000 + "\n" + "." * 40, "not TOML"),
        ("x = " + "[" * 400_000, "tables lie too deep"),
        ("# " + "x" * (1 << 20), "it has more than 1 MiB"),
    ):
        path.write_text(text)
        with pytest.raises(MoetraceError, match=says) as error:
            load_policy(path)
        assert str(error.value).count("\n") == 0
    assert time.monotonic() - start < 60  # it took hours
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(MoetraceError, match="is not an ordinary file"):
        load_policy(path)


@pytest.mark.parametrize("number", ["inf", "nan", "1e999", "-inf"])
def test_numbers_must_be_finite(tmp_path, number):
    (tmp_path / "p.toml").write_text(f"name = 'a'\n[x]\ny = [1, {{ z = {number} }}]\n")
    with pytest.raises(UsageError, match=r"x.y\[1\].z wants a finite number"):
        load_policy(tmp_path / "p.toml")
