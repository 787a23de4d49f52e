"""Route traces of BigMoeOnEdge: a row a token, whatever the order of columns; a bad one is one sentence."""

import json

import pytest
from support.small_sources import COLUMNS, HEADER, LINES, imported, route_trace, steps

from moetrace.spec.errors import MoetraceError


def test_a_route_trace_becomes_rows_of_tokens(tmp_path):
    trace = imported(tmp_path, route_trace(tmp_path))
    assert steps(trace) == [(2, 0), (1, 1), (1, 1), (1, 1)]
    none = [255, 255]
    assert trace.read("experts", 0, 5).tolist() == [
        [[5, 2], none],
        [[2, 7], [4, 3]],
        [[1, 0], [6, 255]],
        [[1, 0], [6, 1]],
        [none, [6, 1]],
    ]
    assert trace.read("recorded", 0, 2).tolist() == [[[0, 0], none], [[0, 1], [0, 2]]]
    assert trace.read("gates", 0, 1).tolist() == [[[0.75, 0.25], [0, 0]]]
    assert trace.read("request", 0, 5).tolist() == [0, 0, 0, 0, 1]
    assert trace.read("position", 0, 5).tolist() == [0, 1, 2, 3, 0]
    assert trace.layer_index.tolist() == [1, 3] and trace.expert_bytes.tolist() == [100, 120]
    assert trace.model == "Some-MoE-3B-IQ4_XS.gguf" and trace.source["quantization"] == "IQ4_XS"
    assert trace.source["arch"] == "some" and "mine" not in json.dumps(trace.source)


def test_columns_go_by_name_and_dropped_choices_are_counted(tmp_path):
    def turned(line: str, more: str) -> str:
        return ",".join([more, *reversed(line.split(","))]) + "\n"

    lines = turned(COLUMNS.strip(), "dropped") + "".join(turned(line, "1") for line in LINES.splitlines())
    trace = imported(tmp_path, route_trace(tmp_path, HEADER + lines))
    assert trace.read("experts", 1, 2).tolist() == [[[2, 7], [4, 3]]] and trace.source["dropped"] == 15


def test_unknown_weights_leave_no_gates(tmp_path):
    lines = "".join(",".join([*line.split(",")[:6], "nan", "0", "0"]) + "\n" for line in LINES.splitlines())
    assert imported(tmp_path, route_trace(tmp_path, HEADER + COLUMNS + lines)).has == {"recorded"}


def test_a_header_may_hold_quotes_and_the_lines_of_another_system(tmp_path):
    text = (HEADER.replace("of mine", 'of "mine') + COLUMNS + LINES).replace("\n", "\r\n")
    path = tmp_path / "route.csv"
    path.write_bytes(text.encode())
    trace = imported(tmp_path, path)
    assert trace.rows == 5 and trace.expert_bytes.tolist() == [100, 120] and trace.model == "Some-MoE-3B-IQ4_XS.gguf"


def test_layers_of_a_route_trace_without_layer_lines(tmp_path):
    trace = imported(tmp_path, route_trace(tmp_path, "\n".join(HEADER.splitlines()[:2]) + "\n" + COLUMNS + LINES))
    assert trace.layer_index.tolist() == [1, 3] and trace.expert_bytes is None


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("# model", "# mod", "has no line '# model="),
        ("n_expert=8", "n_expert=7", "line 10: expert is not 0 to 6"),
        ("n_expert_used=2", "n_expert_used=1", "line 8: slot is not 0 to 0"),
        ("n_expert_used=2", "n_expert_used=9", "top_k is 9"),
        ("n_expert=8 n_expert_used=2", "n_expert=60000 n_expert_used=60000", "15 lines are too few"),
        ("layer=1 expert", f"layer={2**70} expert", r"route\.csv has a line '# layer=1180591620717411303424 expert"),
        ("expert_bytes=100 dense", f"expert_bytes={2**63} dense", r"route\.csv has a line '# layer=1 expert_bytes=92"),
        ("0,0,1,1,0,2,0.5", "0,0,1,1,0,2,1e30", "line 9: weight is beyond 65504"),
        ("0,0,1,1,0,2,0.5", "0,0,1,1,0,2,-inf", "line 9: weight is beyond 65504"),
        ("0,0,1,1,0,2,0.5", '0,0,1,1,0,2,"0.5\n"', "can't be read as CSV"),
        ("slot,", "sloth,", "has no column 'slot' in line 6"),
        ("0,0,1,1,0,2,", "0,0,1,1,0,x,", "can't be read as CSV"),
        ("0,0,1,1,0,2,", "0,0,1,1,1,2,", "line 9: another line has the same turn"),
        ("0,0,1,1,1,7,", "0,0,1,1,1,2,", "line 9: its token chooses this expert of this layer more than once"),
        ("0,0,1,1,0,2,", "0,2,1,1,0,2,", "line 9: phase is not 0 or 1"),
        ("0,0,1,1,0,2,", "0,0,-1,1,0,2,", "line 9: step is negative"),
        ("0,0,1,1,0,2,", "0,0,1,0,0,2,", "line 9: layer is not one of"),
        ("0,0,1,1,0,2,", "-1,0,1,1,0,2,", "line 9: turn is negative"),
        ("0,0,1,1,0,2,0.5,0,0", "0,0,1,1,0,2,0.5,7,0", "line 9: residency is not 0, 1 or 2"),
        ("0,0,1,1,0,2,0.5,0,0", "0,0,1,1,0", "line 9 is incomplete"),
        (LINES, "", "has no lines of routing"),
        (COLUMNS + LINES, "", "no data|has no column|has no lines|CSV"),
    ],
)
def test_a_bad_route_trace_is_one_sentence_and_writes_nothing(tmp_path, old, new, sentence):
    source = route_trace(tmp_path, (HEADER + COLUMNS + LINES).replace(old, new, 1))
    with pytest.raises(MoetraceError, match=sentence) as raised:
        imported(tmp_path, source)
    assert list(tmp_path.iterdir()) == [source]
    assert "\n" not in str(raised.value)
