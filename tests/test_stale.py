"""Compiled kernels outlive no edit of a file beside their own, whose functions are compiled into them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moetrace

GENERATE = """
from moetrace.trace.generate import generate_trace
from moetrace.trace.generate.zipf import _draw_rows
print(generate_trace("mixtral-8x7b", requests=1, prompt=3, output=0, stick=0.0).read("experts", 0, 3).sum(),
      sum(_draw_rows.stats.cache_hits.values()))
"""
# `reuse` calls nothing of another file yet: what is seen is that it is compiled anew.
ANALYZE = """
import numpy as np
from moetrace.analyze.reuse import _note, add, no_reuse
add(no_reuse(1, 4), 0, np.zeros((3, 2), np.uint16), np.arange(3, dtype=np.int32))
print(0, sum(_note.stats.cache_hits.values()))
"""


@pytest.mark.parametrize(
    ("code", "file", "old", "new"),
    [
        (GENERATE, "trace/generate/streams.py", "return z ^ (z >> _31)", "return ~(z ^ (z >> _31))"),
        (ANALYZE, "analyze/overlap.py", "count = 0\n", "count = 1\n"),
    ],
)
def test_an_edit_of_another_file_shows(tmp_path, code, file, old, new):
    package = tmp_path / "moetrace"
    shutil.copytree(Path(moetrace.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))

    def run() -> tuple[str, int]:
        command, compiled = [sys.executable, "-c", code], os.environ | {"NUMBA_DISABLE_JIT": "0"}
        done = subprocess.run(command, cwd=tmp_path, env=compiled, capture_output=True, text=True, check=True)
        answer, hits = done.stdout.split()
        return answer, int(hits)

    (before, first), (again, second) = run(), run()
    assert (first, second, again) == (0, 1, before)
    path = package / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    after, hits = run()
    assert hits == 0 and (code == ANALYZE or after != before)
