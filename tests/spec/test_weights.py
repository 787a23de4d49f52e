"""Weights of few bits: the formula against published figures, bits of single experts, and what is refused."""

import json
import re
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import ROOT

from moetrace.batch.grid import load_grid
from moetrace.batch.identity import identity
from moetrace.spec import Model, WeightBits, canonical, load_model, load_system
from moetrace.spec.derived import model_figures, pair_figures
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.spec.toml_text import toml

SMALL = {"moe_layers": 2, "experts": 3, "top_k": 2, "hidden": 64, "expert_intermediate": 128}
LAYER = {"moe_layers": 1, "experts": 1, "top_k": 1}  # dense: one expert that every row has
SQUEEZED = {"weight_bits.codebook_bits": 16, "weight_bits.bits": 3, "weight_bits.sparse": 0.0045}


def llama(hidden: int, inner: int, matrices: int, bits: float, sparse: float) -> Model:
    shape = LAYER | {"hidden": hidden, "expert_intermediate": inner, "expert_matrices": matrices}
    table = {"weight_bits": bits, "weight_bits.codebook_bits": 16, "weight_bits.sparse": sparse}
    return load_model("mixtral-8x7b", shape | table)


def layer_bits(bits: float, sparse: float) -> float:
    """Average of a layer of LLaMA-7B: attention is four square matrices, the MLP three others."""
    parts = [llama(4096, 4096, 4, bits, sparse), llama(4096, 11008, 3, bits, sparse)]
    return 8 * sum(part.expert_bytes().item() for part in parts) / sum(part.expert_params for part in parts)


@pytest.mark.parametrize(
    ("bits", "sparse", "paper"), [(3, 0, 3.02), (3, 0.0045, 3.24), (4, 0, 4.05), (4, 0.0045, 4.27)]
)
def test_squeezellm_of_an_mlp(bits, sparse, paper):
    assert llama(4096, 11008, 3, bits, sparse).bits_of_experts().item() == pytest.approx(paper, abs=0.01)


@pytest.mark.parametrize(("bits", "dense", "sparse"), [(2, 2.013, 2.229), (3, 3.027, 3.243), (4, 4.054, 4.270)])
def test_squeezellm_of_a_whole_layer(bits, dense, sparse):
    assert [layer_bits(bits, 0), layer_bits(bits, 0.0045)] == pytest.approx([dense, sparse], abs=5e-4)


def test_mixtral_at_8_bits():
    assert load_model("mixtral-8x7b", {"weight_bits": 8}).expert_bytes().sum() / 1e9 == pytest.approx(45.1, abs=0.05)


@pytest.mark.parametrize(("matrices", "channels"), [(1, 64), (2, 64 + 128), (3, 64 + 2 * 128)])
def test_a_codebook_for_each_output_channel(matrices, channels):
    model = load_model("mixtral-8x7b", SMALL | {"expert_matrices": matrices} | SQUEEZED | {"weight_bits.sparse": 0})
    bytes_of_codebooks = channels * 2**3 * 16 / 8
    assert model.expert_bytes()[0, 0] == pytest.approx(matrices * 64 * 128 * 3 / 8 + bytes_of_codebooks)


def test_the_width_of_the_experts_counts():
    wide = load_model("mixtral-8x7b", SMALL | SQUEEZED | {"hidden": 32})
    latent = load_model("mixtral-8x7b", SMALL | SQUEEZED | {"hidden": 4096, "moe_hidden": 32})
    assert (wide.expert_bytes() == latent.expert_bytes()).all()


STORED = st.fixed_dictionaries(
    {
        "codebook_bits": st.sampled_from([0.0, 8.0, 16.0]),
        "sparse": st.floats(0, 0.1),
        "index_bits": st.floats(0, 32),
        "group": st.integers(0, 256),
        "scale_bits": st.floats(0, 16),
    }
)


@given(bits=st.lists(st.integers(1, 6), min_size=2, max_size=2), stored=STORED)
def test_more_bits_are_more_bytes(bits, stored):
    def size(b: int) -> float:
        model = load_model("mixtral-8x7b", SMALL | {"weight_bits": {"bits": b} | stored})
        assert model.bits_of_experts().min() >= b
        return model.expert_bytes()[0, 0]

    assert (size(min(bits)) < size(max(bits))) == (bits[0] != bits[1])


@given(bits=st.floats(1, 16), group=st.integers(1, 512), scale_bits=st.floats(0, 32))
def test_scales(bits, group, scale_bits):
    """`q/g` is what scales add, and nothing without groups."""
    table = {"bits": bits, "group": group, "scale_bits": scale_bits}
    got = load_model("mixtral-8x7b", SMALL | {"weight_bits": table}).bits_of_experts()
    assert got.ravel().tolist() == pytest.approx([bits + scale_bits / group] * 6)
    alone = load_model("mixtral-8x7b", SMALL | {"weight_bits": table | {"group": 0}})
    assert (alone.expert_bytes() == load_model("mixtral-8x7b", SMALL | {"weight_bits": bits}).expert_bytes()).all()


def test_a_table_of_only_bits_is_a_number_to_the_last_bit():
    for bits in (3, 4.84, 16):
        table, number = (load_model("qwen3-30b-a3b", {field: bits}) for field in ("weight_bits.bits", "weight_bits"))
        assert table.weight_bits == WeightBits(bits=bits)
        assert table.expert_bytes().tobytes() == number.expert_bytes().tobytes()


def test_default_values_do_not_change_a_model(tmp_path):
    """A baseline from before these fields, and one of a model that writes defaults out, compare as the same."""
    plain = canonical(load_model("mixtral-8x7b"))
    assert not {"expert_bits", "sparse_launches"} & plain.keys()
    short = {"weight_bits": {"bits": 3, "codebook_bits": 16}}
    long = {"bits": 3.0, "codebook_bits": 16, "sparse": 0, "index_bits": 32, "sparse_value_bits": 16.0}
    long |= {"group": 0, "scale_bits": 0}
    models = [
        load_model("mixtral-8x7b", short),
        load_model("mixtral-8x7b", {"weight_bits": long, "sparse_launches": 0}),
    ]
    assert models[0] == models[1] == load_model(models[1])
    assert len({identity(canonical(model)) for model in models}) == 1
    assert identity(canonical(models[0])) != identity(plain)
    path = tmp_path / "mine.toml"
    path.write_text(toml(canonical(models[0])))
    assert load_model(path) == models[0]
    assert json.loads(json.dumps(canonical(models[0])))["weight_bits"] == {"bits": 3.0, "codebook_bits": 16.0}


LINES = [f"{layer},{expert},{2 + layer + expert}" for layer in range(2) for expert in range(3)]


@given(lines=st.permutations(LINES), header=st.booleans(), kept=st.integers(1, len(LINES)))
def test_the_order_of_the_lines_does_not_matter(lines, header, kept, tmp_path_factory):
    """With the header or without; what the file does not name keeps the model's bits."""
    path = tmp_path_factory.mktemp("bits") / "own.csv"
    text = ["# mine", *(["layer, expert, bits"] if header else []), "", *lines[:kept]]
    path.write_text("\n".join(text))
    expected = [[16.0] * 3, [16.0] * 3]
    for layer, expert, bits in (map(int, line.split(",")) for line in lines[:kept]):
        expected[layer][expert] = float(bits)
    for weight_bits in (16, {"bits": 16}, [16, 16]):
        model = load_model("mixtral-8x7b", SMALL | {"weight_bits": weight_bits, "expert_bits": str(path)})
        assert model.bits_of_experts().tolist() == expected
        assert canonical(model)["expert_bits"] == "own.csv"
    derived = {figure.name: figure.value for figure in model_figures(model)}
    assert derived["experts_of_own_bits"] == kept
    assert derived["weight_bits_mean"] == pytest.approx(sum(map(sum, expected)) / 6)
    assert derived["expert_mb_mean"] == pytest.approx(3 * 64 * 128 * derived["weight_bits_mean"] / 8 / 1e6)


def test_bits_of_single_experts_have_what_the_table_stores_beside_them(tmp_path):
    (tmp_path / "own.csv").write_text("1,2,4\n")
    (tmp_path / "mine.toml").write_text(toml(canonical(load_model("mixtral-8x7b", SMALL | SQUEEZED | {"name": "a"}))))
    text = 'expert_bits = "own.csv"\n' + (tmp_path / "mine.toml").read_text()
    (tmp_path / "mine.toml").write_text(text)  # the file is found beside the TOML
    bits = load_model(tmp_path / "mine.toml").bits_of_experts()
    four = load_model("mixtral-8x7b", SMALL | SQUEEZED | {"weight_bits.bits": 4}).bits_of_experts()
    three = load_model("mixtral-8x7b", SMALL | SQUEEZED).bits_of_experts()
    assert bits.tolist() == [three[0].tolist(), [*three[1, :2].tolist(), four[0, 0]]]


def test_layers_of_fewer_experts(tmp_path):
    uneven = SMALL | {"experts": [3, 2], "expert_bits": str(tmp_path / "own.csv")}
    (tmp_path / "own.csv").write_text("1,1,8\n")
    assert (8 * load_model("mixtral-8x7b", uneven).expert_bytes() / (3 * 64 * 128)).tolist() == [[16] * 3, [16, 8, 0]]
    (tmp_path / "own.csv").write_text("1,2,8\n")
    with pytest.raises(MoetraceError, match="names expert 2 of MoE layer 1, but the model has 2 there"):
        load_model("mixtral-8x7b", uneven)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("0,0,4\n0,1,4\n0,0,4\n", "line 3: names expert 0 of MoE layer 0 a second time: remove one line"),
        ("2,0,4\n", "line 1: names MoE layer 2, but the model has 2, counted from 0"),
        ("0,3,4\n", "line 1: names expert 3 of MoE layer 0, but the model has 3 there, counted from 0"),
        ("layer,expert,bits\n-1,0,4\n", "line 2: wants layer,expert,bits, as 0,5,3"),
        ("16,8,4,2\n", "line 1: wants layer,expert,bits, as 0,5,3"),
        ("0,1\n", "line 1: wants layer,expert,bits, as 0,5,3"),
        ("0,1,x\n", "line 1: wants layer,expert,bits, as 0,5,3"),
        ("0,1,0\n", "line 1: wants bits from 1e-06 to 64, got 0"),
        ("0,1,nan\n", "line 1: wants bits from 1e-06 to 64, got nan"),
        ("layer,expert,bits\n# nothing\n", "has no line of layer,expert,bits"),
    ],
)
def test_bad_files(tmp_path, text, sentence):
    (tmp_path / "own.csv").write_text(text)
    with pytest.raises(MoetraceError, match=rf"own\.csv(:|,) {sentence}"):
        load_model("mixtral-8x7b", SMALL | {"expert_bits": tmp_path / "own.csv"})


def test_a_codebook_of_broken_bits_in_a_file(tmp_path):
    (tmp_path / "own.csv").write_text("0,0,3\n0,1,2.5\n")
    with pytest.raises(
        UsageError, match=r"own\.csv: bits wants whole numbers where .*codebook_bits is above 0, got 2\.5"
    ):
        load_model("mixtral-8x7b", SMALL | SQUEEZED | {"expert_bits": tmp_path / "own.csv"})
    (tmp_path / "bits.csv").write_text("16,16,16\n8,8,8\n")
    with pytest.raises(UsageError, match="expert_bits wants weight_bits to be a number, a list or a table, got a file"):
        load_model("mixtral-8x7b", SMALL | {f"{kind}_bits": tmp_path / "bits.csv" for kind in ("expert", "weight")})


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"bits": 2.5, "codebook_bits": 16}, "weight_bits.bits wants a whole number where codebook_bits is above 0"),
        ({"sparse": 1.5}, "weight_bits.sparse wants a number from 0 to 1, got 1.5"),
        ({"sparse": -0.1}, "weight_bits.sparse wants a number from 0 to 1, got -0.1"),
        ({"sparse": False}, "weight_bits.sparse wants a number, got False"),
        ({"bits": 0}, "weight_bits.bits wants a number from 1e-06 to 64, got 0"),
        ({"group": 1.5}, "weight_bits.group wants a whole number, got 1.5"),
        (
            {"groups": 32},
            r"weight_bits.groups is unknown \(the nearest is 'group'\); known are bits, codebook_bits, sparse, index",
        ),
        ({"bits": 40, "codebook_bits": 16}, "weight_bits wants an average from 1e-06 to 64, got 3"),
        ({"bits": 60, "sparse": 1}, "weight_bits wants an average from 1e-06 to 64, got 108"),
        ({"scale_bits": 8}, "weight_bits.scale_bits changes nothing without weight_bits.group: set that .the number"),
        (
            {"group": 32},
            r"weight_bits.group changes nothing without weight_bits.scale_bits: .*, or remove weight_bits.g",
        ),
        (
            {"index_bits": 16},
            "weight_bits.index_bits changes nothing without weight_bits.sparse: set that .the share",
        ),
        ({"sparse_value_bits": 8}, "weight_bits.sparse_value_bits changes nothing without weight_bits.sparse"),
    ],
)
def test_bad_tables(overrides, sentence):
    with pytest.raises(UsageError, match=f"model mixtral-8x7b: {sentence}"):
        load_model("mixtral-8x7b", {f"weight_bits.{field}": value for field, value in overrides.items()})


@pytest.mark.parametrize(
    "off",
    [
        {"sparse": 0, "index_bits": 16, "sparse_value_bits": 8},
        {"group": 0, "scale_bits": 8},
        {"scale_bits": 0, "group": 8},
    ],
)
def test_a_field_switched_off_equals_one_not_set(off):
    """So a sweep may have it as one of its values."""
    table, number = (load_model("mixtral-8x7b", {"weight_bits": {"bits": 4} | more, "name": "x"}) for more in (off, {}))
    assert table == number and canonical(table) == canonical(number)
    assert load_model(table) == table


def test_sparse_launches_go_with_a_table():
    with pytest.raises(UsageError, match="sparse_launches wants weight_bits to be a table with sparse: set weight"):
        load_model("mixtral-8x7b", {"sparse_launches": 1})
    with pytest.raises(
        UsageError, match=r"sparse_launches applies to weights with a sparse share only: set weight_bits\.sp"
    ):
        load_model("mixtral-8x7b", {"weight_bits.bits": 3, "sparse_launches": 1})
    with pytest.raises(UsageError, match="sparse_launches wants a number from 0 to 1000, got -1"):
        load_model("mixtral-8x7b", SQUEEZED | {"sparse_launches": -1})
    for sparse, starts in ((0, 0), (0.0045, 2.5)):  # so that a sweep may switch the sparse weights off
        model = load_model("mixtral-8x7b", SQUEEZED | {"weight_bits.sparse": sparse, "sparse_launches": 2.5})
        assert model.sparse_starts == starts


def test_derived_times_have_the_starts():
    system = load_system("edge-ndp")
    base = SQUEEZED | {"weight_bits.sparse": 0.01}
    plain, more = (
        {each.name: each.value for each in pair_figures(load_model("qwen3-30b-a3b", base | extra), system)}
        for extra in ({}, {"sparse_launches": 2})
    )
    starts = {"gpu_us": 2 * 5, "unit_us": 2 * 2, "all_units_us": 2 * 2, "dense_us": 0, "head_us": 0, "fetch_us": 0}
    for name, added_us in starts.items():
        assert more[name] - plain[name] == pytest.approx(added_us)


def test_a_sweep_over_a_field_of_the_table(tmp_path):
    grid = load_grid({"trace": "a.h5", "policy": "monde", "set": {"model.weight_bits.bits": [2, 3]}})
    assert [point.values["model.weight_bits.bits"] for point in grid.points] == [2, 3]


def test_the_examples_of_the_page():
    """Each TOML on the page of models is part of a model."""
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    section = page.partition("## Quantized weights")[2].partition("\n## ")[0]
    examples = [tomllib.loads(text) for text in re.findall(r"```toml\n(.*?)```", section, re.DOTALL)]
    models = [load_model("mixtral-8x7b", example) for example in examples]
    assert [round(float(model.bits_of_experts().mean()), 2) for model in models] == [3.24, 8.0, 4.25]
