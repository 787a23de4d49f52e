"""Docs, docstrings, messages and comments are in plain English: few phrases of bench/voice.py for each 1,000 words."""

import re

import pytest
from voice import MARKERS, ROOT, Text, code_sentences, own_texts, page_sentences, rate, sentences

LIMIT = 0.5  # markers for each 1,000 words; public packages have 0 to 0.3
# Sentences that may keep a marker, because no plainer words are as exact.
EXCEPTIONS = {
    "An access waits for the stores of the one before it; two layers at once hide that (8.1 ns an access of 128 "
    "experts alone, 4.4 together).",
}

ROOMS = {f"{room.kind} {room.room}": room for room in own_texts()}


def _without_exceptions(room: Text) -> Text:
    return room._replace(sentences=[sentence for sentence in room.sentences if sentence not in EXCEPTIONS])


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_has_few_markers(name):
    """`python bench/voice.py --show ROOM` prints the sentences."""
    room = _without_exceptions(ROOMS[name])
    found = room.found()
    assert rate([room]) <= LIMIT, found[:5]


def test_names_of_tests_have_few_markers():
    names: list[str] = []
    for path in (ROOT / "tests").rglob("test_*.py"):
        names += re.findall(r"^ *def test_(\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    room = Text("names", "tests", [name.replace("_", " ").capitalize() for name in names])
    assert room.words > 10_000 and rate([room]) <= LIMIT, room.found()


def test_each_exception_still_occurs_and_has_a_marker():
    marked = {sentence for room in ROOMS.values() for _, sentence in room.found()}
    assert sorted(EXCEPTIONS - marked) == []


def test_every_marker_finds_its_phrase():
    examples = {
        "Of ... at the beginning": "Of these, two are evicted.",
        "What ... is, as a subject": "What is fetched is not kept.",
        "..., what ... is, as a subject": "It is kept, what the unit holds is not.",
        "what is, has or stands": "It evicts what was used last.",
        "That is/which": "Which unit holds it is said there.",
        "anew": "It is made anew.",
        "alone": "It is of units alone.",
        "is none": "There is none.",
        "so many": "It holds so many experts.",
        "whatever": "It is kept, whatever it costs.",
        "told": "They are told apart.",
        "the other way round": "It is the other way round.",
        "no more/no less": "It is no more.",
        "but for": "All start cold but for one.",
        "hangs on": "That hangs on the trace.",
        "shall": "It shall not speak.",
        "has not": "It has not the time.",
        "the same of": "There is the same of the units.",
        "lest, thereof": "It is sorted beforehand.",
    }
    assert examples.keys() == MARKERS.keys()
    for name, sentence in examples.items():
        assert name in [marker for marker, _ in Text("docs", "x", [sentence]).found()], name


def test_plain_sentences_have_no_marker():
    plain = [
        "What follows is an example.",
        "Of course it can.",
        "What does it cost?",
        "A batch is as much as twice as large, and takes twice as much memory.",
        "It holds none of the experts.",
        "Lint says what is wrong with the trace.",
    ]
    assert Text("docs", "x", plain).found() == []


def test_pages_and_modules_are_read_without_their_code(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# What it costs\n\n"
        "One `what is` [link](what-is.md). Two\nlines.\n\n```sh\nanew\n```\n\n"
        "    anew\n\n| one cell | whatever |\n"
    )
    assert page_sentences(page) == ["What it costs?", "One X link.", "Two lines.", "one cell", "whatever"]
    module = tmp_path / "module.py"
    module.write_text('"""Do it.\n\n    >>> anew\n"""\n\n# Why\n# so.\nprint(f"{1} is what is left", "anew")\n')
    assert code_sentences(module) == (["Do it.", "X is what is left"], ["Why so."])
    module.write_text("# One\n# comment\none = 1  # the same\ntwo = 2  # of two\n    # Another.\n")
    assert code_sentences(module) == ([], ["One comment", "the same", "of two", "Another."])
    assert sentences("- One.\n- Two: `x`. (Three.)") == ["One.", "Two: X.", "Three.)"]
