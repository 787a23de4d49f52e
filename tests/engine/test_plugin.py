"""The door for policies: what it lets in, what it refuses and in which words, and what is compiled when."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import moetrace
from moetrace.engine.plugin import load_hook, policy
from moetrace.spec import MoetraceError, UsageError

GOOD = "def mine(state, view, layer, load, plan):\n    for i in range(load.size):\n        plan[i] = 1\n"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            GOOD.replace(", plan", ""),
            r"bad.py:1: mine takes 4 arguments, but a policy takes \(state, view",
        ),
        (GOOD + "    return 1.5\n", r"bad.py:1: mine returns a value, but a policy returns nothing"),
        (GOOD.replace("plan[i] = 1", "print(i)"), r"bad.py:1: mine prints \(bad.py, line 3\), .*NUMBA_DISABLE_JIT=1"),
        (GOOD.replace("plan[i] = 1", "plan[i] = here"), r"name 'here' is not defined \(bad.py, line 3\)"),
        (GOOD.replace("plan[i] = 1", "plan[i] = 'gpu'"), r"Numba knows no setitem\(.*\(gpu\)\) \(bad.py, line 3\)"),
        (GOOD.replace("plan[i] = 1", "plan[i] = view.hotness"), r"no 'hotness' in view \(bad.py, line 3\)"),
        (
            GOOD.replace("plan[i] = 1", "plan[i] = view.active[i].heat"),
            r"bad.py:1: .* no 'heat' in the record",
        ),
        (GOOD.replace("plan[i] = 1", "plan[i] = unknown(i)"), r"'unknown' is not defined"),
        (
            GOOD.replace("plan[i] = 1", "import math"),
            r"knows no import, class, global or with inside a function: put those outside \(bad.py, line 3\)",
        ),
        (
            GOOD.replace("plan[i] = 1", "state[layer, i].heat = 1"),
            r"bad.py:1: .* no 'heat' in the record that it asks \(bad.py, line 3\)",
        ),
        (
            GOOD.replace("plan[i] = 1", "plan[i] = sorted(plan, key=lambda j: load[j])[0]"),
            r"a lambda or a function within it uses its variables, .*: write a loop \(bad.py, line 3\)",
        ),
        (GOOD.replace("mine", "other"), r"bad.py defines no mine"),
        (
            "import moetrace\n\n\n@moetrace.policy\n" + GOOD.replace("mine", "minne"),
            r"no mine \(the nearest is 'minne'\)",
        ),
        ("mine = 3\n", r"bad.py: mine is not a function"),
    ],
)
def test_refuses_at_loading_in_one_sentence(tmp_path, source, says):
    path = tmp_path / "bad.py"
    path.write_text(source)
    with pytest.raises(UsageError, match=says) as error:
        load_hook("dispatch", f"{path}:mine")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("\ndef mine(:\n", "^bad.py:2 is not Python: "),
        ("import no_such_module\n", "does not run: ModuleNotFoundError"),
        ("1 / 0\n", "does not run: ZeroDivisionError"),
    ],
)
def test_a_file_that_does_not_run(tmp_path, source, says):
    path = tmp_path / "bad.py"
    path.write_text(source)
    with pytest.raises(MoetraceError, match=says) as error:
        load_hook("dispatch", f"{path}:mine")
    assert "\n" not in str(error.value)


def test_takes_decorated_and_plain_functions(tmp_path):
    path = tmp_path / "good.py"
    path.write_text("import moetrace as mt\n\n@mt.policy\n" + GOOD)
    assert load_hook("dispatch", f"{path}:mine").nopython_signatures
    path.write_text(GOOD)
    assert load_hook("dispatch", f"{path}:mine").nopython_signatures


def test_a_closure_is_compiled_too():
    most = 3

    def mine(state, view, layer, load, plan):
        for i in range(min(most, load.size)):
            plan[i] = 1

    assert policy(mine).nopython_signatures


RUN = """
import sys
import numpy as np
from moetrace.engine.plugin import load_hook
from moetrace.engine.state import ACTIVE, CELL, GROUP, OWN, View
hook = load_hook("dispatch", sys.argv[1])
active = np.zeros(4, ACTIVE)
active["gpu_s"], active["ndp_s"], active["fetch_s"], active["turn"] = 1.0, 3.0, [0, 0, 9, 9], range(4)
active["resident"] = [1, 1, 0, 0]
own, groups = np.zeros(1, OWN), np.zeros(1, GROUP)
view = View(0, 1, 1, 2, 1, 0.0, 0.0, 0.3, 0, 12.0, 0.0, 0.0, 0.0, 0, 0.0, 0.0, 0, active, groups, own.ctypes.data)
plan = np.zeros(5, np.uint8)
hook(np.zeros((1, 4), CELL), view, 0, np.ones(4, np.int64), plan)
print("".join(map(str, plan)), sum(hook.stats.cache_hits.values()), sum(hook.stats.cache_misses.values()))
"""


def run_hook(choice: str, folder: Path, **environment: str) -> list[str]:
    """Run a hook in a process of its own, on the package in ``folder``; return its plan, cache hits and misses."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(folder / "cache")} | environment
    process = subprocess.run(
        [sys.executable, "-c", RUN, choice], cwd=folder, capture_output=True, text=True, env=environment
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.split()


def test_cached_across_processes_and_never_stale(tmp_path):
    """A built-in hook is compiled once; an edit of another file of the engine, whose function it calls, shows."""
    package = tmp_path / "moetrace"
    shutil.copytree(Path(moetrace.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    assert run_hook("balance", tmp_path) == ["11000", "0", "1"]
    assert run_hook("balance", tmp_path) == ["11000", "1", "0"]
    layer = package / "engine" / "layer.py"
    layer.write_text(layer.read_text().replace("return a < b * SAME", "return a > b * SAME"))
    plan, hits, _ = run_hook("balance", tmp_path)
    assert hits == "0"
    assert plan != "11000"


def test_users_edits_show_even_in_files_that_they_import(tmp_path):
    (tmp_path / "rule.py").write_text("import numba\n\n@numba.njit\ndef rule(i):\n    return i % 2 == 0\n")
    mine = tmp_path / "mine.py"
    mine.write_text(
        "import sys, pathlib\nsys.path.insert(0, str(pathlib.Path(__file__).parent))\nfrom rule import rule\n\n"
        + GOOD.replace("plan[i] = 1", "plan[i] = rule(i)")
    )
    root = Path(moetrace.__file__).parents[1]
    assert run_hook(f"{mine}:mine", root) == ["10100", "0", "1"]
    assert run_hook(f"{mine}:mine", root) == ["10100", "1", "0"]
    (tmp_path / "rule.py").write_text("import numba\n\n@numba.njit\ndef rule(i):\n    return i % 2 == 1\n")
    assert run_hook(f"{mine}:mine", root) == ["01010", "0", "1"]
    mine.write_text(mine.read_text().replace("rule(i)", "rule(i + 1)"))
    assert run_hook(f"{mine}:mine", root) == ["10100", "0", "1"]


def test_constants_of_other_files_and_of_the_environment_are_never_stale(tmp_path):
    """What a name stood for when the code was compiled is a part of what is compiled."""
    (tmp_path / "rule.py").write_text("K = 1\n")
    mine = tmp_path / "mine.py"
    mine.write_text(
        "import os, sys, pathlib\nsys.path.insert(0, str(pathlib.Path(__file__).parent))\n"
        "import rule\nfrom rule import K\nMOST = int(os.environ.get('MOST', '9'))\n\n"
        + GOOD.replace("plan[i] = 1", "plan[i] = i < MOST and i % 2 == K and rule.K < 5")
    )
    root = Path(moetrace.__file__).parents[1]
    assert run_hook(f"{mine}:mine", root) == ["01010", "0", "1"]
    assert run_hook(f"{mine}:mine", root) == ["01010", "1", "0"]
    (tmp_path / "rule.py").write_text("K = 0\n")
    assert run_hook(f"{mine}:mine", root) == ["10100", "0", "1"]
    assert run_hook(f"{mine}:mine", root, MOST="1") == ["10000", "0", "1"]


def replay_with(tmp_path, body: str, **options):
    path = tmp_path / "own.py"
    path.write_text("def own(state, view, layer, load, plan):\n" + textwrap.indent(textwrap.dedent(body), "    "))
    trace = moetrace.generate_trace("tiny-olmoe", requests=2, prompt=4, output=20)
    spec = moetrace.load_policy("on-demand", {"name": "own"} | dict.fromkeys(options.pop("hooks"), f"{path}:own"))
    policies = [moetrace.load_policy(spec, options), "edge-ndp"]
    return moetrace.replay(trace, policies=policies, slots=24, jobs=1)


def test_an_index_out_of_bounds_is_one_sentence(tmp_path):
    with pytest.raises(MoetraceError, match=r"Policy own failed: IndexError: .*out of bounds") as error:
        replay_with(tmp_path, "plan[load.size] = 1\n", hooks=["dispatch"])
    assert "\n" not in str(error.value)


def test_an_error_in_a_function_is_one_sentence(tmp_path):
    with pytest.raises(MoetraceError, match="Policy own failed: ValueError: no thanks"):
        replay_with(tmp_path, "raise ValueError('no thanks')\n", hooks=["dispatch"])


def test_a_plan_for_all_is_not_a_fallback(tmp_path):
    result = replay_with(tmp_path, "plan[:] = 1\n", hooks=["dispatch"])
    own = result.to_dict()["policies"][0]
    assert own["optimal_fallbacks"] == 0
    assert (
        own["total_s"]
        == moetrace.replay(
            moetrace.generate_trace("tiny-olmoe", requests=2, prompt=4, output=20), policies="on-demand", slots=24
        ).to_dict()["policies"][0]["total_s"]
    )


@pytest.mark.parametrize("prefetch", ["none", "online:2", "oracle:2"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_hook_that_writes_into_copies_changes_nothing(tmp_path, prefetch, scope):
    """`resident` and `touched` are copies: the replay ends, and the cache keeps to its capacity."""
    body = """
    for e in range(state.shape[1]):
        state[layer, e].resident = view.step % 2
        state[layer, e].touched = -e
        state[layer, e].score = e - 3.0
    """
    result = replay_with(tmp_path, body, hooks=["residency"], prefetch=prefetch, scope=scope)
    for lane in result.run.lanes:
        cache = lane.state.cache
        assert cache.resident.sum() == cache.residents.sum() <= 24


def test_infinite_scores_leave_nothing_to_prefetch_for(tmp_path):
    """Where every resident is kept for good and no slot is free, nothing is worth moving."""
    body = """
    for i in range(load.size):
        state[layer, view.active[i].expert].score = 1e999
    """
    result = replay_with(tmp_path, body, hooks=["residency"], prefetch="online:2")
    assert result.to_dict()["policies"][0]["wasted"] <= 24


def test_the_clairvoyant_run_shows_the_same_residents_in_both_places(tmp_path):
    in_view = "for i in range(load.size):\n    plan[i] = view.active[i].resident\n"
    in_state = "for i in range(load.size):\n    plan[i] = state[layer, view.active[i].expert].resident\n"
    one, other = (
        replay_with(tmp_path, body, hooks=["dispatch"]).to_dict()["policies"][0]["clairvoyant_s"]
        for body in (in_view, in_state)
    )
    assert one == other


def test_a_policy_does_not_depend_on_its_company(tmp_path):
    body = "for i in range(load.size):\n    plan[i] = view.active[i].next_use > 0\n"
    path = tmp_path / "own.py"
    path.write_text("def own(state, view, layer, load, plan):\n" + textwrap.indent(body, "    "))
    trace = moetrace.generate_trace("tiny-olmoe", requests=2, prompt=4, output=20)
    belady = moetrace.load_policy("on-demand", {"residency": "belady"})
    alone = moetrace.replay(trace, policies=f"{path}:own", slots=24).to_dict()["policies"][0]
    beside = moetrace.replay(trace, policies=[f"{path}:own", belady], slots=24).to_dict()["policies"][0]
    assert alone == beside


def test_a_function_compiled_elsewhere_is_no_policy_yet():
    import numba

    @numba.njit("int64(int64, int64, int64, int64, int64)")
    def other(state, view, layer, load, plan):
        return state

    with pytest.raises(UsageError, match=r"other returns|other is not a policy"):
        policy(other)
