"""Damaged input of every importer ends in a clean trace or in one sentence; `bench/fuzz.py` tries 100,000 of each."""

import fuzz
import pytest

from moetrace.importers.formats import FORMATS

NEEDS = {"sglang": "torch", "moe-cache-eval": "safetensors", "trtllm": "safetensors"}


@pytest.mark.parametrize("importer", fuzz.WRITERS)
def test_damaged_input_gives_a_trace_or_one_sentence(importer):
    if importer in NEEDS:
        pytest.importorskip(NEEDS[importer])
    tally = fuzz.fuzz(importer, 200, seed=1)
    assert tally.failures == []
    assert tally.traces + tally.refused == 200 and min(tally[:2]) >= 5, "some damage does no harm, most does"


def test_every_importer_has_samples_to_damage():
    assert set(fuzz.WRITERS) == set(FORMATS)
