"""Damaged and impossible trace files: each is refused in one sentence."""

import errno
import os
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
from support.drawn_traces import change, draw_trace

from moetrace.spec.errors import MoetraceError
from moetrace.trace import Trace


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("schema", None, "no attribute 'schema'"),
        ("schema", "moetrace/2", "has schema 'moetrace/2', but this version reads 'moetrace/1'"),
        ("num_experts", 0, "num_experts is 0"),
        ("num_experts", 300, "/experts holds uint8, but must hold uint16"),
        ("num_experts", "8", "num_experts is not a whole number"),
        ("top_k", 9, "top_k is 9, but must be 1 to num_experts"),
        ("top_k", 1, r"/experts has shape \(40, 3, 2\), but \(40, 3, 1\) is needed"),
        ("model", 3, "model is not text"),
        ("source", "{", "source is not JSON"),
        ("source", "[]", "source is not a JSON object"),
        ("source", "[" * 30000, "source is not JSON: maximum recursion"),
        ("source", '{"a":' * 64 + "{}" + "}" * 64, "source is nested deeper than 64 levels"),
        ("source", "x" * 40000, "source is larger than 32768 bytes"),
        ("/experts", None, "has no dataset /experts"),
        ("/experts", np.zeros((40, 3), np.uint8), r"/experts has shape \(40, 3\)"),
        ("/experts", np.zeros((41, 3, 2), np.uint8), r"/rows/request has shape \(40,\), but \(41\) is needed|/gates"),
        ("/experts", np.zeros((40, 3, 2), np.int64), "/experts holds int64, but must hold uint8"),
        ("/experts", np.zeros((0, 3, 2), np.uint8), "/gates|empty"),
        ("/rows/request", np.zeros(40, np.float64), "/rows/request holds float64"),
        ("/rows/request", None, "has no dataset /rows/request"),
        ("/gates", np.zeros((40, 3), np.float16), "/gates has shape"),
        ("/rows/phase", None, "is mixed, so /rows/phase is needed"),
        ("/layers/index", np.zeros(3, np.uint16), "/layers/index must increase"),
        ("/layers/expert_bytes", np.zeros(3, np.int64), "expert_bytes of layer entry 0 is not positive"),
        ("/layers/expert_bytes", np.ones(4, np.int64), r"expert_bytes has shape \(4,\)"),
        ("/steps/offset", np.zeros(3, np.int64), "/steps/offset has shape"),
        ("/steps/offset", None, "has no dataset /steps/offset"),
        ("/steps", np.zeros(3), "has no dataset /steps/offset"),
    ],
)
def test_a_bad_file_is_one_sentence(file, name, value, sentence):
    change(file, name, value)
    with pytest.raises(MoetraceError, match=sentence) as raised:
        Trace.open(file)
    assert str(file) in str(raised.value) and str(raised.value).endswith(".")


@pytest.mark.parametrize(
    ("step", "value", "sentence"),
    [
        (0, 1, "must begin with 0, but begins with 1"),
        (-1, 41, r"must end with the number of rows \(40\), but ends with 41"),
        (2, 10**6, r"must increase by one row or more a step, but goes from 1000000 to \d+ at step 2"),
        (3, -5, "but goes from .* to -5 at step 2"),
    ],
)
def test_offsets_that_are_not_monotone(file, step, value, sentence):
    with h5py.File(file, "r+") as raw:
        raw["/steps/offset"][step] = value
    with pytest.raises(MoetraceError, match=f"{re.escape(str(file))}: /steps/offset .*{sentence}"):
        Trace.open(file)


@pytest.mark.parametrize(
    ("path", "at", "value", "sentence"),
    [
        ("/experts", (17, 1, 0), 8, "row 17, layer entry 1 holds the id 8, but the model has 8 experts"),
        ("/rows/request", 17, -1, "/rows/request of row 17 is -1, but must be 0 or more"),
        ("/rows/position", 17, -3, "/rows/position of row 17 is -3"),
        ("/rows/phase", 17, 2, "/rows/phase of row 17 is 2"),
        ("/recorded/resident", (17, 1, 0), 3, "/recorded/resident row 17, layer entry 1 is 3"),
    ],
)
def test_impossible_values_are_named_by_row(file, path, at, value, sentence):
    with h5py.File(file, "r+") as raw:
        raw[path][at] = value
    with Trace.open(file) as trace, pytest.raises(MoetraceError, match="differs from its sha256"):
        trace.verify()
    rewrite_sha256(file, path)
    with Trace.open(file) as trace, pytest.raises(MoetraceError, match=sentence):
        trace.verify()


def rewrite_sha256(file: Path, path: str) -> None:
    import hashlib

    with h5py.File(file, "r+") as raw:
        raw[path].attrs["sha256"] = hashlib.sha256(raw[path][()].tobytes()).hexdigest()


def test_an_expert_chosen_twice_is_named_by_row():
    experts = np.zeros((4, 1, 2), np.uint8) + np.array([0, 1], np.uint8)
    experts[2] = 1
    with pytest.raises(MoetraceError, match="row 2, layer entry 0 chooses expert 1 more than once"):
        Trace.from_arrays(experts, num_experts=4).verify()


def test_row_phase_must_agree_with_a_pure_step():
    experts = np.zeros((2, 1, 1), np.uint8)
    trace = Trace.from_arrays(experts, num_experts=2, phase=[0, 1], row_phase=[0, 0])
    with pytest.raises(MoetraceError, match="/rows/phase of row 1 is 0, but its step is decode"):
        next(trace.row_blocks())


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"steps": [3, 1]}, "must end with the number of rows"),
        ({"steps": [2, 0, 3]}, "must increase by one row or more"),
        ({"phase": [0, 1, 0, 1, 3]}, "/steps/phase of step 4 is 3"),
        ({"phase": [0, 1, 2, 1, 0]}, "is mixed, so /rows/phase is needed"),
        ({"request": np.zeros(4, int)}, "/rows/request has shape"),
        ({"request": np.zeros((5, 1), int)}, "/rows/request has shape"),
        ({"request": np.full(5, 1 << 40)}, "beyond those of int32"),
        ({"gates": np.zeros((5, 1, 2))}, "/gates has shape"),
        ({"gates": np.full((5, 2, 1), 1e6)}, "beyond those of float16"),
        ({"wrong": np.zeros(5)}, "no array 'wrong'"),
        ({"num_experts": 1 << 16}, "num_experts is 65536"),
        ({"num_experts": 4.5}, "num_experts is 4.5, but must be a whole number"),
        ({"num_experts": "4"}, "num_experts is '4', but must be a whole number"),
        ({"steps": [2.5, 2.5]}, "steps holds float64, but must hold int64"),
    ],
)
def test_arrays_in_memory_are_checked_alike(arrays, sentence):
    with pytest.raises(MoetraceError, match=sentence):
        Trace.from_arrays(np.zeros((5, 2, 1), np.uint8), **({"num_experts": 3} | arrays))


def test_files_that_are_no_trace_are_refused(tmp_path):
    text = tmp_path / "text.h5"
    text.write_text("rows,steps\n1,2\n")
    for path, sentence in (
        (text, "not a trace file: it is not an HDF5 file"),
        (tmp_path / "none.h5", "there is no file"),
        (tmp_path, "is not a file"),
    ):
        with pytest.raises(MoetraceError, match=sentence):
            Trace.open(path)


def test_an_unreadable_file_is_one_sentence(file, monkeypatch):
    def refuse(*_args, **_options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(MoetraceError, match=r"t\.h5 can't be read: Permission denied"):
        Trace.open(file)


@pytest.mark.parametrize("compress", [None, "zstd"])
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, compress):
    path = tmp_path / "t.h5"
    draw_trace(1, 8, mixed=True).write(path, compress)
    whole = path.read_bytes()
    for size in [0, 1, 7, 50, 200, *range(1000, len(whole), 7919), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(MoetraceError, match=r"t\.h5 "):
            Trace.open(path)


def test_flipped_bytes_never_do_worse_than_an_error(file):
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    damaged = 0
    for _ in range(20):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 40):
            data[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(data)
        try:
            with Trace.open(file) as trace:
                trace.verify()
        except MoetraceError:
            damaged += 1
    assert damaged > 0


def test_data_elsewhere_is_refused(file, tmp_path):
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(240))
    with h5py.File(file, "r+") as raw:
        del raw["/experts"]
        raw.create_dataset("/experts", (40, 3, 2), np.uint8, external=[(str(secret), 0, 240)])
    with pytest.raises(MoetraceError, match="/experts keeps its data in another file"):
        Trace.open(file)
    for link in (h5py.SoftLink("/gates"), h5py.ExternalLink(str(secret), "/x")):
        with h5py.File(file, "r+") as raw:
            del raw["/experts"]
            raw["/experts"] = link
        with pytest.raises(MoetraceError, match="/experts is a link"):
            Trace.open(file)


def test_a_dataset_that_was_never_written_is_refused(file):
    with h5py.File(file, "r+") as raw:
        del raw["/experts"]
        raw.create_dataset("/experts", (40, 3, 2), np.uint8)
    with pytest.raises(MoetraceError, match="/experts has no data"):
        Trace.open(file)
    with h5py.File(file, "r+") as raw:
        del raw["/experts"]
        raw.create_dataset("/experts", (40, 3, 2), np.uint8, chunks=(8, 3, 2))
    with pytest.raises(MoetraceError, match="/experts lacks some of its 5 chunks"):
        Trace.open(file)
