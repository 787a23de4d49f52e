"""The file of answers: what a killed run leaves is found again, and a file of somebody else's stays as it is."""

import os

import pytest

from moetrace.live.journal import Journal, journal_of, marked
from moetrace.spec.errors import MoetraceError, UsageError

KEY = "0123456789abcdef" * 2


def filled(path, numbers):
    journal = Journal(path)
    for number in numbers:
        journal.add(number, KEY, marked(number, KEY, b'{\n "a": [%d]}' % number))
    return journal


def test_added_answers_are_found_again_and_put_in_order(tmp_path):
    path = tmp_path / "j"
    filled(path, [2, 0, 3]).close()
    journal = Journal(path)
    assert (len(journal), journal.most, journal.key(2), journal.key(1)) == (3, 3, KEY, None)
    assert journal.first() == b'{"moetrace":{"prompt":0,"asked":"%s"},"a":[0]}\n' % KEY.encode()
    journal.put_in_order()
    journal.close()
    lines = path.read_bytes().splitlines(True)
    assert [line[-5:] for line in lines] == [b"[0]}\n", b"[2]}\n", b"[3]}\n"]
    Journal(path).close(keep=False)
    assert not path.exists()


@pytest.mark.parametrize("cut", [1, 5, 30, 60])
def test_a_last_line_without_its_end_is_taken_away(tmp_path, cut):
    path = tmp_path / "j"
    filled(path, [0, 1]).close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    journal = Journal(path)
    assert len(journal) == 1
    journal.add(1, KEY, marked(1, KEY, b'{"a":[1]}'))
    journal.close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "content", [b"mine\n", b"mine", b'{"a": 1}', b"\0" * 9, b'{"moetrace":{"prompt":0,"asked":"x"},"a":1}\n', b"\n"]
)
def test_a_file_of_somebody_else_stays(tmp_path, content):
    path = tmp_path / "j"
    path.write_bytes(content)
    with pytest.raises(MoetraceError, match="line 1 is no answer that moetrace record put there: move the file away"):
        Journal(path)
    assert path.read_bytes() == content


def test_an_answer_twice_is_refused(tmp_path):
    path = tmp_path / "j"
    filled(path, [0]).close()
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(MoetraceError, match="line 2 is no answer"):
        Journal(path)


def test_links_folders_pipes_and_inputs_are_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "link", "pipe"):
        with pytest.raises(MoetraceError, match="is no ordinary file: move it away"):
            Journal(tmp_path / name)
    (tmp_path / "a.h5.answers.jsonl").write_bytes(b"")
    with (
        pytest.raises(UsageError, match="is also an input"),
        journal_of(tmp_path / "a.h5", [tmp_path / "a.h5.answers.jsonl"]),
    ):
        pass
    assert (tmp_path / "a.h5.answers.jsonl").exists()


def test_only_one_run_has_it(tmp_path):
    in_use = pytest.raises(UsageError, match="is in use: another run writes the same trace")
    with journal_of(tmp_path / "a.h5", []) as journal, in_use:
        Journal(journal.path)
    assert list(tmp_path.iterdir()) == [], "an empty one goes"


@pytest.mark.parametrize("answer", [b"", b"{}", b"[1]", b"1", b'{"a"', b"\xff", b'{"a":' + b"[" * 100_000])
def test_malformed_answers_are_refused(answer):
    with pytest.raises(MoetraceError, match="it is no JSON"):
        marked(0, KEY, answer)


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    journal = filled(tmp_path / "j", [0])
    before, write = (tmp_path / "j").read_bytes(), os.write
    wrote: list[int] = []

    def full(descriptor, data):
        if wrote:
            raise OSError(28, "No space left on device")
        wrote.append(write(descriptor, data[:5]))
        return wrote[0]

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(MoetraceError, match="could not be written: No space left on device"):
        journal.add(1, KEY, marked(1, KEY, b'{"a":1}'))
    journal.close()
    assert (tmp_path / "j").read_bytes() == before
