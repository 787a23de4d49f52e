"""Prompts: every form of a line becomes the ids that the tokenizer gives; anything else names its line."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moetrace.capture.prompts import read_prompts
from moetrace.spec.errors import MoetraceError

VOCABULARY = 300


class Bytes:
    """A tokenizer whose ids are 3 + byte, after a 1 that begins a text; its chat template puts [role] before each."""

    chat_template = "yes"

    def __call__(self, text, add_special_tokens=True):
        if "refuse" in text:
            raise ValueError("no\nsuch text.")
        return {"input_ids": [1] * add_special_tokens + [3 + byte for byte in text.encode()]}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return "".join(f"[{message['role']}]{message['content']}" for message in messages) + "[assistant]"


def ids(text: str) -> list[int]:
    return [1, *(3 + byte for byte in text.encode())]


def read(tmp_path, content: str | bytes, name: str = "prompts.txt", tokenizer=Bytes) -> list[list[int]]:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [array.tolist() for array in read_prompts(path, tokenizer, VOCABULARY)]


def test_each_line_of_text_is_a_prompt(tmp_path):
    assert read(tmp_path, "one two\r\n\n   \n  drei {x}\nvier") == [ids("one two"), ids("  drei {x}"), ids("vier")]
    assert read(tmp_path, "\ufeffone\n") == [ids("one")], "a byte order mark is not text"
    assert read(tmp_path, '{"x": 1}\n') == [ids('{"x": 1}')], "JSON, but not a prompt"


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.txt"])
def test_json_lines(tmp_path, name):
    lines = [
        {"prompt": "a b"},
        {"token_ids": [5, 0, 299]},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
    ]
    expected = [ids("a b"), [5, 0, 299], ids("[system]s[user]u[assistant]")[1:]]
    assert read(tmp_path, "\n".join(map(json.dumps, lines)), name) == expected


def test_a_tokenizer_is_loaded_once_and_only_for_text(tmp_path):
    calls = []

    def load():
        calls.append(1)
        return Bytes()

    read(tmp_path, '{"token_ids": [1]}\n', tokenizer=load)
    assert calls == []
    read(tmp_path, '{"token_ids": [1]}\n{"prompt": "a"}\n{"prompt": "b"}\n', tokenizer=load)
    assert calls == [1]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a", "temperature": 1}', "unknown field `temperature`"),
        ('{"prompt": "a", "token_ids": [1]}', "needs one of prompt, token_ids and messages, but has 2"),
        ("{}", "but has 0"),
        ('{"prompt": 3}', "Expected `str"),
        ('{"token_ids": [1.5]}', "Expected `int`"),
        ('{"token_ids": [true]}', "Expected `int`"),
        ('{"token_ids": []}', "empty prompt"),
        ('{"token_ids": [1, 300]}', "token 1 is 300, but the model knows 0 to 299"),
        ('{"token_ids": [-1, 2]}', "Expected `int` >= 0"),
        ('{"token_ids": [123456789012345678901234567890]}', "Expected `int` <= 2147483647"),
        ('{"token_ids": [' + "9" * 10_000 + "]}", "is not"),
        ('{"messages": [{"role": "user"}]}', "missing required field `content`"),
        ('{"messages": [{"role": "user", "content": "a", "name": "b"}]}', "unknown field `name`"),
        ('{"messages": "hello"}', "Expected `array"),
        ('{"prompt": "refuse"}', "could not be tokenized: ValueError: no such text"),
        ('{"messages": [{"role": "user", "content": "refuse"}]}', "the chat template refused it"),
        ("{", "is not"),
        ("[" * 100_000, "is not"),
        (b'{"prompt": "\xff"}', "is not"),
        ("plain text", "is not"),
    ],
)
def test_a_malformed_prompt_is_refused_with_its_line(tmp_path, line, words):
    line = line if isinstance(line, bytes) else line.encode()
    with pytest.raises(MoetraceError, match=r"prompts\.jsonl: line 3[ :]") as error:
        read(tmp_path, b'{"prompt": "a"}\n\n' + line + b"\n", "prompts.jsonl")
    assert words in str(error.value) and str(error.value).isprintable()


def test_files_without_a_prompt(tmp_path):
    for content in ("", "\n\n  \n"):
        with pytest.raises(MoetraceError, match="holds no prompt"):
            read(tmp_path, content)
    with pytest.raises(MoetraceError, match=r"line 2 is not UTF-8"):
        read(tmp_path, b"a\n\xff\xfe\n")
    with pytest.raises(MoetraceError, match="there is no file"):
        read_prompts(tmp_path / "none", Bytes, VOCABULARY)
    with pytest.raises(MoetraceError, match="is not a file"):
        read_prompts(tmp_path, Bytes, VOCABULARY)


def test_no_line_is_read_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("moetrace.capture.prompts.LINE_BYTES", 10)
    assert len(read(tmp_path, "0123456789"[:9] + "\n")) == 1
    with pytest.raises(MoetraceError, match="line 2 is longer than 10 bytes"):
        read(tmp_path, "a\n" + "b" * 1000)


def test_messages_need_a_chat_template(tmp_path):
    class Plain(Bytes):
        chat_template = None

    with pytest.raises(MoetraceError, match="line 1 has messages, but the model's tokenizer has no chat template"):
        read(tmp_path, '{"messages": [{"role": "user", "content": "a"}]}', tokenizer=Plain)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=80) | st.text(max_size=40).map(lambda text: ('{"prompt": ' + text).encode()))
def test_any_bytes_give_prompts_or_one_sentence(tmp_path, content):
    try:
        prompts = read(tmp_path, content)
    except MoetraceError as error:
        assert str(error).isprintable()
    else:
        assert prompts and all(prompts) and np.concatenate(prompts).max() < VOCABULARY
