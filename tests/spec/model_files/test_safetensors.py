"""Bits as stored: from the headers of safetensors files beside a config.json."""

import json
import struct

import pytest
from support.small_configs import QWEN

from moetrace.spec import MoetraceError, load_model
from moetrace.spec.model_files.hugging_face import anatomy_of, family_of

CONFIG = QWEN | {"num_hidden_layers": 3, "num_experts": 4, "mlp_only_layers": [0]}


def tensors(expert_bytes, dense_bytes):
    """Name -> (shape, bytes) of every tensor; the bytes of an expert's weight by layer, scales apart."""
    found = {"model.embed_tokens.weight": ((100, 64), 12800), "lm_head.weight": ((100, 64), 6400 * dense_bytes)}
    shapes = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}
    for layer in range(3):
        path = f"model.layers.{layer}"
        found[f"{path}.input_layernorm.weight"] = ((64,), 256)
        for name, shape in shapes.items():
            found[f"{path}.self_attn.{name}.weight"] = (shape, shape[0] * shape[1] * dense_bytes)
        if layer == 0:
            for part in ("gate", "up", "down"):
                found[f"{path}.mlp.{part}_proj.weight"] = (96, 64), 96 * 64 * dense_bytes
            continue
        found[f"{path}.mlp.gate.weight"] = ((4, 64), 4 * 64 * dense_bytes)
        for expert in range(4):
            for part in ("gate", "up", "down"):
                name = f"{path}.mlp.experts.{expert}.{part}_proj"
                found[f"{name}.weight"] = ((32, 64), int(32 * 64 * expert_bytes[layer]))
                found[f"{name}.weight_scale_inv"] = ((1, 1), 4)
    return found


def save(path, named):
    described, place = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, size) in named.items():
        described[name] = {"dtype": "U8", "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    data = json.dumps(described).encode()
    with path.open("wb") as file:
        file.write(header(data))
        file.truncate(8 + len(data) + place)


def header(data):
    return struct.pack("<Q", len(data)) + data


def folder_of(path, named, shards=2, **changes):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG | changes))
    names = [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    for number, name in enumerate(names):
        save(path / name, dict(list(named.items())[number::shards]))
    index = {"weight_map": {tensor: names[number % shards] for number, tensor in enumerate(named)}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def test_bits_by_layer_as_stored(tmp_path):
    folder = folder_of(tmp_path / "Model-FP8", tensors({1: 1, 2: 0.5}, 2))
    model = load_model(folder)
    assert model.weight_bits == [8 + 32 / 2048, 4 + 32 / 2048] and model.dense_weight_bits == 16
    stored = sum(size for name, (_, size) in tensors({1: 1, 2: 0.5}, 2).items() if ".experts." in name)
    assert model.expert_bytes().sum() == stored
    assert load_model(folder / "model.safetensors.index.json") == model
    assert load_model(folder / "model-00001-of-00002.safetensors") == model


def test_one_file_and_dense_bits(tmp_path):
    named = tensors({1: 2, 2: 2}, 1)
    plain = {name: it for name, it in named.items() if "scale" not in name}
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(CONFIG))
    save(tmp_path / "m" / "model.safetensors", plain)
    model = load_model(tmp_path / "m")
    assert (model.weight_bits, model.dense_weight_bits) == (16, 8)


def test_missing_files_leave_what_config_says(tmp_path):
    folder = folder_of(tmp_path / "m", tensors({1: 1, 2: 1}, 2), quantization_config={"quant_method": "mxfp4"})
    assert load_model(folder).weight_bits == 8 + 32 / 2048
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert load_model(folder).weight_bits == 4.25


def test_damage_is_one_sentence(tmp_path):
    folder = folder_of(tmp_path / "m", tensors({1: 1, 2: 1}, 2))
    shard, index = folder / "model-00001-of-00002.safetensors", folder / "model.safetensors.index.json"
    whole = shard.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    for data, says in [
        (b"", "not a whole safetensors file"),
        (whole[: length // 2], "not a whole safetensors file"),
        (struct.pack("<Q", 2**60) + whole[8:], "not a whole safetensors file"),
        (whole[:-1], "the place of the tensor"),
        (header(b'{"a": {"shape": [1], "data_offsets": [0, 1]}}'), "the place of the tensor 'a' makes no sense"),
        (header(b'{"a": {"shape": [1]}}'), "the place of the tensor 'a' makes no sense"),
        (header(b'{"a": {"shape": [1], "data_offsets": [0, 1e400]}}'), "data_offsets"),
        (header(b'{"a": {"shape": [1], "data_offsets": [0, 1180591620717411303424]}}'), "data_offsets"),
        (header(b'{"a": {"shape": [' + b"1," * 20 + b"1]}}"), "of length <= 16"),
        (header(b'{"a": 0}'), "Expected `object"),
        (header(b"[[[["), "Expected `object"),
        (header(b"[" * 100_000), "Expected `object"),
        (header(b'{"a": {"b": ' + b"[" * 100_000), "Cannot read"),
        (header(b'{"a'), "Input data was truncated"),
        (header(b"{" + b'"a":{},' * (1 << 20) + b'"a":{}}'), "more than 1,048,576 fields"),
    ]:
        shard.write_bytes(data)
        with pytest.raises(MoetraceError, match=says) as caught:
            load_model(folder)
        assert str(caught.value).endswith(".")
    shard.write_bytes(whole)
    for names, says in [
        ({"a": "../config.json"}, "is not the name of a file beside it"),
        ({"a": "/etc/x.safetensors"}, "is not the name of a file beside it"),
        ({}, "its weight_map is empty"),
        ([], "Expected `object"),
        ({"a": 1}, "Expected `str`"),
        ({"a": shard.name}, "hold no experts of layer"),
    ]:
        index.write_text(json.dumps({"weight_map": names}))
        if says.startswith("hold"):
            save(shard, {"a": ((1,), 4)})
        with pytest.raises(MoetraceError, match=says):
            load_model(folder)


def test_sizes_of_another_model(tmp_path):
    folder = folder_of(tmp_path / "m", tensors({1: 2, 2: 2}, 2), moe_intermediate_size=2)
    with pytest.raises(MoetraceError, match=r"do not have the sizes that config\.json describes"):
        load_model(folder)


def test_the_stand_in_has_the_tensors_of_the_model(tmp_path):
    """The files above hold what config.json describes: as many weights as the parts of the model."""
    family, fields = family_of(tmp_path, CONFIG)
    anatomy = anatomy_of(family, fields)
    named = tensors({1: 1, 2: 1}, 1)
    left_out = ("scale", "embed", "norm")
    counted = [size for name, (_, size) in named.items() if not any(part in name for part in left_out)]
    assert sum(counted) == anatomy.params
