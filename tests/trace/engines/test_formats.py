"""Which format a file is of: one and no other, whatever its name."""

import importlib
from pathlib import Path

import fuzz
import pytest

from moetrace.trace.engines import FORMATS, _first_bytes, _importer
from moetrace.trace.engines.capture import Hints

NEEDS = {"sglang": "torch", "moe-cache-eval": "safetensors", "trtllm": "safetensors"}


@pytest.mark.parametrize("importer", fuzz.WRITERS)
def test_samples_are_of_their_own_format_alone(tmp_path, importer):
    if importer in NEEDS:
        pytest.importorskip(NEEDS[importer])
    for sample in importlib.import_module(fuzz.WRITERS[importer]).samples(tmp_path):
        for path in sample.files:
            first = _first_bytes(path)
            found = [name for name in FORMATS if _importer(name).recognize(first, path.name)]
            assert found[0] == importer and set(found) <= {importer, "npz"}, (
                "an archive could be npz's, if nothing before claims it"
            )


@pytest.mark.parametrize(
    "text", ["", "\n", "a,b\n1,2\n", "layer,expert\n", "{}\n", "[1, 2]\n", "1\n", "1 2\n", "\0" * 99]
)
def test_other_content_is_of_no_format(tmp_path, text):
    assert not any(_importer(name).recognize(text.encode(), "a.csv") for name in FORMATS)


@pytest.mark.parametrize("importer", ["colibri", "llamacpp", "megatron", "bigmoeonedge", "lattice"])
def test_the_bytes_of_a_source_are_told_once(tmp_path, importer):
    for sample in importlib.import_module(fuzz.WRITERS[importer]).samples(tmp_path):
        read: list[int] = []
        hints = Hints(**sample.hints, reading=read.append)
        _importer(importer).read(sample.files, hints)
        size = sum(Path(path).stat().st_size for path in sample.files)
        assert size - 4 * len(sample.files) <= sum(read) <= size
