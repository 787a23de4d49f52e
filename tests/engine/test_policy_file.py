"""A policy's Python file: what runs is its text, where its compiled code lies, and what it may not write."""

import importlib.util
import marshal
import os
import subprocess
import sys
from pathlib import Path

import pytest

import moetrace as mt
from moetrace.engine.plugin import load_hook
from moetrace.engine.policy_file import run_file
from moetrace.jit import kernel_cache
from moetrace.jit.kernel_cache import is_private
from moetrace.spec import MoetraceError, UsageError

HOOK = "def mine(state, view, layer, load, plan):\n    for i in range(load.size):\n        {}\n"


def leave_compiled(path: Path, text: str) -> None:
    """Put the compiled form of another text where Python would look for that of a file, and have it fit."""
    cached = Path(importlib.util.cache_from_source(str(path)))
    cached.parent.mkdir(exist_ok=True)
    found = path.stat()
    head = importlib.util.MAGIC_NUMBER + bytes(4) + int(found.st_mtime).to_bytes(4, "little")
    cached.write_bytes(head + found.st_size.to_bytes(4, "little") + marshal.dumps(compile(text, str(path), "exec")))


def test_code_compiled_from_another_text_does_not_run(tmp_path):
    for name in ("mine", "beside"):
        (tmp_path / f"{name}.py").write_text("import sys\nWHAT = 'text'\n")
        leave_compiled(tmp_path / f"{name}.py", "WHAT = 'other'\n")
    assert run_file(tmp_path / "mine.py").WHAT == "text"
    (tmp_path / "imports.py").write_text(
        f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nimport beside\nsys.path.pop(0)\nWHAT = beside.WHAT\n"
    )
    assert run_file(tmp_path / "imports.py").WHAT == "text"
    (tmp_path / "bare.pyc").write_bytes(
        (tmp_path / "__pycache__" / f"beside.{sys.implementation.cache_tag}.pyc").read_bytes()
    )
    (tmp_path / "imports.py").write_text(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nimport bare\n")
    with pytest.raises(MoetraceError, match="has no source beside it"):
        run_file(tmp_path / "imports.py")
    sys.path.remove(str(tmp_path))


def test_nothing_is_left_beside_the_file(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("print('hello')\n" + HOOK.format("plan[i] = 1"))
    hook = load_hook("dispatch", f"{tmp_path / 'mine.py'}:mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]
    assert capsys.readouterr() == ("", "hello\n")
    assert Path(hook.stats.cache_path).name == "policies"


def test_each_file_sees_the_modules_of_its_own_folder(tmp_path, monkeypatch):
    """Also where a script has a module of that name; and the compiled code of one is not taken for another's."""
    for number in range(3):
        folder = tmp_path / f"{number}"
        (folder / "parts").mkdir(parents=True)
        (folder / "beside.py").write_text(
            f"import numba\nfrom parts.deep import WHAT\n\n@numba.njit\ndef what():\n    return {number} + 10 * WHAT\n"
        )
        (folder / "parts/__init__.py").write_text("")
        (folder / "parts/deep.py").write_text(f"WHAT = {number}\n")
        (folder / "mine.py").write_text("from beside import WHAT, what\n" + HOOK.format("state[0, 0].score = what()"))
    monkeypatch.syspath_prepend(str(tmp_path / "2"))
    scripts = importlib.import_module("beside")
    known = dict(sys.modules)
    try:
        for number in (0, 1, 0):
            module = run_file(tmp_path / f"{number}" / "mine.py")
            assert (module.WHAT, module.what()) == (number, 11 * number)
            assert sys.modules["beside"] is scripts and sys.modules["parts.deep"] is known["parts.deep"]
            hooks = [load_hook("residency", f"{tmp_path / str(number)}/mine.py:mine") for _ in range(2)]
            assert sum(hooks[1].stats.cache_hits.values()) == 1
        new = {name for name in sys.modules.keys() - known.keys() if not name.startswith("moetrace_policy")}
        assert not [name for name in new if str(tmp_path) in str(getattr(sys.modules[name], "__file__", ""))]
    finally:
        for name in ("beside", "parts", "parts.deep"):
            sys.modules.pop(name, None)


def test_a_helper_that_was_edited_is_read_again(tmp_path):
    (tmp_path / "mine.py").write_text("from beside import WHAT\n")
    for what in (1, 2):
        (tmp_path / "beside.py").write_text(f"WHAT = {what}\n")
        assert what == run_file(tmp_path / "mine.py").WHAT
    (tmp_path / "beside.py").write_text("1 / 0\n")
    known = set(sys.modules)
    with pytest.raises(MoetraceError, match="does not run: ZeroDivisionError"):
        run_file(tmp_path / "mine.py")
    assert set(sys.modules) <= known and "beside" not in sys.modules


@pytest.mark.parametrize("what", ["pipe", "folder"])
def test_a_pipe_or_a_folder_is_refused_without_waiting(tmp_path, what):
    path = tmp_path / "mine.py"
    os.mkfifo(path) if what == "pipe" else path.mkdir()
    known = set(sys.modules)
    with pytest.raises(MoetraceError, match="is not an ordinary file"):
        run_file(path)
    assert set(sys.modules) == known  # code that opens the files of all modules would wait for the pipe


def test_a_file_that_does_not_run_is_no_module(tmp_path):
    (tmp_path / "mine.py").write_text("1 / 0\n")
    known = set(sys.modules)
    with pytest.raises(MoetraceError, match="does not run: ZeroDivisionError"):
        run_file(tmp_path / "mine.py")
    assert set(sys.modules) == known


@pytest.mark.parametrize(
    "line",
    [
        "view.active[i].expert = 60000",
        "view.active[i].rows += 1.0",
        "a = view.active[i]; a.group = 999",
        "view.active.expert[::-1][0] = 9",
        "view.active[i].device_s[0] = 0.0",
        "load[:2][0] = 7",
    ],
)
def test_read_only_arguments_cannot_be_written(tmp_path, line):
    (tmp_path / "mine.py").write_text(HOOK.format(line))
    with pytest.raises(UsageError, match=r"read-only argument: a dispatch may .*\(mine.py, line 3\)") as error:
        load_hook("dispatch", f"{tmp_path / 'mine.py'}:mine")
    assert "\n" not in str(error.value)


def test_a_helper_and_a_residency_cannot_either(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import numba\n\n@numba.njit\ndef helper(record):\n    record.expert = 1\n\n"
        + HOOK.format("helper(view.active[i])")
    )
    with pytest.raises(UsageError, match="read-only argument"):
        load_hook("dispatch", f"{tmp_path / 'mine.py'}:mine")
    (tmp_path / "mine.py").write_text(HOOK.format("plan[i] = 1"))
    with pytest.raises(UsageError, match=r"a residency may write into state and view.memory only \(mine.py, line 3\)"):
        load_hook("residency", f"{tmp_path / 'mine.py'}:mine")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("plan[i] = 2", r"plan\[i\] must be 0 or 1 \(mine.py, line 9; step 0, layer 0\)"),
        ("plan[i] = view.active[-500].resident", "out of bounds"),
        ("plan[i] = beyond(load) > 0", r"out of bounds \(mine.py; step 0, layer 0\); with NUMBA_DISABLE_JIT=1 the"),
        ("plan[i] = 1 // layer", r"ZeroDivisionError: .* \(mine.py, line 9; step 0, layer 0\)"),
        ("plan[i] = 1.0 / layer > 0.5", "ZeroDivisionError"),
        ("plan[i] = layer % layer", "ZeroDivisionError"),
    ],
)
def test_an_error_at_run_time_is_one_sentence(tmp_path, line, says):
    helper = "import numba\n\n@numba.njit\ndef beyond(load):\n    return load[load.size + 5]\n\n"
    (tmp_path / "mine.py").write_text(helper + HOOK.format(line))
    trace = mt.generate_trace("tiny-olmoe", requests=1, prompt=2, output=2)
    with pytest.raises(MoetraceError, match=f"Policy mine failed: .*{says}"):
        mt.replay(trace, policies=f"{tmp_path / 'mine.py'}:mine", slots=24, jobs=1)


def test_without_compilation_the_line_is_named(tmp_path):
    (tmp_path / "mine.py").write_text(HOOK.format("plan[i] = 1 // layer"))
    program = (
        "import sys, moetrace as mt\ntrace = mt.generate_trace('tiny-olmoe', requests=1, prompt=1, output=1)\n"
        "try:\n    mt.replay(trace, policies=sys.argv[1], slots=24, jobs=1)\nexcept mt.MoetraceError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", program, f"{tmp_path / 'mine.py'}:mine"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NUMBA_DISABLE_JIT": "1"})
    assert done.stdout.startswith("Policy mine failed: ZeroDivisionError")
    assert "(mine.py, line 3; step 0, layer 0).\n" in done.stdout


def test_functions_without_a_file_are_distinct():
    """Two texts that were run without a module's name: what was compiled of one is not taken for the other."""
    hooks = []
    for line in ("plan[i] = 1", "load[i] = 1"):
        names: dict = {}
        exec(HOOK.format(line), names)
        hooks.append(names["mine"])
    mt.policy(hooks[0])
    with pytest.raises(UsageError, match="read-only argument"):
        mt.policy(hooks[1])


def test_compiled_code_is_read_from_private_folders_only(tmp_path, monkeypatch, capsys):
    numba = pytest.importorskip("numba")
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    assert not is_private(open_to_all) and is_private(tmp_path)
    monkeypatch.setattr(numba.core.config, "CACHE_DIR", str(open_to_all))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    kernel_cache._say.cache_clear()
    (tmp_path / "mine.py").write_text(HOOK.format("plan[i] = layer == 3"))
    hook = load_hook("dispatch", f"{tmp_path / 'mine.py'}:mine")
    assert not any(open_to_all.iterdir())
    assert Path(hook.stats.cache_path).is_relative_to(tmp_path / "home") and is_private(hook.stats.cache_path)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "NUMBA_CACHE_DIR names, as others may write there" in said[0]


def test_the_oldest_compiled_functions_go(tmp_path):
    for number in range(4):
        for ending in ("nbi", "1.nbc", "2.nbc"):
            (tmp_path / f"f-{number}.{ending}").write_bytes(b"")
            os.utime(tmp_path / f"f-{number}.{ending}", (number, number))
    kernel_cache._remove_oldest(str(tmp_path), 2)
    kept = [f"f-{number}.{ending}" for number in (2, 3) for ending in ("1.nbc", "2.nbc", "nbi")]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def test_a_residency_that_is_no_function_is_one_sentence(tmp_path):
    (tmp_path / "mine.py").write_text("class Thing:\n    __hash__ = None\n")
    for kind in ("dispatch", "residency"):
        with pytest.raises(UsageError, match="'Thing' is not a plain Python function"):
            load_hook(kind, f"{tmp_path / 'mine.py'}:Thing")
