"""`moetrace rebatch`: what it writes, says and refuses."""

from pathlib import Path

import numpy as np
import pytest

from moetrace.trace import Trace

TRACES = Path(__file__).parents[2] / "traces"


def test_rebatch_writes_and_says_so(run, tmp_path):
    out = tmp_path / "b.h5"
    code, said, err = run("rebatch", TRACES / "tiny-olmoe.h5", "-o", out, "--batch", 16, "--chunk", 128)
    assert code == 0 and said == "" and err == f"{out}: tiny-olmoe, 16,414 rows in 551 steps, 1.5 MB.\n"
    code, said, err = run(
        *("rebatch", TRACES / "tiny-olmoe.h5", TRACES / "tiny-olmoe.h5", "-o", out, "--batch", 64),
        *("--order", "shuffle", "--seed", 1, "--compress", "zstd"),
    )
    assert code == 0 and "32,828 rows" in err
    with Trace.open(out) as trace:
        assert trace.storage == "compressed" and trace.source["parameters"]["seed"] == 1


def test_rebatch_says_what_it_leaves_out(run, tmp_path):
    ids = np.zeros((2, 1, 1), np.uint8)
    Trace.from_arrays(ids, num_experts=2, recorded=ids).write(tmp_path / "a.h5")
    code, _, err = run("rebatch", tmp_path / "a.h5", "-o", tmp_path / "b.h5", "--batch", 2)
    assert code == 0 and err.endswith("MB. The recorded residency was left out.\n")


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (["--batch", 0], 2, "--batch"),
        (["--batch", 1, "--chunk", 0], 2, "--chunk"),
        (["--batch", 1, "--order", "random"], 2, "--order"),
        (["--batch", 1, "--seed", 1], 2, "--seed goes with --order shuffle"),
        ([], 2, "--batch"),
        (["none.h5", "--batch", 1], 1, "there is no file none.h5"),
        ([TRACES / "mixtral-8x7b-b16.h5", "--batch", 1], 1, "differ in num_experts, so they can't share a trace"),
    ],
)
def test_rebatch_refuses(run, tmp_path, options, code, sentence):
    found, out, err = run("rebatch", TRACES / "tiny-olmoe.h5", "-o", tmp_path / "b.h5", *options)
    assert (found, out) == (code, "") and sentence in err and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
