"""`moetrace capture`: text in, trace out, with what lint finds; what goes wrong is one sentence and no file."""

import json
import sys

import pytest

from moetrace.cli import main
from moetrace.trace import Trace


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved OLMoE with a tokenizer of words and a chat template."""
    pytest.importorskip("torch").set_num_threads(1)
    transformers = pytest.importorskip("transformers")
    from support.tiny_models import save
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = save("olmoe", tmp_path_factory.mktemp("cli") / "tiny")
    words = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", ":", "one", "two", "three"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}assistant :"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", chat_template=template
    ).save_pretrained(folder)
    return folder


def run(*arguments):
    """Exit code of the command."""
    try:
        main(["capture", *map(str, arguments)])
    except SystemExit as stop:
        return stop.code
    return 0


def test_text_becomes_a_trace(model, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("one two three\n\nthree words: one\n", encoding="utf-8")
    options = ["--output", "4", "--ignore-eos", "--batch", "2", "--temperature", "0.7", "--seed", "3"]
    assert run(model, "--prompts", tmp_path / "prompts.txt", "-o", tmp_path / "a.h5", *options) == 0
    said = capsys.readouterr()
    first, *notes = said.err.splitlines()
    assert said.out == "" and first == f"{tmp_path / 'a.h5'}: tiny, 15 rows in 6 steps, 0.1 MB."
    assert notes and all(line.startswith("  note: In ") for line in notes), "what lint finds, as after an import"
    with Trace.open(tmp_path / "a.h5") as trace:
        trace.verify()
        assert trace.read("token", 0, 7).tolist() == [7, 8, 9, 9, 3, 6, 7]
        expected = {"output": 4, "batch": 2, "temperature": 0.7, "seed": 3, "max_prompt": None, "ignore_eos": True}
        assert trace.source["parameters"] == expected


def test_messages_go_through_the_chat_template(model, tmp_path, capsys):
    line = {"messages": [{"role": "user", "content": "one two"}]}
    (tmp_path / "p.jsonl").write_text(json.dumps(line), encoding="utf-8")
    assert (
        run(model, "--prompts", tmp_path / "p.jsonl", "-o", tmp_path / "a.h5", "--output", "0", "--max-prompt", 5) == 0
    )
    with Trace.open(tmp_path / "a.h5") as trace:
        assert trace.read("token", 0, 9).tolist() == [4, 6, 7, 8, 5]
    assert "1 prompt cut to 5 tokens" in capsys.readouterr().err


def test_a_model_of_ones_own_fits(model, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"token_ids": [5, 6, 7]}', encoding="utf-8")
    own = tmp_path / "own.toml"
    own.write_text(
        'name = "own"\nmoe_layers = 3\nexperts = 8\ntop_k = 2\nhidden = 32\nexpert_intermediate = 16\n'
        "expert_matrices = 3\nweight_bits = 16\ndense_weight_bits = 16\nactivation_bytes = 2\n"
        "dense_params_per_layer = 1000\nonce_params = 1000\nkv_bytes_per_token_layer = 64\n",
        encoding="utf-8",
    )
    out = tmp_path / "a.h5"
    assert run(model, "--prompts", tmp_path / "p.jsonl", "-o", out, "--output", "3", "--model", own) == 0
    with Trace.open(out) as trace:
        assert trace.model == "own"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--output", "-1"], 2, "output is -1"),
        (["--output", "a.h5"], 2, "'a.h5' is no number of tokens; -o names the file"),
        (["--dtype", "int8"], 2, "int8"),
        (["--model", "mixtral-8x7b"], 2, "has 3 MoE layers of 8 experts"),
        (["--device", "abacus"], 1, "the device 'abacus' can't be used"),
    ],
)
def test_an_error_is_one_sentence_and_leaves_no_file(model, tmp_path, capsys, arguments, code, words):
    (tmp_path / "p.jsonl").write_text('{"token_ids": [5, 6, 7]}', encoding="utf-8")
    out = tmp_path / "out"
    out.mkdir()
    assert run(model, "--prompts", tmp_path / "p.jsonl", "-o", out / "a.h5", "--output", 4, *arguments) == code
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and said.startswith("moetrace: ")
    assert not list(out.iterdir())


def test_prompts_are_not_overwritten(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("hello\n", encoding="utf-8")
    assert run(tmp_path, "--prompts", tmp_path / "p.txt", "-o", tmp_path / "p.txt") == 2
    assert "is also an input" in capsys.readouterr().err


def test_an_interrupted_capture_leaves_the_old_file(model, tmp_path, capsys, monkeypatch):
    from moetrace.capture.routers import Recorder

    (tmp_path / "p.jsonl").write_text('{"token_ids": [5, 6, 7]}', encoding="utf-8")
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.h5").write_text("old", encoding="utf-8")
    take = Recorder.take

    def interrupted(self, rows, keep=None):
        if rows == 1:
            raise KeyboardInterrupt
        return take(self, rows, keep)

    monkeypatch.setattr(Recorder, "take", interrupted)
    assert run(model, "--prompts", tmp_path / "p.jsonl", "-o", out / "a.h5", "--output", 4) == 130
    assert capsys.readouterr().err == "moetrace: interrupted; no file was left half-written.\n"
    assert [file.name for file in out.iterdir()] == ["a.h5"] and (out / "a.h5").read_text() == "old"


def test_without_the_extra_it_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}', encoding="utf-8")
    assert run(tmp_path, "--prompts", tmp_path / "p.txt", "-o", tmp_path / "a.h5") == 1
    said = capsys.readouterr().err
    assert said == (
        "moetrace: a capture needs PyTorch and Transformers: pip install '.[capture]' in the clone of moetrace.\n"
    )
