"""The file of placement `mixed`: who stands where, and lines that say it wrongly."""

import numpy as np
import pytest

from moetrace.engine.placement import Placing
from moetrace.engine.placements.mixed import as_laid_out
from moetrace.spec.errors import MoetraceError

UNITS = 3


def laid_out(path, text: str, units: int = UNITS) -> np.ndarray:
    path.write_text(text)
    return as_laid_out(Placing("p", np.arange(2), 4, units, 1, None, None, layout=str(path)))


def test_named_experts_move_and_others_stay(tmp_path):
    groups = laid_out(tmp_path / "l.csv", "layer,expert,unit\n0,1,2\n1,3, striped\n")
    assert groups.tolist() == [[0, 2, 2, 0], [0, 1, 2, UNITS]]


def test_one_unit_has_one_layout(tmp_path):
    assert laid_out(tmp_path / "l.csv", "0,1,striped\n", units=1).tolist() == [[0] * 4] * 2


@pytest.mark.parametrize(
    "line", [f"0,1,{UNITS}", "0,1,-1", "2,0,0", "0,4,0", "0,1", "0,1,2,3", "0,1,all", "0,1,0\n0,1,1"]
)
def test_wrong_lines(tmp_path, line):
    """A unit behind the last one is no way to say striped."""
    with pytest.raises(MoetraceError, match=r"line [12]: (wants a layer below 2, an expert below 4|.* is there twice)"):
        laid_out(tmp_path / "l.csv", line + "\n")
