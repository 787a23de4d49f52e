"""Plan files: what is written is read back, what engines write is read, and what is hostile is one sentence."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrace.analyze.balance.plan_files import plan_bytes, read_plan
from moetrace.analyze.balance.plans import Plan, Tier, make_plan
from moetrace.spec import plan as plan_spec
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.spec.plan import form_of

LAYERS = np.array([1, 2, 4], np.uint16)  # of a model whose layers 0 and 3 are dense
YAML = """num_slots: 4
layer_updates_per_iter: 0
initial_global_assignments:
  1: [0, 1, 2, 0]
  2: [2, 1, 0, 1]
  4: [0, 2, 1, 2]
"""
WANTED = [[[0, 1], [2, 0]], [[2, 1], [0, 1]], [[0, 2], [1, 2]]]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), units=st.integers(1, 4), redundant=st.integers(0, 3))
def test_round_trip(tmp_path_factory, seed, units, redundant):
    folder = tmp_path_factory.getbasetemp()
    loads = np.random.default_rng(seed).integers(0, 50, (3, 5))
    tier = Tier(units, redundant + -(5 + redundant) % units)
    plan = make_plan("eplb", tier, loads.shape, loads)
    for name in ("plan.json", "plan.yaml"):
        data = plan_bytes(plan, LAYERS, 5, form_of(folder / name))
        (folder / name).write_bytes(data)
        read = read_plan(folder / name, LAYERS, 5, units)
        assert read.share == 1 and np.array_equal(read.expert_of_slot, plan.expert_of_slot)
        assert plan_bytes(read, LAYERS, 5, form_of(folder / name)) == data


def test_sglang_has_a_row_for_every_layer():
    rows = json.loads(plan_bytes(Plan(1, np.array(WANTED, np.int32)), LAYERS, 3, "SGLang"))["physical_to_logical_map"]
    assert rows == [[0, 1, 2, 0], [0, 1, 2, 0], [2, 1, 0, 1], [0, 1, 2, 0], [0, 2, 1, 2]]


def test_tensorrt_llm_names_its_layers():
    assert plan_bytes(Plan(1, np.array(WANTED, np.int32)), LAYERS, 3, "TensorRT-LLM").decode() == YAML


@pytest.mark.parametrize(
    "text",
    [
        YAML,
        # As its README shows, and as PyYAML folds long lists.
        """initial_global_assignments:
  1: [0, 1,
    2, 0]
  2: [2, 1, 0, 1]
  4: [0, 2, 1,
    2]
  7: [0, 0, 0, 0]
num_slots: 4
layer_updates_per_iter: 2
ep_size: 2
""",
        "---\n# a comment\n"
        + YAML.replace("  1: [0, 1, 2, 0]", "  1:\n  - 0\n  - 1\n\n  - 2\n  - 0").replace("\n", "\r\n"),
        # With comments, a last comma, and what may end a document.
        """\ufeffnum_slots: 4 # of 2 units
layer_updates_per_iter: 0\t# the plan stays
initial_global_assignments:   # by index
  1: [0, 1, # the first unit
      2, 0,]
  2: # of other style
  - 2 # the first
  - 1
  - 0
  - 1
# between
  4: [
    0, 2,
    1, 2
  ]
...
whatever comes: after the end
""",
        # In braces, as JSON would be.
        """num_slots: 4
initial_global_assignments: {1: [0, 1, 2, 0], 2: [2, 1,
  0, 1], 4 : [0, 2, 1, 2],}
""",
    ],
)
def test_yaml_as_engines_and_people_write_it(tmp_path, text):
    (tmp_path / "a.yml").write_text(text, newline="")
    assert read_plan(tmp_path / "a.yml", LAYERS, 3, 2).expert_of_slot.tolist() == WANTED


def test_json_of_only_moe_layers(tmp_path):
    rows = [[e for unit in units for e in unit] for units in WANTED]
    (tmp_path / "a.json").write_text(json.dumps({"other": {"x": [1.5]}, "physical_to_logical_map": rows}))
    assert read_plan(tmp_path / "a.json", LAYERS, 3, 2).expert_of_slot.tolist() == WANTED


def test_json_with_a_mark_of_its_byte_order(tmp_path):
    data = plan_bytes(Plan(1, np.array(WANTED, np.int32)), LAYERS, 3, "SGLang")
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + data)
    assert read_plan(tmp_path / "a.json", LAYERS, 3, 2).expert_of_slot.tolist() == WANTED


def changed(old, new):
    assert old in YAML
    return YAML.replace(old, new)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.json", "", "no plan of SGLang's"),
        ("a.json", "[" * 100_000, "no plan of SGLang's"),
        ("a.json", '{"x": ' + "[" * 100_000, "no plan of SGLang's"),
        ("a.json", '{"logical_count": [[1, 2]]}', "missing required field `physical_to_logical_map`"),
        ("a.json", '{"physical_to_logical_map": 5}', "no plan of SGLang's"),
        ("a.json", '{"physical_to_logical_map": []}', "has 0 layers, but the trace has layers up to 4"),
        ("a.json", '{"physical_to_logical_map": [[],[],[]]}', "is a plan without slots"),
        ("a.json", '{"physical_to_logical_map": [[0,1,2,0],[0,1,2],[0,1,2,0]]}', "have from 3 to 4 slots"),
        ("a.json", '{"physical_to_logical_map": [[0,1,2,-1],[0,1,2,0],[0,1,2,0]]}', "no plan of SGLang's"),
        ("a.json", '{"physical_to_logical_map": [[0,1,2,1.5],[0,1,2,0],[0,1,2,0]]}', "no plan of SGLang's"),
        ("a.json", '{"physical_to_logical_map": [[0,1,2,true],[0,1,2,0],[0,1,2,0]]}', "no plan of SGLang's"),
        ("a.json", '{"physical_to_logical_map": [[0,1,2,' + "9" * 9000 + "]]}", "no plan of SGLang's"),
        (
            "a.json",
            '{"physical_to_logical_map": [[0,1,2,3],[0,1,2,0],[0,1,2,0]]}',
            "layer 1 has expert 3, but the trace",
        ),
        ("a.json", '{"physical_to_logical_map": [[0,1,2,1],[0,1,2,0],[0,1,1,0]]}', "layer 4 has no slot for expert 2"),
        ("a.json", "\ufeff\x00\x1b[2J", "no plan of SGLang's"),
        ("a.yaml", "", "has no layer 1 among"),
        ("a.yaml", changed("  2:", "  1:"), "line 5: layer 1 is there twice"),
        ("a.yaml", changed("  4:", "  5:"), "has no layer 4 among"),
        ("a.yaml", changed("num_slots: 4", "num_slots: 5"), "num_slots must be there and"),
        ("a.yaml", changed("num_slots: 4\n", ""), "num_slots must be there and"),
        ("a.yaml", changed("num_slots: 4", "num_slots: 4\nnum_slots: 4"), "line 2 is not as in a plan"),
        ("a.yaml", changed("num_slots: 4", "num_slots: !!python/object/apply:os.system [ls]"), "line 1 is not as in"),
        ("a.yaml", changed("num_slots: 4", "x: &a [1]"), "line 1 is not as in"),
        ("a.yaml", changed("[0, 2, 1, 2]", "*a"), "line 6 is not as in"),
        ("a.yaml", changed("[0, 2, 1, 2]", "[0, 2, 1, -2]"), "line 6 is not as in"),
        ("a.yaml", changed("[0, 2, 1, 2]", "[0, 2, 1, 9999999]"), "line 6 is not as in"),
        ("a.yaml", changed("[0, 2, 1, 2]", "[]"), "line 6 is not as in"),
        ("a.yaml", changed("[0, 2, 1, 2]", ""), "num_slots must be there and"),
        ("a.yaml", changed("[0, 2, 1, 2]", "[0, 2,"), "the list that begins in line 6 does not end"),
        ("a.yaml", changed("[0, 2, 1, 2]", "[" + "[" * 5000), "the list that begins in line 6 does not end"),
        ("a.yaml", changed("[0, 2, 1, 2]", "[0, 2,, 1, 2]"), "line 6 is not as in"),
        ("a.yaml", changed("[0, 2, 1, 2]", "[0, 2, 1, 2]#x"), "line 6 is not as in"),
        ("a.yaml", changed("[0, 2, 1, 2]", "[,]"), "line 6 is not as in"),
        (
            "a.yaml",
            changed("assignments:", "assignments: {1: [0], 1: [0]}"),
            "layer 1 is there twice",
        ),
        ("a.yaml", changed("assignments:", "assignments: {1: [0, 1, 2, 0] 2: [0]}"), "line 3 is not as in"),
        ("a.yaml", changed("assignments:", "assignments: {1: {2: [0]}}"), "line 3 is not as in"),
        ("a.yaml", changed("assignments:", "assignments: " + "{1: [" * 50_000), "begins in line 3 does not end"),
        ("a.yaml", changed("assignments:", "assignments: {" + " " * 1_000_000 + "x}"), "line 3 is not as in"),
        ("a.yaml", changed("  4: [0, 2, 1, 2]", "  - 3"), "line 6 is not as in"),
        ("a.yaml", YAML + "\u0665: 3\n", "line 7 is not as in"),
        ("a.yaml", YAML + YAML, "line 7 is not as in"),
        ("a.yaml", "num_slots: 1" + " " * 1_000_000 + "x" + " " * 1_000_000 + "\t", "line 1 is not as in"),
        ("a.yaml", YAML + "ep_size: 4\n", "is a plan for 4 units, not 2"),
        ("a.yaml", changed("[0, 2, 1, 2]", "[0, 2, 1, 2, 0]"), "num_slots must be there and"),
    ],
)
def test_a_file_that_is_no_plan_is_refused_in_one_sentence(tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(MoetraceError) as error:
        read_plan(tmp_path / name, LAYERS, 3, 2)
    message = str(error.value)
    assert sentence in message and "a." in message and "\n" not in message and "\x1b" not in message
    assert len(message) < 500


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="0123 :[],-#\nnum_slots:initial_global_assignments layer", max_size=80))
def test_any_text_is_a_plan_or_a_sentence(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(f"initial_global_assignments:\n{text}", encoding="utf-8")
    with pytest.raises(MoetraceError):
        read_plan(path, LAYERS, 3, 2)


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(MoetraceError, match="there is no plan file"):
        read_plan(tmp_path / "none.json", LAYERS, 3, 2)
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(MoetraceError, match="it is not an ordinary file"):
        read_plan(tmp_path / "folder.json", LAYERS, 3, 2)
    with pytest.raises(UsageError, match=r"does not say whose plan it is: \.json is SGLang's"):
        read_plan(tmp_path / "a.pt", LAYERS, 3, 2)
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MoetraceError, match="is no text file"):
        read_plan(tmp_path / "a.json", LAYERS, 3, 2)
    monkeypatch.setattr(plan_spec, "MAX_BYTES", 10)
    (tmp_path / "b.yaml").write_text(YAML)
    with pytest.raises(MoetraceError, match="it has more than 0 MiB"):
        read_plan(tmp_path / "b.yaml", LAYERS, 3, 2)


def test_slots_that_units_cannot_share(tmp_path):
    (tmp_path / "b.yaml").write_text(YAML)
    with pytest.raises(UsageError, match="has 4 slots a layer, which 3 units cannot share"):
        read_plan(tmp_path / "b.yaml", LAYERS, 3, 3)


def test_plans_that_no_file_can_say():
    loads = np.array([[9, 1, 1, 1], [1, 1, 1, 1], [1, 2, 3, 4]])
    for placement, sentence in (("tp", "splits experts"), ("ep-lpt", "gives units unequal numbers")):
        with pytest.raises(UsageError, match=sentence):
            plan_bytes(make_plan(placement, Tier(2), (3, 4), loads), LAYERS, 4, "SGLang")
    with pytest.raises(UsageError, match=r"unequal numbers of experts, .*: take ep, ep-block or eplb"):
        plan_bytes(make_plan("ep-lpt", Tier(2), (3, 4), loads), LAYERS, 4, "SGLang")
    with pytest.raises(UsageError, match=r"unequal numbers of experts, .*: take units that divide 4 experts, or eplb"):
        plan_bytes(make_plan("ep", Tier(3), (3, 4)), LAYERS, 4, "SGLang")
