"""GGUF files: all sizes equal the sum of the file's tensors, and a stranger's counts are not believed."""

import struct

import numpy as np
import pytest
from support.gguf_files import A_KIND, header, moe_tensors, text, write_gguf

from moetrace.spec import MoetraceError, load_model
from moetrace.spec.model_files.bits import GGML_TYPES
from moetrace.spec.model_files.gguf_header import read_header

BY_NAME = {kind.name: number for number, kind in GGML_TYPES.items()}
# The layer types that llama.cpp gives the experts of a Q4_K_M file: half of the layers have some matrices in Q6_K.
MIXED = [{"down": "Q6_K"}, {}, {}, {"down": "Q6_K"}]


def counted(path, model):
    """Bytes of the tensors that a model counts, summed over the file, and those of the experts."""
    tensors = read_header(path).tensors
    experts = sum(tensor.size for tensor in tensors if "_exps" in tensor.name)
    skipped = ("token_embd", "norm", "bias", "exps")
    rest = sum(tensor.size for tensor in tensors if not any(part in tensor.name for part in skipped))
    return experts, rest


@pytest.mark.parametrize("architecture", ["qwen3moe", "deepseek2", "gpt-oss", "nemotron_h_moe", "llama"])
def test_sizes_are_those_of_the_tensors(tmp_path, architecture):
    path = tmp_path / "model.gguf"
    write_gguf(path, architecture, *moe_tensors(architecture, MIXED, first_dense=architecture == "deepseek2"))
    model = load_model(path)
    experts, rest = counted(path, model)
    assert model.expert_bytes().sum() == pytest.approx(experts, rel=1e-12)
    lost = 0
    if architecture == "deepseek2":  # the attention of a dense first layer, which the timing model leaves out
        first = [tensor for tensor in read_header(path).tensors if tensor.name.startswith("blk.0.attn")]
        lost = sum(tensor.size for tensor in first if "norm" not in tensor.name)
    assert model.moe_layers * model.dense_bytes + model.head_bytes == pytest.approx(rest - lost, rel=1e-3)
    assert (model.moe_layers, model.experts, model.top_k) == (4, 8, 2)
    assert (model.hidden, model.expert_intermediate) == (512, 256)
    assert model.expert_matrices == (2 if architecture == "nemotron_h_moe" else 3)
    assert model.moe_hidden == (256 if architecture == "nemotron_h_moe" else model.moe_hidden)
    assert model.kv_bytes_per_token_layer == (2 * (64 + 32) if architecture == "deepseek2" else 2 * 2 * 2 * 64)


def test_mixed_types_are_bits_by_layer(tmp_path):
    """Q4_K_M: 4.5 bits where all matrices are Q4_K, and 5.19 where one of the three is Q6_K."""
    path = tmp_path / "q4_k_m.gguf"
    write_gguf(path, "qwen3moe", *moe_tensors("qwen3moe", MIXED))
    bits = load_model(path).weight_bits
    assert bits == pytest.approx([(2 * 4.5 + 6.5625) / 3, 4.5, 4.5, (2 * 4.5 + 6.5625) / 3])
    assert round(bits[0], 2) == 5.19


def test_width_that_256_does_not_divide(tmp_path):
    """DeepSeek-V2-Lite's down matrices have rows of 1408: Q8_0 and Q5_0 take the place of Q6_K and Q4_K."""
    layers, sizes = 26, {"experts": 64, "hidden": 2048, "width": 1408}
    mixed = [{"down": "Q8_0" if layer < 12 else "Q5_0"} for layer in range(layers)]
    path = tmp_path / "lite.gguf"
    write_gguf(path, "deepseek2", *moe_tensors("deepseek2", mixed, **sizes))
    assert load_model(path).expert_bytes().sum() / 1e9 == pytest.approx(9.53, abs=0.005)
    alone = layers * 64 * 3 * 2048 * 1408 * 4.5 / 8
    assert alone / 1e9 == pytest.approx(8.10, abs=0.005)


def test_files_of_one_model(tmp_path):
    tensors, facts = moe_tensors("qwen3moe", MIXED)
    whole = tmp_path / "whole.gguf"
    write_gguf(whole, "qwen3moe", tensors, facts)
    names = [f"part-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    for number, name in enumerate(names):
        own = facts if number == 0 else {}
        split = {"split.no": number, "split.count": 3}
        write_gguf(tmp_path / name, "qwen3moe", dict(list(tensors.items())[number::3]), own | split)
    one, parts = load_model(whole, {"name": "x"}), load_model(tmp_path / names[1], {"name": "x"})
    assert one == parts == load_model(tmp_path / names[0], {"name": "x"})
    (tmp_path / names[2]).unlink()
    with pytest.raises(MoetraceError, match=r"part-00003-of-00003\.gguf: No such file"):
        load_model(tmp_path / names[0])
    whole.unlink()
    (tmp_path / "other.gguf").write_bytes((tmp_path / names[0]).read_bytes())
    with pytest.raises(MoetraceError, match="one of 3 files, but is not named as"):
        load_model(tmp_path / "other.gguf")
    with pytest.raises(MoetraceError, match="it has 2 GGUF models: name one"):
        load_model(tmp_path)


def test_one_tensor_an_expert(tmp_path):
    """Files of Mixtral from before March 2024 have a tensor for each matrix of each expert."""
    stacked, facts = moe_tensors("llama", [{}, {}])
    single = {}
    for name, (shape, kind) in stacked.items():
        block, _, rest = name.rpartition(".ffn_")
        matrix = rest.split("_exps")[0]
        if "_exps" in name:
            single |= {f"{block}.ffn_{matrix}.{expert}.weight": (shape[:2], kind) for expert in range(shape[2])}
        else:
            single[name] = (shape, kind)
    write_gguf(tmp_path / "new.gguf", "llama", stacked, facts)
    write_gguf(tmp_path / "old.gguf", "llama", single, facts)
    assert load_model(tmp_path / "old.gguf", {"name": "x"}) == load_model(tmp_path / "new.gguf", {"name": "x"})


def test_vocabulary_is_skipped_and_name_is_read(tmp_path):
    tensors, facts = moe_tensors("qwen3moe", [{}])
    facts |= {
        "tokenizer.ggml.tokens": ["word"] * 5000,
        "general.name": "A Model",
        "tokenizer.chat_template": "x" * 70_000,
    }
    write_gguf(
        tmp_path / "m.gguf", "qwen3moe", tensors, facts | {"tokenizer.ggml.scores": np.zeros(20_000, np.float32)}
    )
    assert load_model(tmp_path / "m.gguf").name == "A Model"
    assert "tokenizer.ggml.tokens" in read_header(tmp_path / "m.gguf").metadata


ONE = text("blk.0.x") + struct.pack("<IQQIQ", 2, 256, 4, BY_NAME["Q4_K"], 0)
BAD = [
    (b"", "it is truncated"),
    (b"GGML" + bytes(40), "it is not a GGUF file"),
    (header(0, 0, version=1), "it is GGUF of version 1, and versions 2 and 3 can be read"),
    (header(2**40, 0), "more than its size allows"),
    (header(0, 2**40), "more than its size allows"),
    (header(0, 1) + struct.pack("<Q", 2**62) + bytes(20), "it is truncated"),
    (header(0, 1) + struct.pack("<Q", 40_000) + bytes(20), "it is truncated"),
    (header(0, 1) + text("a") + struct.pack("<IIQ", 9, 4, 2**61), "it is truncated"),
    (header(0, 1) + text("a") + struct.pack("<IIQ", 9, 8, 2**61), "more than 16,777,216 words"),
    (header(0, 1) + text("a") + struct.pack("<IIQ", 9, 9, 1) + bytes(20), "a list of the type 9"),
    (header(0, 1) + text("a") + struct.pack("<I", 99) + bytes(20), "a metadata field has the type 99"),
    (header(1, 0) + text("t") + struct.pack("<I", 9) + bytes(80), "the tensor 't' has 9 axes"),
    (
        header(1, 0) + text("t") + struct.pack("<IQQIQ", 2, 2**47, 2**47, 0, 0),
        "the shape of the tensor 't'",
    ),
    (header(1, 0) + text("t") + struct.pack("<IQIQ", 1, 0, 0, 0), "the shape of the tensor 't'"),
    (header(1, 0) + text("t") + struct.pack("<IQIQ", 1, 255, BY_NAME["Q4_K"], 0), "not whole blocks of 256 weights"),
    (header(1, 0) + text("t") + struct.pack("<IQIQ", 1, 256, 77, 0), "has the type 77, which is unknown"),
    (header(2, 0) + ONE + ONE + bytes(4000), "two tensors have the same name"),
    (header(1, 0) + ONE, "it is truncated: its tensors need"),
    (header(1, 0) + ONE + bytes(4000), "its general.architecture is missing"),
]


@pytest.mark.parametrize(("data", "says"), BAD)
def test_bad_file_is_one_sentence(tmp_path, data, says):
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(MoetraceError) as caught:
        load_model(path)
    assert says in str(caught.value) and str(caught.value).endswith(".")


def test_every_cut_is_one_sentence(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, "qwen3moe", *moe_tensors("qwen3moe", [{}]))
    data = path.read_bytes()
    for end in range(0, 3000, 37):
        path.write_bytes(data[:end])
        with pytest.raises(MoetraceError, match="Cannot read"):
            load_model(path)


def test_dense_and_odd_models(tmp_path):
    path = tmp_path / "m.gguf"
    tensors, facts = moe_tensors("qwen3moe", [{}, {}])
    write_gguf(path, "qwen3moe", {name: it for name, it in tensors.items() if "exps" not in name}, facts)
    with pytest.raises(MoetraceError, match="it is dense, none of its tensors is of experts"):
        load_model(path)
    write_gguf(path, "qwen3moe", {name: it for name, it in tensors.items() if "down_exps" not in name}, facts)
    with pytest.raises(MoetraceError, match="without ffn_up or ffn_down"):
        load_model(path)
    other = dict(tensors)
    other["blk.1.ffn_down_exps.weight"] = ((256, 256, 8), "Q4_K")
    write_gguf(path, "qwen3moe", other, facts)
    with pytest.raises(MoetraceError, match="do not fit each other"):
        load_model(path)


def test_types_are_those_of_the_package():
    gguf = pytest.importorskip("gguf")
    sizes = {kind.value: size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {number: (kind.block, kind.block_bytes) for number, kind in GGML_TYPES.items()} == sizes
    assert {number: kind.name for number, kind in GGML_TYPES.items()} == {
        kind.value: kind.name for kind in gguf.GGML_QUANT_SIZES
    }


def test_file_that_the_package_writes(tmp_path):
    """The same tensors as `gguf` reads in a file that it wrote: names, shapes, types and bytes."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    tensors, facts = moe_tensors("qwen3moe", MIXED)
    for key, value in facts.items():
        if key.startswith("general."):
            continue
        writer.add_uint32(key, value) if isinstance(value, int) else writer.add_string(key, value)
    for name, (shape, kind) in tensors.items():
        block = GGML_TYPES[BY_NAME[kind]]
        bytes_of_row = shape[0] // block.block * block.block_bytes
        number = getattr(gguf.GGMLQuantizationType, kind)
        if kind in A_KIND:
            writer.add_tensor(name, np.zeros(shape[::-1], A_KIND[kind]))
        else:
            writer.add_tensor(name, np.zeros((*shape[:0:-1], bytes_of_row), np.uint8), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    ours = read_header(path).tensors
    assert {tensor.name: tensor.size for tensor in ours} == {name: int(it.n_bytes) for name, it in read.items()}
    assert load_model(path).expert_bytes().sum() == sum(int(it.n_bytes) for it in read.values() if "exps" in it.name)
