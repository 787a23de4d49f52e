"""Which format a file is of: one and no other, whatever its name."""

import importlib
from pathlib import Path

import fuzz
import numpy as np
import pytest

from moetrace.importers.captured import Hints
from moetrace.importers.formats import FORMATS, _first_bytes, _importer, detect
from moetrace.importers.importing import import_traces
from moetrace.spec.errors import UsageError
from moetrace.trace import Trace

BINARY = {".pt", ".npy", ".npz", ".safetensors", ".parquet", ".gguf", ".oracleGeneral", ".mbolt"}
NEEDS = {"sglang": "torch", "moe-cache-eval": "safetensors", "trtllm": "safetensors"}


@pytest.mark.parametrize("importer", fuzz.WRITERS)
def test_samples_are_recognized_only_as_their_own_format(tmp_path, importer):
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


@pytest.mark.parametrize("importer", sorted(fuzz.WRITERS.keys() - {"npz"}))
def test_a_byte_order_mark_before_a_text_is_no_matter(tmp_path, importer):
    if importer in NEEDS:
        pytest.importorskip(NEEDS[importer])
    for sample in importlib.import_module(fuzz.WRITERS[importer]).samples(tmp_path):
        texts = [
            path
            for path in map(Path, sample.files)
            if path.suffix
            not in {".pt", ".npy", ".npz", ".safetensors", ".parquet", ".gguf", ".oracleGeneral", ".mbolt"}
        ]
        if not texts:
            continue
        found = []
        for mark in (b"", b"\xef\xbb\xbf"):
            for path in texts:
                path.write_bytes(mark + path.read_bytes())
            import_traces([Path(path) for path in sample.files], tmp_path / "t.h5", hints=Hints(**sample.hints))
            with Trace.open(tmp_path / "t.h5") as trace:
                what = "counts" if "counts" in trace.has else "experts"
                found.append(trace.read(what, 0, max(trace.rows, trace.steps)).tolist())
        assert found[0] == found[1]


# Options that an importer accepts although they differ: a wider top_k is allowed, and the user's number goes first.
SAID = {("colibri", "top_k"), ("fiddler", "top_k"), ("sglang", "num_experts")}


@pytest.mark.parametrize("importer", fuzz.WRITERS)
def test_sizes_that_contradict_the_source_are_wrong_usage(tmp_path, importer):
    if importer in NEEDS:
        pytest.importorskip(NEEDS[importer])
    sample = importlib.import_module(fuzz.WRITERS[importer]).samples(tmp_path)[0]
    files, out = [Path(path) for path in sample.files], tmp_path / "out.h5"
    import_traces(files, out, format=importer, hints=Hints(**sample.hints))
    with Trace.open(out) as trace:
        sizes = {"num_experts": trace.num_experts, "top_k": trace.top_k}
    out.unlink()
    for name, size in sizes.items():
        hints = Hints(**sample.hints)
        if getattr(hints, name) is not None or (importer, name) in SAID:
            continue
        import_traces(files, out, format=importer, hints=hints._replace(**{name: size}))
        out.unlink()
        said = f"has {size} experts a (token|layer), but --(top-k|experts) says {size - 1}"
        with pytest.raises(UsageError, match=said):
            import_traces(files, out, format=importer, hints=hints._replace(**{name: size - 1}))
        assert not out.exists()
        spared = hints._replace(**{name: size + 1}, from_model=(name,))
        import_traces(files, out, format=importer, hints=spared)
        out.unlink()


@pytest.mark.parametrize("importer", ["colibri", "llamacpp", "megatron", "bigmoeonedge", "lattice"])
def test_progress_counts_the_bytes_of_a_source_once(tmp_path, importer):
    for sample in importlib.import_module(fuzz.WRITERS[importer]).samples(tmp_path):
        read: list[int] = []
        hints = Hints(**sample.hints, reading=read.append)
        _importer(importer).read(sample.files, hints)
        size = sum(Path(path).stat().st_size for path in sample.files)
        assert size - 4 * len(sample.files) <= sum(read) <= size


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("rows", [3, 30_000])
def test_an_archive_with_ids_behind_floats_is_no_logits(tmp_path, save, rows):
    aux = np.random.default_rng(0).random((rows, 4), np.float32)
    save(tmp_path / "a.npz", aux=aux, expert_ids=np.zeros((rows, 1, 2), np.uint8))
    assert detect(tmp_path / "a.npz") == "npz"
    save(tmp_path / "a.npz", aux=aux, more=aux)
    assert detect(tmp_path / "a.npz") == "router-logits"
