"""Compiled kernels outlive no edit of what they compile in, wherever it stands."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moetrace

HITS = """
def hits(kernel):
    return sum(kernel.stats.cache_hits.values()) if hasattr(kernel, "stats") else 0
"""
# Each prints a figure, and how often the kernel that made it was found in the cache.
REPLAY = (
    HITS
    + """
import moetrace as mt
from moetrace.engine.replay import replay_batch
trace = mt.generate_trace("mixtral-8x7b", requests=1, prompt=3, output=2)
print(mt.replay(trace, policies="edge-ndp").summary["total_s"][0], hits(replay_batch), sep=";")
"""
)
ANALYZE = (
    HITS
    + """
import moetrace as mt
from moetrace.analyze.cache.kernels import slots
trace = mt.generate_trace("mixtral-8x7b", requests=2, prompt=20, output=20, zipf=1.0)
print(mt.cache_hits(trace, [64], ["belady"], scope="layer", sequential=True)["hits"][0],
      hits(slots._replay_small), sep=";")
"""
)
GENERATE = (
    HITS
    + """
from moetrace.generators import generate_trace
from moetrace.generators.zipf import _draw_rows
print(generate_trace("mixtral-8x7b", requests=1, prompt=3, output=0, stick=0.0).read("experts", 0, 3).sum(),
      hits(_draw_rows), sep=";")
"""
)
RULES = "LFU, LFU_IN_CACHE, BELADY = FAR"


class Copy:
    """A copy of the package, which can be edited."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(
            Path(moetrace.__file__).parent, folder / "moetrace", ignore=shutil.ignore_patterns("__pycache__")
        )

    def edit(self, file: str, old: str, new: str) -> None:
        path = self.folder / "moetrace" / file
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    def run(self, code: str, **variables: str) -> tuple[str, int]:
        """Return the figure that code prints, and how often a kernel was found in the cache."""
        environment = os.environ | {"NUMBA_DISABLE_JIT": "0", "NUMBA_CACHE_DIR": str(self.folder / "cache")} | variables
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        figure, hits = done.stdout.strip().split(";")
        return figure, int(hits)

    def in_python(self, code: str) -> float:
        """Return the figure that it prints where nothing is compiled."""
        return float(self.run(code, NUMBA_DISABLE_JIT="1")[0])


@pytest.fixture
def copy(tmp_path) -> Copy:
    return Copy(tmp_path)


# The kernel stands in one file; it uses `file`, which imports a constant from a third one.
@pytest.mark.parametrize(
    ("code", "file", "old", "new", "before", "after"),
    [
        (REPLAY, "engine/prefetch.py", "DONE_BYTES = 1e-3", "DONE_BYTES = FAR", "1e-3", "1e15"),
        (ANALYZE, "analyze/cache/eviction.py", "LFU, LFU_IN_CACHE, BELADY = 0, 1, 2", RULES, "0, 1, 2", "2, 1, 0"),
        (GENERATE, "jit/random.py", "return z ^ (z >> _31)", "return z ^ (z >> np.uint64(FAR))", "31", "7"),
    ],
    ids=["engine", "analyze", "generators"],
)
def test_an_edit_two_modules_away_shows(copy, code, file, old, new, before, after):
    far = copy.folder / "moetrace/spec/far.py"
    far.write_text(f"FAR = {before}\n")
    copy.edit(file, old, new)
    copy.edit(
        file,
        "\nfrom moetrace.jit.compile import kernel",
        "\nfrom moetrace.jit.compile import kernel\nfrom moetrace.spec.far import FAR",
    )
    (first, hits), (again, found) = copy.run(code), copy.run(code)
    assert (hits, found, again) == (0, 1, first)
    far.write_text(f"FAR = {after}\n")
    figure, hits = copy.run(code)
    assert hits == 0
    # Other numbers for the same rules change no figure, but a stale kernel would take one rule for another.
    assert float(figure) == pytest.approx(copy.in_python(code), rel=1e-12) and (figure == first) == (code == ANALYZE)


def test_an_edit_elsewhere_compiles_nothing(copy):
    assert copy.run(GENERATE)[1] == 0
    copy.edit("jit/heap.py", "ARITY = 4", "ARITY = 8")
    assert copy.run(GENERATE)[1] == 1


def test_a_named_tuple_of_another_name_is_compiled_again(copy):
    """Types are in the cache by the names of their classes, those of earlier versions too."""
    figure, hits = copy.run(GENERATE)
    copy.edit("generators/zipf.py", "_Tables", "_Renamed")
    assert copy.run(GENERATE) == (figure, hits) == (figure, 0)
    assert copy.run(GENERATE) == (figure, 1)


POLICY = (
    HITS
    + """
import numba
import moetrace as mt

@mt.policy
def by_phase(state, view, layer, load, plan):
    for i in range(load.size):
        plan[i] = view.phase == 1

trace = mt.generate_trace("mixtral-8x7b", requests=1, prompt=3, output=2)
print(mt.replay(trace, policies=by_phase).summary["total_s"][0], hits(by_phase), sep=";")
"""
)
RING = (
    HITS
    + """
import moetrace as mt
from moetrace.engine.replay import replay_batch
trace = mt.generate_trace("mixtral-8x7b", requests=2, prompt=3, output=20)
print(mt.replay(trace, policies="on-demand", slots=96).summary["hits"][0],
      hits(replay_batch), sep=";")
"""
)


@pytest.mark.parametrize(
    ("code", "file", "one", "other"),
    [
        (POLICY, "engine/state.py", "    phase: int  # 0 prefill, 1 decode, 2 mixed\n", "    rows: int  # T\n"),
        (
            RING,
            "engine/residency.py",
            *(f"    {name}: np.ndarray  # int64 [pools]\n" for name in ("residents", "capacity")),
        ),
    ],
    ids=["a user's hook", "replay"],
)
def test_fields_of_a_named_tuple_in_another_order_are_compiled_again(copy, code, file, one, other):
    """Numba tells named tuples apart by their class and the types in them."""
    (copy.folder / "policy.py").write_text(code)
    run = "import runpy; runpy.run_path('policy.py')"
    figure, _ = copy.run(run)
    assert copy.run(run) == (figure, 1)
    path = copy.folder / "moetrace" / file
    text = path.read_text()
    assert text.index(one) < text.index(other)
    path.write_text(text.replace(one, "    ?\n").replace(other, one).replace("    ?\n", other))
    # The engine hands over a view by the order of its fields, so figures may change: but as they do in plain Python.
    figure, found = copy.run(run)
    assert (float(figure), found) == (pytest.approx(copy.in_python(run), rel=1e-12), 0)
