"""`moetrace select`: what it writes, says and refuses."""

from pathlib import Path

import pytest

from moetrace.trace import Trace

TINY = Path(__file__).parents[2] / "traces" / "tiny-olmoe.h5"


def test_a_part_is_written_and_said(run, tmp_path):
    out = tmp_path / "p.h5"
    code, said, err = run("select", TINY, "-o", out, "--rows", ":100,200:300,500", "--layers", "1,3:")
    assert (code, said) == (0, "") and err.endswith("201 rows in 51 steps, 0.1 MB.\n") and err.startswith(f"{out}: ")
    with Trace.open(out) as trace:
        trace.verify()
        assert trace.layer_index.tolist() == [1, 3, 4, 5]


def test_a_part_is_left_out(run, tmp_path):
    code, _, err = run("select", TINY, "-o", tmp_path / "p.h5", "--requests", "0", "--phase", "prefill", "--out")
    assert code == 0 and "16,362 rows" in err


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        ([], 2, "select something"),
        (["--rows", "a:b"], 2, "'a:b' is no range"),
        (["--rows", "1:2:3"], 2, "no range"),
        (["--rows", ""], 2, "range"),
        (["--rows", "-3:"], 2, "'-3:' is no range"),
        (["--rows", "9:3"], 2, "a range is START:STOP"),
        (["--rows", "99999:"], 2, "there are only 16,414 rows"),
        (["--layers", "77"], 2, "has no layer 77"),
        (["--requests", "999"], 1, "nothing would be left"),
        (["--phase", "mixed"], 2, "--phase"),
    ],
)
def test_wrong_selections_are_refused_in_one_sentence(run, tmp_path, options, code, sentence):
    found, out, err = run("select", TINY, "-o", tmp_path / "p.h5", *options)
    assert (found, out) == (code, "") and sentence in err and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
