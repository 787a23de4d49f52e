"""Neighbouring layers of sound captures, of which a few rows share few experts."""

from pathlib import Path

import numpy as np
import pytest
from support.findings import found
from support.traps import choose

from moetrace.trace import Trace

TINY = Path(__file__).parents[2] / "traces" / "tiny-olmoe.h5"


def test_few_rows_of_few_requests_are_no_parts_of_a_layer():
    with Trace.open(TINY) as trace:
        for start, stop in ((6128, 6328), (2231, 2631), (2328, 2528), (5723, 5923), (7566, 7766), (16199, 16399)):
            ids = trace.read("experts", start, stop)
            assert "wrong-stride" not in found({"experts": ids, "num_experts": trace.num_experts})


@pytest.mark.parametrize(("experts", "k", "read"), [(8, 3, 2), (64, 6, 4), (160, 6, 4)])
def test_cells_across_two_layers_are_found_in_enough_rows(experts, k, read):
    ids = choose(np.random.default_rng(4), 2000, 12, experts, k).reshape(2000, -1, read)
    assert "wrong-stride" in found({"experts": ids, "num_experts": experts})
