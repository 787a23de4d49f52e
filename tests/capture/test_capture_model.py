"""A model's folder: what is not there, or would run a stranger's code, is one sentence before anything is loaded."""

import json
import pickle
import sys

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402
from support.tiny_models import save  # noqa: E402

from moetrace.capture.checkpoint import load_tokenizer, load_weights, open_folder  # noqa: E402
from moetrace.spec.errors import MoetraceError  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    return save("mixtral", tmp_path / "model")


def edit(folder, **fields):
    """Change config.json; None removes a field."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | fields
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), encoding="utf-8")


def test_facts_of_a_folder(folder):
    opened = open_folder(folder)
    assert (opened.name, opened.config.vocab_size, len(opened.config_sha256)) == ("model", 64, 64)
    assert load_weights(opened, "auto", "cpu").dtype == torch.float32
    assert load_weights(opened, "bfloat16", "cpu").dtype == torch.bfloat16
    assert not load_weights(opened, "float64", "cpu").training


def test_folders_without_a_model_are_refused(tmp_path, folder):
    with pytest.raises(MoetraceError, match="there is no folder"):
        open_folder(tmp_path / "allenai" / "OLMoE")
    with pytest.raises(MoetraceError, match="is not a folder with a model"):
        open_folder(folder / "config.json")
    with pytest.raises(MoetraceError, match=r"has no config\.json"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ("[" * 100_000, "is not JSON"),
        ("{}", "the model type None"),
        ('{"model_type": []}', "the model type"),
    ],
)
def test_malformed_configs_are_refused(folder, content, words):
    (folder / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(MoetraceError, match=words):
        open_folder(folder)


def test_sizes_that_make_no_sense_are_one_sentence(folder):
    edit(folder, hidden_size="large")
    with pytest.raises(MoetraceError, match=r"config\.json does not describe a model"):
        open_folder(folder)


def test_a_long_config_is_not_read(folder, monkeypatch):
    monkeypatch.setattr("moetrace.capture.checkpoint.CONFIG_BYTES", 10)
    with pytest.raises(MoetraceError, match="at most 10 are read"):
        open_folder(folder)


def test_code_of_the_model_is_never_run(folder, tmp_path):
    marker = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\n", encoding="utf-8")
    edit(folder, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    with pytest.raises(MoetraceError, match="does not know the model type 'own' and would need its own code"):
        open_folder(folder)
    edit(folder, model_type="mixtral")  # known, so that the code is not needed
    assert load_weights(open_folder(folder), "auto", "cpu").config.model_type == "mixtral"
    assert not marker.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("nested", [False, True])
def test_attention_from_a_repository_is_refused(folder, key, nested):
    edit(folder, **({"text_config": {key: {"": "org/kernel"}}} if nested else {key: "org/kernel@v1:attention"}))
    with pytest.raises(MoetraceError, match=f"asks for the attention 'org/kernel.*remove {key}"):
        open_folder(folder)
    edit(folder, text_config=None, **{key: "eager"})
    assert load_weights(open_folder(folder), "auto", "cpu").config._attn_implementation == "eager"


class Bomb:
    def __reduce__(self):
        return (sys.exit, (99,))


def test_pickles_are_never_read(folder):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    load_weights(open_folder(folder), "auto", "cpu")  # there are safetensors
    (folder / "model.safetensors").unlink()
    with pytest.raises(MoetraceError, match=r"pickled weights \(pytorch_model\.bin\), which .* are never read"):
        open_folder(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(MoetraceError, match=r"has no model\.safetensors"):
        open_folder(folder)


def test_adapters_are_refused(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/model"}', encoding="utf-8")
    with pytest.raises(MoetraceError, match="holds an adapter"):
        open_folder(folder)


def test_weights_that_are_missing_are_not_made_up(folder):
    weights = load_file(folder / "model.safetensors")
    gone = next(name for name in weights if "gate" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != gone}, folder / "model.safetensors")
    with pytest.raises(MoetraceError, match="the checkpoint lacks 1 of the weights, such as model"):
        load_weights(open_folder(folder), "auto", "cpu")
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(MoetraceError, match="can't be loaded as a causal language model"):
        load_weights(open_folder(folder), "auto", "cpu")


def test_models_that_write_no_text(folder):
    edit(folder, model_type="vit", architectures=None, vocab_size=None)
    with pytest.raises(MoetraceError, match="gives no vocab_size"):
        open_folder(folder)


def test_a_tokenizer_is_needed_for_text(folder, tmp_path):
    empty = open_folder(save("olmoe", tmp_path / "olmoe"))  # of which Transformers would make up an empty one
    with pytest.raises(MoetraceError, match="holds no tokenizer, which prompts of text need"):
        load_tokenizer(empty)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(MoetraceError, match="holds no tokenizer that can be loaded"):
        load_tokenizer(open_folder(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(MoetraceError, match="holds no tokenizer, which prompts of text need"):
        load_tokenizer(open_folder(folder))


def test_without_the_extra_it_says_how_to_get_it(folder, monkeypatch):
    for module in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MoetraceError, match=r"pip install '\.\[capture\]'"):
            open_folder(folder)
        monkeypatch.undo()
