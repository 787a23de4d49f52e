"""What a notebook shows of traces, results and sweeps, and of the module."""

from html.parser import HTMLParser

import numpy as np

import moetrace as mt

EVIL = "<script>alert('x')</script>&\x1b[31m"


class Cells(HTMLParser):
    """The texts of a table's cells, row by row, and all tags."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.rows, self.tags = [], set()
        self.feed(markup)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows:
            self.rows[-1][-1] += data


def trace(model: str) -> mt.Trace:
    return mt.Trace.from_arrays(np.array([[[3, 1]] * 6, [[1, 2]] * 6]), num_experts=32, model=model)


def test_the_module_shows_its_public_names_only():
    assert dir(mt) == sorted(mt.__all__)


def test_a_trace_is_a_table_in_which_its_names_are_no_markup():
    shown = Cells(trace(EVIL)._repr_html_())
    assert shown.tags <= {"table", "thead", "tbody", "tr", "th", "td"}
    assert ["model", EVIL.replace("\x1b", "\\x1b")] in shown.rows and ["rows", "2"] in shown.rows
    assert repr(trace("tiny-olmoe")) == "<Trace trace in memory: 2 rows in 2 steps of tiny-olmoe>"


def test_a_result_has_a_row_a_policy():
    evil = mt.load_policy("on-demand", {"name": "<b>mine</b>"})
    made = mt.generate_trace("tiny-olmoe", requests=2, prompt=4, output=8)
    result = mt.replay(made, policies=["monde", evil], slots=48)
    shown = Cells(result._repr_html_())
    assert "b" not in shown.tags and "speed-up" in shown.rows[0]
    assert [row[0] for row in shown.rows[:3]] == ["policy", "monde", "<b>mine</b>"]
    total = shown.rows[0].index("total ms")
    for row, total_s in zip(shown.rows[1:], result.summary["total_s"], strict=False):
        assert abs(float(row[total].replace(",", "")) / (1000 * total_s) - 1) < 1e-3
    assert len({len(row) for row in shown.rows[:3]}) == 1


def test_a_sweep_has_a_row_a_cell(tmp_path):
    mt.generate(tmp_path / "a.h5", "tiny-olmoe", requests=1, prompt=2, output=70)
    (tmp_path / "grid.toml").write_text('trace = "a.h5"\npolicy = ["monde", "ndp-tp"]\nslots = [24, 48]\n')
    swept = mt.sweep(tmp_path / "grid.toml", jobs=1)
    shown = Cells(swept._repr_html_())
    assert [row[0] for row in shown.rows[1:]] == [cell.name for cell in swept.listed]
    assert shown.rows[0][0] == "cell" and all(float(row[1].replace(",", "")) > 0 for row in shown.rows[1:])


def test_long_tables_are_cut():
    from moetrace.spec.html_table import html_table

    shown = html_table(["n"], [[n] for n in range(53)])
    assert len(Cells(shown).rows) == 51 and "3 more rows" in shown
